"""Show the nodes of a mesh, their shards and sessions, as one agent sees them."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

SUMMARY = "nodes, shards and sessions of a mesh"
SECTION = "Look at it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    """Ask an agent for its snapshot."""
    from node_agent.adapters.api_client import ApiClient, api_base

    client = ApiClient(api_base(args.api), timeout_s=5)
    while True:
        snapshot = client.get("/mesh/v1/nodes")
        if args.json:
            print(json.dumps(snapshot), flush=True)
        else:
            clear = "\x1b[2J\x1b[H" if args.watch else ""
            print(clear + nodes_table(snapshot), flush=True)
        if not args.watch:
            return 0
        time.sleep(1.0)


def nodes_table(snapshot: dict[str, Any]) -> str:
    """A line for each replica, nodes without any included."""
    from node_agent.commands.show import table

    rows = []
    for node in snapshot["nodes"]:
        state = node["state"] + (f": {node['reason']}" if node["reason"] else "")
        head = [
            node["name"],
            node["id"],
            node["address"],
            state,
            f"{node['memory_free_bytes'] / 2**30:.1f} GiB",
        ]
        if not node["replicas"]:
            rows.append([*head, "-", "", "", ""])
        for i, replica in enumerate(node["replicas"]):
            kv = f"{replica['kv_reserved_bytes'] / 2**20:.0f}/{replica['kv_budget_bytes'] / 2**20:.0f} MiB"
            what = replica["state"] + (f": {replica['reason']}" if replica["reason"] else "")
            sessions = f"{replica['sessions']}/{replica['slots']}"
            rows.append([*(head if i == 0 else [""] * 5), replica["shard"], what, sessions, kv])
    heads = ["node", "id", "address", "state", "free", "shard", "replica", "sessions", "KV"]
    return table(heads, rows, empty="no nodes")
