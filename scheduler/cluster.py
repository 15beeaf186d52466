"""The cluster snapshot: immutable; events in, a new snapshot out.

Scheduler, every ingress and the simulator see this type. What is *known* of a node comes from its
own record; whether it may be used is ``state``, which membership decides.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mesh.capabilities import Capabilities
from mesh.coordinates import Coordinate
from mesh.gossip import MemberState
from mesh.links import LinkEstimate
from mesh.messages import FEATURES
from mesh.types import NO_POLICY, Address, NodeId, PolicyVersion, ShardInfo, Term
from scheduler.layer_speed import LayerSpeed
from scheduler.speed import StageSpeed


class ReplicaState(enum.Enum):
    """Only ``SERVING`` replicas are in routes."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Replica:
    """A shard loaded on a node, and how busy it is."""

    shard: ShardInfo
    state: ReplicaState
    reason: str = ""
    sessions: int = 0
    slots: int = 0
    context_max: int = 0
    """Positions that a session may take."""
    kv_reserved_bytes: int = 0
    kv_budget_bytes: int = 0
    provider: str = ""
    leases: int = 0
    speed: StageSpeed | None = None
    term: Term | None = None
    """Of the scheduler that placed it here, if one did."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a node says of itself, and what we think of it."""

    id: NodeId
    name: str
    address: Address
    api_address: Address
    capabilities: Capabilities
    memory_total_bytes: int
    memory_free_bytes: int
    replicas: tuple[Replica, ...] = ()
    models: tuple[str, ...] = ()
    version: str = ""
    draining: bool = False
    region: str = ""
    links: Mapping[NodeId, LinkEstimate] = field(default_factory=dict)
    """What it measured of its links, by peer; ``out`` is away from it."""
    coordinate: Coordinate | None = None
    public_key: bytes = b""
    """Ed25519, raw."""
    layer_speeds: tuple[LayerSpeed, ...] = ()
    """Measured here at any time, by model."""
    scheduler: bool = False
    """It may lead placement."""
    started_ms: int = 0
    """Unix time of its start, by its own clock."""
    term: Term | None = None
    """The latest of the schedulers' that it has heard of."""
    policy: PolicyVersion = NO_POLICY
    features: int = FEATURES
    """Feature bits of the wire that it speaks."""
    stage_us: float = 0.0
    """What stages took beside their computation, as this ingress measured it; 0 unknown."""
    losses: int = 0
    """How often we saw it die."""
    known_since_s: float = 0.0
    state: MemberState = MemberState.ALIVE
    reachable: bool = True
    """It answers *us*; a node that answers others only is alive, but in no route from here."""
    broken: bool = False
    """It is not reachable, or not alive, because our stream from it broke; otherwise it fell silent."""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node's own record arrived. ``at_s``: on any clock that all events of a snapshot share."""

    node: Node
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeJudged:
    """Membership changed its mind about a node."""

    node: NodeId
    state: MemberState
    reachable: bool = True
    at_s: float = 0.0
    broken: bool = False


@dataclass(frozen=True, slots=True)
class NodeForgotten:
    """A node left, or was dead for so long that its record is dropped."""

    node: NodeId


ClusterEvent = NodeSeen | NodeJudged | NodeForgotten


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All nodes by id."""

    nodes: Mapping[NodeId, Node] = field(default_factory=lambda: MappingProxyType({}))
    at_s: float = 0.0
    """Time of the last event."""

    def apply(self, event: ClusterEvent) -> ClusterSnapshot:
        """The snapshot after ``event``."""
        nodes = dict(self.nodes)
        match event:
            case NodeSeen(node, at_s):
                known = nodes.get(node.id)
                if known:
                    node = replace(
                        node,
                        state=known.state,
                        reachable=known.reachable,
                        broken=known.broken,
                        losses=known.losses,
                        known_since_s=known.known_since_s,
                    )
                else:
                    node = replace(node, known_since_s=at_s)
                nodes[node.id] = node
            case NodeJudged(node_id, state, reachable, at_s, broken):
                known, told = nodes.get(node_id), (state, reachable, broken)
                if known is None or (known.state, known.reachable, known.broken) == told:
                    return self
                died = state is MemberState.DEAD and known.state is not MemberState.DEAD
                losses = known.losses + died
                nodes[node_id] = replace(
                    known, state=state, reachable=reachable, broken=broken, losses=losses
                )
            case NodeForgotten(node_id):
                if nodes.pop(node_id, None) is None:
                    return self
                at_s = self.at_s
        return ClusterSnapshot(MappingProxyType(nodes), max(self.at_s, at_s))

    def alive(self) -> list[Node]:
        """Nodes that new routes may use, by id."""
        return [n for _, n in sorted(self.nodes.items()) if n.state is MemberState.ALIVE and n.reachable]
