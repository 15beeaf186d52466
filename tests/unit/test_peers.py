"""What an agent makes of a record's stream that breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random

import node_agent.adapters.peers as peers
from mesh.errors import PeerError
from mesh.gossip import Fact, MemberState
from mesh.membership import Membership
from mesh.membership_events import Changed, Event, StreamLost, SyncReceived, TwinSeen
from mesh.profiles import LAN
from mesh.types import Address, NodeId
from node_agent.adapters.peers import ClusterView
from scheduler.cluster import Node
from tests.builders import node, shard

B = NodeId("b")


class Driver:
    """A membership machine without a network; remembers when streams were told to be lost."""

    def __init__(self, me: str) -> None:
        self.machine = Membership(Fact(NodeId(me), Address(f"{me}:1"), 1), LAN, Random(1), 0)
        self.accused: list[float] = []
        self._changed: Callable[[NodeId], None] = lambda node: None

    def listen(self, changed: Callable[[NodeId], None], twin: Callable[[TwinSeen], None]) -> None:
        self._changed = changed

    def handle(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(event, StreamLost):
            self.accused.append(loop.time())
        for effect in self.machine.handle(event, int(loop.time() * 1e9)):
            if isinstance(effect, Changed):
                self._changed(effect.node)

    async def close(self) -> None: ...


class Streams:
    """The record of ``b``, on streams that end when told to; a dial that follows is answered, refused or left waiting."""

    def __init__(self) -> None:
        self.broken, self.opened = asyncio.Event(), 0
        self.refuses = self.waits = False

    async def __call__(self, address: Address) -> AsyncIterator[Node]:
        self.opened += 1
        if self.refuses:
            raise PeerError("connection refused")
        if self.waits:
            await asyncio.sleep(3)
        yield node("b", shard(0, 3))
        await self.broken.wait()
        self.broken.clear()
        raise PeerError("reset by peer")


async def watching(me: str = "a") -> tuple[ClusterView, Driver, Streams]:
    driver, streams = Driver(me), Streams()
    view = ClusterView(driver, streams)
    other = Fact(B, Address("b:1"), 1)
    driver.handle(SyncReceived(other, (other,)))
    await asyncio.sleep(peers._RETRY_S[0] + 0.01)
    assert view.snapshot.nodes[B].reachable
    return view, driver, streams


def test_a_node_that_refuses_us_after_a_break_leaves_our_routes_at_once_and_is_accused_later() -> None:
    async def story() -> None:
        view, driver, streams = await watching()
        begin = asyncio.get_running_loop().time()
        streams.refuses = True
        streams.broken.set()
        await asyncio.sleep(peers._REDIAL_S / 2)
        shunned = view.snapshot.nodes[B]
        assert (shunned.reachable, shunned.broken, shunned.state) == (False, True, MemberState.ALIVE)
        assert not driver.accused
        await asyncio.sleep(peers._ACCUSE_S[1] + peers._REDIAL_S)
        assert peers._ACCUSE_S[0] <= driver.accused[0] - begin <= peers._ACCUSE_S[1] + 0.1
        assert driver.machine.members[B].fact.state is MemberState.SUSPECT
        await view.close()

    asyncio.run(story())


def test_so_is_one_that_leaves_us_waiting() -> None:
    async def story() -> None:
        view, driver, streams = await watching()
        streams.waits = True
        streams.broken.set()
        await asyncio.sleep(peers._REDIAL_S / 2)
        assert view.snapshot.nodes[B].reachable
        await asyncio.sleep(peers._REDIAL_S)
        assert not view.snapshot.nodes[B].reachable
        await asyncio.sleep(peers._ACCUSE_S[1] + peers._REDIAL_S)
        assert driver.accused
        await view.close()

    asyncio.run(story())


def test_one_that_answers_at_once_stays_in_our_routes_and_is_not_accused() -> None:
    async def story() -> None:
        view, driver, streams = await watching()
        streams.broken.set()
        for _ in range(30):
            await asyncio.sleep(0.01)
            assert view.snapshot.nodes[B].reachable
        assert streams.opened == 2
        assert not driver.accused
        await view.close()

    asyncio.run(story())


def test_a_stream_that_never_lasts_is_not_dialled_without_a_pause() -> None:
    async def story() -> None:
        view, _, streams = await watching()
        for _ in range(40):
            streams.broken.set()
            await asyncio.sleep(0.01)
        assert streams.opened <= 7
        await view.close()

    asyncio.run(story())


def test_a_node_that_goes_on_refusing_is_accused_again_and_again() -> None:
    async def story() -> None:
        view, driver, streams = await watching()
        streams.refuses = True
        streams.broken.set()
        async with asyncio.timeout(5):
            while len(driver.accused) < 2:
                await asyncio.sleep(0.01)
        await view.close()

    asyncio.run(story())


def test_the_next_record_brings_membership_s_own_judgement_back() -> None:
    async def story() -> None:
        view, driver, streams = await watching()
        streams.refuses = True
        streams.broken.set()
        await asyncio.sleep(0.01)
        assert not view.snapshot.nodes[B].reachable
        streams.refuses = False
        async with asyncio.timeout(5):
            while not view.snapshot.nodes[B].reachable:
                await asyncio.sleep(0.01)
        shown, judged = view.snapshot.nodes[B], driver.machine.members[B]
        assert (shown.state, shown.reachable) == (judged.fact.state, judged.reachable)
        await view.close()

    asyncio.run(story())


def test_not_everybody_accuses_in_the_same_moment() -> None:
    async def story() -> None:
        views = [(await watching(f"n{i}"))[0] for i in range(12)]
        waits = sorted(view._patience_s(B) for view in views)
        assert peers._ACCUSE_S[0] <= waits[0] < waits[-1] <= peers._ACCUSE_S[1]
        assert waits[-1] - waits[0] > (peers._ACCUSE_S[1] - peers._ACCUSE_S[0]) / 2
        for view in views:
            await view.close()

    asyncio.run(story())


def test_links_hear_of_those_who_are_back_and_of_nobody_else() -> None:
    async def story() -> None:
        view, driver, _ = await watching()
        back = list[MemberState]()
        view.on_return = lambda: back.append(view.snapshot.nodes[B].state)
        c = Fact(NodeId("c"), Address("c:1"), 1)
        driver.handle(SyncReceived(c, (c, Fact(B, Address("b:1"), 1, 0, MemberState.SUSPECT, by=c.node))))
        assert view.snapshot.nodes[B].state is MemberState.SUSPECT
        assert not back
        refuted = Fact(B, Address("b:1"), 1, 1)
        driver.handle(SyncReceived(refuted, (refuted,)))
        assert back == [MemberState.ALIVE]
        await view.close()

    asyncio.run(story())
