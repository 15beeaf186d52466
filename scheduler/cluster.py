"""The cluster snapshot: immutable; events in, a new snapshot out.

Scheduler, every ingress and the simulator see this type. What is *known* of a node comes from its
own record; whether it may be used is ``state``, which the data plane decides.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mesh.types import Address, NodeId, ShardInfo


class NodeState(enum.Enum):
    """Alive or not, as the data plane sees it. Only ``ALIVE`` nodes are in new routes."""

    ALIVE = "alive"
    SUSPECT = "suspect"


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


@dataclass(frozen=True, slots=True)
class Node:
    """What a node says of itself, and since when we think what we think of it."""

    id: NodeId
    name: str
    address: Address
    api_address: Address
    cores: int
    memory_total_bytes: int
    memory_free_bytes: int
    replicas: tuple[Replica, ...] = ()
    peers: tuple[Address, ...] = ()
    models: tuple[str, ...] = ()
    version: str = ""
    incarnation: int = 0
    draining: bool = False
    state: NodeState = NodeState.ALIVE
    reason: str = ""
    since_ns: int = 0


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node's own record arrived."""

    node: Node


@dataclass(frozen=True, slots=True)
class NodeSilent:
    """A node does not answer; ``reason`` is what the data plane saw."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """A node said goodbye."""

    node: NodeId


ClusterEvent = NodeSeen | NodeSilent | NodeLeft


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All nodes by id."""

    nodes: Mapping[NodeId, Node] = field(default_factory=lambda: MappingProxyType({}))

    def apply(self, event: ClusterEvent, now: int) -> ClusterSnapshot:
        """The snapshot after ``event``; records older than the one that is known are ignored."""
        nodes = dict(self.nodes)
        match event:
            case NodeSeen(node):
                known = nodes.get(node.id)
                if known and known.incarnation > node.incarnation:
                    return self
                unchanged = known is not None and known.state is NodeState.ALIVE
                since = known.since_ns if known and unchanged else now
                nodes[node.id] = replace(node, state=NodeState.ALIVE, reason="", since_ns=since)
            case NodeSilent(node_id, reason):
                known = nodes.get(node_id)
                if known is None or known.state is not NodeState.ALIVE:
                    return self
                nodes[node_id] = replace(known, state=NodeState.SUSPECT, reason=reason, since_ns=now)
            case NodeLeft(node_id):
                if nodes.pop(node_id, None) is None:
                    return self
        return ClusterSnapshot(MappingProxyType(nodes))

    def alive(self) -> list[Node]:
        """Usable nodes, by id."""
        return [n for _, n in sorted(self.nodes.items()) if n.state is NodeState.ALIVE]
