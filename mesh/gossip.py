"""What members say of each other: facts, the packets that carry them, and how news spreads.

A fact is one node's standing: its incarnation is raised by the node itself, and only by it, to
refute what others say. Which of two facts about one instance counts is SWIM's order (Das, Gupta,
Motivala, DSN 2002): the higher incarnation; at the same one, the worse news.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from mesh.coordinates import Coordinate
from mesh.types import Address, NodeId

NOBODY = NodeId("")


class MemberState(enum.Enum):
    """Standing of a member, from best to worst news."""

    ALIVE = 0
    """It answers."""
    SUSPECT = 1
    """It did not answer, to us nor through others: out of new routes; it may still refute."""
    DEAD = 2
    """It did not refute in time. It is tried now and then and may come back."""
    LEFT = 3
    """It said goodbye."""


@dataclass(frozen=True, slots=True)
class Fact:
    """``instance`` is when the process started (ms of its own clock): a restart is another one."""

    node: NodeId
    address: Address
    instance: int
    incarnation: int = 0
    state: MemberState = MemberState.ALIVE
    region: str = ""
    by: NodeId = NOBODY
    """Who accuses; empty for what a node says of itself."""

    def news_to(self, known: Fact) -> bool:
        """Whether this changes ``known``, a fact about the same instance."""
        return (self.incarnation, self.state.value) > (known.incarnation, known.state.value)


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by the named instance only. ``count``: pings sent to it so far, this one included."""

    seq: int
    target: NodeId
    instance: int
    count: int


@dataclass(frozen=True, slots=True)
class Ack:
    """``held`` (ns) is how long the answer was in the making, ``seen`` how many pings came from
    the asker so far, ``count`` how many answers went to it."""

    seq: int
    held: int = 0
    seen: int = 0
    count: int = 0
    coordinate: Coordinate | None = None


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Please ping this member for me; its fact says what I hold of it."""

    seq: int
    target: Fact


@dataclass(frozen=True, slots=True)
class Nack:
    """The member that you asked about did not answer me either; but you see that I do."""

    seq: int


@dataclass(frozen=True, slots=True)
class Train:
    """One of ``total`` packets of ``size`` bytes that leave back to back, to measure bandwidth."""

    train: int
    index: int
    total: int
    size: int


@dataclass(frozen=True, slots=True)
class TrainSeen:
    """How fast a train arrived, bits per second."""

    train: int
    bits_per_second: int


@dataclass(frozen=True, slots=True)
class Twin:
    """You are not the only one with your node id: an older process at ``address`` is alive."""

    address: Address


Body = Ping | Ack | PingRequest | Nack | Train | TrainSeen | Twin | None


@dataclass(frozen=True, slots=True)
class Packet:
    """A datagram: who sends it (its own fact), what it asks, and news that ride along."""

    sender: Fact
    body: Body
    news: tuple[Fact, ...] = ()


@dataclass(slots=True)
class _Rumour:
    fact: Fact
    told: int = 0


@dataclass(slots=True)
class Rumours:
    """News to pass on, the least told first; each is dropped when it was told often enough."""

    per_packet: int
    _kept: dict[tuple[NodeId, NodeId], _Rumour] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, fact: Fact) -> None:
        """Spread a fact; older ones about the same node are forgotten."""
        if fact.state is not MemberState.SUSPECT:
            for key in [k for k in self._kept if k[0] == fact.node]:
                del self._kept[key]
        else:
            old = self._kept.get((fact.node, NOBODY))
            if old is not None:
                del self._kept[(fact.node, NOBODY)]
        self._kept[(fact.node, fact.by if fact.state is MemberState.SUSPECT else NOBODY)] = _Rumour(fact)

    def take(self, limit: int) -> tuple[Fact, ...]:
        """News for one packet; ``limit`` is how often each may be told."""
        if not self._kept:
            return ()
        chosen = sorted(self._kept.items(), key=lambda item: item[1].told)[: self.per_packet]
        for key, rumour in chosen:
            rumour.told += 1
            if rumour.told >= limit:
                del self._kept[key]
        return tuple(rumour.fact for _, rumour in chosen)
