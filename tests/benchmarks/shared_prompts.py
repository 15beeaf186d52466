"""What it saves to compute once what prompts have in common: the choices of one request, and a question after a system prompt that
somebody else has asked after, at temperature 0, where texts stay as they are.

Two meshes of three agents take turns: one that shares (the default), and one that does not.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from mesh.forms import parse_form
from node_agent.adapters.local_mesh import temporary_mesh
from tests.benchmarks.common import (
    MODEL,
    THREADS,
    arguments,
    finish,
    median,
    prompt_ids,
    stream,
    the_store,
)

PROMPT, QUESTION, TOKENS, CHOICES = 320, 16, 32, 8
CACHES = ("auto", "off")


def round_of(base: str, words: list[int], number: int) -> tuple[float, float]:
    """Seconds until all choices are there, and until the second question's first token is."""
    prompt, system = (words[at:] + words[:at] for at in (2 * number, 2 * number + 1))
    choices = stream(base, prompt, TOKENS, temperature=1.0, choices=CHOICES)
    stream(base, system + words[:QUESTION], 2)
    second = stream(base, system + words[QUESTION : 2 * QUESTION], 2)
    return choices.end - choices.begin, second.ttft


async def measure(form: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    store = the_store()
    words, seen = prompt_ids(store, PROMPT), {cache: list[tuple[float, float]]() for cache in CACHES}
    settings = {"threads": str(THREADS)}
    async with (
        temporary_mesh(3, store.root.parent, settings | {"prefix_cache": CACHES[0]}) as shares,
        temporary_mesh(3, store.root.parent, settings | {"prefix_cache": CACHES[1]}) as alone,
    ):
        for mesh in (shares, alone):
            await mesh.serve(MODEL, *parse_form(form))
        for number in range(rounds + 1):
            for cache, mesh in zip(CACHES, (shares, alone), strict=True):
                found = await asyncio.to_thread(round_of, mesh.endpoint, words, number)
                if number:  # the first warms everything up
                    seen[cache].append(found)
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return seen


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--form", default="onnx-int8", help="runtime and quantization, for example litert-int4"
    )
    said = parser.parse_args()
    seen = asyncio.run(measure(said.form, said.rounds))
    rows: list[tuple[str, str, str]] = []
    keys: dict[str, Any] = {}
    for i, (what, key) in enumerate(
        (
            (f"{CHOICES} choices of {TOKENS} tokens after {PROMPT}", "choices8"),
            (f"first token of a question after a system prompt of {PROMPT}", "ttft"),
        )
    ):
        shared, alone = (median([found[i] for found in seen[cache]]) * 1e3 for cache in CACHES)
        rows.append((what, f"{shared:.0f} ms; each computed alone {alone:.0f}", ""))
        keys |= {f"{key}_ms_shared": round(shared, 1), f"{key}_ms_alone": round(alone, 1)}
        keys[f"{key}_ratio_shared_alone"] = round(shared / alone, 3)
    finish(rows, keys, said.json)


if __name__ == "__main__":
    main()
