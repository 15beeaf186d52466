"""Who loads a shard that nobody serves any more, for sessions that wait for it. Pure.

The scheduler places what a policy asks for; this is for what no policy names (shards that agents were told to hold), when
the last replica of a stage is lost: the node that is expected to bring the sessions on first takes its shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mesh.types import Address, Digest, NodeId, ShardInfo
from scheduler.cluster import ClusterSnapshot, Node, ReplicaState
from scheduler.layer_speed import stage_speed
from scheduler.policy import ClassPolicy, forbidden
from scheduler.speed import guess

SESSIONS = 4
"""Sessions for which a shard that is loaded in need reserves KV memory."""


@dataclass(frozen=True, slots=True)
class ColdLoad:
    """A shard, and the node that should load it."""

    shard: ShardInfo
    node: NodeId
    address: Address


def cold_loads(
    snapshot: ClusterSnapshot,
    wanted: Iterable[ShardInfo],
    positions: int,
    replayed: int,
    avoid: frozenset[NodeId],
    rules: Sequence[ClassPolicy] = (),
) -> list[ColdLoad]:
    """Where to load each ``wanted`` shard that nobody serves or loads now: the node with room for it and KV memory of
    ``SESSIONS`` sessions of ``positions``, that is expected to replay ``replayed`` positions soonest. A shard for
    which there is none is left out."""
    found: list[ColdLoad] = []
    taken: dict[NodeId, int] = {}
    alive = [n for n in snapshot.alive() if not n.draining and n.id not in avoid]
    for shard in wanted:
        if _is_with(alive, shard.digest, ReplicaState.SERVING, ReplicaState.LOADING):
            continue
        size = shard.weight_bytes + SESSIONS * positions * shard.kv_bytes_per_token
        able = [
            n
            for n in alive
            if shard.model.ref.name in n.models
            and n.memory_free_bytes - taken.get(n.id, 0) >= size
            and not any(r.shard.digest == shard.digest for r in n.replicas)
            and not any(forbidden(n, r) for r in rules)
        ]
        if able:
            best = min(able, key=lambda n: (_replay_us(n, shard, replayed), n.id))
            taken[best.id] = taken.get(best.id, 0) + size
            found.append(ColdLoad(shard, best.id, best.address))
    return found


def served_beside(snapshot: ClusterSnapshot, shard: Digest, node: NodeId) -> bool:
    """Whether somebody but ``node``, who loaded a shard in need, serves it."""
    others = (n for n in snapshot.alive() if n.id != node and not n.draining)
    return _is_with(others, shard, ReplicaState.SERVING)


def _is_with(nodes: Iterable[Node], shard: Digest, *states: ReplicaState) -> bool:
    return any(r.shard.digest == shard and r.state in states for n in nodes for r in n.replicas)


def _replay_us(node: Node, shard: ShardInfo, positions: int) -> float:
    """Microseconds: reading the weights once is as long as a step; then the replay."""
    wanted = (shard.model.ref.digest, shard.runtime, shard.quantization)
    known = [s for s in node.layer_speeds if (s.model, s.runtime, s.quantization) == wanted]
    speed = stage_speed(shard, known[0]) if known else guess(shard, node.capabilities)
    return speed.decode + speed.prefill * positions
