"""The production session, stages and hop logs on a network in memory, whose nodes die, freeze and come back all the
time. A token depends on everything before it through every stage: one frame lost, doubled or taken from an old epoch, and the
text differs."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest

from mesh.errors import NoRoute
from mesh.messages import Message
from mesh.session import Session
from mesh.session_events import SessionOrder, Standbys
from mesh.types import Address, LayeredRoute, NodeId, SessionId, ShardInfo, Stage
from node_agent.adapters.memory_store import MemoryFrames, MemoryTokenLog
from node_agent.adapters.metrics import AgentMetrics, StageMetrics
from node_agent.adapters.replica import Replica
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.adapters.stage_host import StageHost
from node_agent.hop_log import HopLog
from scheduler.cluster import ClusterSnapshot
from scheduler.routing import RoutePlan
from scheduler.speed import StageSpeed
from tests.builders import SHAPE, order, shard

CUTS = (0, 2, 4, 6)
REPLICAS = 3
TOKENS = 40
CLIENTS = 6
SLOTS = 16
_DELAY_S = 0.0005


class ChainRuntime:
    """Each position's output is a checksum of its input and of the output before it."""

    slots, capacity, provider = SLOTS, 256, "test"

    def __init__(self, info: ShardInfo) -> None:
        self.info = info
        self.chains: list[list[int]] = [[] for _ in range(SLOTS)]

    def _step(self, slot: int, position: int, value: int) -> int:
        chain = self.chains[slot]
        assert len(chain) >= position, f"position {position} came after {len(chain)}"
        del chain[position:]
        chain.append(link(chain[-1] if chain else 0, value, self.info.layers.start))
        return chain[-1]

    def _out(self, values: list[int]) -> Any:
        if self.info.last:
            logits = np.zeros((len(values), SHAPE.vocabulary), dtype=np.float32)
            for i, value in enumerate(values):
                logits[i, token_of(value)] = 1.0
            return logits
        out = np.zeros((len(values), SHAPE.width), dtype=np.float32)
        for i, value in enumerate(values):
            out[i, :2] = value >> 16, value & 0xFFFF
        return out

    def _in(self, row: Any) -> int:
        return int(row) if self.info.first else (int(row[0]) << 16) | int(row[1])

    def decode(self, slot: int, positions: Sequence[int], inputs: Any, logits: bool = True) -> Any:
        values = []
        for i, position in enumerate(positions):
            chain = self.chains[slot + i]
            if len(chain) < position:  # a row that nobody reads
                values.append(0)
                continue
            values.append(self._step(slot + i, position, self._in(inputs[i])))
        return self._out(values)

    def prefill(self, slot: int, position: int, inputs: Any, logits: bool = True) -> Any:
        values = [self._step(slot, position + i, self._in(row)) for i, row in enumerate(inputs)]
        return self._out(values[-1:] if self.info.last else values)

    def release(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


def link(before: int, value: int, salt: int) -> int:
    return zlib.crc32(f"{before},{value},{salt}".encode())


def token_of(value: int) -> int:
    return value % (SHAPE.vocabulary - 2) + 1


def expected(prompt: Sequence[int]) -> list[int]:
    """What an undisturbed run gives."""
    tokens = list(prompt)
    out: list[int] = []
    before = [0] * (len(CUTS) - 1)
    at = 0
    while len(out) < TOKENS:
        while at < len(tokens):
            value = tokens[at]
            for i, start in enumerate(CUTS[:-1]):
                value = before[i] = link(before[i], value, start)
            at += 1
        out.append(token_of(value))
        tokens.append(out[-1])
    return out


@dataclass(eq=False)
class Wire:
    """One direction between two nodes: in order, with a delay; ``reply`` goes the other way."""

    storm: Storm
    source: Machine
    target: Machine
    due: float = 0.0
    back_due: float = 0.0

    def send(self, message: Message) -> None:
        self.due = self.storm.later(self.due, self.source, self.target, self._arrive, message)

    def _arrive(self, message: Message) -> None:
        self.target.host.received(self, message)

    def reply(self, message: Message) -> None:
        def back(message: Message) -> None:
            self.source.host.replied(self.target.address, message)

        self.back_due = self.storm.later(self.back_due, self.target, self.source, back, message)


@dataclass(eq=False)
class Machine:
    """A node: one replica, or the ingress."""

    storm: Storm
    name: str
    info: ShardInfo | None
    alive: bool = True
    frozen: asyncio.Event | None = None
    wires: dict[Address, Wire] = field(default_factory=dict)
    held: list[tuple[Any, Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.node, self.address = NodeId(self.name), Address(f"{self.name}:1")
        hops = HopLog(MemoryFrames(), self.storm.log_bytes, 1 << 30)
        self.host = StageHost(self.node, self.address, self.send, lambda reason: None, hops)
        self.replica: Replica | None = None
        if self.info is not None:
            speed = StageSpeed(1000, 100, 100, 2000)
            runtime = ChainRuntime(self.info)
            self.replica = Replica(runtime, 1 << 30, self.host.forward, self.host.failed, speed)
            self.host.replicas[self.info.digest] = self.replica
            self.host.metrics[self.info.digest] = StageMetrics(AgentMetrics(self.name), self.info)
        self.task = asyncio.get_running_loop().create_task(self.host.run())

    def send(self, address: Address, message: Message) -> None:
        if not self.alive:
            return
        target = self.storm.by_address(address)
        if target is None:
            asyncio.get_running_loop().call_later(_DELAY_S, self.lost, address, None)
            return
        wire = self.wires.get(address)
        if wire is None or wire.target is not target:
            wire = self.wires[address] = Wire(self.storm, self, target)
        wire.send(message)

    def lost(self, address: Address, who: Machine | None) -> None:
        if self.alive:
            if address in self.wires and self.wires[address].target is who:
                del self.wires[address]
            self.host.downstream_lost(address, "gone")
            if self is self.storm.ingress:
                self.storm.driver.link_lost(address, "gone")

    def die(self) -> None:
        self.alive = False
        self.task.cancel()
        if self.replica is not None:
            self.replica._jobs.put(None)


class Storm:
    """Machines, what happens to them, and one ingress that outlives it all."""

    def __init__(self, seed: int, log_bytes: int = 1 << 30, standbys: bool = False) -> None:
        self.rng, self.log_bytes, self.hot = Random(seed), log_bytes, standbys
        self.loop = asyncio.get_running_loop()
        self.machines: dict[str, Machine] = {}
        for i in range(len(CUTS) - 1):
            for r in range(REPLICAS):
                self.begin(f"s{i}{r}")
        self.ingress = Machine(self, "ingress", None)
        self.machines["ingress"] = self.ingress
        nothing = ClusterSnapshot()
        self.driver = SessionDriver(
            self.ingress.host, MemoryTokenLog(), AgentMetrics("i"), 64, 60, lambda: nothing
        )
        self.driver._looked_at = nothing  # losses are told by the data plane alone
        self.ingress.host.owner = self.driver
        self.rungs: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def begin(self, name: str) -> None:
        i = int(name[1])
        self.machines[name] = Machine(self, name, shard(CUTS[i], CUTS[i + 1]))

    def by_address(self, address: Address) -> Machine | None:
        found = self.machines.get(address.split(":")[0])
        return found if found and found.alive else None

    def later(self, due: float, source: Machine, target: Machine, do: Any, message: Message) -> float:
        """Deliver in order after a while; what a dead machine sends or is sent is gone."""
        due = max(due + 1e-7, self.loop.time() + self.rng.random() * _DELAY_S)

        def arrive() -> None:
            if not source.alive or not target.alive:
                return
            if target.frozen is not None or target.held:
                target.held.append((do, message))
            else:
                do(message)

        self.loop.call_at(due, arrive)
        return due

    def kill(self, name: str) -> None:
        machine = self.machines[name]
        machine.die()
        self.faults["kill"] += 1
        for other in self.machines.values():
            if other.alive and machine.address in other.wires:
                self.loop.call_later(self.rng.random() * 0.002, other.lost, machine.address, machine)
        for wire in machine.wires.values():
            self.loop.call_later(self.rng.random() * 0.002, self._ended, wire)

    def _ended(self, wire: Wire) -> None:
        """The far end of a link hears of its end after everything that came before it."""
        target = wire.target
        if target.frozen is not None or target.held:
            target.held.append((lambda message: target.host.upstream_lost(wire), []))
        elif target.alive:
            target.host.upstream_lost(wire)

    async def freeze(self, name: str, for_s: float) -> None:
        machine = self.machines[name]
        if not machine.alive or machine.frozen is not None:
            return
        machine.frozen = asyncio.Event()
        self.faults["freeze"] += 1
        await asyncio.sleep(for_s)
        machine.frozen = None
        while machine.held and machine.alive:
            do, message = machine.held.pop(0)
            do(message)

    def route(self, avoid: frozenset[NodeId], keep: LayeredRoute | None) -> LayeredRoute:
        stages = []
        for i in range(len(CUTS) - 1):
            info = shard(CUTS[i], CUTS[i + 1])
            known = keep.stages[i] if keep else None
            here = [m for m in self.machines.values() if m.info == info and m.alive and m.node not in avoid]
            if not here:
                raise NoRoute(f"nobody for stage {i}")
            same = [m for m in here if known and m.node == known.node]
            chosen = same[0] if same and self.rng.random() < 0.9 else self.rng.choice(here)
            stages.append(Stage(chosen.node, chosen.address, info.layers, info.digest))
        return LayeredRoute(tuple(stages))

    def standbys(self, route: LayeredRoute) -> Standbys:
        if not self.hot:
            return ()
        spare = self.route(frozenset(s.node for s in route.stages), None)
        return spare.stages

    def replan(self, session: Session, before: RoutePlan, avoid: frozenset[NodeId]) -> RoutePlan:
        return RoutePlan(self.route(avoid, session.route), (), 0.0, 0.0)

    async def client(self, number: int) -> None:
        rng = Random(number)
        prompt = tuple(rng.randrange(1, 90) for _ in range(rng.randrange(3, 60)))
        asked: SessionOrder = order(
            session=SessionId(f"{number:032x}"),
            prompt=prompt,
            tokens_max=TOKENS,
            positions_max=200,
            chunk=16,
            window=8,
            deadline_ns=10**18,
            step_timeout_ns=20 * 10**9,
            recovery_timeout_ns=20 * 10**9,
            stop_tokens=frozenset(),
            exact=rng.random() < 0.5,
        )
        while True:
            try:
                route = self.route(frozenset(), None)
                break
            except NoRoute:
                await asyncio.sleep(0.01)
        try:
            standbys = self.standbys(route)
        except NoRoute:
            standbys = ()
        plan = RoutePlan(route, (), 0.0, 0.0)
        handle: SessionHandle = self.driver.start(asked, plan, "tiny", self.replan, standbys=standbys)
        seen = [token async for token in handle.tokens()]
        assert [t.position for t in seen] == list(range(len(prompt), len(prompt) + TOKENS))
        assert [t.token for t in seen] == expected(prompt), f"session {number}: {handle.trace.recoveries}"
        self.rungs.update(r.rung for r in handle.trace.recoveries)

    async def weather(self, every_s: float) -> None:
        """Something breaks; what broke comes back."""
        while True:
            await asyncio.sleep(self.rng.random() * 2 * every_s)
            name = self.rng.choice([n for n in self.machines if n != "ingress"])
            if not self.machines[name].alive:
                continue
            if self.rng.random() < 0.15:
                task = self.loop.create_task(self.freeze(name, 0.1 + self.rng.random()))
                self.thaws.add(task)
                task.add_done_callback(self.thaws.discard)
            else:
                self.kill(name)
                self.loop.call_later(self.rng.random() * 4 * every_s, self.begin, name)

    async def run(self, sessions: int, every_s: float) -> None:
        self.thaws: set[asyncio.Task[None]] = set()
        weather = self.loop.create_task(self.weather(every_s))
        ticking = self.loop.create_task(self.driver.run())
        numbers = iter(range(sessions))

        async def one_after_the_other() -> None:
            for number in numbers:
                await self.client(number)

        try:
            async with asyncio.timeout(240):
                await asyncio.gather(*(one_after_the_other() for _ in range(CLIENTS)))
            weather.cancel()
            await asyncio.sleep(1.5)  # closes arrive, what is frozen thaws
        finally:
            for task in (weather, ticking, *self.thaws):
                task.cancel()
            self.left = Counter(
                {
                    n: m.replica.book.live
                    for n, m in self.machines.items()
                    if m.alive and m.replica is not None
                }
            )
            for machine in self.machines.values():
                machine.die()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("log_bytes", "standbys", "rung"),
    [(1 << 30, False, "warm"), (20_000, False, "ingress"), (1 << 30, True, "hot")],
    ids=["warm", "log full", "hot"],
)
def test_r2_r4_r5_no_token_is_lost_repeated_or_changed_in_a_storm(
    log_bytes: int, standbys: bool, rung: str
) -> None:
    async def story() -> Storm:
        storm = Storm(7, log_bytes, standbys)
        await storm.run(sessions=150, every_s=0.05)
        return storm

    storm = asyncio.run(story())
    assert storm.faults["kill"] > 30, storm.faults
    assert storm.rungs[rung] > 10, storm.rungs
    assert not storm.left.total(), f"sessions that ended are still fed: {storm.left}"
