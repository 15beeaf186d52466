"""How fast the simulator is: events a second, and whole meshes over long times on one core.

    python -m tests.benchmarks.simulator --json

Every node asks at least once a minute and goes now and then; probes are the LAN profile's. Each run is a process of its own, so
that its peak memory is known. ``--share 0.1`` runs a tenth of each virtual time, for a first look.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from simulations.command import SCENARIOS
from simulations.report import figures
from simulations.run import simulate
from simulations.scenario import Scenario, read_scenario

TEMPLATE = """
name = "{name}"
time = "{seconds}s"
quiet = "20s"
profile = "lan"
[model]
cuts = [15]
[load]
each = "uniform(55s, 59s)"
prompt = [4, 8]
tokens = [1, 4]
[[nodes]]
kind = "node"
count = {nodes}
regions = {regions}
up = "exponential(100h)"
down = "exponential(30s)"
silent = 0.3
"""


@dataclass(frozen=True)
class Case:
    """``wanted_s``: of wall time, on one core."""

    key: str
    nodes: int
    regions: int
    seconds: int
    wanted_s: int


CASES = (
    Case("s_1000_nodes_1h", 1000, 100, 3600, 300),
    Case("s_10000_nodes_10min", 10_000, 1000, 600, 600),
    Case("s_100_nodes_24h", 100, 10, 86_400, 600),
)


def scenario_of(case: Case, share: float) -> Scenario:
    """Regions of ten nodes."""
    seconds = max(60, int(case.seconds * share))
    return read_scenario(
        TEMPLATE.format(name=case.key, seconds=seconds, nodes=case.nodes, regions=case.regions), case.key
    )


def run_one(case: Case, share: float) -> dict[str, Any]:
    """In this process."""
    begin = time.perf_counter()
    outcome = simulate(scenario_of(case, share), 1)
    took = time.perf_counter() - begin
    found = figures(outcome)
    minutes = found["seconds"] / 60
    return {
        "s": round(took, 1),
        "events": found["events"],
        "requests": found["requests"],
        "per_node_minute": round(found["requests"] / case.nodes / minutes, 2),
        "availability": found["availability"],
        "faults": found["faults"],
        "violations": found["violations"][:3],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_a_process(*words: str, hash_seed: str = "0") -> dict[str, Any]:
    """What another process prints last."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.simulator", description=__doc__)
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    parser.add_argument("--share", type=float, default=1.0, help="of each virtual time [1.0]")
    parser.add_argument("--only", choices=[c.key for c in CASES], help="one of the long runs")
    parser.add_argument("--run", choices=[c.key for c in CASES], help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.run:
        print(json.dumps(run_one(next(c for c in CASES if c.key == said.run), said.share)))
        return 0
    storm = read_scenario((SCENARIOS / "storm.toml").read_text(), "storm")
    begin = time.perf_counter()
    events = simulate(storm, 1).events
    result: dict[str, Any] = {
        "events_per_s": round(events / (time.perf_counter() - begin)),
        "share": said.share,
    }
    print(f"storm: {result['events_per_s']} events a second")
    peaks = []
    for case in (c for c in CASES if said.only in (None, c.key)):
        found = in_a_process(
            "-m", "tests.benchmarks.simulator", "--run", case.key, "--share", str(said.share)
        )
        result[case.key] = found["s"]
        peaks.append(found["peak_mb"])
        print(f"{case.key}: {found} (wanted {case.wanted_s} s)")
    result["peak_mb"] = max(peaks)
    words = ("-m", "mesh", "simulate", "kiosk", "--seed", "3", "--time", "2m", "--json")
    logs = {in_a_process(*words, hash_seed=s)["event_log"] for s in ("1", "2")}
    result["identical"] = len(logs) == 1
    print(json.dumps(result) if said.json else "\n".join(f"{k:22} {v}" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
