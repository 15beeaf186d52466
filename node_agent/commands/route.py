"""Show the route that a request would take now, what it is predicted to take, and why.

One line a stage: computing, waiting, the hop that leads there (latency and transfer), the price of
risk and what the policy adds, in milliseconds a token; the last two weigh stages and take no time. Then the routes that stand by, sharing no machine with it but the ingress.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

SUMMARY = "the route that a request would take, with the terms of its cost"
SECTION = "Look at it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--percentile", choices=("p50", "p99"), default="p50", help="what to choose by")
    parser.add_argument("--class", dest="class_name", default="", help="a class of requests of the policy")
    parser.add_argument("--explain", action="store_true", help="every term (as it always shows)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Ask an agent."""
    import urllib.parse

    from node_agent.adapters.api_client import ApiClient, api_base

    query = urllib.parse.urlencode(
        {"model": args.model, "percentile": args.percentile, "class": args.class_name}
    )
    plan = ApiClient(api_base(args.api), timeout_s=5).get(f"/mesh/v1/route?{query}")
    print(json.dumps(plan) if args.json else plan_view(plan))
    return 0


def plan_view(plan: dict[str, Any]) -> str:
    """The table and what is below it."""
    from node_agent.commands.show import table

    rows = [
        [
            str(s["stage"]),
            s["name"] or s["node"],
            f"{s['layers'][0]}-{s['layers'][1]}",
            *(f"{s[k]:.2f}" for k in ("compute_ms", "queue_ms", "hop_ms", "transfer_ms")),
            f"{s['risk_ms']:.4f}",
            f"{s['policy_ms']:.2f}",
        ]
        for s in plan["stages"]
    ]
    rows.append(["-", "home", "", "", "", f"{plan['home_ms']:.2f}", "", "", ""])
    heads = [
        "stage",
        "node",
        "layers",
        "compute ms",
        "queue ms",
        "hop ms",
        "transfer ms",
        "risk ms",
        "policy ms",
    ]
    lines = [
        table(heads, rows),
        f"predicted   TPOT {plan['predicted_tpot_ms']:.2f} ms   TTFT {plan['predicted_ttft_ms']:.1f} ms",
        *(f"stands by   {route}" for route in plan["alternatives"]),
    ]
    return "\n".join(lines)
