"""Ask a question and see the route that the answer took.

mesh ask "What is the capital of France?"             asks the agent at MESH_API (127.0.0.1:8080)
mesh ask --nodes 3 "What is the capital of France?"   starts three agents for this one question
mesh ask --json "..."                                 one JSON object, for scripts
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

SUMMARY = "ask a question; with --nodes N on a mesh made for it"
SECTION = "Try it"

_SYSTEM = "You are a helpful assistant."


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("question", help="'-' reads it from standard input")
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="start N agents for this question and stop them after"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--runtime", default="", help="with --nodes: onnx, litert or onnxstd [what is measured to be fastest]"
    )
    parser.add_argument(
        "--quantization", default="", help="with --nodes: int8, fp32 or int4 [the runtime's default]"
    )
    parser.add_argument("--system", default=_SYSTEM, help="system message (empty: the model's own)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--speculation",
        action="store_true",
        help="guess tokens that stood in the text before, where that pays (slow links)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--home", help="with --nodes: where models are kept [MESH_HOME]")


def run(args: argparse.Namespace) -> int:
    """Ask an agent that runs, or one of a mesh started for it."""
    if args.nodes is None:
        from node_agent.adapters.api_client import api_base

        return _ask(args, api_base(args.api))
    import asyncio

    return asyncio.run(_with_mesh(args))


async def _with_mesh(args: argparse.Namespace) -> int:
    import asyncio

    from node_agent.adapters.local_mesh import temporary_mesh
    from node_agent.commands.show import progress_bars
    from node_agent.paths import default_home

    home = Path(args.home) if args.home else default_home()
    async with temporary_mesh(args.nodes, home) as mesh:
        with progress_bars() as progress:
            await mesh.serve(args.model, args.runtime, args.quantization, progress)
        return await asyncio.to_thread(_ask, args, mesh.endpoint)


def _ask(args: argparse.Namespace, base: str) -> int:
    import json

    from node_agent.adapters.api_client import ApiClient

    question = sys.stdin.read() if args.question == "-" else args.question
    client = ApiClient(base)
    messages = [{"role": "user", "content": question}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    body: dict[str, Any] = {
        "model": args.model,
        "messages": messages,
        "max_completion_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream_options": {"include_usage": True},
    }
    if args.seed is not None:
        body["seed"] = args.seed
    if args.speculation:
        body["speculation"] = True
    text, answer_id, finish, usage = [], "", None, None
    for chunk in client.chat(body):
        answer_id = chunk["id"]
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
            text.append(piece)
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    trace = client.get(f"/mesh/v1/sessions/{answer_id}")
    if args.json:
        print(
            json.dumps(
                {
                    "answer": "".join(text),
                    "finish_reason": finish,
                    "usage": usage,
                    "model": args.model,
                    "route": trace,
                }
            )
        )
    else:
        print("\n")
        print(route_report(trace, client.get("/mesh/v1/nodes")))
    return 0


def route_report(trace: dict[str, Any], nodes: dict[str, Any]) -> str:
    """The route as a table: where each token's time went."""
    from node_agent.commands.show import table

    names = {n["id"]: n["name"] for n in nodes["nodes"]}
    rows = [["-", "ingress", "", "", "", "", _ms(trace["ingress_hop_ms"])]]
    for i, stage in enumerate(trace["stages"]):
        last = i == len(trace["stages"]) - 1
        layers = f"{stage['layers'][0]}-{stage['layers'][1]}"
        rows.append(
            [
                str(i),
                names.get(stage["node"], stage["node"]),
                layers,
                _ms(stage["first_compute_ms"]),
                _ms(stage["compute_ms"]),
                _ms(stage["queue_ms"]),
                _ms(trace["return_ms"] if last else stage["hop_ms"]),
            ]
        )
    heads = ["stage", "node", "layers", "prefill ms", "ms/token", "queue ms", "hop on ms"]
    rate = 1000 / trace["tpot_ms"] if trace["tpot_ms"] else 0.0
    summary = (
        f"{trace['prompt_tokens']} tokens in, {trace['tokens']} out   "
        f"TTFT {trace['ttft_ms']:.0f} ms   TPOT {trace['tpot_ms']:.2f} ms   {rate:.0f} tokens/s"
    )
    if trace["guesses"]:
        summary += f"   {trace['guesses_right']} of {trace['guesses']} guesses right"
    return f"{table(heads, rows)}\n{summary}"


def _ms(value: float) -> str:
    return f"{value:.2f}"
