"""Nodes and replicas to protos and back."""

from __future__ import annotations

from typing import Any

from mesh.errors import PeerError
from mesh.messages import FEATURES, WIRE_VERSION
from mesh.types import Address, Digest, LayerRange, ModelRef, ModelShape, NodeId, ShardInfo
from protos.gen import agent_pb2 as pb
from scheduler.cluster import Node, Replica, ReplicaState

_STATES: dict[ReplicaState, Any] = {
    ReplicaState.LOADING: pb.REPLICA_STATE_LOADING,
    ReplicaState.SERVING: pb.REPLICA_STATE_SERVING,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.FAILED: pb.REPLICA_STATE_FAILED,
}
_READ_STATES = {v: k for k, v in _STATES.items()}


def replica_record(replica: Replica) -> pb.ReplicaRecord:
    shard, model = replica.shard, replica.shard.model
    return pb.ReplicaRecord(
        shard=pb.ShardInfo(
            model=pb.ModelShape(
                name=model.ref.name,
                digest=bytes.fromhex(model.ref.digest),
                layers=model.layers,
                width=model.width,
                vocabulary=model.vocabulary,
                context_max=model.context_max,
            ),
            layer_start=shard.layers.start,
            layer_end=shard.layers.end,
            runtime=shard.runtime,
            quantization=shard.quantization,
            digest=bytes.fromhex(shard.digest),
            weight_bytes=shard.weight_bytes,
            kv_bytes_per_token=shard.kv_bytes_per_token,
        ),
        state=_STATES[replica.state],
        reason=replica.reason,
        sessions=replica.sessions,
        slots=replica.slots,
        context_max=replica.context_max,
        kv_reserved_bytes=replica.kv_reserved_bytes,
        kv_budget_bytes=replica.kv_budget_bytes,
        provider=replica.provider,
        leases=replica.leases,
    )


def node_record(node: Node, cluster: str) -> pb.NodeRecord:
    return pb.NodeRecord(
        node=node.id,
        name=node.name,
        cluster=cluster,
        wire_version=WIRE_VERSION,
        features=FEATURES,
        address=node.address,
        api_address=node.api_address,
        version=node.version,
        incarnation=node.incarnation,
        cores=node.cores,
        memory_total_bytes=node.memory_total_bytes,
        memory_free_bytes=node.memory_free_bytes,
        replicas=[replica_record(r) for r in node.replicas],
        peers=node.peers,
        models=node.models,
        draining=node.draining,
    )


def read_replica(record: pb.ReplicaRecord) -> Replica:
    """Raises ``PeerError`` on ranges and states that make no sense."""
    shard, model = record.shard, record.shard.model
    try:
        layers = LayerRange(shard.layer_start, shard.layer_end)
    except ValueError as error:
        raise PeerError(f"a replica's record is wrong: {error}") from None
    if layers.end > model.layers:
        raise PeerError(f"a replica claims layers {layers} of {model.layers}")
    shape = ModelShape(
        ModelRef(model.name, Digest(model.digest.hex())),
        model.layers,
        model.width,
        model.vocabulary,
        model.context_max,
    )
    info = ShardInfo(
        shape,
        layers,
        shard.runtime,
        shard.quantization,
        Digest(shard.digest.hex()),
        shard.weight_bytes,
        shard.kv_bytes_per_token,
    )
    return Replica(
        info,
        _READ_STATES.get(record.state, ReplicaState.FAILED),
        record.reason,
        record.sessions,
        record.slots,
        record.context_max,
        record.kv_reserved_bytes,
        record.kv_budget_bytes,
        record.provider,
        record.leases,
    )


def read_node(record: pb.NodeRecord) -> Node:
    """Raises ``PeerError`` on what makes no sense."""
    if not record.node or not record.address:
        raise PeerError("a node's record names no id or address")
    return Node(
        id=NodeId(record.node),
        name=record.name,
        address=Address(record.address),
        api_address=Address(record.api_address),
        cores=record.cores,
        memory_total_bytes=record.memory_total_bytes,
        memory_free_bytes=record.memory_free_bytes,
        replicas=tuple(read_replica(r) for r in record.replicas),
        peers=tuple(Address(p) for p in record.peers),
        models=tuple(record.models),
        version=record.version,
        incarnation=record.incarnation,
        draining=record.draining,
    )
