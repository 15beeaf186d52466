"""Check this machine and its surroundings for an agent with the given settings, and say what to do.

Ports, multicast, clocks, Consul, runtimes, memory, disk, and whether other agents answer. Takes the
settings of 'mesh agent' (--config, MESH_*, flags). Exit status 1 when something must be mended.
"""

from __future__ import annotations

import argparse

SUMMARY = "check ports, multicast, clocks, Consul, runtimes, disk"
SECTION = "Look at it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    from node_agent.commands.agent import add_settings

    parser.add_argument("--json", action="store_true", help="one JSON object for each finding, as a list")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Examine and report."""
    import asyncio
    import json

    from node_agent.adapters.doctor import Verdict, examine
    from node_agent.commands.agent import read_settings
    from node_agent.commands.show import table

    findings = asyncio.run(examine(read_settings(args)))
    if args.json:
        print(
            json.dumps(
                [
                    {"check": f.check, "verdict": f.verdict.value, "found": f.found, "advice": f.advice}
                    for f in findings
                ]
            )
        )
    else:
        rows = []
        for f in findings:
            rows.append([f.verdict.value, f.check, f.found])
            if f.advice:
                rows.append(["", "", f"  -> {f.advice}"])
        print(table(["", "check", "found"], rows))
    return 1 if any(f.verdict is Verdict.BAD for f in findings) else 0
