"""Make a policy file the cluster's: the scheduler then loads and unloads until things are as it says.

mesh apply mesh.toml            show the plan, act, wait until everything serves
mesh apply mesh.toml --detach   do not wait

Nothing is changed when a model of the file cannot be placed. The file replaces the whole policy.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

SUMMARY = "make a policy file the cluster's, and wait until it serves"
SECTION = "Models"

if TYPE_CHECKING:
    from node_agent.adapters.api_client import ApiClient


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("file", help="a policy file (TOML)")
    common_flags(parser)


def common_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that changes the policy takes."""
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--detach", action="store_true", help="do not wait until it serves")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="wait no longer [300]")


def run(args: argparse.Namespace) -> int:
    """Plan, apply, wait."""
    from node_agent.adapters.api_client import ApiClient, api_base
    from node_agent.commands.plan import read_policy

    client = ApiClient(api_base(args.api), timeout_s=120)
    return change_policy(client, read_policy(args.file), args.file, args.detach, args.timeout)


def change_policy(client: ApiClient, text: str, name: str, detach: bool, timeout_s: float) -> int:
    """Show what ``text`` comes to, apply it, and wait until it serves."""
    from node_agent.commands.plan import report_view

    body: dict[str, Any] = {"policy": text, "name": name}
    report = client.send("POST", "/mesh/v1/plan", body)
    print(report_view(report, explain=False), flush=True)
    if not all(m["feasible"] for m in report["models"].values()):
        print("\nnothing was changed", file=sys.stderr)
        return 1
    client.send("PUT", "/mesh/v1/policy", {**body, "version": report["version"]})
    if detach:
        return 0
    return _wait(client, timeout_s)


def _wait(client: ApiClient, timeout_s: float) -> int:
    """Until everything planned serves and nothing else is held."""
    from mesh.errors import Unavailable
    from node_agent.commands.show import progress_bars

    until = time.monotonic() + timeout_s
    left = ["no answer yet"]
    with progress_bars() as progress:
        while time.monotonic() < until:
            try:
                report = client.get("/mesh/v1/plan")
            except Unavailable as error:
                left = [str(error)]
            else:
                done, total, left = _progress(report)
                progress("placing shards", done, total)
                if not left:
                    break
            time.sleep(0.3)
    if left:
        print(
            f"not within {timeout_s:g} s: {'; '.join(left[:4])} ('mesh nodes' has the reasons)",
            file=sys.stderr,
        )
        return 1
    print("everything serves")
    return 0


def _progress(report: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Steps done, steps in all, and what is left."""
    left = [f"{model} still unloads" for model in report["unloads"]]
    total = done = 0
    for model, plan in report["models"].items():
        if not plan["feasible"]:
            left.append(f"{model}: {plan['reason']}")
            continue
        for s in plan["stages"]:
            total += 1
            if s["change"] == "stays":
                done += 1
            else:
                left.append(f"{model}:{s['layers'][0]}-{s['layers'][1]} on {s['name']}: {s['change']}")
        left += [f"{model}:{g['layers'][0]}-{g['layers'][1]} on {g['name']} still goes" for g in plan["goes"]]
    return done, max(total, 1), left
