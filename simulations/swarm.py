"""Random scenarios: for each seed another mesh, another load and another choice of faults.

A run with everything in it hides bugs: what one fault brings about, the next one clears away. So each scenario leaves
most kinds of fault out (swarm testing, Groce et al., ISSTA 2012) and is harsh with those that are left.
"""

from __future__ import annotations

from random import Random
from typing import Literal

import msgspec

from simulations.scenario import Fault, Load, Model, NodeKind, Radio, Scenario, time_ns

S = 1_000_000_000
_QUIET_SHARE = 0.4
_QUIET_MAX_S = 40
_POLICY = '[models.smollm2-135m]\nreplicas = {replicas}\nsessions = 4\nrecovery = "{recovery}"\n'
_SPECULATING, _FEW_TOKENS = 0.3, 5
"""Share of scenarios in which tokens are guessed, and how many there are then: a third of the guesses comes true."""
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
_RESETS, _RESET_SHARE = Fault(what="reset", every="exponential(2s)", duration="uniform(1ms, 200ms)"), 0.3
_ALIKE_SHARE = 0.4
_NOMAD_FAULTS = (
    Fault(what="nomad", every="exponential(15s)", duration="uniform(2s, 20s)"),
    Fault(what="drain", every="exponential(10s)", duration="uniform(1s, 10s)"),
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
        memory_mib=rng.choice((700, 900, 2000)) if placed else 2000,
        drift_ppm=rng.choice((0, 0, 300)),
    )
    gateways = NodeKind(kind="gateway", count=rng.randint(1, 3), hosts=False)
    nomad = placed and rng.random() < 0.5
    faults = _FAULTS + _NOMAD_FAULTS if nomad else _FAULTS
    load = rng.choice((Load(prompt=(2, 20), tokens=(1, 8)), Load(prompt=(20, 200), tokens=(10, 80))))
    clients = gateways.count + (hosts.count if hosts.ingress else 0)
    each_s = clients * _busy_s(load, hosts.speed) / (replicas * rng.choice((0.05, 0.2, 0.4)))
    drawn = Scenario(
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
        nomad=nomad,
        policy=_POLICY.format(replicas=replicas, recovery=recovery) if placed else "",
        model=Model(cuts=tuple(cuts)),
        radio=Radio(
            latency=rng.choice(("200us", "2ms", "20ms")),
            loss=rng.choice((0.0, 0.0, 0.05)),
            duplicate=rng.choice((0.0, 0.1)),
            reorder=rng.choice((0.0, 0.1)),
        ),
        load=msgspec.structs.replace(load, each=f"exponential({max(20, int(each_s * 1000))}ms)"),
        nodes=(hosts, gateways),
        faults=tuple(rng.sample(faults, rng.randint(1, 4))),
    )
    if rng.random() < _SPECULATING:
        model = msgspec.structs.replace(drawn.model, vocabulary=_FEW_TOKENS)
        drawn = msgspec.structs.replace(drawn, speculation="on", model=model)
    if rng.random() < _RESET_SHARE:
        drawn = msgspec.structs.replace(drawn, faults=(*drawn.faults, _RESETS))
    if rng.random() < _ALIKE_SHARE:
        drawn = msgspec.structs.replace(drawn, load=msgspec.structs.replace(drawn.load, alike=0.7))
    return drawn


def _busy_s(load: Load, speed: float) -> float:
    """How long a request keeps one copy of the model busy, about: a mesh with more to do than it can shows nothing."""
    model = Model()
    prompt, tokens = sum(load.prompt) / 2, sum(load.tokens) / 2
    token_us = model.layers * model.layer_us + model.head_us
    return (tokens * token_us + prompt * model.layers * model.prefill_us) / speed / 1e6
