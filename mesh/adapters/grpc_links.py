"""Links: one long-lived gRPC stream per direction between two agents.

Whoever has something to send dials (``LinkPool``) and its packets go down that stream;
acknowledgements and beacons come back up it (``LinkServer``). A receive loop only decodes and hands
over: it waits for no computation and no send (rule R8). Every outbox is bounded; one that
overflows is a peer that does not read, and its link is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from mesh.adapters.begun import Begun
from mesh.adapters.codec import Decoder, encode
from mesh.errors import PeerError
from mesh.messages import FEATURES, WIRE_VERSION, Message
from mesh.types import Address, NodeId
from protos.gen import mesh_pb2 as pb
from protos.gen import mesh_pb2_grpc as rpc

log = logging.getLogger(__name__)

OUTBOX_MAX = 4096
HANDSHAKE_TIMEOUTS_S = (1.0, 3.0)
"""By dial. The first is short: just after a cut a new stream can be half open (the peer's side is gone, nothing says so),
and what waits for it is a session's report of its loss."""
MESSAGE_BYTES_MAX = 4 << 20
_FRAMING_BYTES = 14
"""gRPC's prefix (5) and HTTP/2's frame head (9)."""

QUIET_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
"""For streams whose peer membership watches anyway: nothing is sent while there is nothing to say."""
CHANNEL_OPTIONS = (
    *QUIET_CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are to peers."""

    cluster: str
    node: NodeId


class Upstream(Protocol):
    """Where acknowledgements for a frame go: back up the stream that it came down."""

    def reply(self, message: Message) -> None: ...


class _Outbox:
    """Packets waiting for a stream; one is written at a time.

    The first is handed to the stream as it is put: a token waits for it, and all that its sender does next, and
    whatever else is in line on the loop, would come before. The next goes when the stream says that it has the last.
    """

    def __init__(self) -> None:
        self._packets: deque[pb.Packet] = deque()
        self._write: Callable[[pb.Packet], Any] | None = None
        self._writing: Begun | None = None
        self._ended: asyncio.Future[None] | None = None
        self.broken = False
        self.bytes_sent = 0

    def put(self, message: Message) -> bool:
        """Send a message, or queue it behind others; false when the peer has not read for too long."""
        if self.broken or len(self._packets) >= OUTBOX_MAX:
            self.broken = True
            return False
        self._packets.extend(encode(message))
        self._go_on()
        return True

    def _go_on(self) -> None:
        while self._write is not None and self._writing is None and self._packets:
            packet = self._packets.popleft()
            self.bytes_sent += packet.ByteSize() + _FRAMING_BYTES
            writing = Begun(self._write(packet), self._wrote)
            if not writing.over:
                self._writing = writing
            elif writing.error is not None:
                self._fail(writing.error)

    def _wrote(self, error: BaseException | None) -> None:
        self._writing = None
        if error is not None:
            self._fail(error)
        self._go_on()

    def _fail(self, error: BaseException) -> None:
        self._write = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)

    async def pump(self, write: Callable[[pb.Packet], Any]) -> None:
        """Write for ever; ends by cancellation or with the stream's error."""
        self._write, self._ended = write, asyncio.get_running_loop().create_future()
        self._go_on()
        try:
            await self._ended
        finally:
            self._write = None
            if self._writing is not None:
                self._writing.close()
            if self._ended.done() and not self._ended.cancelled():
                self._ended.exception()  # it may have come as we were cancelled: then nobody asks


class _Link:
    """The dialled stream to one address."""

    def __init__(self, pool: LinkPool, address: Address) -> None:
        self.outbox = _Outbox()
        self.node: NodeId | None = None
        self.dropped = False
        self._pool, self._address = pool, address
        self._patience_s = list(HANDSHAKE_TIMEOUTS_S)
        self._handshake_by: asyncio.Timeout | None = None
        self.task = asyncio.create_task(self._run(), name=f"link to {address}")

    async def _run(self) -> None:
        reason = "closed"
        try:
            for patience_s in self._patience_s:
                try:
                    reason = await self._dial(patience_s)
                    break
                except TimeoutError:
                    reason = f"no answer within {patience_s:g} s"
        except grpc.RpcError as error:
            reason = _describe(error)
        except PeerError as error:
            reason = str(error)
        finally:
            self.outbox.broken = True
            self._pool.ended(self._address, self, reason)

    def dial_again(self) -> None:
        """Where the peer has not answered yet, begin anew now; once, as a peer that is gone must be reported in time."""
        by = self._handshake_by
        if by is not None and not by.expired() and len(self._patience_s) == len(HANDSHAKE_TIMEOUTS_S):
            self._patience_s.append(HANDSHAKE_TIMEOUTS_S[-1])
            by.reschedule(asyncio.get_running_loop().time())

    async def _dial(self, patience_s: float) -> str:
        """Run one stream to its end.

        Returns:
            Why it ended.

        Raises:
            TimeoutError: No answer to the handshake; nothing was sent of what waits in the outbox.
            PeerError: The peer is no agent of this mesh.
            grpc.RpcError: The stream broke.
        """
        async with grpc.aio.insecure_channel(self._address, CHANNEL_OPTIONS) as channel:
            call = rpc.PeerStub(channel).Link()
            try:
                async with asyncio.timeout(patience_s) as self._handshake_by:
                    await self._handshake(call)
            finally:
                self._handshake_by = None
            writer = asyncio.create_task(self.outbox.pump(call.write))
            try:
                return await self._receive(call, writer)
            finally:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await writer
                call.cancel()

    async def _handshake(self, call: Any) -> None:
        me = self._pool.identity
        hello = pb.Hello(cluster=me.cluster, wire_version=WIRE_VERSION, features=FEATURES, node=me.node)
        await call.write(pb.Packet(hello=hello))
        answer = await call.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("kind") != "welcome":
            raise PeerError(f"{self._address} did not answer the handshake; is it a mesh agent?")
        if not answer.welcome.accepted:
            raise PeerError(f"{self._address} refused us: {answer.welcome.reason}")
        self.node = NodeId(answer.welcome.node)

    async def _receive(self, call: Any, writer: asyncio.Task[None]) -> str:
        decoder = Decoder()
        # A write error would else go unseen until the next packet.
        writer.add_done_callback(lambda _: call.cancel())
        try:
            while (packet := await call.read()) is not grpc.aio.EOF:
                message = decoder.decode(packet)
                if message is not None:
                    self._pool.received(self._address, message)
        except asyncio.CancelledError:
            if writer.done() and not writer.cancelled():
                writer.result()
            raise
        return "the peer ended the stream"


class LinkPool:
    """Outgoing links by address; dials when first used and again after a loss."""

    def __init__(
        self,
        identity: Identity,
        received: Callable[[Address, Message], None],
        lost: Callable[[Address, str], None],
    ) -> None:
        self.identity = identity
        self.received = received
        self._lost = lost
        self._links: dict[Address, _Link] = {}
        self._closing = False

    def send(self, address: Address, message: Message) -> None:
        """Queue a message. A link that cannot take it is reported through ``lost``, later, once."""
        link = self._link(address)
        if link is not None and not link.outbox.put(message):
            link.task.cancel()

    def dial(self, address: Address) -> None:
        """Have a link there before there is something to send."""
        self._link(address)

    def _link(self, address: Address) -> _Link | None:
        link = self._links.get(address)
        if link is None or link.outbox.broken:
            if self._closing:
                return None
            if link is not None:
                link.task.cancel()
            link = self._links[address] = _Link(self, address)
        return link

    def drop(self, address: Address) -> None:
        """Forget a link whose peer is silent: what comes next is dialled anew, as TCP would go on waiting for ever
        longer before it tries again. It is not reported as lost: whoever drops it knows."""
        link = self._links.pop(address, None)
        if link is not None:
            link.dropped = True
            link.outbox.broken = True
            link.task.cancel()

    def dial_again(self) -> None:
        """Somebody who was away is back, or we are: whatever was dialled meanwhile is dialled anew, as TCP waits ever longer before it
        tries again."""
        for link in list(self._links.values()):
            link.dial_again()

    def ended(self, address: Address, link: _Link, reason: str) -> None:
        """A link's task is over."""
        if self._links.get(address) is link:
            del self._links[address]
        if not self._closing and not link.dropped:
            log.info("link to %s ended: %s", address, reason)
            self._lost(address, reason)

    def bytes_sent(self) -> dict[Address, int]:
        """Bytes of packets written so far, by address, of the links that are open."""
        return {address: link.outbox.bytes_sent for address, link in self._links.items()}

    async def close(self) -> None:
        """End all links."""
        self._closing = True
        tasks = [link.task for link in self._links.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Incoming:
    """One accepted stream; replies go back up it."""

    def __init__(self, peer: NodeId) -> None:
        self.peer = peer
        self.outbox = _Outbox()

    def reply(self, message: Message) -> None:
        self.outbox.put(message)


class LinkServer(rpc.PeerServicer):
    """Accepts links of peers of the same cluster and wire version."""

    def __init__(
        self,
        identity: Identity,
        received: Callable[[Incoming, Message], None],
        lost: Callable[[Incoming], None],
    ) -> None:
        self._identity, self._received, self._lost = identity, received, lost
        self._open: set[Incoming] = set()

    def bytes_sent(self) -> dict[NodeId, int]:
        """Bytes of replies written so far, by peer, on the streams that are open."""
        totals: dict[NodeId, int] = {}
        for incoming in self._open:
            totals[incoming.peer] = totals.get(incoming.peer, 0) + incoming.outbox.bytes_sent
        return totals

    async def Link(  # type: ignore[override]  # noqa: N802 (gRPC's name)
        self, request_iterator: AsyncIterator[pb.Packet], context: Any
    ) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUTS_S[-1]):
                first = await context.read()
        except TimeoutError:
            return
        refusal = self._refusal(first)
        hello = first.hello if refusal is None else pb.Hello()
        welcome = pb.Welcome(
            accepted=refusal is None,
            reason=refusal or "",
            node=self._identity.node,
            features=FEATURES & hello.features,
        )
        await context.write(pb.Packet(welcome=welcome))
        if refusal is not None:
            log.warning("refused the link of %s: %s", context.peer(), refusal)
            return
        incoming = Incoming(NodeId(hello.node))
        self._open.add(incoming)
        writer = asyncio.create_task(incoming.outbox.pump(context.write))
        try:
            decoder = Decoder()
            while (packet := await context.read()) is not grpc.aio.EOF:
                message = decoder.decode(packet)
                if message is not None:
                    self._received(incoming, message)
        except PeerError as error:
            log.warning("link of %s broke the contract: %s", incoming.peer, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            incoming.outbox.broken = True
            self._open.discard(incoming)
            writer.cancel()
            self._lost(incoming)

    def _refusal(self, packet: Any) -> str | None:
        if packet is grpc.aio.EOF or packet.WhichOneof("kind") != "hello":
            return "the first packet was no hello"
        hello, me = packet.hello, self._identity
        if hello.cluster != me.cluster:
            return f"this is cluster {me.cluster!r}, not {hello.cluster!r}"
        if hello.wire_version != WIRE_VERSION:
            return f"this agent speaks wire version {WIRE_VERSION}, not {hello.wire_version}"
        return None


def _describe(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error)
