"""Slow links, with guessed tokens and without: three agents in network namespaces, every hop delayed by 20 ms.

The same questions are asked in turn with ``"speculation": true`` and ``false``: to summarise a report, to summarise a
passage of a story (of which this model takes over few words), and to chat. The ratio is of tokens a second after the
first token, for each question; told is the median.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mesh.forms import parse_form
from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.shard_maker import make_shard
from tests.agents import start_agent
from tests.benchmarks.common import MODEL, arguments, cut, finish, median, the_store
from tests.delayed_lan import DelayedLan, refused

AGENTS = 3
DELAY_MS = 20.0
PASSAGE_WORDS = 220
PASSAGES = 4
CHATS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "How do I boil an egg?",
    "What does a compiler do?",
    "Tell me a story about a robot and a cat.",
    "Why do seasons change?",
)


@contextlib.contextmanager
def running(work: Path, home: Path, form: str) -> Iterator[str]:
    """The agents, each with its shard; yields the API's base of the first, where the first stage is."""
    delays = dict.fromkeys(itertools.permutations(range(1, AGENTS + 1), 2), DELAY_MS)
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(DelayedLan(f"mbl{os.getpid()}", AGENTS, delays))
        first = ""
        for i, (start, end) in enumerate(cut(AGENTS), 1):
            host = lan.address(i)
            settings = {
                "host": host,
                "api_host": host,
                "threads": "1",
                "scheduler": "off",
                "prefix_cache": "off",
            }
            settings |= {"shards": f"{MODEL}:{start}-{end}/{form}", "home": str(home)}
            settings |= {"peers": first} if first else {}
            made = start_agent(work / f"n{i}", lan.prefix(i), None, **settings)
            stack.callback(made.end)
            if not first:
                first, base = made.address, f"http://{made.api}"
        _await_stages(base)
        yield base


def _await_stages(base: str) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        nodes = ApiClient(base).get("/mesh/v1/nodes")["nodes"]
        if sum(r["state"] == "serving" for n in nodes for r in n["replicas"]) == AGENTS:
            time.sleep(3)  # links are measured
            return
        time.sleep(0.5)
    raise SystemExit("the agents did not all serve their shards within 90 s")


def ask(base: str, question: str, tokens: int, speculation: bool) -> tuple[str, dict[str, Any]]:
    """Answer and trace."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "speculation": speculation,
    }
    client = ApiClient(base)
    chunks = list(client.chat(body))
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    return text, client.get(f"/mesh/v1/sessions/{chunks[0]['id']}")


def questions() -> dict[str, list[str]]:
    here = Path(__file__).parent
    reports = (here / "reports.txt").read_text().strip().split("\n\n")
    words = (here / "text.txt").read_text().split(" ")
    passages = [" ".join(words[i * PASSAGE_WORDS : (i + 1) * PASSAGE_WORDS]) for i in range(PASSAGES)]
    return {
        "summarise": [f"Summarize the following report.\n\n{r}" for r in reports],
        "story": [f"Summarize the following passage.\n\n{p}" for p in passages],
        "chat": list(CHATS),
    }


def measure(base: str, tokens: int) -> dict[str, Any]:
    ask(base, CHATS[0], 16, True)  # warm
    keys: dict[str, Any] = {}
    same = total = 0
    for kind, asked in questions().items():
        ratios, plain_rates, rates, made, right = [], [], [], 0, 0
        for done, question in enumerate(asked):
            print(f"\r{kind}: {done} of {len(asked)}  ", end="", file=sys.stderr, flush=True)
            order = (False, True) if done % 2 else (True, False)
            found = {speculation: ask(base, question, tokens, speculation) for speculation in order}
            (plain_text, plain), (text, guessed) = found[False], found[True]
            ratios.append(plain["tpot_ms"] / guessed["tpot_ms"])
            plain_rates.append(1000 / plain["tpot_ms"])
            rates.append(1000 / guessed["tpot_ms"])
            made, right = made + guessed["guesses"], right + guessed["guesses_right"]
            same, total = same + (text == plain_text), total + 1
        keys |= {
            f"speculation_ratio_{kind}": round(median(ratios), 3),
            f"speculation_ratio_{kind}_least": round(min(ratios), 3),
            f"tokens_s_{kind}": round(median(rates), 1),
            f"tokens_s_{kind}_without": round(median(plain_rates), 1),
            f"guesses_right_{kind}": round(right / made, 3) if made else 0.0,
        }
        print(file=sys.stderr)
    return keys | {"same_text": f"{same} of {total}"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="most of an answer [128]")
    parser.add_argument(
        "--form", default="int8", help="form of the shards, as int8, fp32, litert-int8 [int8]"
    )
    args = parser.parse_args()
    if reason := refused():
        raise SystemExit(f"links cannot be delayed here: {reason}")
    store = the_store()
    runtime, quantization = parse_form(args.form)
    for start, end in cut(AGENTS):
        make_shard(store, MODEL, start, end, quantization, runtime=runtime)
    with tempfile.TemporaryDirectory() as work, running(Path(work), store.root.parent, args.form) as base:
        keys = measure(base, args.tokens)
    wanted = {"speculation_ratio_summarise": ">= 1.8", "speculation_ratio_chat": ">= 1.0"}
    finish([(k, str(v), wanted.get(k, "")) for k, v in keys.items()], keys, args.json)


if __name__ == "__main__":
    main()
