"""What an agent sends over the modelled network: data links, membership's datagrams, records and questions to peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import PeerError
from mesh.membership import Membership
from mesh.membership_events import (
    Changed,
    Effect,
    Event,
    PingStream,
    Received,
    Send,
    StreamAnswered,
    Sync,
    Synced,
    SyncReceived,
    Tick,
    TwinSeen,
)
from mesh.messages import Frame, Message
from mesh.types import Address, Epoch, NodeId, SessionId
from node_agent.ports import NO_EPOCH, LoggedSession
from scheduler.cluster import Node

if TYPE_CHECKING:
    from simulations.network import Stream
    from simulations.node import SimNode

_DIAL_NS = 3_000_000_000
_ASK_S = 1.5
_PACKET_BYTES, _FACT_BYTES, _RECORD_BYTES, _HEAD_BYTES = 120, 40, 1500, 60


def size_of(message: Message) -> int:
    """Bytes on the wire, about."""
    if isinstance(message, list):
        return sum(_HEAD_BYTES + getattr(getattr(m, "payload", None), "nbytes", 0) for m in message)
    return _HEAD_BYTES + 4 * len(getattr(message, "prompt", ()))


def copy_of(message: Message) -> Message:
    """As it comes off the wire: frames are the receiver's own."""
    if isinstance(message, list) and message and isinstance(message[0], Frame):
        return [_sent(f) for f in message if isinstance(f, Frame)]
    return message


def damage(frames: list[Any]) -> None:
    """Activations that came out wrong, as of a processor that is too hot."""
    for frame in frames:
        if isinstance(frame, Frame) and frame.payload.ndim > 1:
            frame.payload = np.full_like(frame.payload, np.nan)


@dataclass(slots=True)
class SentFrame(Frame):
    """A frame that remembers the epoch in which it was sent."""

    sent: Epoch = NO_EPOCH


def _sent(frame: Frame) -> Frame:
    known = {f.name: getattr(frame, f.name) for f in fields(Frame)}
    return SentFrame(**known, sent=frame.epoch)


class _Upstream:
    """Where a stage's answers go: back up the stream that frames came down."""

    def __init__(self, stream: Stream, source: SimNode, address: Address) -> None:
        self._stream, self._source, self._address = stream, source, address

    def reply(self, message: Message) -> None:
        self._stream.send(False, size_of(message), self._back, message)

    def _back(self, message: Message) -> None:
        self._source.host.replied(self._address, message)


class SimLinks:
    """As ``mesh.adapters.grpc_links.LinkPool``: dials when first used, and again after a loss."""

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._links: dict[Address, tuple[Stream, _Upstream] | None] = {}

    def send(self, address: Address, message: Message) -> None:
        if address not in self._links:
            self._links[address] = self._dial(address)
        link = self._links[address]
        if link is not None:
            stream, upstream = link
            target: Any = stream.target
            sent = copy_of(message)
            if self._node.corrupts and isinstance(sent, list):
                damage(sent)
            stream.send(True, size_of(message), target.received, upstream, sent)

    def _dial(self, address: Address) -> tuple[Stream, _Upstream] | None:
        node = self._node
        found: list[_Upstream] = []
        stream = node.network.connect(
            node,
            address,
            lambda reason: self._lost(address, reason, found),
            lambda: stream.target.host.upstream_lost(found[0]),  # type: ignore[union-attr]
            _DIAL_NS,
        )
        if stream is None:
            return None
        found.append(_Upstream(stream, node, address))
        return stream, found[0]

    def _lost(self, address: Address, reason: str, found: list[_Upstream]) -> None:
        link = self._links.get(address)
        if (link[1] if link else None) is not (found[0] if found else None):
            return  # dropped, or dialled anew
        self._links.pop(address, None)
        self._node.host.downstream_lost(address, reason)
        self._node.driver.link_lost(address, reason)

    def drop(self, address: Address) -> None:
        link = self._links.pop(address, None)
        if link is not None:
            link[0].close("dropped", tell_source=False)


class SimMembership:
    """``node_agent.adapters.peers.MachineDriver``: datagrams and whole views over the modelled network."""

    def __init__(self, node: SimNode, machine: Membership) -> None:
        self._node, self._machine = node, machine
        self._loop = node.loop
        self._timer: asyncio.TimerHandle | None = None
        self._changed: Callable[[NodeId], None] = lambda who: None
        self._twin: Callable[[TwinSeen], None] = lambda seen: None
        self._still_ns: int | None = None
        """By the node's clock: since when it stands still."""
        self._arm()

    @property
    def machine(self) -> Membership:
        return self._machine

    def listen(self, changed: Callable[[NodeId], None], twin: Callable[[TwinSeen], None]) -> None:
        self._changed, self._twin = changed, twin

    def stand_still(self) -> None:
        """Ask nobody until ``go_on``."""
        self._still_ns = self._node.clock.monotonic_ns()
        if self._timer is not None:
            self._timer.cancel()

    def go_on(self) -> int:
        """As if no time had passed; how much has, ns."""
        since, self._still_ns = self._still_ns, None
        if since is None:
            return 0
        passed = self._node.clock.monotonic_ns() - since
        self._machine.stood_still(passed)
        self._arm()
        return passed

    def handle(self, event: Event) -> None:
        if self._still_ns is not None and not isinstance(
            event, Received | Synced | SyncReceived | StreamAnswered
        ):
            self._node.disturbed()  # (those were on their way)
        for effect in self._machine.handle(event, self._node.clock.monotonic_ns()):
            self._carry_out(effect)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._still_ns is not None:
            return
        due = self._machine.next_deadline()
        wait = None if due is None else max(0, due - self._node.clock.monotonic_ns())
        self._timer = None if wait is None else self._loop.at_ns(self._loop.now_ns + wait, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.handle(Tick())

    def _carry_out(self, effect: Effect) -> None:
        node = self._node
        match effect:
            case Send(target, packet):
                size = _PACKET_BYTES + _FACT_BYTES * len(packet.news)

                def deliver(host: Any, due: int) -> None:
                    host.membership.handle(Received(packet, node.address, host.clock.monotonic_ns()))

                node.network.datagram(node.address, target, size, deliver)
            case Changed(who):
                self._changed(who)
            case TwinSeen():
                self._twin(effect)
            case Sync(target):
                self._sync(target)
            case PingStream(target, _, seq):
                node.asks(target, lambda host: host.membership.machine.me, self._answered(seq), lambda: None)

    def _answered(self, seq: int) -> Callable[[Any], None]:
        return lambda fact: self.handle(StreamAnswered(seq, fact))

    def _sync(self, target: Address) -> None:
        machine = self._machine
        mine = SyncReceived(machine.me, machine.facts(), machine.summaries())

        def exchange(host: Any) -> Synced:
            other = host.membership.machine
            answer = Synced(target, other.me, other.facts(), other.summaries())
            host.membership.handle(mine)
            return answer

        self._node.asks(target, exchange, self.handle, lambda: self.handle(Synced(target, error="no answer")))

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class SimRecords:
    """``node_agent.adapters.peers.RecordSource``."""

    def __init__(self, node: SimNode) -> None:
        self._node = node

    async def __call__(self, address: Address) -> AsyncIterator[Node]:
        node = self._node
        news: asyncio.Queue[Node | str] = asyncio.Queue()
        watch: list[Callable[[Node], None]] = []

        def ended() -> None:
            if watch:
                stream.target.watchers.pop(watch[0], None)  # type: ignore[union-attr]

        stream = node.network.connect(node, address, news.put_nowait, ended, _DIAL_NS)
        if stream is None:
            raise PeerError(str(await news.get()))

        def tell(record: Node) -> None:
            stream.send(False, _RECORD_BYTES, news.put_nowait, record)

        def begin() -> None:
            target: Any = stream.target
            watch.append(tell)
            target.watchers[tell] = None
            tell(target.record())

        stream.send(True, _HEAD_BYTES, begin)
        try:
            while isinstance(found := await news.get(), Node):
                yield found
            raise PeerError(found)
        finally:
            stream.close("watched no more", tell_source=False)


def sim_ask(node: SimNode) -> Any:
    """``node_agent.adapters.takeover.Ask``."""

    async def ask(
        address: Address, session: SessionId, expected: Epoch | None, wanted: Epoch | None
    ) -> tuple[LoggedSession | None, bool] | None:
        answer: asyncio.Future[tuple[LoggedSession | None, bool] | None] = node.loop.create_future()

        def told(found: tuple[LoggedSession | None, bool] | None) -> None:
            if not answer.done():
                answer.set_result(found)

        node.asks(
            address,
            lambda host: host.takeovers.answer(session, expected, wanted),
            told,
            lambda: told(None),
        )
        try:
            async with asyncio.timeout(_ASK_S):
                return await answer
        except TimeoutError:
            return None

    return ask
