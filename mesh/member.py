"""What is held of one member."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.coordinates import Coordinate
from mesh.gossip import Fact, MemberState
from mesh.links import LinkMeter
from mesh.suspicion import Suspicion
from mesh.types import NodeId

UNREACHABLE_AFTER = 3
"""Probes in a row that only others got through, after which no route from here uses the member."""


@dataclass(slots=True)
class Probe:
    """One round of asking a member whether it lives."""

    member: Member
    instance: int
    last_chance: bool
    """Its time to refute is up: if this finds nothing, it is dead."""
    seqs: list[int] = field(default_factory=list)
    helpers: tuple[NodeId, ...] = ()
    nacks: int = 0
    over: bool = False


@dataclass(slots=True)
class Member:
    """``since`` (ns) and ``reason`` are of its present standing."""

    fact: Fact
    since: int
    reason: str = ""
    sources: set[str] = field(default_factory=set)
    """How we know of it: names of discovery adapters, ``direct`` or ``gossip``."""
    meter: LinkMeter = field(default_factory=LinkMeter)
    coordinate: Coordinate | None = None
    suspicion: Suspicion | None = None
    missed: int = 0
    """Probes in a row that found no direct answer."""
    broken: bool = False
    """What is held against it is that our stream from it broke; otherwise it is silent."""
    by_stream: bool = False
    """Its last answer came over gRPC because datagrams did not get through."""
    probe: Probe | None = None
    """The probe that is under way."""
    trains: dict[int, list[int]] = field(default_factory=dict)
    """Arrival times of the packets of a train, by its number."""

    @property
    def present(self) -> bool:
        """Alive, or not known to be otherwise."""
        return self.fact.state is MemberState.ALIVE or self.fact.state is MemberState.SUSPECT

    @property
    def reachable(self) -> bool:
        """Alive and answering *us*: what a route from here needs."""
        return self.fact.state is MemberState.ALIVE and self.missed < UNREACHABLE_AFTER
