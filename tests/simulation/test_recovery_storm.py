"""Nodes die, freeze, lose power and are cut off all the time, in virtual time, under the production agent's code. A token
depends on everything before it through every stage: one frame lost, doubled or taken from an old epoch, and the text differs."""

from __future__ import annotations

from collections import Counter

import pytest

from simulations.run import simulate
from simulations.scenario import read_scenario

STORM = """
name = "storm"
time = "80s"
quiet = "25s"
patience = "60s"
replay = "{replay}"
recovery = "{recovery}"
log_mib = {log_mib}

[load]
each = "exponential(400ms)"
prompt = [3, 90]
tokens = [10, 60]

[[nodes]]
kind = "host"
count = 12
ingress = false

[[nodes]]
kind = "gateway"
count = 2
hosts = false

[[faults]]
what = "crash"
every = "exponential(500ms)"
who = "host"
duration = "uniform(100ms, 2s)"

[[faults]]
what = "freeze"
every = "exponential(1s)"
who = "host"
duration = "uniform(100ms, 1500ms)"

[[faults]]
what = "power"
every = "exponential(4s)"
who = "host"

[[faults]]
what = "partition"
every = "exponential(2s)"
duration = "uniform(100ms, 2s)"

[[faults]]
what = "one-way"
every = "exponential(4s)"
duration = "uniform(100ms, 2s)"

[[faults]]
what = "crash"
every = "exponential(10s)"
who = "gateway"
"""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("changes", "rung"),
    [
        ({}, "warm"),
        ({"replay": "fast"}, "warm"),
        ({"log_mib": 1}, "ingress"),
        ({"recovery": "hot"}, "hot"),
    ],
    ids=["warm exact", "warm fast", "log full", "hot"],
)
def test_r2_r4_r5_no_token_is_lost_repeated_or_changed_in_a_storm(
    changes: dict[str, object], rung: str, seed: int
) -> None:
    settings = {"replay": "exact", "recovery": "warm", "log_mib": 256, **changes}
    outcome = simulate(read_scenario(STORM.format(**settings), "storm"), seed)
    world = outcome.world
    assert not world.violations, world.violations[:5]
    assert sum(world.faults.values()) > 100, world.faults
    rungs = Counter(rung for rung, _ in world.stalls_us())
    assert rungs[rung] > 10, rungs
    failed = [r.error for r in world.requests if r.error]
    # Two machines at once may hold the only copies of a session's tokens: that is told, not hidden.
    assert len(failed) <= 0.05 * len(world.requests), failed
