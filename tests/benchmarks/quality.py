"""Does cutting, batching or quantizing change the text? Greedy text over cuts, perplexity of each runtime and quantization, a route over both.

Perplexity is measured with this project's own float32 graph as the reference, over a text of over
4,000 tokens in windows of 512.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mesh.forms import QUANTIZATIONS
from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.local_mesh import temporary_mesh
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import CHECK_POSITIONS, reference
from node_agent.shards.deviation import logits_deviation
from tests.benchmarks.common import MODEL, arguments, cut, finish, load, load_one, the_store, tokens_of

WINDOW = 512
CHUNK = 64
MIXED_MAX = 0.25
"""The largest tolerance among the manifests of its stages."""
TOKENS = 64
CUTS = (1, 2, 3, 5)
PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "How do I boil an egg?",
    "Name three large rivers in Africa.",
    "What is a prime number?",
    "Tell me a story about a robot and a cat.",
    "Summarise the plot of Romeo and Juliet.",
    "What does a compiler do?",
    "Give me a recipe for bread.",
    "Why do seasons change?",
    "What is the difference between a virus and a bacterium?",
    "List five uses for an old bottle.",
    "How does a bicycle stay upright?",
    "What happened in 1969?",
    "Translate 'good morning' into Spanish.",
    "What should I pack for a hike?",
    "Describe the smell of rain.",
    "How far away is the Moon?",
    "Who invented the telephone?",
)


def perplexity(store: ModelStore, form: str, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    shard: Any = load(store, 1, form, capacity=WINDOW + 1)[0]
    total, count = 0.0, 0
    for begin in range(0, len(ids) - 1, WINDOW):
        window = ids[begin : begin + WINDOW + 1]
        inputs, targets = np.array(window[:-1], dtype=np.int64), np.array(window[1:])
        for at in range(0, len(inputs), CHUNK):
            chunk = inputs[at : at + CHUNK]
            logits = shard.prefill(0, at, chunk, logits=len(chunk)).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), targets[at : at + CHUNK]]
            total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
            count += len(logits)
    shard.close()
    return float(np.exp(total / count))


def ask(base: str, prompt: str) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
    }
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in ApiClient(base).chat(body))


async def texts(store: ModelStore, parts: int, together: int, runtime: str = "onnx") -> list[str]:
    """Greedy answers of a mesh of ``parts`` agents, ``together`` sessions at a time."""
    async with temporary_mesh(parts, store.root.parent, {"threads": "2"}) as mesh:
        await mesh.serve(MODEL, runtime)
        answers: list[str] = []
        for at in range(0, len(PROMPTS), together):
            batch = PROMPTS[at : at + together]
            answers += await asyncio.gather(*(asyncio.to_thread(ask, mesh.endpoint, p) for p in batch))
        return answers


async def compare(store: ModelStore) -> dict[str, Any]:
    by_cut = {}
    for parts in CUTS:
        print(f"greedy text over {parts} agents", file=sys.stderr, flush=True)
        by_cut[parts] = await texts(store, parts, 1)
    lite = []
    for parts in CUTS:
        print(f"greedy text over {parts} agents on LiteRT", file=sys.stderr, flush=True)
        lite.append(await texts(store, parts, 1, "litert"))
    print("greedy text, 8 sessions at a time", file=sys.stderr, flush=True)
    batched = await texts(store, 3, 8)
    alone = by_cut[CUTS[0]]
    same_cut = all(answers == alone for answers in by_cut.values())
    return {
        "identical_across_cuts": same_cut,
        "identical_across_cuts_litert": all(answers == lite[0] for answers in lite),
        "identical_batched": batched == alone,
        "prompts": len(PROMPTS),
        "tokens_each": TOKENS,
    }


def mixed_route(store: ModelStore) -> float:
    """How far the logits of a route ONNX -> LiteRT -> ONNX are from the reference's, over its text."""
    with np.load(reference(store, MODEL)) as made:
        state, expected = made["tokens"][:CHECK_POSITIONS], made["logits"]
    for (start, end), form in zip(cut(3), ("int8", "litert", "int8"), strict=True):
        shard = load_one(store, start, end, form)
        state = shard.prefill(0, 0, state, len(expected)).copy()
        shard.close()
    return logits_deviation(state, expected)


def main() -> None:
    args = arguments(__doc__).parse_args()
    store = the_store()
    keys = asyncio.run(compare(store))
    ids = tokens_of(store, (Path(__file__).parent / "text.txt").read_text())
    print(f"perplexity over {len(ids)} tokens", file=sys.stderr, flush=True)
    forms = [f"{runtime}-{q}" for runtime, known in QUANTIZATIONS.items() for q in known]
    found = {form: perplexity(store, form, ids) for form in forms}
    exact, mixed = found["onnx-fp32"], mixed_route(store)
    keys |= {
        "ppl_tokens": len(ids),
        "ppl_reference": round(exact, 4),
        "ppl_default": round(found["onnx-int8"], 4),
        "ppl_ratio": round(found["onnx-int8"] / exact, 5),
        "ppl_ratio_by_profile": {form: round(ppl / exact, 5) for form, ppl in found.items()},
        "mixed_route_error": round(mixed, 4),
        "mixed_route_ok": mixed <= MIXED_MAX,
    }
    wanted = {
        "identical_across_cuts": "True",
        "identical_across_cuts_litert": "True",
        "mixed_route_ok": "True",
        "identical_batched": "True",
        "ppl_ratio": "<= 1.01",
    }
    finish(
        [("what", "value", "wanted"), *((k, str(v), wanted.get(k, "")) for k, v in keys.items())],
        keys,
        args.json,
    )


if __name__ == "__main__":
    main()
