"""Show what the scheduler would place where, and what would change. Changes nothing.

mesh plan                  the policy that the cluster follows
mesh plan mesh.toml        what a policy file would come to
mesh plan --explain        every term of every stage, and why each other node hosts nothing

A plan carries a bound: no placement of the model takes less per token than it. "exact" means that
the plan reaches it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

SUMMARY = "what would be placed where, what would change, and why"
SECTION = "Models"
_IDLE_SHOWN = 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("file", nargs="?", help="a policy file; without it the cluster's own")
    parser.add_argument("--explain", action="store_true", help="the terms of each stage, and every reason")
    parser.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Ask an agent; 1 if something cannot be placed."""
    from node_agent.adapters.api_client import ApiClient, api_base

    client = ApiClient(api_base(args.api), timeout_s=120)
    if args.file:
        body = {"policy": read_policy(args.file), "name": args.file}
        report = client.send("POST", "/mesh/v1/plan", body)
    else:
        report = client.get("/mesh/v1/plan")
    print(json.dumps(report) if args.json else report_view(report, args.explain))
    return 0 if all(m["feasible"] for m in report["models"].values()) else 1


def read_policy(path: str) -> str:
    """The file's text; raises ``InputError``."""
    from pathlib import Path

    from mesh.errors import InputError

    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the policy {path} cannot be read: {error}") from None


def report_view(report: dict[str, Any], explain: bool) -> str:
    """Everything, for people."""
    parts = [model_view(name, plan, explain) for name, plan in report["models"].items()]
    if not report["models"]:
        parts.append("the policy asks for no model; 'mesh model deploy NAME' does, or 'mesh apply FILE'")
    parts += [f"{model}: wanted no more, unloads" for model in report["unloads"]]
    if report["leader"]:
        parts.append(f"{report['leader_name']} leads, in term {report['term']}")
    elif report["schedulers"]:
        parts.append("no leader yet: the longest-lived agent takes over within seconds")
    else:
        parts.append("no agent may schedule: start one with --scheduler on, or nothing is placed")
    if report["nomad"]:
        parts += nomad_view(report["nomad"])
    return "\n\n".join(parts)


def nomad_view(nomad: dict[str, Any]) -> list[str]:
    """What Nomad holds us to, rolls out, and sees otherwise than the mesh; nothing to say: nothing."""
    lines = [f"{name}: {why}" for name, why in sorted(nomad["avoid"].items())]
    lines += [
        f"{name}: Nomad calls it down; the mesh sees it alive, and it goes on serving"
        for name in nomad["down_but_alive"]
    ]
    for r in nomad["rollouts"]:
        lines.append(
            f"{r['job']}, version {r['version']}: {r['said']} ({r['healthy']} of {r['total']} healthy)"
        )
        if r["canaries"] and r["status"] == "running":
            lines.append(f"  when its canaries do well: nomad deployment promote {r['deployment'][:8]}")
    for a in nomad["allocations"]:
        layers = f"{a['layers'][0]}-{a['layers'][1]}"
        lines.append(f"{a['job']} {layers} on {a['client']} ({a['id'][:8]}): {a['difference']}")
    return ["\n".join(["Nomad", *(f"  {line}" for line in lines)])] if lines else []


def model_view(name: str, plan: dict[str, Any], explain: bool) -> str:
    """One model's plan, or why there is none."""
    if not plan["feasible"]:
        lines = [f"{name}: no plan. {plan['reason']}"]
        if plan["would_do"]:
            lines.append(f"  what would do: {plan['would_do']}")
        return "\n".join([*lines, *_idle(plan, explain)])
    proof = "exact" if plan["exact"] else f"at most {plan['gap']:.1%} above the best possible"
    lines = [
        f"{name} {plan['quantization']}   {plan['tpot_ms']:.2f} ms per token predicted ({proof})   "
        f"up {plan['availability']:.4%}   KV for {plan['sessions']} sessions of {plan['context']}",
        _stages(plan, explain),
    ]
    lines += [f"  {g['name']} lets go of {g['layers'][0]}-{g['layers'][1]}" for g in plan["goes"]]
    return "\n".join([*lines, *_idle(plan, explain)])


def _stages(plan: dict[str, Any], explain: bool) -> str:
    from node_agent.commands.show import table

    heads = ["copy", "node", "layers", "change", "ms/token", "hop ms", "memory"]
    if explain:
        heads += ["agent ms", "policy ms", "layers moved"]
    rows = []
    for s in plan["stages"]:
        ms = s["ms"]
        row = [
            str(s["copy"]),
            s["name"],
            f"{s['layers'][0]}-{s['layers'][1]}",
            s["change"],
            f"{ms['compute']:.2f}",
            f"{ms['hop']:.2f}",
            f"{s['memory_bytes'] / 2**20:.0f} MiB",
        ]
        if explain:
            row += [f"{ms['overhead']:.2f}", f"{ms['policy']:.3f}", str(s["moved_layers"])]
        rows.append(row)
    return table(heads, rows)


def _idle(plan: dict[str, Any], explain: bool) -> list[str]:
    shown = plan["idle"] if explain else plan["idle"][:_IDLE_SHOWN]
    lines = [f"  {i['name']} hosts nothing: {i['reason']}" for i in shown]
    if len(shown) < len(plan["idle"]):
        lines.append(f"  and {len(plan['idle']) - len(shown)} more (--explain)")
    return lines
