"""Runs a ``Membership`` machine in real time: datagrams, timers, and gRPC for whole views.

The socket is read before any timer fires: an answer that waits there must not count as silence
because this process was busy. Arrival times are the kernel's, so a round trip is the network's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import grpc

from mesh.adapters.grpc_links import QUIET_CHANNEL_OPTIONS
from mesh.adapters.membership_codec import (
    cluster_mark,
    decode_packet,
    encode_packet,
    fact_to_pb,
    read_fact,
    read_view,
    view_to_pb,
)
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
from mesh.types import Address, NodeId
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc as rpc

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 3.0
_BATCH = 256
_RECEIVE_MAX = 2048
_HEADER_BYTES = 28
"""IPv4 and UDP."""
_BUFFER_BYTES = 1 << 20
_STAMP_BELIEVED_NS = 2_000_000_000
_NAME_KEPT_S = 60.0
_STAMP = getattr(socket, "SO_TIMESTAMPNS", 35)
_TIMESPEC = struct.Struct("qq")


def open_socket(host: str, port: int) -> socket.socket:
    """A datagram socket at ``host``; raises ``OSError`` where the port is taken."""
    wildcard = "::" if host == "" else host
    found = socket.getaddrinfo(wildcard, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
    family, _, _, _, place = found[0]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, _STAMP, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(place)
    except OSError:
        sock.close()
        raise
    return sock


class MembershipDriver(rpc.MembershipServicer):
    """One machine on a socket."""

    def __init__(
        self,
        cluster: str,
        machine: Membership,
        sock: socket.socket,
    ) -> None:
        self.machine = machine
        self.bytes_sent = self.bytes_received = 0
        self._cluster, self._mark = cluster, cluster_mark(cluster)
        self._sock = sock
        self._changed: Callable[[NodeId], None] = lambda node: None
        self._twin: Callable[[TwinSeen], None] = lambda seen: None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: dict[str, tuple[float, Any]] = {}
        self._garbage = 0
        self._loop.add_reader(sock, self._readable)
        self._arm()

    def listen(self, changed: Callable[[NodeId], None], twin: Callable[[TwinSeen], None]) -> None:
        """Whom to tell of members that changed, and of nodes that are there twice."""
        self._changed, self._twin = changed, twin

    def handle(self, event: Event) -> None:
        """Give the machine an event and do what it asks for."""
        for effect in self.machine.handle(event, time.monotonic_ns()):
            self._carry_out(effect)
        self._arm()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(address, packet):
                self._send(address, encode_packet(packet, self._mark))
            case Changed(node):
                self._changed(node)
            case TwinSeen():
                self._twin(effect)
            case Sync(address):
                self._spawn(self._sync(address))
            case PingStream(address, node, seq):
                self._spawn(self._ping_stream(address, node, seq))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- time ----------------------------------------------------------------------------------

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.machine.next_deadline()
        self._timer = None if due is None else self._loop.call_at(due / 1e9, self._tick)

    def _tick(self) -> None:
        self._readable()
        self.handle(Tick())

    # -- datagrams -----------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _, source = self._sock.recvmsg(_RECEIVE_MAX, 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.debug("datagram socket: %s", error)
                return
            self.bytes_received += len(data) + _HEADER_BYTES
            try:
                packet = decode_packet(data, self._mark)
            except PeerError as error:
                self._garbage += 1
                if self._garbage & (self._garbage - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                    log.warning("garbage from %s (%d in all): %s", source[0], self._garbage, error)
                continue
            if packet is not None:
                self.handle(Received(packet, Address(f"{source[0]}:{source[1]}"), _arrival(ancillary)))

    def _send(self, address: Address, data: bytes) -> None:
        place = self._resolve(address)
        if place is None:
            return
        self.bytes_sent += len(data) + _HEADER_BYTES
        try:
            self._sock.sendto(data, place)
        except OSError as error:  # no route, a full buffer: to the machine that is loss
            log.debug("datagram to %s: %s", address, error)

    def _resolve(self, address: Address) -> Any:
        """A socket address; ``None`` while a name is being looked up or is not of our family."""
        now = self._loop.time()
        known = self._names.get(address)
        if known is not None and known[0] > now:
            return known[1]
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            literal = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            self._names[address] = (now + 1.0, known[1] if known else None)
            self._spawn(self._look_up(address, host, int(port)))
            return known[1] if known else None
        place = self._place(host, int(port), literal.version)
        self._names[address] = (now + 3600.0, place)
        return place

    def _place(self, host: str, port: int, version: int) -> Any:
        if self._sock.family == socket.AF_INET6:
            text = host if version == 6 else f"::ffff:{host}"
            return socket.getaddrinfo(text, port, socket.AF_INET6, socket.SOCK_DGRAM)[0][4]
        return (host, port) if version == 4 else None

    async def _look_up(self, address: Address, host: str, port: int) -> None:
        family = self._sock.family
        flags = socket.AI_V4MAPPED if family == socket.AF_INET6 else 0
        try:
            found = await self._loop.getaddrinfo(
                host, port, family=family, type=socket.SOCK_DGRAM, flags=flags
            )
        except OSError as error:
            log.debug("%s cannot be looked up: %s", host, error)
            return
        self._names[address] = (self._loop.time() + _NAME_KEPT_S, found[0][4])

    # -- gRPC ----------------------------------------------------------------------------------

    async def _sync(self, address: Address) -> None:
        machine = self.machine
        view = view_to_pb(self._cluster, machine.me, machine.facts(), machine.summaries())
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                answer = await rpc.MembershipStub(channel).Exchange(view, timeout=SYNC_TIMEOUT_S)
            event = Synced(address, *read_view(answer, self._cluster))
        except grpc.aio.AioRpcError as error:
            event = Synced(address, error=f"{error.code().name.lower()}: {error.details()}")
        except PeerError as error:
            event = Synced(address, error=str(error))
        self.handle(event)

    async def _ping_stream(self, address: Address, node: NodeId, seq: int) -> None:
        timeout_s = 2 * self.machine.profile.probe_timeout / 1e9
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                request = pb.ProbeRequest(cluster=self._cluster, target=node)
                answer = await rpc.MembershipStub(channel).Probe(request, timeout=timeout_s)
            sender = read_fact(answer.sender)
        except (grpc.aio.AioRpcError, PeerError) as error:
            log.debug("probe of %s over gRPC: %s", address, error)
            return
        self.handle(StreamAnswered(seq, sender))

    async def Exchange(self, request: pb.View, context: Any) -> pb.View:  # noqa: N802 (gRPC's name)
        try:
            sender, facts, regions = read_view(request, self._cluster)
        except PeerError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"we refuse this view: {error}")
        machine = self.machine
        answer = view_to_pb(self._cluster, machine.me, machine.facts(), machine.summaries())
        self.handle(SyncReceived(sender, facts, regions))
        return answer

    async def Probe(self, request: pb.ProbeRequest, context: Any) -> pb.ProbeReply:  # noqa: N802
        if request.cluster != self._cluster:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is cluster {self._cluster!r}")
        return pb.ProbeReply(sender=fact_to_pb(self.machine.me), clock_ms=time.time_ns() // 1_000_000)

    async def close(self) -> None:
        """Stop; the socket is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _arrival(ancillary: list[tuple[int, int, bytes]]) -> int:
    """When the kernel received a datagram, on the monotonic clock; now where it does not say."""
    now = time.monotonic_ns()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _STAMP and len(data) >= _TIMESPEC.size:
            seconds, nanos = _TIMESPEC.unpack_from(data)
            age: int = time.time_ns() - (seconds * 1_000_000_000 + nanos)
            if 0 <= age < _STAMP_BELIEVED_NS:  # the wall clock may have been set in between
                return now - age
    return now


async def probe_agent(cluster: str, address: Address, timeout_s: float) -> tuple[NodeId, float]:
    """Ask whoever listens at ``address``: its node id, and how far its clock is ahead of ours (s).

    Raises ``PeerError`` naming what it said, or that nobody answers.
    """
    try:
        async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
            stub = rpc.MembershipStub(channel)
            await stub.Probe(pb.ProbeRequest(cluster=cluster), timeout=timeout_s)  # connects
            begin = time.time()
            answer = await stub.Probe(pb.ProbeRequest(cluster=cluster), timeout=timeout_s)
            end = time.time()
    except grpc.aio.AioRpcError as error:
        raise PeerError(f"{address}: {error.code().name.lower()}: {error.details()}") from None
    return read_fact(answer.sender).node, answer.clock_ms / 1000 - (begin + end) / 2
