"""Show the sessions that an agent runs as their owner: state, epoch, tokens, route.

An epoch above 1 is a session that went on along another route.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

SUMMARY = "live sessions with their routes and epochs"
SECTION = "Look at it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask an agent."""
    from node_agent.adapters.api_client import ApiClient, api_base

    sessions = ApiClient(api_base(args.api), timeout_s=5).get("/mesh/v1/sessions")
    print(json.dumps(sessions) if args.json else sessions_view(sessions))
    return 0


def sessions_view(sessions: list[dict[str, Any]]) -> str:
    """A table."""
    from node_agent.commands.show import table

    if not sessions:
        return "no session runs here"
    rows = [
        [
            s["session"][:12],
            s["model"],
            s["state"],
            str(s["epoch"]),
            f"{s['prompt_tokens']}+{s['tokens']}",
            " -> ".join(f"{r['node']}[{r['layers'][0]}-{r['layers'][1]}]" for r in s["route"]),
        ]
        for s in sessions
    ]
    return table(["session", "model", "state", "epoch", "tokens", "route"], rows)
