"""Random scenarios: for each seed another mesh, another load and another choice of faults.

A run with everything in it hides bugs: what one fault brings about, the next one clears away. So each scenario leaves
most kinds of fault out (swarm testing, Groce et al., ISSTA 2012) and is harsh with those that are left.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from simulations.scenario import Fault, Load, Model, NodeKind, Radio, Scenario, time_ns

S = 1_000_000_000
_QUIET_SHARE = 0.4
_QUIET_MAX_S = 40
_POLICY = '[models.smollm2-135m]\nreplicas = {replicas}\nsessions = 8\nrecovery = "{recovery}"\n'
_FAULTS = (
    Fault(what="crash", every="exponential(3s)", duration="uniform(200ms, 4s)"),
    Fault(what="power", every="exponential(8s)", duration="uniform(1s, 6s)"),
    Fault(what="wipe", every="exponential(15s)", duration="uniform(1s, 6s)"),
    Fault(what="restart", every="exponential(8s)"),
    Fault(what="freeze", every="exponential(3s)", duration="uniform(50ms, 3s)"),
    Fault(what="partition", every="exponential(5s)", duration="uniform(100ms, 5s)"),
    Fault(what="one-way", every="exponential(6s)", duration="uniform(100ms, 4s)"),
    Fault(what="slow", every="exponential(6s)", duration="uniform(1s, 8s)", factor=8.0),
    Fault(what="disk", every="exponential(5s)", duration="uniform(500ms, 5s)", factor=60.0),
    Fault(what="clock", every="exponential(5s)", duration="uniform(1s, 1h)"),
    Fault(what="corrupt", every="exponential(6s)", duration="uniform(50ms, 1s)"),
    Fault(what="consul", every="exponential(15s)", duration="uniform(2s, 20s)"),
    Fault(what="update", every="exponential(20s)", duration="uniform(3s, 10s)", count=2, wave="3s"),
)


def random_scenario(seed: int, time: str) -> Scenario:
    """The scenario of a seed; ``time``: how long it runs."""
    rng = Random(seed)
    quiet_s = min(_QUIET_MAX_S, int(_QUIET_SHARE * time_ns(time) / S))
    cuts = sorted(rng.sample(range(1, 30), rng.randint(0, 4)))
    stages, replicas = len(cuts) + 1, rng.randint(2, 3)
    placed = rng.random() < 0.4
    recovery: Literal["warm", "hot"] = rng.choice(("warm", "warm", "hot"))
    hosts = NodeKind(
        kind="host",
        count=max(3, stages * replicas) + rng.randint(0, 2),
        ingress=rng.random() < 0.5,
        speed=rng.choice((0.3, 1.0, 2.0)),
        slots=rng.choice((4, 16)),
        memory_mib=rng.choice((500, 900, 2000)) if placed else 2000,
        drift_ppm=rng.choice((0, 0, 300)),
    )
    gateways = NodeKind(kind="gateway", count=rng.randint(1, 3), hosts=False)
    return Scenario(
        name=f"swarm-{seed}",
        about="drawn at random",
        time=time,
        quiet=f"{quiet_s}s",
        patience="60s",
        profile=rng.choice(("lan", "lan", "wan")),
        replay=rng.choice(("exact", "fast")),
        recovery=recovery,
        log=rng.choice(("async", "async", "off")),
        log_mib=rng.choice((1, 256)),
        consul=rng.random() < 0.3,
        policy=_POLICY.format(replicas=replicas, recovery=recovery) if placed else "",
        model=Model(cuts=tuple(cuts)),
        radio=Radio(
            latency=rng.choice(("200us", "2ms", "20ms")),
            loss=rng.choice((0.0, 0.0, 0.05)),
            duplicate=rng.choice((0.0, 0.1)),
            reorder=rng.choice((0.0, 0.1)),
        ),
        load=Load(
            each=rng.choice(("exponential(700ms)", "exponential(3s)", "exponential(10s)")),
            prompt=rng.choice(((2, 20), (20, 200))),
            tokens=rng.choice(((1, 8), (10, 80))),
        ),
        nodes=(hosts, gateways),
        faults=tuple(rng.sample(_FAULTS, rng.randint(1, 4))),
    )
