"""Move the sessions of a node elsewhere and send it nothing new, until it is undone; nothing is unloaded.

mesh drain cupboard           and wait until no session has a stage there
mesh drain cupboard --undo    serve again

An agent that is stopped (Ctrl-C, SIGTERM) drains by itself.
"""

from __future__ import annotations

import argparse
import sys
import time

SUMMARY = "move a node's sessions elsewhere before it is taken away"
SECTION = "Run it"
_POLL_S = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("node", help="name or id of a node ('mesh nodes' lists them)")
    parser.add_argument("--undo", action="store_true", help="serve again")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="wait no longer [60]")
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")


def run(args: argparse.Namespace) -> int:
    """Ask an agent to see to it, and wait."""
    from node_agent.adapters.api_client import ApiClient, api_base

    client = ApiClient(api_base(args.api), timeout_s=10)
    body = {"node": args.node, "undo": args.undo}
    deadline, told = time.monotonic() + args.timeout, -1
    while True:
        left = client.send("POST", "/mesh/v1/drain", body)
        if args.undo:
            print(f"{args.node} serves again")
            return 0
        if left["stages"] != told:
            told = left["stages"]
            print(f"{args.node}: {told} stages of sessions are still there", flush=True)
        if not told:
            return 0
        if time.monotonic() >= deadline:
            print("they did not leave in time: is there another replica of each shard?", file=sys.stderr)
            return 1
        time.sleep(_POLL_S)
