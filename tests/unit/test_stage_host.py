"""What a node answers to those before and behind its stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mesh.messages import Cause, Close, Frame, HopLost, Message, Opened
from mesh.types import Address, Epoch, NodeId
from node_agent.adapters.memory_store import MemoryFrames
from node_agent.adapters.metrics import AgentMetrics, StageMetrics
from node_agent.adapters.replica import Replica
from node_agent.adapters.stage_host import StageHost
from node_agent.hop_log import HopLog
from node_agent.hop_watch import HopWatch
from scheduler.speed import StageSpeed
from tests.builders import ADDRESS, OWNER, SESSION, frame, opening, route, shard

ROUTE = route(2, 4)
HERE = ROUTE.stages[1]
SECOND = Epoch(2, OWNER)


class Echo:
    """Gives what it was given."""

    info, slots, capacity, provider, batch, batch_exact = shard(2, 4), 4, 64, "test", 4, True

    def decode(self, slot: int, positions: Any, inputs: Any, logits: bool = True) -> Any:
        return inputs

    def prefill(self, slot: int, position: int, inputs: Any, logits: int = 1) -> Any:
        return inputs

    def replay(self, slot: int, position: int, inputs: Any) -> Any:
        return inputs

    def prepare(self) -> None:
        pass

    def hold_to_steps(self, inputs: Any) -> bool:
        return True

    def copy(self, source: int, target: int, positions: int) -> None: ...

    def settle(self) -> None: ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...


class Bench:
    """A node in the middle of a route; what it sends on, and what it answers."""

    def __init__(self) -> None:
        self.sent: list[tuple[Address, Message]] = []
        self.answers: list[Message] = []
        self.dialled: list[Address] = []
        self.host = StageHost(
            HERE.node,
            HERE.address,
            lambda address, message: self.sent.append((address, message)),
            lambda _: None,
            dial=self.dialled.append,
            hops=HopLog(MemoryFrames(), 1 << 20, 1 << 20),
        )
        info = Echo.info
        self.host.replicas[HERE.shard] = Replica(
            Echo(), 1 << 30, self.host.forward, self.host.failed, StageSpeed(1000, 100, 100, 2000)
        )
        self.host.metrics[HERE.shard] = StageMetrics(AgentMetrics("n"), info)

    def reply(self, message: Message) -> None:
        self.answers.append(message)

    def open(self, position: int, epoch: Epoch, **changes: Any) -> None:
        order = replace(opening(position=position, epoch=epoch, **changes), route=ROUTE, stage=1)
        self.host.received(self, order)

    async def compute(self, *lengths: int) -> None:
        """Frames of these lengths, from position 0 on."""
        for i, length in enumerate(lengths):
            payload = np.zeros((length, Echo.info.model.width), dtype=np.float32)
            given = frame(sum(lengths[:i]), length, payload=payload, stage=1, sample=False)
            self.host.received(self, [given])
        async with asyncio.timeout(5):
            while self.host.replicas[HERE.shard].working:
                await asyncio.sleep(0.001)

    def replayed(self) -> list[tuple[int, int, bool]]:
        """Position and length of the frames that went on, and whether they are steps."""
        frames = [f for _, m in self.sent if isinstance(m, list) for f in m if isinstance(f, Frame)]
        return [(f.position, f.length, f.steps) for f in frames]

    def told(self, position: int, epoch: Epoch) -> None:
        self.host.replied(ROUTE.stages[2].address, Opened(SESSION, epoch, 2, position))


def run(story: Callable[[Bench], Awaitable[None]]) -> None:
    async def whole() -> None:
        await story(Bench())

    asyncio.run(whole())


def test_a_stage_that_has_nothing_says_so_before_those_behind_it_have_told() -> None:
    async def story(bench: Bench) -> None:
        bench.open(10, SECOND)
        assert bench.answers == [Opened(SESSION, SECOND, 1, 0, short=1)]
        assert [type(m).__name__ for _, m in bench.sent] == ["Open"]

    run(story)


def test_one_that_has_something_waits_for_what_those_behind_it_want() -> None:
    async def story(bench: Bench) -> None:
        first = Epoch(1, OWNER)
        bench.open(0, first)
        await bench.compute(4)
        bench.answers.clear()
        bench.open(4, SECOND)
        assert bench.answers == []
        bench.told(4, SECOND)
        assert bench.answers == [Opened(SESSION, SECOND, 1, 4)]

    run(story)


@pytest.mark.parametrize(
    ("how", "frames"),
    [
        (
            {"exact": True, "steps": True},
            [(0, 3, False), (3, 16, True), (19, 4, True), (23, 2, False), (25, 1, False)],
        ),
        ({"exact": True, "window": 4}, [(0, 3, False), (3, 1, False), (4, 1, False), (5, 1, False)]),
        ({"exact": False, "steps": True}, [(0, 26, False)]),
    ],
    ids=["steps in chunks", "one by one, as far as there is credit", "in large chunks"],
)
def test_a_replay_goes_out_in_frames_that_say_how_they_first_ran(
    how: dict[str, Any], frames: list[tuple[int, int, bool]]
) -> None:
    async def story(bench: Bench) -> None:
        bench.open(0, Epoch(1, OWNER), window=64)
        await bench.compute(3, *[1] * 20, 2, 1)
        bench.open(26, SECOND, **{"window": 64, **how})
        bench.sent.clear()
        bench.told(0, SECOND)
        for _ in range(12):
            await asyncio.sleep(0)
        assert bench.replayed() == frames

    run(story)


def test_replayed_steps_are_logged_and_sent_on_as_steps() -> None:
    async def story(bench: Bench) -> None:
        bench.open(0, Epoch(1, OWNER), window=64)
        payload = np.zeros((5, Echo.info.model.width), dtype=np.float32)
        bench.host.received(bench, [frame(0, 5, payload=payload, stage=1, sample=False, steps=True)])
        async with asyncio.timeout(5):
            while bench.host.replicas[HERE.shard].working:
                await asyncio.sleep(0.001)
        assert bench.replayed() == [(0, 5, True)]
        bench.sent.clear()
        bench.open(5, SECOND, exact=True, window=64)
        bench.told(0, SECOND)
        for _ in range(12):
            await asyncio.sleep(0)
        assert bench.replayed() == [(i, 1, False) for i in range(5)]

    run(story)


def test_a_step_before_the_lost_stage_goes_on_again_without_being_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed = list[int]()

    def decode(self: Echo, slot: int, positions: Any, inputs: Any, logits: bool = True) -> Any:
        computed.extend(positions)
        return inputs

    monkeypatch.setattr(Echo, "decode", decode)

    async def story(bench: Bench) -> None:
        bench.open(0, Epoch(1, OWNER), window=64)
        await bench.compute(1, 1, 1)
        bench.sent.clear()
        bench.open(2, SECOND, window=64, resume=SESSION)
        payload = np.zeros((1, Echo.info.model.width), dtype=np.float32)
        for position in (2, 3):
            bench.host.received(bench, [frame(position, epoch=SECOND, payload=payload, stage=1)])
            async with asyncio.timeout(5):
                while bench.host.replicas[HERE.shard].working:
                    await asyncio.sleep(0.001)
        assert bench.replayed() == [(2, 1, False), (3, 1, False)]
        assert computed == [0, 1, 2, 3]

    run(story)


def test_a_standby_sends_nothing_and_has_its_link_ready_for_when_it_will() -> None:
    async def story(bench: Bench) -> None:
        standbys = (None, HERE, None)
        order = replace(opening(), route=ROUTE, stage=1, standbys=standbys, standby=True)
        bench.host.received(bench, order)
        assert bench.dialled == [ADDRESS, ROUTE.stages[2].address]
        # That this link breaks is no loss of the session's.
        bench.host.downstream_lost(ROUTE.stages[2].address, "reset")
        assert bench.sent == []
        assert not bench.host.replicas[HERE.shard].book.sessions[SESSION].hushed

    run(story)


def test_a_standby_that_is_none_any_more_is_told_by_who_fed_it() -> None:
    """The owner tells it as well, but later: it may be lost by then, and nobody else knows of that standby."""

    async def story(bench: Bench) -> None:
        spare = replace(ROUTE.stages[2], node=NodeId("spare"), address=Address("10.0.0.9:7070"))
        other = replace(spare, node=NodeId("other"), address=Address("10.0.0.8:7070"))
        bench.open(0, Epoch(1, OWNER), standbys=(None, None, spare))
        bench.open(0, SECOND, standbys=(None, None, spare))
        assert not [m for a, m in bench.sent if a == spare.address and isinstance(m, Close)]
        third = Epoch(3, OWNER)
        bench.open(0, third, standbys=(None, None, other))
        (told,) = [m for a, m in bench.sent if a == spare.address and isinstance(m, Close)]
        assert told == Close(SESSION, third, "the session moved", 2, alone=True)

    run(story)


def test_a_stage_has_a_link_to_the_owner_ready_whose_loss_is_none_while_nothing_was_told() -> None:
    async def story(bench: Bench) -> None:
        bench.open(0, Epoch(1, OWNER))
        assert ADDRESS in bench.dialled
        bench.sent.clear()
        bench.host.downstream_lost(ADDRESS, "reset")
        assert bench.sent == []
        bench.host.downstream_lost(ROUTE.stages[2].address, "reset")
        lost = HopLost(SESSION, Epoch(1, OWNER), 2, Cause.STREAM_BROKEN, "reset")
        assert bench.sent == [(ADDRESS, lost)]
        # That report may be lost with the link: it is told again.
        bench.sent.clear()
        bench.host.downstream_lost(ADDRESS, "reset")
        assert (ADDRESS, lost) in bench.sent

    run(story)


class CountingWatch(HopWatch[Address]):
    looks = 0

    def look(self, outstanding: Iterable[Address], now: int, every_ns: int) -> list[tuple[Address, int]]:
        self.looks += 1
        return super().look(outstanding, now, every_ns)


def test_a_node_that_only_keeps_what_is_over_rests_until_there_is_work() -> None:
    async def story(bench: Bench) -> None:
        watch = bench.host.watch = CountingWatch()
        bench.open(0, Epoch(1, OWNER))
        await bench.compute(4)
        task = asyncio.create_task(bench.host.run())
        await asyncio.sleep(0.2)
        assert watch.looks
        bench.host.received(bench, Close(SESSION, Epoch(1, OWNER), "it is over", 1, keep=True))
        await asyncio.sleep(0.05)
        assert bench.host.replicas[HERE.shard].book.kept
        before = watch.looks
        await asyncio.sleep(0.2)
        assert watch.looks == before
        bench.open(0, SECOND)
        async with asyncio.timeout(5):
            while watch.looks == before:
                await asyncio.sleep(0.01)
        task.cancel()

    run(story)


def test_what_a_run_leaves_for_later_is_done_when_its_result_is_on_its_way() -> None:
    async def story(bench: Bench) -> None:
        gone: list[int] = []
        replica: Any = bench.host.replicas[HERE.shard]
        replica.runtime.settle = lambda: gone.append(len(bench.replayed()))
        bench.open(0, Epoch(1, OWNER))
        await bench.compute(4, 1, 1)  # the last one on the event loop: the one before was brief
        assert gone[-3:] == [1, 2, 3]

    run(story)


def test_nothing_is_computed_until_a_run_is_settled() -> None:
    """Its result may bring the next run about at once, which would read what is not there yet."""

    async def story(bench: Bench) -> None:
        events: list[str] = []
        replica: Any = bench.host.replicas[HERE.shard]
        forward, prefill = replica._forward, replica.runtime.prefill

        def followed(results: Any) -> None:
            forward(results)
            if len(bench.replayed()) == 3:
                payload = np.zeros((4, Echo.info.model.width), dtype=np.float32)
                bench.host.received(bench, [frame(6, 4, payload=payload, stage=1, sample=False)])

        def settle() -> None:
            time.sleep(0.05)
            events.append("settled")

        def next_run(*given: Any) -> Any:
            events.append("computed")
            return prefill(*given)

        bench.open(0, Epoch(1, OWNER))
        await bench.compute(4, 1)
        replica._forward, replica.runtime.settle, replica.runtime.prefill = followed, settle, next_run
        await bench.compute(4, 1, 1)
        assert bench.replayed()[-1] == (6, 4, False)
        assert events[:2] == ["settled", "computed"]

    run(story)


@pytest.mark.parametrize(
    ("lengths", "well"), [((4,), 0), ((4, 1, 1), 4)], ids=["on the thread", "on the event loop"]
)
def test_a_session_whose_run_cannot_be_settled_is_lost_here_and_the_replica_lives(
    lengths: tuple[int, ...], well: int
) -> None:
    async def story(bench: Bench) -> None:
        replica: Any = bench.host.replicas[HERE.shard]
        # On the thread a run is settled there, and looked at again where its result goes out.
        replica.runtime.settle = Mock(side_effect=[None] * well + [MemoryError("no room"), None])
        bench.open(0, Epoch(1, OWNER))
        await bench.compute(*lengths)
        lost = [(m.cause, m.detail) for _, m in bench.sent if isinstance(m, HopLost)]
        assert lost == [(Cause.RUNTIME, "MemoryError: no room")]
        assert not replica.working
        assert SESSION not in replica.book.sessions

    run(story)
