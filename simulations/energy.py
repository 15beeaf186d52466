"""Batteries: what idling and computing draw, chargers and the sun; who runs low hands over and leaves, to come back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh.capabilities import Battery
from node_agent.hysteresis import below_floor
from simulations.air import sun
from simulations.scenario import NodeKind, draw

if TYPE_CHECKING:
    from simulations.world import World

S = 1_000_000_000
_LOOK_S = 2.0
_WAKES_AT = 15
"""Percent over ``land_at`` at which a node that slept until the sun charged it starts again."""


class Cell:
    """The battery of one node, over all its lives."""

    def __init__(self, world: World, name: str, kind: NodeKind, day_ns: int) -> None:
        self._world, self._name, self._kind, self._day_ns = world, name, kind, day_ns
        self._spec, self._rng = world.specs[name], world.random(f"battery {name}")
        self._left_wh = kind.battery_wh * self._rng.uniform(0.5, 1.0)

    async def drain(self, calm: Callable[[], bool]) -> None:
        """As long as the scenario runs; once it is ``calm`` nobody runs low any more, and who is away comes back."""
        spec, low, busy_ns = self._spec, False, self._spec.busy_ns
        while True:
            await asyncio.sleep(_LOOK_S)
            node = self._world.nodes.get(self._name)
            if node is None or calm():
                continue
            share = min(1.0, (spec.busy_ns - busy_ns) / (_LOOK_S * S))
            busy_ns = spec.busy_ns
            self._use(self._kind.idle_w + self._kind.busy_w * share)
            low = below_floor(low, self._told(), self._kind.land_at)
            node.draining = low
            if (low and not node.replicas_busy()) or self._left_wh <= 0:
                self._world.crash(self._name, silently=self._left_wh <= 0)
                await self._charge(calm)
                low, busy_ns = False, spec.busy_ns
                self._world.start(self._name)

    def _use(self, power_w: float) -> None:
        kind = self._kind
        gained_w = kind.solar_w * sun(self._world.loop.now_ns, self._day_ns)
        left_wh = self._left_wh + (gained_w - power_w) * _LOOK_S / 3600
        self._left_wh = min(kind.battery_wh, max(0.0, left_wh))
        self._world.energy_wh += power_w * _LOOK_S / 3600
        self._spec.battery = Battery(self._percent, gained_w > power_w, self._left_wh, power_w)

    def _told(self) -> Battery:
        battery = self._spec.battery
        assert battery is not None
        return battery

    @property
    def _percent(self) -> int:
        return math.floor(100 * self._left_wh / self._kind.battery_wh)

    async def _charge(self, calm: Callable[[], bool]) -> None:
        """Until it may start again: charged full at its charger, or by the sun as far as it needs to be."""
        kind, world = self._kind, self._world
        if kind.solar_w:
            world.tell(f"{self._name} sleeps")
            while self._percent < kind.land_at + _WAKES_AT and not calm():
                await asyncio.sleep(_LOOK_S)
                self._use(0.0)
            world.tell(f"{self._name} wakes")
        else:
            until_ns = world.loop.now_ns + draw(kind.charging).ns(self._rng)
            while world.loop.now_ns < until_ns and not calm():
                await asyncio.sleep(min(_LOOK_S, max(0.0, (until_ns - world.loop.now_ns) / S)))
            world.tell(f"{self._name} is charged")
            self._left_wh = kind.battery_wh
        self._spec.battery = Battery(self._percent, False, self._left_wh, kind.idle_w)


def full(kind: NodeKind) -> Battery | None:
    """What a node begins with; ``None``: a cable."""
    return Battery(100, False, kind.battery_wh, kind.idle_w) if kind.battery_wh else None
