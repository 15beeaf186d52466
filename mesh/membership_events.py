"""What happens to membership and what it asks for, as values: ``Membership.handle`` takes the one and
returns the other."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.gossip import Fact, Packet
from mesh.types import Address, NodeId


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """What another region is told instead of all its members: the seam for meshes of many sites."""

    region: str
    alive: int
    gateways: tuple[Address, ...]


# -- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """Discovery saw an agent at ``address``; ``node`` where the advert says which."""

    address: Address
    source: str
    node: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Gone:
    """Discovery does not list ``address`` any more. That alone kills nobody."""

    address: Address
    source: str


@dataclass(frozen=True, slots=True)
class Received:
    """A packet arrived at ``at`` (ns; the kernel's time where there is one)."""

    packet: Packet
    address: Address
    at: int


@dataclass(frozen=True, slots=True)
class Synced:
    """Views were exchanged with the agent at ``address``; ``error`` if it could not be reached."""

    address: Address
    sender: Fact | None = None
    facts: tuple[Fact, ...] = ()
    regions: tuple[RegionSummary, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class SyncReceived:
    """Another agent sent its view (and gets ours: ``facts``)."""

    sender: Fact
    facts: tuple[Fact, ...]
    regions: tuple[RegionSummary, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamAnswered:
    """A ping over the peer's stream (``PingStream``) came back."""

    seq: int
    sender: Fact


@dataclass(frozen=True, slots=True)
class StreamLost:
    """A stream to a member broke."""

    node: NodeId
    instance: int
    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """We stop: tell everybody."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline may have passed."""


Event = Found | Gone | Received | Synced | SyncReceived | StreamAnswered | StreamLost | Leave | Tick


# -- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """One datagram."""

    address: Address
    packet: Packet


@dataclass(frozen=True, slots=True)
class Sync:
    """Exchange views with the agent at ``address``; ``Synced`` must follow."""

    address: Address


@dataclass(frozen=True, slots=True)
class PingStream:
    """Ask over the peer's gRPC port as well: where datagrams are blocked that is the only way."""

    address: Address
    node: NodeId
    seq: int


@dataclass(frozen=True, slots=True)
class Changed:
    """A member's standing or address changed, or it is new, or (``member`` gone) forgotten."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class TwinSeen:
    """Two live agents have one node id; ``ours`` if it is our own and we are the younger."""

    node: NodeId
    address: Address
    ours: bool


Effect = Send | Sync | PingStream | Changed | TwinSeen
