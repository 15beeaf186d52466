"""Asking members whether they live: whom next, how often, and through whom else.

A probe asks three times directly, over one timeout; with the third time it asks helpers to try, and
tries the gRPC port itself. Another timeout later nobody has answered. What that means is decided
elsewhere (``Membership``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from mesh.gossip import NOBODY, Ack, Body, Fact, MemberState, Nack, Ping, PingRequest
from mesh.member import Member, Probe
from mesh.membership_events import PingStream
from mesh.profiles import Profile
from mesh.timers import Timers
from mesh.types import Address, NodeId

if TYPE_CHECKING:
    from random import Random

_ASKS = 3
_LATE = 4
"""An answer is still worth its round trip so many timeouts after the ping."""


class ProbingHost(Protocol):
    """What a prober needs of the machine that it is part of."""

    members: dict[NodeId, Member]

    @property
    def timeout(self) -> int:
        """Patience of now, ns: longer when we are slow ourselves."""

    def present(self) -> list[Member]:
        """Those to be probed."""

    def send(self, address: Address, body: Body, *facts: Fact) -> None: ...

    def ping_stream(self, effect: PingStream) -> None: ...

    def unanswered(self, probe: Probe) -> None:
        """A probe ended without any answer."""

    def answered(self, member: Member, sender: Fact, first: bool) -> None:
        """``member`` answered, itself or through ``sender``; ``first``: that ends its probe."""

    def measured(self, member: Member, ack: Ack, rtt: int, count: int) -> None:
        """A direct answer to ping number ``count`` took ``rtt`` (ns)."""


class Prober:
    """Pings under way, and those that we make for others."""

    def __init__(self, host: ProbingHost, profile: Profile, rng: Random, timers: Timers) -> None:
        self._host, self._profile, self._rng, self._timers = host, profile, rng, timers
        self._seq = rng.randrange(1 << 30)
        self._pings: dict[int, tuple[Probe | None, NodeId, int, int]] = {}
        """By seq: the probe, whom, when, and its count."""
        self._relays: dict[int, tuple[int, Address]] = {}
        """By our seq: the asker's seq and address."""
        self._ring: list[NodeId] = []
        timers.after(int(profile.probe_interval * rng.random()), self._next)

    def joined(self, node: NodeId) -> None:
        """A new member takes its place in the round at random."""
        if self._ring:
            self._ring.insert(self._rng.randrange(len(self._ring) + 1), node)

    def _next(self) -> None:
        """Begin the next probe: everybody once, in random order, then in another."""
        fanout = max(1, min(self._profile.probe_fanout, len(self._host.members)))
        self._timers.after(self._profile.probe_interval // fanout, self._next)
        for _ in range(len(self._ring) + 1):
            if not self._ring:
                self._ring = [m.fact.node for m in self._host.present()]
                self._rng.shuffle(self._ring)
                if not self._ring:
                    return
            member = self._host.members.get(self._ring.pop())
            if member and member.present and member.probe is None:
                self.probe(member)
                return

    def probe(self, member: Member, last_chance: bool = False) -> None:
        """Begin a probe of a member that has none."""
        member.probe = Probe(member, member.fact.instance, last_chance)
        self._ask(member.probe, 0)

    def _ask(self, probe: Probe, step: int) -> None:
        if probe.over:
            return
        timeout = self._host.timeout
        if step == _ASKS:
            self._end(probe)
            self._host.unanswered(probe)
            return
        seq = self.ping(probe.member, probe)
        if step < _ASKS - 1:
            self._timers.after(timeout // 2, self._ask, probe, step + 1)
            return
        fact = probe.member.fact
        self._host.ping_stream(PingStream(fact.address, fact.node, seq))
        others = [
            m
            for m in self._host.present()
            if m.missed == 0 and m is not probe.member and m.fact.state is MemberState.ALIVE
        ]
        helpers = self._rng.sample(others, min(self._profile.helpers, len(others)))
        probe.helpers = tuple(h.fact.node for h in helpers)
        for helper in helpers:
            self._host.send(helper.fact.address, PingRequest(seq, fact))
        self._timers.after(timeout, self._ask, probe, _ASKS)

    def ping(self, member: Member, probe: Probe | None = None) -> int:
        """One ping; the accused is told of what in it. Returns its seq."""
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        seq, fact = self._seq, member.fact
        member.meter.pings_sent += 1
        count = member.meter.pings_sent
        self._pings[seq] = (probe, fact.node, self._timers.now, count)
        if probe is not None:
            probe.seqs.append(seq)
        else:
            self._timers.after(_LATE * self._profile.probe_timeout, self._forget, seq)
        accused = (fact,) if fact.state is not MemberState.ALIVE else ()
        self._host.send(fact.address, Ping(seq, fact.node, fact.instance, count), *accused)
        return seq

    def _forget(self, seq: int) -> None:
        self._pings.pop(seq, None)

    def _end(self, probe: Probe) -> None:
        probe.over = True
        probe.member.probe = None
        for seq in probe.seqs:
            # An answer that is late still tells the round trip and that the peer lives.
            _, node, sent, count = self._pings[seq]
            self._pings[seq] = (None, node, sent, count)
            self._timers.after(_LATE * self._profile.probe_timeout, self._forget, seq)

    def acknowledged(self, seq: int, sender: Fact, ack: Ack | None, at: int) -> None:
        """A ping came back at ``at``: from its target, through a helper, or (no ``ack``) over gRPC."""
        relay = self._relays.get(seq)
        if relay is not None:
            self._pass_on(relay, sender)
            return
        found = self._pings.get(seq)
        if found is None:
            return
        probe, node, sent, count = found
        member = self._host.members.get(node)
        direct = sender.node == node
        if member is None or (direct and sender.instance != member.fact.instance):
            return
        first = probe is not None and not probe.over
        if probe is not None and first:
            self._end(probe)
        if direct:
            del self._pings[seq]
            member.by_stream = ack is None
        self._host.answered(member, sender, first)
        if direct and ack is not None:
            self._host.measured(member, ack, at - sent - ack.held, count)

    def refused(self, seq: int) -> None:
        """A helper got no answer either."""
        found = self._pings.get(seq)
        if found and found[0] is not None:
            found[0].nacks += 1

    # -- for others ----------------------------------------------------------------------------

    def help(self, asker: Fact, seq: int, target: Member) -> None:
        """Ping a member for another."""
        own = self.ping(target)
        self._relays[own] = (seq, asker.address)
        self._timers.after(self._profile.probe_timeout * 4 // 5, self._give_up, own)

    def _pass_on(self, relay: tuple[int, Address], target: Fact) -> None:
        seq, asker = relay
        self._host.send(asker, Ack(seq), replace(target, state=MemberState.ALIVE, by=NOBODY))
        for own, waiting in list(self._relays.items()):
            if waiting == relay:
                del self._relays[own]

    def _give_up(self, own: int) -> None:
        relay = self._relays.pop(own, None)
        if relay is not None:
            self._host.send(relay[1], Nack(relay[0]))
