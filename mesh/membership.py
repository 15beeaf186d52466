"""Who is in the mesh and who of them is alive: a pure machine, events in, effects out.

::

                 no answer, also not through others; its stream broke
          ┌───────────────────────────────────────────────▶┐
       ALIVE ◀──── higher incarnation: it refuted ────── SUSPECT
          │  ▲                                             │ nothing in time, nor to a last probe
          │  └──── higher incarnation, or restarted ──── DEAD
          └────────────── it says so ──────────────────▶ LEFT

SWIM probes and gossip, with Lifeguard's three refinements: a node that is slow itself waits
longer before it accuses, suspicions last the shorter the more accusers agree, and the accused is
told first. Beyond SWIM: each probe asks three times directly before the others are asked (lossy
radios), a death needs one more failed probe when its time is up, timers that come late (this
process was stopped or starved) move all deadlines instead of accusing anybody, and stream failures
of the data plane are evidence at once.

Discovery only says where to knock. A node that answers is a member whatever discovery says, and
one that does not is none, however long Consul lists it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil, log10
from typing import TYPE_CHECKING

from mesh.coordinates import Vivaldi
from mesh.gossip import (
    NOBODY,
    Ack,
    Body,
    Fact,
    MemberState,
    Nack,
    Packet,
    Ping,
    PingRequest,
    Rumours,
    Train,
    TrainSeen,
    Twin,
)
from mesh.links import LinkMeter, train_speed
from mesh.member import UNREACHABLE_AFTER, Member, Probe
from mesh.membership_events import (
    Changed,
    Effect,
    Event,
    Found,
    Gone,
    Leave,
    PingStream,
    Received,
    RegionSummary,
    Send,
    StreamAnswered,
    StreamLost,
    Sync,
    Synced,
    SyncReceived,
    Tick,
    TwinSeen,
)
from mesh.probing import Prober
from mesh.profiles import Profile
from mesh.sightings import Sightings
from mesh.suspicion import CONFIRMATIONS, Suspicion
from mesh.timers import Timers
from mesh.types import Address, NodeId

if TYPE_CHECKING:
    from random import Random

MEMBERS_MAX = 4096
FULL_VIEW_MAX = 400
"""Beyond so many members, those of other regions are kept as a summary only."""
SYNCS_MAX = 8
"""Exchanges of views that run at once."""
NEWS_PER_PACKET = 10
_HEALTH_MAX = 8
_SPREAD_NS = 20_000_000
"""Fresh news is passed on after so long, the same news again every ``gossip_interval``."""
_GATEWAYS = 3


class Membership:
    """The machine. ``me`` is our own fact; times are ns, randomness comes in as ``rng``."""

    def __init__(self, me: Fact, profile: Profile, rng: Random, now: int) -> None:
        self.me, self.profile = me, profile
        self.members: dict[NodeId, Member] = {}
        self.regions: dict[str, RegionSummary] = {}
        self.vivaldi = Vivaldi(rng)
        self.health = 0
        """Lifeguard's local health, 0 (well) to 8: multiplies the time we give others."""
        self.twin: Address | None = None
        """An older process with our node id: we keep out of the mesh."""
        self._rng = rng
        self._out: list[Effect] = []
        self._timers = Timers(now)
        self._prober = Prober(self, profile, rng, self._timers)
        self._rumours = Rumours(NEWS_PER_PACKET)
        self._spread_due = 0
        self._sightings = Sightings(profile.probe_interval // 4)
        self._knocking = False
        """There is a timer for those whose turn has not come."""
        self._syncing: set[Address] = set()
        self._contested: set[NodeId] = set()
        """Nodes that spoke as another process: which of the two lives is being found out."""
        self._leaving = False
        self._train = 0
        self._known_present: list[Member] | None = None
        self._timers.after(self._share(profile.sync_interval), self._sync_next)
        self._timers.after(self._share(profile.dead_probe_interval), self._try_dead)
        self._timers.after(self._share(profile.train_interval), self._train_next)

    # -- interface -----------------------------------------------------------------------------

    def handle(self, event: Event, now: int) -> list[Effect]:
        """Take an event; what must be done about it comes back."""
        self._timers.now = now
        out: list[Effect] = []
        self._out = out
        if self._leaving or self.twin is not None:
            return out
        match event:
            case Received(packet, address, at):
                self._received(packet, address, at)
            case Tick():
                self._tick()
            case Synced():
                self._synced(event)
            case SyncReceived(sender, facts, regions):
                self._exchange(sender, facts, regions)
            case Found(address, source, node):
                self._found(address, source, node)
            case Gone(address, source):
                self._gone(address, source)
            case StreamAnswered(seq, sender):
                self._prober.acknowledged(seq, sender, None, now)
            case StreamLost(node, instance, reason):
                self._stream_lost(node, instance, reason)
            case Leave():
                self._leave()
        return out

    def next_deadline(self) -> int | None:
        """When ``Tick`` is due."""
        return None if self._leaving else self._timers.next_due

    def facts(self) -> tuple[Fact, ...]:
        """Our view for an exchange: ourselves and all members but the left."""
        return (
            self.me,
            *(m.fact for _, m in sorted(self.members.items()) if m.fact.state is not MemberState.LEFT),
        )

    def summaries(self) -> tuple[RegionSummary, ...]:
        """Our region's summary and those we heard of."""
        alive = [self.me, *(m.fact for m in self.members.values() if m.fact.state is MemberState.ALIVE)]
        ours = sorted(f.node for f in alive if f.region == self.me.region)
        addresses = {f.node: f.address for f in alive}
        own = RegionSummary(self.me.region, len(ours), tuple(addresses[n] for n in ours[:_GATEWAYS]))
        return (own, *(s for r, s in sorted(self.regions.items()) if r != self.me.region))

    def unresolved(self) -> list[tuple[Address, tuple[str, ...], str]]:
        """Addresses that discovery lists and nobody answers at: address, sources, error."""
        return self._sightings.unanswered()

    # -- timers --------------------------------------------------------------------------------

    def _share(self, interval: int) -> int:
        """A random part of an interval: nodes that start together must not probe together."""
        return int(interval * self._rng.random())

    def _tick(self) -> None:
        now = self._now
        late = now - (self._timers.next_due or now)
        if late > self.profile.stall:
            # We were held up. Whatever is due now was due while we could not listen.
            self.stood_still(late)
            self._unwell(1)
        self._timers.run()

    def stood_still(self, by: int) -> None:
        """Move all that is due into the future: for so long we neither asked nor listened, ns."""
        self._timers.postpone(by)
        for member in self.members.values():
            if member.suspicion is not None:
                member.suspicion.since += by

    @property
    def settled(self) -> bool:
        """No news to pass on, nothing being found out, and everybody who is present answers us: as long as probes are
        answered, only estimates of links change."""
        busy = self._rumours or self._syncing or self._contested or self.health or self.twin
        return not busy and all(m.missed == 0 and m.suspicion is None for m in self.present())

    @property
    def _now(self) -> int:
        return self._timers.now

    def _unwell(self, by: int) -> None:
        self.health = min(_HEALTH_MAX, max(0, self.health + by))

    @property
    def timeout(self) -> int:
        """How long an answer may take, ns."""
        return self.profile.probe_timeout * (1 + self.health)

    # -- sending -------------------------------------------------------------------------------

    def send(self, address: Address, body: Body, *facts: Fact) -> None:
        """One datagram: ``facts`` first, then as much news as fits."""
        news = self._rumours.take(self._tellings) if self._rumours else ()
        if facts:
            named = {f.node for f in facts}
            news = (*facts, *(f for f in news if f.node not in named))
        self._out.append(Send(address, Packet(self.me, body, news)))

    @property
    def _tellings(self) -> int:
        return self.profile.retransmit * ceil(log10(len(self.members) + 2))

    def _tell(self, fact: Fact) -> None:
        """Spread news, soon."""
        self._rumours.add(fact)
        soon = self._now + _SPREAD_NS
        if not self._spread_due or self._spread_due > soon:
            self._spread_due = soon
            self._timers.after(_SPREAD_NS, self._spread)

    def _spread(self) -> None:
        if self._spread_due > self._now:
            return  # an earlier timer took its turn
        self._spread_due = 0
        peers = self.present()
        for member in self._rng.sample(peers, min(self.profile.gossip_fanout, len(peers))):
            if not self._rumours:
                return
            self.send(member.fact.address, None)
        if self._rumours and peers:
            self._spread_due = self._now + self.profile.gossip_interval
            self._timers.after(self.profile.gossip_interval, self._spread)

    def present(self) -> list[Member]:
        """Members that are alive or suspect, by id; kept until somebody's standing changes."""
        if self._known_present is None:
            self._known_present = [m for _, m in sorted(self.members.items()) if m.present]
        return self._known_present

    def _change(self, member: Member, state: MemberState, reason: str, broken: bool = False) -> None:
        self._known_present = None
        member.since, member.reason, member.broken = self._now, reason, broken
        if state is not MemberState.SUSPECT:
            member.suspicion = None
        self._out.append(Changed(member.fact.node))

    # -- answers to probes ---------------------------------------------------------------------

    def ping_stream(self, effect: PingStream) -> None:
        """Try the gRPC port."""
        self._out.append(effect)

    def unanswered(self, probe: Probe) -> None:
        """A probe found nobody: suspect its member, or bury it."""
        member = probe.member
        if self.members.get(member.fact.node) is not member or member.fact.instance != probe.instance:
            return
        if probe.helpers and not probe.nacks:
            # Nobody told us that he could not reach it either: perhaps nobody hears us.
            self._unwell(1)
        member.missed += 1
        if probe.last_chance and member.fact.state is MemberState.SUSPECT:
            self._bury(member)
        elif member.present:
            through = f", nor through {' and '.join(sorted(probe.helpers))}" if probe.helpers else ""
            waited = 2 * self.profile.probe_timeout / 1e9
            self._suspect(member, self.me.node, f"no answer for {waited:.3g} s{through}")

    def answered(self, member: Member, sender: Fact, first: bool) -> None:
        """A member answered, itself or through another."""
        if first:
            self._unwell(-1)
        was_reachable = member.missed < UNREACHABLE_AFTER
        if sender.node == member.fact.node:
            member.missed = 0
        elif first:
            member.missed += 1
        if was_reachable != (member.missed < UNREACHABLE_AFTER) and member.fact.state is MemberState.ALIVE:
            member.reason = f"answers {sender.node}, not us" if was_reachable else ""
            self._out.append(Changed(member.fact.node))

    def measured(self, member: Member, ack: Ack, rtt: int, count: int) -> None:
        """Fold a direct answer into link and coordinates."""
        member.meter.answered(rtt if rtt > 0 else None, count, ack.seen, ack.count)
        if ack.coordinate is not None and ack.coordinate.valid():
            member.coordinate = ack.coordinate
            if rtt > 0:
                self.vivaldi.measured(ack.coordinate, rtt / 1e9)

    # -- suspicion and death -------------------------------------------------------------------

    def _suspect(self, member: Member, by: NodeId, reason: str, broken: bool = False) -> None:
        fact = replace(member.fact, state=MemberState.SUSPECT, by=by)
        suspicion = member.suspicion
        if suspicion is None:
            expected = min(CONFIRMATIONS, len(self.members) - 1)
            suspicion = member.suspicion = Suspicion(
                self._now, self.profile.suspicion_min, self.profile.suspicion_max, expected
            )
            suspicion.confirm(by)
            member.fact = fact
            self._change(member, MemberState.SUSPECT, reason, broken)
        elif not suspicion.confirm(by):
            return
        self._tell(fact)
        if by == self.me.node:
            self._prober.ping(member)  # the accused hears it first
        self._timers.after(suspicion.deadline() - self._now, self._time_is_up, member, suspicion)

    def _time_is_up(self, member: Member, suspicion: Suspicion) -> None:
        if member.suspicion is not suspicion or self._now < suspicion.deadline():
            return
        if member.probe is not None:
            member.probe.last_chance = True
        else:
            self._prober.probe(member, last_chance=True)

    def _bury(self, member: Member) -> None:
        member.fact = replace(member.fact, state=MemberState.DEAD, by=self.me.node)
        self._change(member, MemberState.DEAD, member.reason, member.broken)
        self._tell(member.fact)

    def _stream_lost(self, node: NodeId, instance: int, reason: str) -> None:
        member = self.members.get(node)
        if member and member.fact.instance == instance and member.fact.state is MemberState.ALIVE:
            self._suspect(member, self.me.node, reason, broken=True)

    def _try_dead(self) -> None:
        """Knock at one dead member, and forget those that are dead for long."""
        self._timers.after(self.profile.dead_probe_interval, self._try_dead)
        if len(self.present()) == len(self.members):
            return
        gone = [m for m in self.members.values() if not m.present]
        for member in gone:
            if self._now - member.since > self.profile.forget:
                del self.members[member.fact.node]
                self._known_present = None
                self._out.append(Changed(member.fact.node))
        dead = [m for m in gone if m.fact.state is MemberState.DEAD]
        if dead:
            self._prober.ping(self._rng.choice(dead))

    # -- packets in ----------------------------------------------------------------------------

    def _received(self, packet: Packet, address: Address, at: int) -> None:
        sender, body = packet.sender, packet.body
        if isinstance(body, Twin):
            self._start_sync(body.address)  # a datagram is no proof: who answers there?
            return
        if sender.node == self.me.node:
            if sender.instance != self.me.instance:
                self._start_sync(sender.address)
            return
        self._met(sender)
        for fact in packet.news:
            self._merge(fact)
        match body:
            case Ping():
                self._answer(sender, body, at)
            case Ack(seq):
                self._prober.acknowledged(seq, sender, body, at)
            case PingRequest(seq, target):
                self._merge(target)
                if target.node in self.members:
                    self._prober.help(sender, seq, self.members[target.node])
            case Nack(seq):
                self._prober.refused(seq)
            case Train():
                self._train_came(sender, body, at)
            case TrainSeen(_, speed):
                member = self.members.get(sender.node)
                if member is not None and speed > 0:
                    member.meter.train_out(speed)
            case None:
                pass

    def _answer(self, sender: Fact, ping: Ping, at: int) -> None:
        if (ping.target, ping.instance) != (self.me.node, self.me.instance):
            # It knows our address by another process: an earlier life of ours, or another node's.
            self.send(sender.address, None, self.me)
            return
        member = self.members.get(sender.node)
        seen = count = 0
        if member is not None:
            member.meter.pings_seen += 1
            member.meter.acks_sent += 1
            seen, count = member.meter.pings_seen, member.meter.acks_sent
        ack = Ack(ping.seq, max(0, self._now - at), seen, count, self.vivaldi.here)
        facts = (member.fact,) if member and member.fact.state is not MemberState.ALIVE else ()
        self.send(sender.address, ack, *facts)

    # -- facts ---------------------------------------------------------------------------------

    def _met(self, sender: Fact) -> None:
        """A packet came straight from a node: its own word on itself, this very moment."""
        known = self.members.get(sender.node)
        if known is None:
            self._merge(sender)
            if sender.node in self.members:
                self.members[sender.node].sources.add("direct")
                self._start_sync(sender.address)
        elif known.fact.instance == sender.instance:
            known.sources.add("direct")
            if sender.incarnation > known.fact.incarnation:
                self._merge(sender)
        else:
            self._other_instance(known, sender)

    def _merge(self, fact: Fact) -> None:
        """Fold in what somebody says."""
        if fact.node == self.me.node:
            self._about_us(fact)
            return
        member = self.members.get(fact.node)
        if member is None:
            self._welcome(fact)
        elif fact.instance != member.fact.instance:
            if fact.instance > member.fact.instance and fact.state is MemberState.ALIVE:
                if member.fact.state is MemberState.ALIVE:
                    self._knock(fact)  # a restart that we missed, or a twin: let it speak for itself
                else:
                    self._replace(member, fact)
        elif fact.state is MemberState.SUSPECT:
            self._accused(member, fact)
        elif fact.news_to(member.fact):
            self._news(member, fact)

    def _news(self, member: Member, fact: Fact) -> None:
        before = member.fact
        match fact.state:
            case MemberState.ALIVE:
                member.fact = fact
                member.missed = 0
                if before.state is not MemberState.ALIVE or before.address != fact.address:
                    self._change(member, MemberState.ALIVE, "")
                self._tell(fact)
            case MemberState.DEAD:
                if before.state is MemberState.ALIVE:
                    # Not while we hold it alive: it may refute, as it could to those who say so.
                    member.fact = replace(before, incarnation=fact.incarnation)
                    self._suspect(member, fact.by, f"{fact.by} says that it is dead")
                else:
                    member.fact = fact
                    self._change(member, MemberState.DEAD, member.reason or f"{fact.by} says so")
                    self._tell(fact)
            case MemberState.LEFT:
                member.fact = fact
                self._change(member, MemberState.LEFT, "it left")
                self._tell(fact)
            case _:
                raise AssertionError(fact)

    def _accused(self, member: Member, fact: Fact) -> None:
        known = member.fact
        if fact.incarnation < known.incarnation or (
            fact.incarnation == known.incarnation and known.state.value > MemberState.SUSPECT.value
        ):
            return
        if fact.incarnation > known.incarnation:
            member.suspicion = None
            member.fact = replace(known, incarnation=fact.incarnation, state=MemberState.ALIVE)
        self._suspect(member, fact.by, f"{fact.by} gets no answer from it")

    def _welcome(self, fact: Fact) -> None:
        if fact.state.value >= MemberState.DEAD.value or len(self.members) >= MEMBERS_MAX:
            return
        if fact.region != self.me.region and len(self.members) >= FULL_VIEW_MAX:
            return
        member = Member(replace(fact, state=MemberState.ALIVE, by=NOBODY), self._now, sources={"gossip"})
        self.members[fact.node] = member
        member.sources |= self._sightings.resolved(fact.address)
        self._prober.joined(fact.node)
        self._change(member, MemberState.ALIVE, "")
        self._tell(member.fact)
        if fact.state is MemberState.SUSPECT:
            self._suspect(member, fact.by, f"{fact.by} gets no answer from it")

    def _replace(self, member: Member, fact: Fact) -> None:
        """Another process of the same node took its place."""
        member.fact = replace(fact, state=MemberState.ALIVE, by=NOBODY)
        member.meter, member.missed, member.suspicion = LinkMeter(), 0, None
        self._change(member, MemberState.ALIVE, "")
        self._tell(member.fact)

    def _about_us(self, fact: Fact) -> None:
        if (
            fact.instance == self.me.instance
            and fact.state is not MemberState.ALIVE
            and fact.incarnation >= self.me.incarnation
        ):
            self.me = replace(self.me, incarnation=fact.incarnation + 1)
            self._unwell(1)
            self._tell(self.me)

    # -- twins ---------------------------------------------------------------------------------

    def _knock(self, fact: Fact) -> None:
        self.send(fact.address, Ping(0, fact.node, fact.instance, 0))

    def _other_instance(self, known: Member, sender: Fact) -> None:
        """A node that we know speaks as another process: restarted, or there are two of it."""
        if known.fact.address == sender.address or known.fact.state is not MemberState.ALIVE:
            self._replace(known, sender)
            return
        if sender.node in self._contested:
            return
        self._contested.add(sender.node)
        self._prober.ping(known)
        self._timers.after(self.timeout, self._prober.ping, known)
        self._timers.after(2 * self.timeout, self._settle, known, sender, known.meter.acks_seen)

    def _settle(self, known: Member, challenger: Fact, acks_before: int) -> None:
        """Whether the process that we knew has answered since the other one turned up."""
        self._contested.discard(challenger.node)
        if self.members.get(challenger.node) is not known or known.fact.instance == challenger.instance:
            return
        if known.meter.acks_seen == acks_before:
            self._replace(known, challenger)
            return
        # Both live. The older stays: whoever copied a data directory is the younger.
        older, younger = sorted((known.fact, challenger), key=lambda f: (f.instance, f.address))
        self.send(younger.address, Twin(older.address))
        self._out.append(TwinSeen(challenger.node, younger.address, ours=False))
        if older is not known.fact:
            self._replace(known, older)

    def _twin_of_ours(self, other: Fact) -> None:
        if (other.instance, other.address) > (self.me.instance, self.me.address):
            self.send(other.address, Twin(self.me.address))
            self._out.append(TwinSeen(other.node, other.address, ours=False))
        elif self.twin is None and other.address != self.me.address:
            self.twin = other.address
            self._timers.clear()
            self._out.append(TwinSeen(self.me.node, other.address, ours=True))
            for node in list(self.members):
                del self.members[node]
                self._out.append(Changed(node))

    # -- discovery and exchange of views -------------------------------------------------------

    def _found(self, address: Address, source: str, node: NodeId | None) -> None:
        if address == self.me.address:
            return
        for member in self.members.values():
            if member.fact.address == address:
                member.sources.add(source)
                return
        self._sightings.add(address, source, self._now)
        self._knock_later()
        self._knock_next()

    def _gone(self, address: Address, source: str) -> None:
        for member in self.members.values():
            if member.fact.address == address:
                member.sources.discard(source)
        self._sightings.remove(address, source)

    def _knock_next(self) -> None:
        """Exchange views with those that discovery named, a few at a time."""
        for address in self._sightings.due(self._now, SYNCS_MAX - len(self._syncing)):
            self._start_sync(address)

    def _knock_later(self) -> None:
        if not self._knocking:
            self._knocking = True
            self._timers.after(self.profile.probe_interval // 4, self._knock_again)

    def _knock_again(self) -> None:
        self._knocking = False
        if self._sightings:
            self._knock_later()
            self._knock_next()

    def _start_sync(self, address: Address) -> None:
        if address not in self._syncing and len(self._syncing) < SYNCS_MAX:
            self._syncing.add(address)
            self._out.append(Sync(address))

    def _sync_next(self) -> None:
        self._timers.after(self.profile.sync_interval, self._sync_next)
        alive = [m.fact.address for m in self.members.values() if m.fact.state is MemberState.ALIVE]
        afar = [g for r, s in sorted(self.regions.items()) if r != self.me.region for g in s.gateways]
        known = {m.fact.address for m in self.members.values()}
        choices = alive + [g for g in afar if g not in known]
        if choices:
            self._start_sync(self._rng.choice(choices))

    def _synced(self, event: Synced) -> None:
        self._syncing.discard(event.address)
        if event.sender is None:
            self._sightings.failed(event.address, event.error, self._now)
        else:
            sources = self._sightings.resolved(event.address)
            self._exchange(event.sender, event.facts, event.regions)
            # It may tell another address than the one that was listed.
            member = self.members.get(event.sender.node)
            if member is not None:
                member.sources |= sources
        self._knock_next()

    def _exchange(self, sender: Fact, facts: Iterable[Fact], regions: Iterable[RegionSummary]) -> None:
        if sender.node == self.me.node:
            if sender.instance != self.me.instance:
                self._twin_of_ours(sender)
            return
        self._met(sender)
        for fact in facts:
            if fact.node != sender.node:
                self._merge(fact)
        for summary in regions:
            if summary.region != self.me.region and len(self.regions) < MEMBERS_MAX:
                self.regions[summary.region] = summary

    def _leave(self) -> None:
        """Tell everybody directly, twice: nobody will be there to repeat it."""
        gone = replace(self.me, state=MemberState.LEFT)
        for _ in range(2):
            for member in self.present():
                self._out.append(Send(member.fact.address, Packet(gone, None, (gone,))))
        self.me = gone
        self._leaving = True

    # -- bandwidth -----------------------------------------------------------------------------

    def _train_next(self) -> None:
        self._timers.after(self.profile.train_interval, self._train_next)
        alive = [m for m in self.members.values() if m.reachable and not m.by_stream]
        if not alive:
            return
        member = self._rng.choice(alive)
        self._train = (self._train + 1) & 0xFFFFFFFF
        total, size = self.profile.train_packets, self.profile.train_bytes
        for index in range(total):
            packet = Packet(self.me, Train(self._train, index, total, size))
            self._out.append(Send(member.fact.address, packet))

    def _train_came(self, sender: Fact, train: Train, at: int) -> None:
        member = self.members.get(sender.node)
        if member is None:
            return
        arrivals = member.trains.get(train.train)
        if arrivals is None:
            member.trains.clear()
            arrivals = member.trains[train.train] = []
            self._timers.after(self.timeout, self._train_over, member, train, sender.address)
        if len(arrivals) < train.total:
            arrivals.append(at)

    def _train_over(self, member: Member, train: Train, address: Address) -> None:
        speed = train_speed(member.trains.pop(train.train, ()), train.size)
        if speed:
            member.meter.train_in(speed)
            self.send(address, TrainSeen(train.train, speed))
