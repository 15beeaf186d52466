"""Many runs: seeds that break something, smaller scenarios that break the same, and tables of what-ifs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.errors import ConfigError
from simulations.run import Outcome, simulate
from simulations.scenario import Scenario, draw, read_scenario, time_ns

_S = 1_000_000_000
_LEAST_NS = 10 * _S
_REPLICAS = re.compile(r"\breplicas *= *\d+")


@dataclass(frozen=True, slots=True)
class Found:
    """A run that broke something."""

    scenario: Scenario
    seed: int
    what: str


def search(
    scenario_of: Callable[[int], Scenario], seeds: Iterator[int], told: Callable[[int], None]
) -> tuple[Found | None, int]:
    """The first seed that breaks something, and how many were tried; each runs a scenario of its own, or all the same."""
    tried = 0
    for seed in seeds:
        told(seed)
        tried += 1
        scenario = scenario_of(seed)
        broken = breaks(scenario, seed)
        if broken is not None:
            return Found(scenario, seed, broken), tried
    return None, tried


def breaks(scenario: Scenario, seed: int) -> str | None:
    """What a run breaks first, if anything."""
    outcome = simulate(scenario, seed)
    return outcome.world.violations[0].what if outcome.world.violations else None


def shrink(found: Found, told: Callable[[str], None]) -> Found:
    """The smallest scenario, by leaving out faults, nodes and time, that still breaks something at this seed."""
    best, changed = found, True
    while changed:
        changed = False
        for what, smaller in _smaller(best.scenario):
            broken = breaks(smaller, best.seed)
            if broken is not None:
                told(what)
                best, changed = Found(smaller, best.seed, broken), True
                break
    return best


def _smaller(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    for i, fault in enumerate(scenario.faults):
        rest = scenario.faults[:i] + scenario.faults[i + 1 :]
        yield f"without {fault.what}", msgspec.structs.replace(scenario, faults=rest)
    half_ns = time_ns(scenario.time) // 2
    if half_ns > max(_LEAST_NS, time_ns(scenario.quiet)):
        yield f"{half_ns // _S} s", msgspec.structs.replace(scenario, time=f"{half_ns // _S}s")
    for i, kind in enumerate(scenario.nodes):
        if kind.count > 1:
            fewer = msgspec.structs.replace(kind, count=kind.count - max(1, kind.count // 4))
            nodes = (*scenario.nodes[:i], fewer, *scenario.nodes[i + 1 :])
            smaller = msgspec.structs.replace(scenario, nodes=nodes)
            if scenario.policy or sum(n.count for n in nodes if n.hosts) > len(scenario.model.cuts):
                yield f"{fewer.count} of {kind.kind}", smaller


def with_setting(scenario: Scenario, key: str, value: str) -> Scenario:
    """A scenario with one thing changed: ``replicas`` (of each layer), ``churn`` (how often nodes go, 2 is twice
    as often), ``nodes`` (about so many in all, kinds in proportion), or a top-level key. Raises ``ConfigError``."""
    if key in ("replicas", "churn", "nodes"):
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not number > 0:
            raise ConfigError(f"{key}={value}: write numbers above 0, for example {key}=3")
        if key == "replicas" and scenario.policy:
            policy, found = _REPLICAS.subn(f"replicas = {int(number)}", scenario.policy)
            if not found:
                raise ConfigError(f"{key}: the scenario's policy does not say replicas = N")
            return msgspec.structs.replace(scenario, policy=policy)
        change = {"replicas": _with_count, "churn": _with_churn, "nodes": _with_nodes}[key]
        nodes = tuple(change(kind, number, scenario) for kind in scenario.nodes)
        return msgspec.structs.replace(scenario, nodes=nodes)
    if key not in Scenario.__struct_fields__ or not isinstance(getattr(scenario, key), str):
        known = [k for k in Scenario.__struct_fields__ if isinstance(getattr(scenario, k), str)]
        raise ConfigError(f"{key}: there are replicas, churn, nodes, {', '.join(known)}")
    changed = {**msgspec.to_builtins(scenario), key: value}
    return read_scenario(json.dumps(changed), f"{key}={value}")


def _with_count(kind: Any, number: float, scenario: Scenario) -> Any:
    count = int(number) * (len(scenario.model.cuts) + 1)
    return msgspec.structs.replace(kind, count=count) if kind.hosts else kind


def _with_nodes(kind: Any, number: float, scenario: Scenario) -> Any:
    now = sum(k.count for k in scenario.nodes)
    return msgspec.structs.replace(kind, count=max(1, round(kind.count * number / now)))


def _with_churn(kind: Any, number: float, scenario: Scenario) -> Any:
    if not kind.up:
        return kind
    up = draw(kind.up)
    if up.shape in ("weibull", "pareto"):
        text = f"{up.shape}({up.first:g}, {int(up.second / number)}ns)"
    elif up.shape == "uniform":
        text = f"uniform({int(up.first / number)}ns, {int(up.second / number)}ns)"
    else:
        mean = f"{int(up.first / number)}ns"
        text = f"exponential({mean})" if up.shape == "exponential" else mean
    return msgspec.structs.replace(kind, up=text)


def sweep(
    scenario: Scenario, axes: dict[str, list[str]], seeds: int, told: Callable[[str], None]
) -> list[tuple[dict[str, str], list[Outcome]]]:
    """Every combination of the axes' values, with so many seeds each."""
    points: list[tuple[dict[str, str], Scenario]] = [({}, scenario)]
    for key, values in axes.items():
        points = [({**at, key: v}, with_setting(s, key, v)) for at, s in points for v in values]
    found = []
    for at, changed in points:
        told(" ".join(f"{k}={v}" for k, v in at.items()))
        found.append((at, [simulate(changed, seed) for seed in range(1, seeds + 1)]))
    return found
