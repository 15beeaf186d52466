"""One stream through the mesh against the bare runtime and llama.cpp, interleaved in one run.

(0) the runtime in a loop, (a) one agent with one shard, (b) three agents over gRPC, (c) llama.cpp
through llama-cpp-python on the same GGUF; 128 tokens after a prompt of 128, greedy, 2 threads each. And (b) at temperature 1, which
clients get who ask for nothing else; and three agents with LiteRT shards against (c), after prompts of 128 and 512, and with
8 streams at temperature 1 (those of a fixed text are computed one by one there).
"""

from __future__ import annotations

import asyncio
import collections
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from node_agent.adapters.local_mesh import temporary_mesh
from node_agent.adapters.model_store import ModelStore
from tests.benchmarks.common import (
    END_OF_TEXT,
    MODEL,
    THREADS,
    Timing,
    arguments,
    bare_decode,
    finish,
    load,
    median,
    prompt_ids,
    stream,
    the_store,
    trace_of,
)

CONTEXT = 128
TOKENS = 128
STREAMS = 8
HOPS = 3
LONG = 512
SETTINGS = {"threads": str(THREADS), "prefix_cache": "off"}


class LlamaCpp:
    """The peer: evaluates and picks the likeliest, nothing else."""

    def __init__(self, store: ModelStore) -> None:
        from llama_cpp import Llama

        self._llama: Any = Llama(
            str(store.folder(MODEL) / "model.gguf"),
            n_ctx=1024,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            verbose=False,
        )

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of prefill and per step."""
        llama = self._llama
        llama.reset()
        begin = time.perf_counter()
        llama.eval(prompt)
        token = self._best()
        prefilled = time.perf_counter()
        for _ in range(tokens - 1):
            llama.eval([token])
            token = self._best()
        return prefilled - begin, (time.perf_counter() - prefilled) / (tokens - 1)

    @classmethod
    def if_it_runs(cls, store: ModelStore) -> LlamaCpp | None:
        """The peer; none where it is not installed, or dies here: it is tried in a child first.

        Its build takes whatever the compiler's machine offers; under some hypervisors AMX is offered and faults.
        """
        if importlib.util.find_spec("llama_cpp") is None:
            return None
        trial = multiprocessing.get_context("spawn").Process(target=_try_peer, args=(store.root.parent,))
        trial.start()
        trial.join(120)
        if trial.exitcode == 0:
            return cls(store)
        print(
            f"llama.cpp ended with {trial.exitcode} when tried: rebuild llama-cpp-python, without what this machine only claims "
            "to have (CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON' where tiles crash)",
            file=sys.stderr,
        )
        trial.kill()
        return None

    def _best(self) -> int:
        llama = self._llama
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),))
        logits[END_OF_TEXT] -= 100
        return int(logits.argmax())


def _try_peer(home: Path) -> None:
    LlamaCpp(ModelStore(home)).run(list(range(100, 100 + CONTEXT)), 8)


def together(base: str, prompt: list[int], temperature: float = 0.0) -> tuple[float, float]:
    """Tokens per second of several streams at once: over the time when all of them decode, as the bare runtime's batches do,
    and by how long each took from its first token on, in which the others' prompts are computed as well."""
    with ThreadPoolExecutor(STREAMS) as pool:
        timings: list[Timing] = list(
            pool.map(lambda i: stream(base, prompt[i:] + prompt[:i], TOKENS, temperature), range(STREAMS))
        )
    begin, end = max(t.first for t in timings), min(t.end for t in timings)
    done = sum(t.tokens_between(begin, end) for t in timings)
    return done / (end - begin), sum(1 / t.tpot for t in timings)


def each_round(rounds: int, seen: dict[str, list[float]], what: str) -> Iterator[dict[str, float]]:
    """Values to fill in, once a round. The first round warms everything up and is not kept."""
    for round_ in range(-1, rounds):
        values: dict[str, float] = {}
        yield values
        if round_ >= 0:
            for key, value in values.items():
                seen[key].append(value)
            print(f"{what}: round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)


async def measure(rounds: int) -> dict[str, Any]:
    """Two tables one after the other: agents that a table does not compare are not up meanwhile, for idle ones take two
    cores' time and cache too."""
    store, seen = the_store(), collections.defaultdict[str, list[float]](list)
    llama = LlamaCpp.if_it_runs(store)
    await measure_default(store, llama, each_round(rounds, seen, "default"))
    await measure_litert(store, llama, each_round(rounds, seen, "LiteRT"))
    return report(seen)


async def measure_default(
    store: ModelStore, llama: LlamaCpp | None, each: Iterator[dict[str, float]]
) -> None:
    """What agents load unless told otherwise: bare, in one agent, in three; the peer."""
    prompt, long_prompt = prompt_ids(store, CONTEXT), prompt_ids(store, LONG)
    bare = load(store, 1, "int8", slots=STREAMS)
    async with (
        temporary_mesh(1, store.root.parent, SETTINGS) as one,
        temporary_mesh(3, store.root.parent, SETTINGS) as three,
    ):
        await one.serve(MODEL)
        await three.serve(MODEL)
        for values in each:
            values["0"] = bare_decode(bare, prompt, TOKENS)[1]
            values["a"] = (await asyncio.to_thread(stream, one.endpoint, prompt, TOKENS)).tpot
            b = await asyncio.to_thread(stream, three.endpoint, prompt, TOKENS)
            trace = await asyncio.to_thread(trace_of, three.endpoint, b)
            values |= {"b": b.tpot, "ttft": b.ttft}
            values["o50"] = trace["overhead_ms_p50"] / HOPS
            values["o99"] = trace["overhead_ms_p99"] / HOPS
            values["b1"] = (await asyncio.to_thread(stream, three.endpoint, prompt, TOKENS, 1.0)).tpot
            if llama:
                values["c"] = llama.run(prompt, TOKENS)[1]
            values["08"] = bare_decode(bare, prompt, TOKENS, STREAMS)[1] / STREAMS
            rates = await asyncio.to_thread(together, three.endpoint, prompt)
            values |= {"b8": 1 / rates[0], "b8whole": 1 / rates[1]}
            long = await asyncio.to_thread(stream, three.endpoint, long_prompt, 4)
            values["p512"] = long.ttft / LONG


async def measure_litert(store: ModelStore, llama: LlamaCpp | None, each: Iterator[dict[str, float]]) -> None:
    """Three agents with LiteRT shards; the peer."""
    prompt, long_prompt = prompt_ids(store, CONTEXT), prompt_ids(store, LONG)
    async with temporary_mesh(3, store.root.parent, SETTINGS) as lite:
        await lite.serve(MODEL, "litert")
        for values in each:
            values["l128"] = (await asyncio.to_thread(stream, lite.endpoint, prompt, TOKENS)).tpot
            if llama:
                values["c128"] = llama.run(prompt, TOKENS)[1]
            deep = await asyncio.to_thread(stream, lite.endpoint, long_prompt, TOKENS)
            values |= {"l512": deep.tpot, "lp512": deep.ttft}
            if llama:
                values["cp512"], values["c512"] = llama.run(long_prompt, TOKENS)
            values["l8"] = 1 / (await asyncio.to_thread(together, lite.endpoint, prompt, 1.0))[0]


def report(seen: dict[str, list[float]]) -> dict[str, Any]:
    mid = {key: median(values) for key, values in seen.items() if values}
    rate = {key: 1 / mid[key] for key in ("0", "a", "b", "c", "08", "b8", "b8whole", "p512") if key in mid}

    def ratio(upper: str, lower: str) -> float | None:
        # Of the same round: the machine's mood cancels.
        pairs = [x / y for x, y in zip(seen[lower], seen[upper], strict=False)]
        return round(median(pairs), 4) if pairs else None

    gain, bare_gain = ratio("b8", "b"), ratio("08", "0")
    assert gain is not None
    assert bare_gain is not None
    return {
        "bare_tok_s": round(rate["0"], 1),
        "single_tok_s": round(rate["a"], 1),
        "sharded_tok_s": round(rate["b"], 1),
        "llamacpp_tok_s": round(rate["c"], 1) if "c" in rate else None,
        "ratio_single_bare": ratio("a", "0"),
        "ratio_sharded_single": ratio("b", "a"),
        "ratio_sharded_llamacpp": ratio("b", "c"),
        "ratio_sampled_greedy": ratio("b1", "b"),
        "hop_overhead_ms_p50": round(mid["o50"], 3),
        "hop_overhead_ms_p99": round(mid["o99"], 3),
        "batch8_tok_s": round(rate["b8"], 1),
        "batch8_with_prefill_tok_s": round(rate["b8whole"], 1),
        "batch8_ratio": gain,
        "batch8_bare_ratio": bare_gain,
        "batch8_efficiency": round(gain / bare_gain, 4),
        "litert_tok_s": round(1 / mid["l128"], 1),
        "litert_batch8_tok_s": round(1 / mid["l8"], 1),
        "litert_batch8_ratio": ratio("l8", "l128"),
        "litert_ratio_onnx": round(mid["b"] / mid["l128"], 4),  # of two tables: the mood does not cancel
        "litert_ratio_llamacpp_ctx128": ratio("l128", "c128"),
        "litert_ratio_llamacpp_ctx512": ratio("l512", "c512"),
        "litert_prefill512_ratio_llamacpp": ratio("lp512", "cp512"),
        "ttft_ms_p50": round(mid["ttft"] * 1000, 1),
        "tpot_ms_p50": round(mid["b"] * 1000, 3),
        "prefill512_tok_s": round(rate["p512"], 1),
        "rounds": len(seen["0"]),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keys = asyncio.run(measure(args.rounds))
    if keys["llamacpp_tok_s"] is None:
        print(
            "no peer in this run: llama-cpp-python ('make bench' installs it) is missing or does not run here"
        )
    wanted = {
        "ratio_single_bare": ">= 0.95",
        "ratio_sharded_single": ">= 0.85",
        "ratio_sharded_llamacpp": ">= 0.7",
        "hop_overhead_ms_p50": "<= 0.25",
        "batch8_efficiency": ">= 0.85",
        "litert_ratio_llamacpp_ctx128": ">= 1.1",
        "litert_ratio_llamacpp_ctx512": ">= 1.0",
        "litert_prefill512_ratio_llamacpp": ">= 2",
    }
    rows = [("what", "median", "wanted")] + [(k, str(v), wanted.get(k, "")) for k, v in keys.items()]
    finish(rows, keys, args.json)


if __name__ == "__main__":
    main()
