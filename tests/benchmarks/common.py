"""What the benchmarks share: the model, a client that costs little, medians, tables."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mesh.forms import parse_form
from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.model_pull import pull_model
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.paths import default_home
from node_agent.ports import Runtime, RuntimeOptions

MODEL = "smollm2-135m"
LAYERS = 30
THREADS = 2
END_OF_TEXT = 2


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark; SIGTERM ends it as Ctrl-C does, so that no agent and no network stays behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    return parser


def the_store() -> ModelStore:
    """The model store, with the model in it."""
    store = ModelStore(default_home())
    pull_model(store, MODEL)
    return store


def cut(parts: int) -> list[tuple[int, int]]:
    return [(LAYERS * i // parts, LAYERS * (i + 1) // parts) for i in range(parts)]


def load(store: ModelStore, parts: int, form: str, slots: int = 1, capacity: int = 1024) -> list[Runtime]:
    """All shards of an even cut, in this process."""
    return [load_one(store, start, end, form, slots, capacity) for start, end in cut(parts)]


def load_one(
    store: ModelStore, start: int, end: int, form: str, slots: int = 1, capacity: int = 1024
) -> Runtime:
    """One shard; ``form`` as in ``mesh.forms``."""
    runtime, quantization = parse_form(form)
    folder = make_shard(store, MODEL, start, end, quantization, runtime=runtime)
    options = RuntimeOptions(threads=THREADS)
    return load_shard(folder, store.manifest(folder), slots=slots, capacity=capacity, options=options)


def tokens_of(store: ModelStore, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_str(store.tokenizer_json(MODEL)).encode(text).ids
    return ids


def prompt_ids(store: ModelStore, count: int) -> list[int]:
    """``count`` tokens of English."""
    return (tokens_of(store, (Path(__file__).parent / "text.txt").read_text()) * 2)[:count]


@dataclass(frozen=True, slots=True)
class Timing:
    """One streamed answer as a client sees it, seconds."""

    ttft: float
    tpot: float
    tokens: int
    begin: float
    first: float
    end: float
    id: str
    came: tuple[tuple[float, int], ...]
    """When something came, and how many events had come by then; the last says that it is over."""

    def tokens_between(self, begin: float, end: float) -> float:
        """Of those that came with an event of their own, as all but a few do."""
        events = [count for when, count in self.came if begin < when <= end]
        before = max((count for when, count in self.came if when <= begin), default=0)
        return (max(events, default=before) - before) * self.tokens / (self.came[-1][1] - 1)


def stream(base: str, prompt: list[int], tokens: int, temperature: float = 0.0, choices: int = 1) -> Timing:
    """Stream a completion of exactly ``tokens`` tokens (of several ``choices``: each) and time it.

    A bare socket that only notes when something came: on two cores every microsecond of the
    client is taken from the mesh.
    """
    host, port = base.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": temperature,
            "n": choices,
            "stream": True,
            "logit_bias": {str(END_OF_TEXT): -100},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    parts: list[bytes] = []
    times: list[float] = []
    begin = time.perf_counter()
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        while data := connection.recv(1 << 16):
            parts.append(data)
            times.append(time.perf_counter())
    events = [e for e in b"".join(parts).split(b"data: ")[1:] if e.startswith(b"{")]
    assert events, b"".join(parts)[:500]
    # The headers come with the first token; the last chunk carries the finish reason.
    first, last = times[0], times[-1]
    answer = json.loads(events[0].split(b"\n")[0])
    assert "error" not in answer, answer
    counts = itertools.accumulate(part.count(b"\n\n") for part in parts)
    came = tuple(zip(times, counts, strict=True))
    return Timing(
        first - begin, (last - first) / (tokens - 1), tokens, begin, first, last, answer["id"], came
    )


def trace_of(base: str, timing: Timing) -> dict[str, Any]:
    report: dict[str, Any] = ApiClient(base).get(f"/mesh/v1/sessions/{timing.id}")
    return report


def bare_decode(shards: list[Runtime], prompt: list[int], tokens: int, batch: int = 1) -> tuple[float, float]:
    """The runtime in a loop, greedy, without the end of text: seconds of prefill and per step."""
    begin = time.perf_counter()
    hidden: Any = None
    for slot in range(batch):
        hidden = np.array(prompt, dtype=np.int64)
        for shard in shards:
            hidden = shard.prefill(slot, 0, hidden).copy()
    hidden[:, END_OF_TEXT] -= 100
    ids = np.full(batch, hidden[0].argmax(), dtype=np.int64)
    prefilled = time.perf_counter()
    for step in range(tokens - 1):
        hidden = ids
        for shard in shards:
            hidden = shard.decode(0, [len(prompt) + step] * batch, hidden)
        hidden[:, END_OF_TEXT] -= 100
        ids = hidden.argmax(axis=1)
    return prefilled - begin, (time.perf_counter() - prefilled) / (tokens - 1)


def median(values: list[float]) -> float:
    return statistics.median(values)


def quantile(values: list[float], percent: int) -> float:
    """The value that ``percent`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)]


def finish(rows: list[tuple[str, str, str]], keys: dict[str, Any], as_json: bool) -> None:
    """A table for people (what, value, wanted) and, if asked, the JSON line."""
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    if as_json:
        print(json.dumps(keys))
