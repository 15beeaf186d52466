"""False deaths and time to detect in virtual time: 200 nodes, 10 % of all packets lost each way.

The production machine on a virtual network, LAN profile, without the probes over gRPC that would
save it on a real one. 1,000 node-hours take minutes of all cores; ``--hours`` makes it shorter.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from mesh.gossip import MemberState
from mesh.types import Address
from tests.benchmarks.common import arguments, finish, quantile
from tests.virtual_network import S, VirtualNetwork

NODES = 200
LOSS = 0.1
_RUN_S = 900
_KILLS = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run: ``suspected`` and ``declared`` are seconds until all survivors agreed."""

    node_hours: float
    false_deaths: int
    false_suspicions: int
    suspected: tuple[float, ...]
    declared: tuple[float, ...]


def run(seed: int, seconds: float = _RUN_S, kills: int = _KILLS, loss: float = LOSS) -> Outcome:
    """Quiet time in which nobody dies, then real deaths one after another."""
    net = VirtualNetwork(NODES, seed=seed, loss=loss, streams=False)
    net.knit()
    net.run(seconds)
    # A death that several hold is one death; so is the suspicion of one incarnation.
    deaths = {c.member for c in net.changes if c.state is MemberState.DEAD}
    suspicions = [c for c in net.changes if c.state is MemberState.SUSPECT and "no answer for" in c.reason]
    suspected, declared = [], []
    for i in range(kills):
        victim = f"n{(seed * 7 + i * 31) % NODES}"
        if Address(victim) in net.down:
            continue
        net.run(0.13 * (i + 1))
        begin = net.now
        net.kill(victim)
        gone = {MemberState.SUSPECT, MemberState.DEAD}
        net.until(lambda victim=victim, gone=gone: net.states(victim) <= gone, 60)  # type: ignore[misc]
        suspected.append((net.now - begin) / S)
        net.until(lambda victim=victim: net.states(victim) == {MemberState.DEAD}, 60)  # type: ignore[misc]
        declared.append((net.now - begin) / S)
    return Outcome(NODES * seconds / 3600, len(deaths), len(suspicions), tuple(suspected), tuple(declared))


def report(outcomes: list[Outcome]) -> dict[str, Any]:
    hours = sum(o.node_hours for o in outcomes)
    suspected = [s for o in outcomes for s in o.suspected]
    declared = [s for o in outcomes for s in o.declared]
    return {
        "node_hours": round(hours, 1),
        "false_deaths": sum(o.false_deaths for o in outcomes),
        "false_deaths_per_1000_node_hours": round(sum(o.false_deaths for o in outcomes) * 1000 / hours, 3),
        "false_suspicions_per_node_hour": round(sum(o.false_suspicions for o in outcomes) / hours, 2),
        "suspected_everywhere_s_p50": round(quantile(suspected, 50), 2),
        "suspected_everywhere_s_p99": round(quantile(suspected, 99), 2),
        "declared_everywhere_s_p50": round(quantile(declared, 50), 2),
        "declared_everywhere_s_p99": round(quantile(declared, 99), 2),
        "real_deaths": len(declared),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--hours", type=float, default=1000.0, help="node-hours (default 1000)")
    args = parser.parse_args()
    runs = max(1, round(args.hours * 3600 / NODES / _RUN_S))
    begin = time.monotonic()
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for outcome in pool.imap_unordered(run, range(1, runs + 1)):
            outcomes.append(outcome)
            print(f"run {len(outcomes)} of {runs}", file=sys.stderr, flush=True)
    keys = {**report(outcomes), "wall_s": round(time.monotonic() - begin, 1)}
    wanted = {
        "false_deaths_per_1000_node_hours": "<= 1",
        "suspected_everywhere_s_p50": "<= 3",
        "declared_everywhere_s_p99": "<= 10",
    }
    finish(
        [("what", "value", "wanted"), *((k, str(v), wanted.get(k, "")) for k, v in keys.items())],
        keys,
        args.json,
    )


if __name__ == "__main__":
    main()
