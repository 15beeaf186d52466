"""What breaks, and how it is mended: the faults of a scenario, and churn by distributions or traces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from simulations.scenario import Draw, Fault, NodeKind, draw, region_of, time_ns

if TYPE_CHECKING:
    from simulations.world import World

S = 1_000_000_000
_RESTART_S = 2.0
"""Until a process that was ended on purpose listens again."""


class Faults:
    """Does to nodes what a scenario says, until all is ``calm``."""

    def __init__(self, world: World, kinds: dict[str, NodeKind], calm: Callable[[], bool]) -> None:
        self._world, self._kinds, self._calm, self._loop = world, kinds, calm, world.loop

    async def churn(self, name: str, kind: NodeKind) -> None:
        """A node goes and comes back, again and again."""
        rng, up, down = self._world.random(f"churn {name}"), draw(kind.up), draw(kind.down)
        while True:
            await _wait(up, rng)
            if self._calm() or name not in self._world.nodes:
                return
            self._world.crash(name, rng.random() < kind.silent, rng.random() < kind.wiped)
            await _wait(down, rng)
            self._again(name)

    async def follow(self, name: str, kind: NodeKind) -> None:
        """A node is up when its trace says so, and down before, between and after that."""
        rng = self._world.random(f"trace {name}")

        def go() -> None:
            if not self._calm():
                self._world.crash(name, rng.random() < kind.silent, rng.random() < kind.wiped)

        for node, up_s, down_s in kind.intervals:
            if node != name:
                continue
            if self._loop.now_ns < up_s * S:
                go()
                await self._sleep_until(up_s)
                self._again(name)
            await self._sleep_until(down_s)
        go()

    async def _sleep_until(self, at_s: float) -> None:
        while not self._calm() and self._loop.now_ns < at_s * S:
            await asyncio.sleep(min(1.0, at_s - self._loop.now_ns / S))

    async def fly(self, name: str, kind: NodeKind) -> None:
        """A node is out of range of all others, now and then."""
        rng = self._world.random(f"flight {name}")
        every, away = draw(kind.out_of_range), draw(kind.away)
        while True:
            await _wait(every, rng)
            if self._calm():
                return
            self._world.part([name], away.ns(rng) / S)

    async def happen(self, fault: Fault, rng: Random) -> None:
        """One fault of the scenario, once or again and again."""
        if fault.at:
            await asyncio.sleep(max(0.0, (time_ns(fault.at) - self._loop.now_ns) / S))
            await self._break(fault, rng)
            return
        every = draw(fault.every)
        while True:
            await _wait(every, rng)
            if self._calm():
                return
            await self._break(fault, rng)

    async def _break(self, fault: Fault, rng: Random) -> None:
        world, length = self._world, draw(fault.duration)
        able = sorted(n for n in world.nodes if fault.who in self._names(n))
        chosen = rng.sample(able, min(fault.count, len(able)))
        match fault.what:
            case "partition" | "one-way":
                if chosen:
                    world.part(chosen, length.ns(rng) / S, fault.what == "one-way")
            case "consul":
                world.lose_consul(length.ns(rng) / S)
            case "nomad":
                world.lose_nomad(length.ns(rng) / S)
            case "drain":
                await asyncio.gather(*(self._drain(name, length.ns(rng) / S) for name in chosen))
            case "update":
                await self._roll_out(fault, able, rng, length)
            case _:
                for name in chosen:
                    self._break_one(fault, name, length.ns(rng) / S, rng)

    def _names(self, node: str) -> tuple[str, ...]:
        """By what a fault may name a node; the empty string names all."""
        kind = self._kinds[node]
        return ("", node, kind.kind, region_of(node, kind))

    def _break_one(self, fault: Fault, name: str, for_s: float, rng: Random) -> None:
        world = self._world
        match fault.what:
            case "freeze":
                world.freeze(name, for_s)
            case "reset":
                world.reset(name, for_s)
            case "slow":
                world.slow(name, fault.factor, for_s)
            case "disk":
                world.slow_disk(name, fault.factor / 1000, for_s)
            case "corrupt":
                world.corrupt(name, for_s)
            case "clock":
                world.set_clock(name, rng.choice((-1, 1)) * for_s)
            case "restart":
                self._restart(name)
            case _:
                world.crash(name, fault.what == "power", fault.what == "wipe")
                self._loop.call_later(for_s, self._again, name)

    async def _roll_out(self, fault: Fault, able: list[str], rng: Random, length: Draw) -> None:
        """An update that makes nodes slower, ``count`` of them a wave; each is rolled back after its time."""
        rng.shuffle(able)
        for first in range(0, len(able), fault.count):
            if self._calm():
                return
            for name in able[first : first + fault.count]:
                for_s = length.ns(rng) / S
                self._restart(name)
                self._world.slow(name, fault.factor, for_s)
                self._loop.call_later(for_s, self._restart, name)
            await asyncio.sleep(time_ns(fault.wave) / S)

    async def _drain(self, name: str, for_s: float) -> None:
        """Nomad drains a client; when its time is up, or faults end, its machine is rebooted."""
        self._world.drain(name)
        await self._sleep_until(self._loop.now_ns / S + for_s)
        await self._world.reboot(name, _RESTART_S)

    def _restart(self, name: str) -> None:
        self._world.crash(name)
        self._loop.call_later(_RESTART_S, self._again, name)

    def _again(self, name: str) -> None:
        if name not in self._world.nodes:
            self._world.start(name)


async def _wait(how: Draw, rng: Random) -> None:
    await asyncio.sleep(how.ns(rng) / S)
