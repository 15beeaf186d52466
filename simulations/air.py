"""What lies between nodes: the same for all pairs, or by how far apart they fly and by the hour of the day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import combinations
from math import cos, hypot, pi, sin
from random import Random
from typing import TYPE_CHECKING

from mesh.types import Address
from simulations.network import Path
from simulations.scenario import NodeKind, Scenario, time_ns

if TYPE_CHECKING:
    from simulations.network import Network

_LOOK_S = 0.5
_FADES_FROM = 0.7
"""Of the range: from here on a radio gets worse."""
_FADED_LOSS, _FADED_RATE = 0.5, 0.8


def sun(now_ns: int, day_ns: int) -> float:
    """How high it stands, 0 to 1; a scenario begins at sunrise."""
    return max(0.0, sin(2 * pi * now_ns / day_ns))


class Air:
    """Paths of a scenario. Nodes that fly go round a circle about their place."""

    def __init__(
        self, scenario: Scenario, kinds: dict[str, NodeKind], rng: Random, now_ns: Callable[[], int]
    ) -> None:
        radio = scenario.radio
        self._now_ns, self._day_ns = now_ns, time_ns(scenario.day)
        self._range_m, self._busy = radio.range_m, radio.busy
        self._base = Path(
            time_ns(radio.latency),
            time_ns(radio.jitter),
            radio.mbit * 1e6 / 8,
            radio.loss,
            radio.duplicate,
            radio.reorder,
        )
        self._places = {Address(f"{n}:7070"): _place(k, rng) for n, k in kinds.items()}
        self._apart: set[tuple[Address, Address]] = set()

    def path(self, source: Address, target: Address) -> Path:
        """Of a message that is sent now."""
        if not self._range_m and not self._busy:
            return self._base
        base, rate, loss = self._base, self._base.bytes_per_s, self._base.loss
        if self._busy:
            rate *= 1 - self._busy * sun(self._now_ns(), self._day_ns)
        if self._range_m:
            far = self._distance_m(source, target) / self._range_m
            fade = min(1.0, max(0.0, (far - _FADES_FROM) / (1 - _FADES_FROM)))
            rate, loss = rate * (1 - _FADED_RATE * fade), min(1.0, loss + _FADED_LOSS * fade * fade)
        return Path(base.latency_ns, base.jitter_ns, rate, loss, base.duplicate, base.reorder)

    def _distance_m(self, a: Address, b: Address) -> float:
        (ax, ay), (bx, by) = self._at(a), self._at(b)
        return hypot(ax - bx, ay - by)

    def _at(self, address: Address) -> tuple[float, float]:
        x, y, orbit_m, lap_ns, phase = self._places[address]
        angle = 2 * pi * (self._now_ns() / lap_ns + phase)
        return (x + orbit_m * cos(angle), y + orbit_m * sin(angle)) if orbit_m else (x, y)

    async def watch(self, network: Network, calm: Callable[[], bool]) -> None:
        """Cut off who is out of range of whom, until all is ``calm``: then everybody comes near."""
        while self._range_m:
            pairs: set[tuple[Address, Address]] = set()
            if not calm():
                for a, b in combinations(self._places, 2):
                    if self._distance_m(a, b) > self._range_m:
                        pairs |= {(a, b), (b, a)}
            network.cut(pairs - self._apart)
            network.heal(self._apart - pairs)
            self._apart = pairs
            await asyncio.sleep(_LOOK_S)


def _place(kind: NodeKind, rng: Random) -> tuple[float, float, float, int, float]:
    """Its middle, how far about it it flies, how long a lap takes, and where in the lap it begins."""
    far, angle = kind.spread_m * rng.random() ** 0.5, 2 * pi * rng.random()
    x, y = kind.place
    return (
        x + far * cos(angle),
        y + far * sin(angle),
        kind.orbit_m,
        max(1, time_ns(kind.lap)),
        rng.random(),
    )
