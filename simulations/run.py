"""A scenario, run: nodes start, clients ask, faults happen; in the end everything must have come to its end."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from mesh.capabilities import Battery
from mesh.types import Address, Digest, LayerRange, ModelRef, ModelShape, ShardInfo
from node_agent.config import AgentConfig
from node_agent.hysteresis import below_floor
from scheduler.speed import LayerSpeed, stage_speed
from simulations.network import Path
from simulations.node import NodeSpec
from simulations.scenario import LONGEST_NS, Draw, Fault, NodeKind, Scenario, draw, names_of, time_ns
from simulations.virtual_time import VirtualLoop
from simulations.world import World

S = 1_000_000_000
_WIDTH, _VOCABULARY, _CONTEXT = 576, 512, 2048
_KV_LAYER_BYTES, _LAYER_BYTES = 1536, 3_600_000
_KNIT_S = 3.0
_KNOWN_S = 10
"""Once everything is up again, everybody knows within so long."""
_BATTERY_S = 2.0
_TAIL = 1.4


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is over."""

    scenario: Scenario
    seed: int
    world: World
    events: int
    """Callbacks of the virtual loop."""


def simulate(
    scenario: Scenario, seed: int, progress: Callable[[float], None] = lambda share: None
) -> Outcome:
    """Run it to its end; ``progress`` is told the share of virtual time that has passed."""
    # What agents say of their losses is in the story; a thousand of them would flood a terminal.
    logging.getLogger("node_agent").setLevel(logging.CRITICAL)
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        run = _Run(scenario, seed, loop, progress)
        loop.run_until_complete(run.all())
        loop.wind_up()
        return Outcome(scenario, seed, run.world, loop.callbacks)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class _Run:
    def __init__(
        self, scenario: Scenario, seed: int, loop: VirtualLoop, progress: Callable[[float], None]
    ) -> None:
        self.scenario, self.loop, self.progress = scenario, loop, progress
        self.end_ns = time_ns(scenario.time)
        self.calm_ns = self.end_ns - time_ns(scenario.quiet)
        model = scenario.model
        digest = Digest(f"{len(model.name):02x}" * 32)
        self.shape = ModelShape(ModelRef(model.name, digest), model.layers, _WIDTH, _VOCABULARY, _CONTEXT)
        edges = (0, *model.cuts, model.layers)
        cuts = tuple(LayerRange(a, b) for a, b in pairwise(edges))
        radio = scenario.radio
        path = Path(time_ns(radio.latency), time_ns(radio.jitter), radio.mbit * 1e6 / 8, radio.loss)
        config = replace(
            AgentConfig(),
            context=_CONTEXT,
            profile=scenario.profile,
            replay=scenario.replay,
            recovery=scenario.recovery,
            log=scenario.log,
            log_limit=scenario.log_mib,
        )
        patience_s = time_ns(scenario.patience) / S
        self.world = World(loop, seed, self.shape, cuts, config, lambda a, b: path, patience_s)
        self.kinds = dict(names_of(scenario))
        self._deal(cuts)
        self._tasks: list[asyncio.Task[None]] = []

    def _deal(self, cuts: tuple[LayerRange, ...]) -> None:
        """Ranges of layers in turn to the nodes that host."""
        model, given = self.scenario.model, 0
        for name, kind in self.kinds.items():
            known = LayerSpeed(
                self.shape.ref.digest,
                "onnx",
                "int8",
                model.layer_us / kind.speed,
                model.head_us / kind.speed,
                model.row_share,
                model.prefill_us / kind.speed,
                _TAIL,
                model.context_us / kind.speed,
            )
            shards: tuple[ShardInfo, ...] = ()
            if kind.hosts:
                layers = cuts[given % len(cuts)]
                given += 1
                shards = (self._shard(layers),)
            spec = NodeSpec(
                name,
                kind.kind,
                Address(f"{name}:7070"),
                shards,
                stage_speed(shards[0], known) if shards else None,
                slots=kind.slots,
                battery=Battery(100, False, kind.battery_wh, kind.idle_w) if kind.battery_wh else None,
            )
            self.world.specs[name] = spec

    def _shard(self, layers: LayerRange) -> ShardInfo:
        digest = Digest(f"{layers.start:02x}{layers.end:02x}" * 16)
        count = len(layers)
        return ShardInfo(
            self.shape, layers, "onnx", "int8", digest, count * _LAYER_BYTES, count * _KV_LAYER_BYTES
        )

    async def all(self) -> None:
        """From the first start to the last answer."""
        world = self.world
        for name in self.kinds:
            world.start(name)
        await asyncio.sleep(_KNIT_S)
        for name, kind in self.kinds.items():
            if kind.ingress:
                self._go(self._client(name))
                if self.scenario.load.crowd_at:
                    self._go(self._client(name, crowd=True))
            if kind.up:
                self._go(self._churn(name, kind))
            if kind.battery_wh:
                self._go(self._battery(name, kind))
            if kind.out_of_range:
                self._go(self._fly(name, kind))
        for number, fault in enumerate(self.scenario.faults):
            self._go(self._fault(fault, world.random(f"fault {number}")))
        while self.loop.now_ns < self.end_ns:
            await asyncio.sleep(min(1.0, (self.end_ns - self.loop.now_ns) / S))
            world.sample()
            if world.calm_ns < 0 and self._calm and world.whole():
                world.calm_ns = self.loop.now_ns + _KNOWN_S * S
            self.progress(min(1.0, self.loop.now_ns / self.end_ns))
        for task in self._tasks:
            task.cancel()
        await world.finish()

    def _go(self, work: object) -> None:
        self._tasks.append(self.loop.create_task(work))  # type: ignore[arg-type]

    async def _wait(self, how: Draw, rng: Random) -> None:
        await asyncio.sleep(how.ns(rng) / S)

    @property
    def _calm(self) -> bool:
        """Faults have ended."""
        return self.loop.now_ns >= self.calm_ns

    async def _client(self, name: str, crowd: bool = False) -> None:
        """Asks all the time; or, as part of a ``crowd``, for a while and more often."""
        load = self.scenario.load
        rng, each = self.world.random(f"{'crowd' if crowd else 'load'} {name}"), draw(load.each)
        until_ns, hurry = LONGEST_NS, 1.0
        if crowd:
            begin_ns = time_ns(load.crowd_at)
            await asyncio.sleep(max(0.0, (begin_ns - self.loop.now_ns) / S))
            until_ns, hurry = begin_ns + time_ns(load.crowd_for), load.crowd
        while True:
            await asyncio.sleep(each.ns(rng) / S / hurry)
            if self.loop.now_ns >= until_ns:
                return
            prompt = tuple(rng.randrange(1, _VOCABULARY) for _ in range(rng.randint(*load.prompt)))
            self.world.ask(name, prompt, rng.randint(*load.tokens))

    async def _churn(self, name: str, kind: NodeKind) -> None:
        rng, up, down = self.world.random(f"churn {name}"), draw(kind.up), draw(kind.down)
        while True:
            await self._wait(up, rng)
            if self._calm or name not in self.world.nodes:
                return
            self.world.crash(name, rng.random() < kind.silent, rng.random() < kind.wiped)
            await self._wait(down, rng)
            self.world.start(name)

    async def _fly(self, name: str, kind: NodeKind) -> None:
        rng, every, away = self.world.random(f"flight {name}"), draw(kind.out_of_range), draw(kind.away)
        while True:
            await self._wait(every, rng)
            if self._calm:
                return
            self.world.part([name], away.ns(rng) / S)

    async def _battery(self, name: str, kind: NodeKind) -> None:
        """Drains with what it computes; at the floor it hands over and leaves, to come back charged."""
        spec, rng = self.world.specs[name], self.world.random(f"battery {name}")
        left_wh, busy_ns = kind.battery_wh * rng.uniform(0.5, 1.0), spec.busy_ns
        low = False
        while True:
            await asyncio.sleep(_BATTERY_S)
            node = self.world.nodes.get(name)
            if node is None:
                continue
            share = min(1.0, (spec.busy_ns - busy_ns) / (_BATTERY_S * S))
            power_w, busy_ns = kind.idle_w + kind.busy_w * share, spec.busy_ns
            left_wh = max(0.0, left_wh - power_w * _BATTERY_S / 3600)
            self.world.energy_wh += power_w * _BATTERY_S / 3600
            percent = math.floor(100 * left_wh / kind.battery_wh)
            spec.battery = Battery(percent, False, left_wh, power_w)
            low = below_floor(low, spec.battery, kind.land_at)
            node.draining = low
            if (low and not node.replicas_busy()) or left_wh <= 0:
                self.world.crash(name, silently=left_wh <= 0)
                self.world.tell(f"{name} is charged")
                await self._wait(draw(kind.charging), rng)
                left_wh, low = kind.battery_wh, False
                spec.battery = Battery(100, False, left_wh, kind.idle_w)
                self.world.start(name)

    async def _fault(self, fault: Fault, rng: Random) -> None:
        length = draw(fault.duration)
        if fault.at:
            await asyncio.sleep(max(0.0, (time_ns(fault.at) - self.loop.now_ns) / S))
            self._break(fault, rng, length)
            return
        every = draw(fault.every)
        while True:
            await self._wait(every, rng)
            if self._calm:
                return
            self._break(fault, rng, length)

    def _break(self, fault: Fault, rng: Random, length: Draw) -> None:
        world = self.world
        able = sorted(n for n in world.nodes if fault.who in ("", n, self.kinds[n].kind))
        chosen = rng.sample(able, min(fault.count, len(able)))
        if fault.what in ("partition", "one-way") and chosen:
            world.part(chosen, length.ns(rng) / S, fault.what == "one-way")
            return
        for name in chosen:
            for_s = length.ns(rng) / S
            match fault.what:
                case "freeze":
                    world.freeze(name, for_s)
                case "slow":
                    world.slow(name, fault.factor, for_s)
                case _:
                    world.crash(name, fault.what == "power")
                    self.loop.call_later(for_s, self._again, name)

    def _again(self, name: str) -> None:
        if name not in self.world.nodes:
            self.world.start(name)
