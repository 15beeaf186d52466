"""Nodes and replicas to protos and back."""

from __future__ import annotations

from math import isfinite
from typing import Any

from mesh.capabilities import Accelerator, Battery, Capabilities, Cpu, Disk, Interface, Speed, Thermal
from mesh.coordinates import Coordinate
from mesh.errors import PeerError
from mesh.links import LinkEstimate
from mesh.messages import WIRE_VERSION
from mesh.types import (
    NO_POLICY,
    Address,
    Digest,
    LayerRange,
    ModelRef,
    ModelShape,
    NodeId,
    PolicyVersion,
    ShardInfo,
    Term,
)
from protos.gen import agent_pb2 as pb
from scheduler.cluster import Node, Replica, ReplicaState
from scheduler.layer_speed import LayerSpeed
from scheduler.speed import StageSpeed

_SPEED_MAX_US = 1e9
_LINKS_MAX = 512
_SPEEDS_MAX = 64
_COUNTER_MAX = 1 << 53

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
        speed=_speed_record(replica.speed) if replica.speed else None,
        term=term_record(replica.term),
    )


def term_record(term: Term | None) -> pb.Term | None:
    """For a message's field; nothing where there is no term."""
    return pb.Term(counter=term.counter, leader=term.leader) if term else None


def read_term(record: pb.Term) -> Term | None:
    """``None`` for an absent one, and for a counter that would fence everybody out for ever."""
    if not record.leader or not 0 < record.counter < _COUNTER_MAX:
        return None
    return Term(record.counter, NodeId(record.leader))


def _speed_record(speed: StageSpeed) -> pb.StageSpeed:
    return pb.StageSpeed(
        decode=speed.decode,
        row=speed.row,
        prefill=speed.prefill,
        decode_p99=speed.decode_p99,
        measured=speed.measured,
        context=speed.context,
        hope=speed.hope,
        prefill_context=speed.prefill_context,
    )


def _read_speed(record: pb.StageSpeed) -> StageSpeed | None:
    """``None`` for figures that cannot be: they come from the network and steer routes."""
    runs = (record.decode, record.row, record.prefill, record.decode_p99)
    later = (record.context, record.hope, record.prefill_context)
    if not all(isfinite(v) and 0 <= v < _SPEED_MAX_US for v in (*runs, *later)) or record.decode <= 0:
        return None
    return StageSpeed(*runs, record.measured, *later)


def node_record(node: Node, cluster: str) -> pb.NodeRecord:
    return pb.NodeRecord(
        node=node.id,
        name=node.name,
        cluster=cluster,
        wire_version=WIRE_VERSION,
        features=node.features,
        address=node.address,
        api_address=node.api_address,
        version=node.version,
        memory_total_bytes=node.memory_total_bytes,
        memory_free_bytes=node.memory_free_bytes,
        replicas=[replica_record(r) for r in node.replicas],
        models=node.models,
        draining=node.draining,
        capabilities=capabilities_record(node.capabilities),
        region=node.region,
        public_key=node.public_key,
        links=[_link_record(peer, link) for peer, link in sorted(node.links.items())],
        coordinate=_coordinate_record(node.coordinate) if node.coordinate else None,
        layer_speeds=[_layer_speed_record(s) for s in node.layer_speeds],
        scheduler=node.scheduler,
        started_unix_ms=node.started_ms,
        term=term_record(node.term),
        policy_version=node.policy.counter,
        policy_writer=node.policy.writer,
        stage_us=node.stage_us,
    )


def _layer_speed_record(speed: LayerSpeed) -> pb.LayerSpeed:
    return pb.LayerSpeed(
        model_digest=bytes.fromhex(speed.model),
        runtime=speed.runtime,
        quantization=speed.quantization,
        layer=speed.layer,
        head=speed.head,
        row_share=speed.row_share,
        prefill=speed.prefill,
        tail=speed.tail,
        context=speed.context,
        prefill_context=speed.prefill_context,
        head_known=speed.head_known,
        run=speed.run,
    )


def _read_layer_speeds(record: pb.NodeRecord) -> tuple[LayerSpeed, ...]:
    """Those whose figures can be."""
    speeds = []
    for s in record.layer_speeds[:_SPEEDS_MAX]:
        values = (s.layer, s.head, s.row_share, s.prefill, s.tail, s.context, s.prefill_context)
        timed = all(isfinite(v) and 0 <= v < _SPEED_MAX_US for v in values) and abs(s.run) < _SPEED_MAX_US
        if timed and s.layer > 0 and s.prefill > 0:
            model = Digest(s.model_digest.hex())
            speeds.append(LayerSpeed(model, s.runtime, s.quantization, *values, s.head_known, s.run))
    return tuple(speeds)


def _link_record(peer: NodeId, link: LinkEstimate) -> pb.LinkRecord:
    return pb.LinkRecord(
        peer=peer,
        rtt_us_p50=link.rtt_p50 // 1000,
        rtt_us_p99=link.rtt_p99 // 1000,
        loss_out=link.loss_out,
        loss_in=link.loss_in,
        bandwidth_out=link.bandwidth_out_p50,
        bandwidth_in=link.bandwidth_in_p50,
    )


def _coordinate_record(place: Coordinate) -> pb.NetworkCoordinate:
    return pb.NetworkCoordinate(
        vector=place.vector, height=place.height, adjustment=place.adjustment, error=place.error
    )


def _read_links(record: pb.NodeRecord) -> dict[NodeId, LinkEstimate]:
    links = {}
    for link in record.links[:_LINKS_MAX]:
        shares = (link.loss_out, link.loss_in)
        if link.rtt_us_p50 and all(isfinite(s) and 0 <= s <= 1 for s in shares):
            links[NodeId(link.peer)] = LinkEstimate(
                rtt_p50=link.rtt_us_p50 * 1000,
                rtt_p99=max(link.rtt_us_p50, link.rtt_us_p99) * 1000,
                loss_out=link.loss_out,
                loss_in=link.loss_in,
                bandwidth_out_p50=link.bandwidth_out,
                bandwidth_in_p50=link.bandwidth_in,
            )
    return links


def _read_coordinate(record: pb.NodeRecord) -> Coordinate | None:
    if not record.HasField("coordinate"):
        return None
    place = record.coordinate
    found = Coordinate(tuple(place.vector), place.height, place.adjustment, place.error)
    return found if found.valid() else None


def capabilities_record(have: Capabilities) -> pb.Capabilities:
    cpu, battery, thermal = have.cpu, have.battery, have.thermal
    return pb.Capabilities(
        cpu=pb.Cpu(
            cores=cpu.cores,
            quota=cpu.quota,
            architecture=cpu.architecture,
            model=cpu.model,
            mhz=cpu.mhz,
            mhz_now=cpu.mhz_now,
            instructions=cpu.instructions,
        ),
        disk=pb.Disk(total_bytes=have.disk.total, free_bytes=have.disk.free),
        accelerators=[pb.Accelerator(kind=a.kind, name=a.name, detail=a.detail) for a in have.accelerators],
        battery=None
        if battery is None
        else pb.Battery(
            percent=battery.percent,
            charging=battery.charging,
            energy_wh=battery.energy_wh,
            power_w=battery.power_w,
        ),
        thermal=None
        if thermal is None
        else pb.Thermal(zone=thermal.zone, celsius=thermal.celsius, throttled=thermal.throttled),
        interfaces=[pb.NetworkInterface(name=i.name, kind=i.kind, mbps=i.mbps) for i in have.interfaces],
        speeds=[pb.Speed(runtime=s.runtime, gb_s=s.gb_s, gflop_s=s.gflop_s) for s in have.speeds],
        labels=dict(have.labels),
    )


def read_capabilities(record: pb.Capabilities) -> Capabilities:
    cpu, battery, thermal = record.cpu, record.battery, record.thermal
    return Capabilities(
        cpu=Cpu(
            cpu.cores,
            cpu.quota,
            cpu.architecture,
            cpu.model,
            cpu.mhz,
            cpu.mhz_now,
            tuple(cpu.instructions),
        ),
        disk=Disk(record.disk.total_bytes, record.disk.free_bytes),
        accelerators=tuple(Accelerator(a.kind, a.name, a.detail) for a in record.accelerators),
        battery=Battery(battery.percent, battery.charging, battery.energy_wh, battery.power_w)
        if record.HasField("battery")
        else None,
        thermal=Thermal(thermal.zone, thermal.celsius, thermal.throttled)
        if record.HasField("thermal")
        else None,
        interfaces=tuple(Interface(i.name, i.kind, i.mbps) for i in record.interfaces),
        speeds=tuple(Speed(s.runtime, s.gb_s, s.gflop_s) for s in record.speeds),
        labels=tuple(sorted(record.labels.items())),
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
        _read_speed(record.speed) if record.HasField("speed") else None,
        read_term(record.term),
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
        capabilities=read_capabilities(record.capabilities),
        memory_total_bytes=record.memory_total_bytes,
        memory_free_bytes=record.memory_free_bytes,
        replicas=tuple(read_replica(r) for r in record.replicas),
        models=tuple(record.models),
        version=record.version,
        draining=record.draining,
        region=record.region,
        public_key=record.public_key,
        links=_read_links(record),
        coordinate=_read_coordinate(record),
        layer_speeds=_read_layer_speeds(record),
        scheduler=record.scheduler,
        started_ms=record.started_unix_ms,
        term=read_term(record.term),
        policy=read_version(record.policy_version, record.policy_writer),
        features=record.features,
        stage_us=record.stage_us
        if isfinite(record.stage_us) and 0 < record.stage_us < _SPEED_MAX_US
        else 0.0,
    )


def read_version(counter: int, writer: str) -> PolicyVersion:
    """No version where it makes no sense."""
    if not writer or not 0 < counter < _COUNTER_MAX:
        return NO_POLICY
    return PolicyVersion(counter, NodeId(writer))
