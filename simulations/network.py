"""The modelled network: datagrams that may be lost, streams that keep order, and cables that can be pulled.

A stream behaves as TCP does where it matters for recovery: what is sent while the path is cut waits and arrives late
after it heals, a process that dies resets its streams, a machine whose power fails says nothing, and gRPC's keepalive
ends a stream whose far end has been silent for ``KEEPALIVE_NS``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from mesh.types import Address
from simulations.virtual_time import Machine, VirtualLoop

KEEPALIVE_NS = 8_000_000_000
DIAL_TRIPS, DIAL_NS = 3, 12_000_000
"""Round trips before a new stream carries its first frame (TCP, HTTP/2 settings, headers), and what both ends compute for it."""
RESET_NS = 25_000_000
"""Until a killed process's sockets are closed: Linux gives back its memory first."""
DIALS_MAX = 200
"""In a second, to one address: more is a loop that never ends."""
_LATE = 20
"""Latencies by which a datagram that is overtaken comes later, at most."""


@dataclass(frozen=True, slots=True)
class Path:
    """One direction between two nodes."""

    latency_ns: int
    jitter_ns: int
    bytes_per_s: float
    loss: float = 0.0
    """Of datagrams; a stream pays ``latency_ns`` twice for a packet that was lost."""
    duplicate: float = 0.0
    """Of datagrams: they come twice."""
    reorder: float = 0.0
    """Of datagrams: they come after others that were sent later."""


class Host(Protocol):
    """Who listens at an address."""

    @property
    def machine(self) -> Machine: ...

    @property
    def address(self) -> Address: ...


@dataclass(eq=False)
class Stream:
    """A connection, both directions; either end may send once it is open."""

    network: Network
    source: Host
    target: Host
    on_lost: Callable[[str], None]
    """Runs at the source when the stream broke."""
    on_ended: Callable[[], None]
    """Runs at the target."""
    open: bool = True
    _due: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    _waiting: list[tuple[bool, int, Callable[..., object], tuple[object, ...]]] = field(default_factory=list)
    cut_at_ns: int = 0

    def send(self, forth: bool, size: int, deliver: Callable[..., object], *args: object) -> None:
        """Deliver at the target (``forth``) or back at the source, after what was sent before."""
        if not self.open:
            return
        if self.cut_at_ns:
            self._waiting.append((forth, size, deliver, args))
            return
        ends = (self.source, self.target) if forth else (self.target, self.source)
        network = self.network
        due = network.loop.now_ns + network.transit_ns(ends[0].address, ends[1].address, size)
        self._due[forth] = max(due, self._due[forth] + 1)
        ends[1].machine.post(self._due[forth], self._arrive, deliver, args)

    def opens_at(self, at_ns: int) -> None:
        """Nothing arrives before."""
        self._due = {True: at_ns, False: at_ns}

    def _arrive(self, deliver: Callable[..., object], args: tuple[object, ...]) -> None:
        if self.open:
            deliver(*args)

    def cut(self) -> None:
        """The path is gone; nobody is told."""
        self.cut_at_ns = self.cut_at_ns or self.network.loop.now_ns

    def heal(self, after_ns: int) -> None:
        """All goes on after TCP's next attempt; until then what is sent waits behind what waits already."""
        self.network.loop.at_ns(self.network.loop.now_ns + after_ns, self._again)

    def _again(self) -> None:
        ends = (self.source.address, self.target.address)
        if not self.cut_at_ns or self.network.is_cut(*ends) or self.network.is_cut(*ends[::-1]):
            return
        self.cut_at_ns, waiting, self._waiting = 0, self._waiting, []
        for forth, size, deliver, args in waiting:
            self.send(forth, size, deliver, *args)

    def close(self, reason: str, tell_source: bool = True, tell_target: bool = True) -> None:
        """Break it; the ends that are to be told hear of it a moment later, after what was under way."""
        loop, network = self.network.loop, self.network
        if not network.forget(self):
            return
        if tell_source:
            at = loop.now_ns + network.transit_ns(self.target.address, self.source.address, 0)
            self.source.machine.post(max(at, self._due[False] + 1), self.on_lost, reason)
        if tell_target:
            at = loop.now_ns + network.transit_ns(self.source.address, self.target.address, 0)
            self.target.machine.post(max(at, self._due[True] + 1), self.on_ended)
        loop.at_ns(loop.now_ns + network.longest_ns, self._shut)

    def reset(self) -> None:
        """Break it for both ends; what was under way is lost."""
        self.close("reset by peer")
        self.open = False

    def _shut(self) -> None:
        self.open = False


class Network:
    """Hosts by address, and what lies between them."""

    def __init__(self, loop: VirtualLoop, rng: Random, path: Callable[[Address, Address], Path]) -> None:
        self.loop, self._rng, self.path = loop, rng, path
        self._probes_rng = Random(rng.random())
        """Of datagrams: how many there are must not change what streams draw."""
        self.hosts: dict[Address, Host] = {}
        self.streams: dict[Stream, None] = {}
        """Open ones; a dict for its order."""
        self._at: defaultdict[Address, dict[Stream, None]] = defaultdict(dict)
        """The same by each end."""
        self.cuts: Counter[tuple[Address, Address]] = Counter()
        """Directions in which nothing passes, and for how many reasons."""
        self.bytes = 0
        self.messages = 0
        self.longest_ns = 0
        self.broken: Callable[[str], None] = lambda what: None
        """Told of what must never happen."""
        self._dials: dict[tuple[Address, Address], tuple[int, int]] = {}
        """By pair: the second, and how often in it."""

    def transit_ns(self, source: Address, target: Address, size: int) -> int:
        """How long a message takes; counts it."""
        path = self.path(source, target)
        self.bytes += size
        self.messages += 1
        took = path.latency_ns + int(path.jitter_ns * self._rng.random() + size / path.bytes_per_s * 1e9)
        if path.loss and self._rng.random() < path.loss:
            took += 2 * path.latency_ns
        self.longest_ns = max(self.longest_ns, took)
        return took

    def is_cut(self, source: Address, target: Address) -> bool:
        return (source, target) in self.cuts

    def datagram(
        self, source: Address, target: Address, size: int, deliver: Callable[[Host, int], None]
    ) -> None:
        """``deliver(host, arrival)`` at the target, or nothing."""
        host = self.hosts.get(target)
        if host is None or self.is_cut(source, target):
            return
        path = self.path(source, target)
        self.bytes += size
        self.messages += 1
        if path.loss and self._probes_rng.random() < path.loss:
            return
        due = self.loop.now_ns + path.latency_ns + int(path.jitter_ns * self._probes_rng.random())
        if path.reorder and self._probes_rng.random() < path.reorder:
            due += int(_LATE * path.latency_ns * self._probes_rng.random())
        host.machine.post(due, deliver, host, due)
        if path.duplicate and self._probes_rng.random() < path.duplicate:
            host.machine.post(due + path.latency_ns, deliver, host, due + path.latency_ns)

    def connect(
        self,
        source: Host,
        target: Address,
        on_lost: Callable[[str], None],
        on_ended: Callable[[], None],
        timeout_ns: int,
    ) -> Stream | None:
        """A stream to whoever listens there; ``None`` and ``on_lost`` a moment later where nobody answers."""
        host = self.hosts.get(target)
        self._count_dial(source.address, target)
        if host is None or self.is_cut(source.address, target) or self.is_cut(target, source.address):
            refused = host is None and not self.is_cut(source.address, target)
            wait = 2 * self.path(source.address, target).latency_ns if refused else timeout_ns
            reason = "connection refused" if refused else "no answer"
            source.machine.post(self.loop.now_ns + wait, on_lost, reason)
            return None
        stream = Stream(self, source, host, on_lost, on_ended)
        trip_ns = self.path(source.address, target).latency_ns + self.path(target, source.address).latency_ns
        stream.opens_at(self.loop.now_ns + DIAL_TRIPS * trip_ns + DIAL_NS)
        self.streams[stream] = None
        self._at[source.address][stream] = self._at[target][stream] = None
        return stream

    def forget(self, stream: Stream) -> bool:
        """It is open no more; false if it was not."""
        for end in (stream.source.address, stream.target.address):
            self._at[end].pop(stream, None)
        return self.streams.pop(stream, stream) is None

    def _count_dial(self, source: Address, target: Address) -> None:
        now_s = self.loop.now_ns // 1_000_000_000
        second, count = self._dials.get((source, target), (now_s, 0))
        count = count + 1 if second == now_s else 1
        self._dials[source, target] = (now_s, count)
        if count == DIALS_MAX:
            self.broken(f"{source} dialled {target} {DIALS_MAX} times in a second")

    def cut(self, pairs: set[tuple[Address, Address]]) -> None:
        """Let nothing pass in these directions, until ``heal``."""
        self.cuts.update(pairs)
        for stream in list(self.streams) if pairs else ():
            ends = (stream.source.address, stream.target.address)
            if ends in pairs or ends[::-1] in pairs:
                stream.cut()
                self.loop.at_ns(self.loop.now_ns + KEEPALIVE_NS, self._keepalive, stream, stream.cut_at_ns)

    def heal(self, pairs: set[tuple[Address, Address]]) -> None:
        """Let it pass again, as far as nothing else is in the way."""
        self.cuts.subtract(pairs)
        for pair in [p for p in pairs if not self.cuts[p]]:
            del self.cuts[pair]
        for stream in list(self.streams) if pairs else ():
            ends = (stream.source.address, stream.target.address)
            if stream.cut_at_ns and ends not in self.cuts and ends[::-1] not in self.cuts:
                # The next attempt comes after as long again at most.
                after_ns = int(self._rng.random() * (self.loop.now_ns - stream.cut_at_ns))
                if self._lives(stream):
                    stream.heal(after_ns)
                else:
                    self.loop.at_ns(self.loop.now_ns + after_ns, stream.close, "reset by peer")

    def _lives(self, stream: Stream) -> bool:
        ends = (stream.source, stream.target)
        return all(self.hosts.get(end.address) is end for end in ends)

    def started(self, host: Host) -> None:
        """A process listens again where another one was: what still comes for that one is answered with a reset."""
        self.hosts[host.address] = host
        for stream in list(self._at[host.address]):
            cut = self.is_cut(stream.source.address, stream.target.address)
            if not cut and not self._lives(stream):
                stream.close("reset by peer")

    def reset(self, address: Address) -> None:
        """Break the streams that lead to an address, as a router that forgot them would."""
        for stream in list(self._at[address]):
            if stream.target.address == address and not stream.cut_at_ns:
                stream.reset()

    def _keepalive(self, stream: Stream, cut_at_ns: int) -> None:
        if stream.cut_at_ns == cut_at_ns:
            stream.close("keepalive: no answer")

    def gone(self, host: Host, silently: bool) -> None:
        """A process died; its system resets its streams, or is gone as well (``silently``)."""
        if self.hosts.get(host.address) is host:
            del self.hosts[host.address]
        for stream in list(self._at[host.address]):
            if host in (stream.source, stream.target):
                if silently or stream.cut_at_ns:
                    stream.cut()
                    self.loop.at_ns(
                        self.loop.now_ns + KEEPALIVE_NS, self._keepalive, stream, stream.cut_at_ns
                    )
                else:
                    told = (stream.source is not host, stream.target is not host)
                    self.loop.at_ns(self.loop.now_ns + RESET_NS, stream.close, "reset by peer", *told)
