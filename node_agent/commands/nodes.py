"""Show the nodes of a mesh as one agent sees them: standing, capabilities, shards, links.

Three tables: nodes (what each is, its standing and since when, how we know of it), shards, and
links from this agent (round trip, loss and bandwidth each way). What discovery lists but does not
answer, and what the agent waits for, is said below them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

SUMMARY = "nodes, shards, links and sessions of a mesh"
SECTION = "Look at it"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_USUAL_PROVIDER = "CPUExecutionProvider"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--json", action="store_true", help="everything that the agent knows, as JSON")
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    """Ask an agent for its view."""
    from mesh.errors import Unavailable
    from node_agent.adapters.api_client import ApiClient, api_base

    client = ApiClient(api_base(args.api), timeout_s=5)
    clear = "\x1b[2J\x1b[H" if args.watch and not args.json else ""
    while True:
        try:
            snapshot = client.get("/mesh/v1/nodes")
            text = json.dumps(snapshot) if args.json else whole_view(snapshot)
        except Unavailable as error:
            if not args.watch:
                raise
            text = str(error)  # whoever watches wants to see it come back
        print(clear + text, flush=True)
        if not args.watch:
            return 0
        time.sleep(1.0)


def whole_view(snapshot: dict[str, Any]) -> str:
    """All tables and remarks."""
    parts = [_members_table(snapshot), nodes_table(snapshot, only_shards=True), _links_table(snapshot)]
    if snapshot.get("waiting_for"):
        parts.append(f"waiting for peers: {snapshot['waiting_for']}")
    unanswered = snapshot.get("unanswered", [])
    if unanswered:
        lines = [f"listed, but nobody answers there ({len(unanswered)}):"]
        lines += [f"  {u['address']} ({', '.join(u['sources'])}): {u['error']}" for u in unanswered[:8]]
        parts.append("\n".join(lines))
    for region in snapshot.get("regions", []):
        parts.append(
            f"region {region['region'] or '(none)'}: {region['alive']} nodes, by {', '.join(region['gateways'])}"
        )
    return "\n\n".join(part for part in parts if part)


def _members_table(snapshot: dict[str, Any]) -> str:
    from node_agent.commands.show import table

    rows = []
    for node in snapshot["nodes"]:
        state = node["state"] + (f": {node['reason']}" if node["reason"] else "")
        rows.append(
            [
                node["name"] or "?",
                node["id"],
                node["address"],
                state,
                _age(node["since_s"]),
                _machine(node),
                ", ".join(node["sources"]),
            ]
        )
    heads = ["node", "id", "address", "state", "since", "machine", "known by"]
    return table(heads, rows, empty="no nodes")


def _machine(node: dict[str, Any]) -> str:
    """A node's capabilities in some words."""
    have = node.get("capabilities")
    if have is None:
        return "record not here yet"
    words = [f"{have['cpu']['cores']} cores {have['cpu']['architecture']}".strip()]
    words.append(
        f"{node['memory_free_bytes'] / 2**30:.1f} of {node['memory_total_bytes'] / 2**30:.1f} GiB free"
    )
    words += [a["name"] for a in have["accelerators"] if a["kind"] != "provider"]
    if have["battery"]:
        words.append(
            f"battery {have['battery']['percent']} %{' charging' if have['battery']['charging'] else ''}"
        )
    if have["thermal"]:
        words.append(f"{have['thermal']['celsius']} °C{' throttled' if have['thermal']['throttled'] else ''}")
    words += [f"{s['runtime']} {s['gb_s']:.0f} GB/s" for s in have["speeds"]]
    words += ["=".join(label) for label in have["labels"]]
    return ", ".join(words)


def nodes_table(snapshot: dict[str, Any], only_shards: bool = False) -> str:
    """A line for each replica; nodes without any are included unless ``only_shards``."""
    from node_agent.commands.show import table

    rows = []
    for node in snapshot["nodes"]:
        state = node["state"] + (f": {node['reason']}" if node["reason"] else "")
        head = (
            [node["name"]]
            if only_shards
            else [
                node["name"],
                node["id"],
                node["address"],
                state,
                f"{node.get('memory_free_bytes', 0) / 2**30:.1f} GiB",
            ]
        )
        if not node["replicas"] and not only_shards:
            rows.append([*head, "-", "", "", ""])
        for i, replica in enumerate(node["replicas"]):
            kv = f"{replica['kv_reserved_bytes'] / 2**20:.0f}/{replica['kv_budget_bytes'] / 2**20:.0f} MiB"
            what = replica["state"] + (f": {replica['reason']}" if replica["reason"] else "")
            if replica["provider"] not in ("", _USUAL_PROVIDER):
                what += f" on {replica['provider']}"
            if node["state"] not in ("alive", ""):
                what = f"its node is {node['state']}"
            sessions = f"{replica['sessions']}/{replica['slots']}"
            rows.append([*(head if i == 0 else [""] * len(head)), replica["shard"], what, sessions, kv])
    heads = ["node"] if only_shards else ["node", "id", "address", "state", "free"]
    return table(
        [*heads, "shard", "replica", "sessions", "KV"], rows, empty="" if only_shards else "no nodes"
    )


def _links_table(snapshot: dict[str, Any]) -> str:
    from node_agent.commands.show import table

    rows = []
    for node in snapshot["nodes"]:
        link, estimate = node["link"], node.get("rtt_estimate_ms")
        if node["id"] == snapshot["self"]:
            continue
        if link is None:
            rows.append([node["name"], "-" if estimate is None else f"~{estimate:.2f}", "", "", "", "", ""])
            continue
        rows.append(
            [
                node["name"] + (" (datagrams blocked)" if node.get("by_stream") else ""),
                f"{link['rtt_ms_p50']:.2f}",
                f"{link['rtt_ms_p99']:.2f}",
                f"{link['jitter_ms']:.2f}",
                f"{link['loss_out']:.1%} / {link['loss_in']:.1%}",
                _mbit(link, "out"),
                _mbit(link, "in"),
            ]
        )
    heads = [
        "link to",
        "RTT p50 ms",
        "p99",
        "jitter",
        "loss out / in",
        "Mbit/s out p50 (p10)",
        "in p50 (p10)",
    ]
    return table(heads, rows)


def _mbit(link: dict[str, Any], way: str) -> str:
    if not link[f"mbit_s_{way}_p50"]:
        return "-"
    return f"≥ {link[f'mbit_s_{way}_p50']:.0f} ({link[f'mbit_s_{way}_p10']:.0f})"


def _age(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < _DAY else f"{seconds / _DAY:.1f} d"
