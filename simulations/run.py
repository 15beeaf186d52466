"""A scenario, run: nodes start, clients ask, faults happen; in the end everything must have come to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from zlib import crc32

from mesh.types import Address, LayerRange
from node_agent.config import AgentConfig
from scheduler.routing import models_served
from simulations.air import Air
from simulations.energy import Cell, full
from simulations.faults import Faults
from simulations.model import CONTEXT, SimModel
from simulations.node import NodeSpec
from simulations.scenario import LONGEST_NS, NodeKind, Scenario, draw, names_of, region_of, time_ns
from simulations.virtual_time import VirtualLoop
from simulations.world import World

S = 1_000_000_000
_KNIT_S = 3.0
_KNOWN_S = 10
"""Once everything is up again, everybody knows within so long."""
_DEPLOYED_NS = 120 * S
_GARBAGE = (200_000, 20, 1000)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is over."""

    scenario: Scenario
    seed: int
    world: World
    events: int
    """Callbacks of the virtual loop."""


def simulate(
    scenario: Scenario,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
    quiet: bool = True,
) -> Outcome:
    """Run it to its end; ``progress`` is told the share of virtual time that has passed. ``quiet``: let quiet hours
    pass quickly."""
    # What agents say of their losses is in the story; a thousand of them would flood a terminal.
    logging.getLogger("node_agent").setLevel(logging.CRITICAL)
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    # A mesh is a large heap of which little dies: looking for garbage in it as often as by default takes a fifth of a run.
    before = gc.get_threshold()
    gc.set_threshold(*_GARBAGE)
    try:
        run = Run(scenario, seed, loop, progress, quiet)
        loop.run_until_complete(run.all())
        loop.wind_up()
        return Outcome(scenario, seed, run.world, loop.callbacks)
    finally:
        gc.set_threshold(*before)
        asyncio.set_event_loop(None)
        loop.close()


class Run:
    """One run as it goes on."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        loop: VirtualLoop,
        progress: Callable[[float], None],
        quiet: bool,
    ) -> None:
        self.scenario, self.loop, self.progress = scenario, loop, progress
        self.end_ns = time_ns(scenario.time)
        self.calm_ns = self.end_ns - time_ns(scenario.quiet)
        self.model = SimModel(scenario.model)
        self.kinds = dict(names_of(scenario))
        self.air = Air(scenario, self.kinds, Random(crc32(b"air") ^ seed), lambda: loop.now_ns)
        patience_s = time_ns(scenario.patience) / S
        radio = scenario.radio
        still = quiet and not (radio.loss or radio.reorder or radio.range_m or scenario.consul)
        self.world = World(loop, seed, self.model.shape, self.air.path, patience_s, still)
        self.faults = Faults(self.world, self.kinds, self._calm)
        self._deal()
        self._tasks: list[asyncio.Task[None]] = []

    def _deal(self) -> None:
        """Who is there; without a policy, ranges of layers go in turn to the nodes of a region that host."""
        model, drifts = self.scenario.model, self.world.random("drift")
        given: Counter[str] = Counter()
        cuts = [LayerRange(a, b) for a, b in pairwise((0, *model.cuts, model.layers))]
        for name, kind in self.kinds.items():
            held = None
            if kind.hosts and not self.scenario.policy:
                region = region_of(name, kind)
                held = self.model.key(cuts[given[region] % len(cuts)])
                given[region] += 1
            self.world.specs[name] = NodeSpec(
                name,
                kind.kind,
                Address(f"{name}:7070"),
                self.model,
                self._config(name, kind),
                held,
                kind.speed,
                controlled=bool(self.scenario.policy),
                labels=tuple(sorted(_pair(label) for label in kind.labels)),
                battery=full(kind),
                drift_ppm=drifts.randint(-kind.drift_ppm, kind.drift_ppm),
                consul=self.world.consul if self.scenario.consul else None,
                nomad=self.world.nomad if self.scenario.nomad else None,
            )

    def _config(self, name: str, kind: NodeKind) -> AgentConfig:
        told = self.scenario
        exact = told.replay == "exact" and told.speculation == "off"
        return AgentConfig(
            prefix_cache="off" if not told.load.alike else "auto" if exact else "on",
            context=CONTEXT,
            profile=told.profile,
            replay=told.replay,
            recovery=told.recovery,
            speculation=told.speculation,
            log=told.log,
            log_limit=told.log_mib,
            moves=told.moves,
            scheduler="on" if kind.scheduler else "off",
            slots=kind.slots,
            memory=kind.memory_mib if kind.hosts else 1,
            region=region_of(name, kind),
        )

    async def all(self) -> None:
        """From the first start to the last answer."""
        world = self.world
        for name in self.kinds:
            world.start(name)
        await asyncio.sleep(_KNIT_S)
        if self.scenario.policy:
            await self._deploy()
        for name, kind in self.kinds.items():
            if kind.ingress:
                self._go(self._client(name))
                if self.scenario.load.crowd_at:
                    self._go(self._client(name, crowd=True))
            if kind.intervals:
                self._go(self.faults.follow(name, kind))
            elif kind.up:
                self._go(self.faults.churn(name, kind))
            if kind.battery_wh:
                self._go(Cell(world, name, kind, time_ns(self.scenario.day)).drain(self._calm))
            if kind.out_of_range:
                self._go(self.faults.fly(name, kind))
        self._go(self.air.watch(world.network, self._calm))
        for number, fault in enumerate(self.scenario.faults):
            self._go(self.faults.happen(fault, world.random(f"fault {number}")))
        while self.loop.now_ns < self.end_ns:
            await asyncio.sleep(min(1.0, (self.end_ns - self.loop.now_ns) / S))
            world.sample()
            if world.calm_ns < 0 and self._calm() and world.whole():
                world.calm_ns = self.loop.now_ns + _KNOWN_S * S
            self.progress(min(1.0, self.loop.now_ns / self.end_ns))
        for task in self._tasks:
            task.cancel()
        await world.finish()

    async def _deploy(self) -> None:
        """An operator applies the policy at some node, and waits until the model is served."""
        world, until_ns = self.world, self.loop.now_ns + _DEPLOYED_NS
        first = world.nodes[next(iter(self.kinds))]
        first.machine.run(first.policies.apply, self.scenario.policy, "the scenario")
        while self.model.name not in models_served(first.view.snapshot):
            if self.loop.now_ns > until_ns:
                why = [f"{m}: {a}" for n in world.nodes.values() for m, a in n.control.answers.items()]
                world.violated(f"the model is not served after {_DEPLOYED_NS / S:g} s: {'; '.join(why)}")
                return
            await asyncio.sleep(0.5)
        world.tell("the model is served")

    def _go(self, work: object) -> None:
        self._tasks.append(self.loop.create_task(work))  # type: ignore[arg-type]

    def _calm(self) -> bool:
        """Faults have ended."""
        return self.loop.now_ns >= self.calm_ns

    async def _client(self, name: str, crowd: bool = False) -> None:
        """Asks all the time; or, as part of a ``crowd``, for a while and more often."""
        load = self.scenario.load
        rng, each = self.world.random(f"{'crowd' if crowd else 'load'} {name}"), draw(load.each)
        others, text = self.world.random(f"alike {name}"), self.world.random("alike")
        common = tuple(text.randrange(1, self.model.shape.vocabulary) for _ in range(load.prompt[1]))
        until_ns, hurry = LONGEST_NS, 1.0
        if crowd:
            begin_ns = time_ns(load.crowd_at)
            await asyncio.sleep(max(0.0, (begin_ns - self.loop.now_ns) / S))
            until_ns, hurry = begin_ns + time_ns(load.crowd_for), load.crowd
        while True:
            await asyncio.sleep(each.ns(rng) / S / hurry)
            if self.loop.now_ns >= until_ns:
                return
            prompt = tuple(
                rng.randrange(1, self.model.shape.vocabulary) for _ in range(rng.randint(*load.prompt))
            )
            if load.alike and others.random() < load.alike:
                shared = others.randint(0, len(prompt))
                prompt = common[:shared] + prompt[shared:]
            self.world.ask(name, prompt, rng.randint(*load.tokens))


def _pair(label: str) -> tuple[str, str]:
    key, _, value = label.partition("=")
    return key, value
