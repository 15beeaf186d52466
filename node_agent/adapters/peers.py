"""The cluster as this agent sees it: membership's judgement and each member's own record, in one snapshot.

Membership (datagrams) says who is alive; a ``Watch`` stream to every member brings its record
whenever that changes. A stream that breaks is dialled again at once: a dead process refuses that in the time of a round trip, and
a node that refuses, or leaves us waiting, is out of our routes. (Where our own streams were cut, all of them break together, and
without that question no route would be left for any session.) Membership, and through it everybody, is told
a little later, everybody's at a time of its own: whoever has a session there learns of the loss from the session's own stream,
and where all peers of a dead node accused it in the same millisecond, their gossip kept the session waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mesh.clock import Clock
from mesh.discovery import Sighting
from mesh.errors import PeerError
from mesh.gossip import MemberState
from mesh.member import Member
from mesh.membership import Membership
from mesh.membership_events import Event, Found, Gone, Leave, StreamLost, TwinSeen
from mesh.types import Address, NodeId
from scheduler.cluster import ClusterEvent, ClusterSnapshot, Node, NodeForgotten, NodeJudged, NodeSeen

log = logging.getLogger(__name__)

_RETRY_S = (0.1, 2.0)
"""Between dials; the first that follows the break of a stream that lived for as long as the shorter comes at once."""
_REDIAL_S = 0.02
"""How long a node whose stream broke may take to answer that dial before we route around it."""
_ACCUSE_S = (0.3, 0.8)
"""Between our routing around it and our accusation: past the time in which sessions are brought back elsewhere."""
_CONNECT_S = 3.0
_LEAVE_S = 0.05
"""Time for the goodbyes to leave the machine."""


RecordSource = Callable[[Address], AsyncIterator[Node]]
"""The record of the agent at an address, and again whenever it changes; raises ``PeerError`` with the reason when it ends."""


class MachineDriver(Protocol):
    """What runs a membership machine."""

    @property
    def machine(self) -> Membership: ...

    def listen(self, changed: Callable[[NodeId], None], twin: Callable[[TwinSeen], None]) -> None:
        """Whom to tell of members that changed, and of nodes that are there twice."""
        ...

    def handle(self, event: Event) -> None:
        """Give the machine an event and do what it asks for."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Watch:
    address: Address
    instance: int
    task: asyncio.Task[None]


class ClusterView:
    """Our snapshot. ``on_change`` is called when a member's standing or record changed."""

    def __init__(self, driver: MachineDriver, records: RecordSource, clock: Clock = time) -> None:
        self.snapshot = ClusterSnapshot()
        self.twins: dict[NodeId, Address] = {}
        """Addresses of agents that have another's node id."""
        self.digests: dict[NodeId, str] = {}
        """Capability digests as discovery advertised them."""
        self.driver, self._records, self._clock = driver, records, clock
        self._watches: dict[NodeId, _Watch] = {}
        driver.listen(self._judged, self._twin)
        self.on_twin: Callable[[Address], None] = lambda address: None
        self.on_suspicion: Callable[[], None] = lambda: None
        self.on_return: Callable[[], None] = lambda: None
        self.on_record: Callable[[Node], None] = lambda node: None

    @property
    def membership(self) -> Membership:
        return self.driver.machine

    def apply(self, event: ClusterEvent) -> None:
        """Fold an event into the snapshot."""
        self.snapshot = self.snapshot.apply(event)

    # -- discovery -----------------------------------------------------------------------------

    def know(self, addresses: Iterable[Address], source: str) -> None:
        """Agents may be at these addresses."""
        for address in addresses:
            self.driver.handle(Found(address, source))

    def found(self, source: str, sighting: Sighting) -> None:
        """A discovery adapter saw an agent."""
        if sighting.digest:
            self.digests[sighting.node] = sighting.digest
        for address in sighting.addresses:
            self.driver.handle(Found(address, source, sighting.node))

    def gone(self, source: str, sighting: Sighting) -> None:
        """A discovery adapter lists an agent no more."""
        for address in sighting.addresses:
            self.driver.handle(Gone(address, source))

    # -- membership ----------------------------------------------------------------------------

    def _judged(self, node: NodeId) -> None:
        member = self.membership.members.get(node)
        if member is None:
            self._unwatch(node)
            self.apply(NodeForgotten(node))
            self.twins.pop(node, None)
            return
        state = member.fact.state
        known = self.snapshot.nodes.get(node)
        away = known is not None and known.state in (MemberState.SUSPECT, MemberState.DEAD)
        self.apply(NodeJudged(node, state, member.reachable, self._clock.monotonic(), member.broken))
        if state is MemberState.SUSPECT:
            self.on_suspicion()
        elif away and state is MemberState.ALIVE:
            self.on_return()
        log.log(
            logging.WARNING if state in (MemberState.SUSPECT, MemberState.DEAD) else logging.INFO,
            "%s at %s is %s%s",
            node,
            member.fact.address,
            state.name.lower(),
            f": {member.reason}" if member.reason else "",
        )
        if not member.present:
            self._unwatch(node)
            return
        watch = self._watches.get(node)
        if watch is None or (watch.address, watch.instance) != (member.fact.address, member.fact.instance):
            self._unwatch(node)
            self._start_watch(member)

    def _twin(self, seen: TwinSeen) -> None:
        if seen.ours:
            log.error(
                "an older agent at %s has our node id %s: we keep out of the mesh. Give each agent a data "
                "directory of its own (remove node-id and node-key.pem from a copied one) and start it again",
                seen.address,
                seen.node,
            )
            self.on_twin(seen.address)
        elif self.twins.get(seen.node) != seen.address:
            log.error("two agents have the node id %s; the younger is at %s", seen.node, seen.address)
            self.twins[seen.node] = seen.address

    # -- records -------------------------------------------------------------------------------

    def _start_watch(self, member: Member) -> None:
        fact = member.fact
        task = asyncio.create_task(self._watch(fact.node, fact.address, fact.instance))
        self._watches[fact.node] = _Watch(fact.address, fact.instance, task)

    def _unwatch(self, node: NodeId) -> None:
        watch = self._watches.pop(node, None)
        if watch is not None:
            watch.task.cancel()

    async def _watch(self, node: NodeId, address: Address, instance: int) -> None:
        wait_s = _RETRY_S[0]
        doubt: asyncio.Task[None] | None = None
        try:
            while True:
                up_at, reason = None, "it ended the stream of its record"
                try:
                    async for record in self._records(address):
                        if doubt is not None:
                            doubt.cancel()
                            doubt = None
                        self._seen(node, record)
                        up_at = up_at or self._clock.monotonic()
                except PeerError as error:
                    reason = str(error)
                log.debug("watch of %s at %s: %s", node, address, reason)
                if doubt is not None:
                    self._shun(node)
                if doubt is None or doubt.done():
                    doubt = asyncio.create_task(self._doubt(node, instance, reason))
                if up_at is not None:
                    wait_s = _RETRY_S[0]
                    if self._clock.monotonic() - up_at >= wait_s:
                        continue
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _RETRY_S[1])
        finally:
            if doubt is not None:
                doubt.cancel()

    async def _doubt(self, node: NodeId, instance: int, reason: str) -> None:
        """What a broken stream leads to; cancelled by the node's next record."""
        await asyncio.sleep(_REDIAL_S)
        self._shun(node)
        await asyncio.sleep(self._patience_s(node))
        self.driver.handle(StreamLost(node, instance, reason))

    def _shun(self, node: NodeId) -> None:
        """Out of our routes, until membership's judgement or its next record says otherwise."""
        member = self.membership.members.get(node)
        if member is not None:
            self.apply(NodeJudged(node, member.fact.state, False, self._clock.monotonic(), True))

    def _patience_s(self, node: NodeId) -> float:
        """Not everybody's the same; drawn by name, so that a run can be repeated."""
        drawn = hashlib.sha256(f"{self.membership.me.node} {node}".encode()).digest()[0] / 255
        return _ACCUSE_S[0] + (_ACCUSE_S[1] - _ACCUSE_S[0]) * drawn

    def _seen(self, node_id: NodeId, node: Node) -> None:
        if node.id != node_id:
            raise PeerError(f"it says that it is {node.id}, not {node_id}")
        now = self._clock.monotonic()
        self.apply(NodeSeen(node, now))
        self.on_record(node)
        member = self.membership.members.get(node_id)
        if member is not None:
            self.apply(NodeJudged(node_id, member.fact.state, member.reachable, now, member.broken))

    # -- the end -------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Say goodbye to everybody."""
        self.driver.handle(Leave())
        await asyncio.sleep(_LEAVE_S)

    async def close(self) -> None:
        """Stop watching and listening."""
        tasks = [w.task for w in self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.driver.close()
