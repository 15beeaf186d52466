"""Who may host layers of a model, how fast each would be, and why the others may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from types import MappingProxyType

from mesh.gossip import MemberState
from mesh.types import LayerRange, NodeId, ShardInfo
from scheduler.cluster import ClusterSnapshot, Node, Replica
from scheduler.cost import STAGE_US, battery_us, hazard_per_s, risk_us
from scheduler.demand import ModelDemand
from scheduler.layer_speed import HEAD_SHARE, LayerSpeed
from scheduler.policy import ModelPolicy, forbidden, price_us
from scheduler.speed import guess

MEMORY_BELIEVED_BYTES = 1 << 46
"""64 TiB: whoever reports more reports nonsense."""
GUESS_MARGIN = 0.25
"""Of a guessed speed, added to its cost: a node that was never measured must win by more than the guess
may be off, or every newcomer would make the plan move."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """A node that may host. Microseconds a token: ``overhead`` of a stage beside its computation, ``price``
    what the policy adds to a stage; ``speed`` is what its clock would show. ``room`` in bytes."""

    node: Node
    room: int
    speed: LayerSpeed
    overhead: float
    price: float
    weight: float
    """Factor on computation: 1, and what risk, battery and doubt add."""
    present: tuple[LayerRange, ...]
    staying: tuple[LayerRange, ...]
    """Of those present: what no plan unloads, so that its memory is not part of ``room``."""
    hazard: float


NOTHING_TAKEN: Mapping[NodeId, int] = MappingProxyType({})


def hosts_of(
    snapshot: ClusterSnapshot,
    demand: ModelDemand,
    policy: ModelPolicy,
    taken: Mapping[NodeId, int] = NOTHING_TAKEN,
) -> tuple[list[Host], dict[NodeId, str]]:
    """Hosts by node id, and why every other node is none. ``taken``: bytes that other plans will take."""
    scale, stage_us = _calibration(snapshot, demand), stage_overhead_us(snapshot)
    heads = _heads(snapshot, demand)
    hosts, reasons = [], {}
    for node_id, node in sorted(snapshot.nodes.items()):
        node = without(node, taken)
        reason = _unfit(node, demand, policy)
        if reason is None:
            host = _host(node, demand, policy, scale, stage_us, snapshot.at_s)
            if heads is not None and not host.speed.head_known:
                host = replace(host, speed=replace(host.speed, head=host.speed.layer * heads))
            hosts.append(host)
        else:
            reasons[node_id] = reason
    return hosts, reasons


def without(node: Node, taken: Mapping[NodeId, int]) -> Node:
    """A node with that much less memory free."""
    if not taken.get(node.id):
        return node
    return replace(node, memory_free_bytes=max(0, node.memory_free_bytes - taken[node.id]))


def _unfit(node: Node, demand: ModelDemand, policy: ModelPolicy) -> str | None:
    ref = demand.shape.ref
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: None if node.state is MemberState.ALIVE else f"it is {node.state.name.lower()}",
        lambda: None if node.reachable else "it does not answer us",
        lambda: "it is draining" if node.draining else None,
        lambda: forbidden(node, policy),
        lambda: _no_device(node, policy),
        lambda: _battery(node, policy),
        lambda: _figures(node),
        lambda: (
            None if ref.name in node.models else f"it does not have {ref.name}: mesh model pull {ref.name}"
        ),
        lambda: no_room(node, demand, policy),
    )
    return next((why for check in checks if (why := check())), None)


def _no_device(node: Node, policy: ModelPolicy) -> str | None:
    have = {a.name for a in node.capabilities.accelerators}
    if not policy.devices or have & set(policy.devices):
        return None
    return f"it has none of {', '.join(policy.devices)}"


def _battery(node: Node, policy: ModelPolicy) -> str | None:
    battery = node.capabilities.battery
    if battery is None or battery.charging or battery.percent >= policy.battery_floor:
        return None
    return f"its battery is at {battery.percent} %, the floor is {policy.battery_floor} %"


def _figures(node: Node) -> str | None:
    free, total = node.memory_free_bytes, node.memory_total_bytes
    if free <= 0 and not node.replicas:
        return f"it reports {free} bytes free"
    if max(free, total) > MEMORY_BELIEVED_BYTES:
        return f"it reports {max(free, total):,} bytes of memory, which nobody has"
    return None


def no_room(node: Node, demand: ModelDemand, policy: ModelPolicy) -> str | None:
    """What a node lacks for one layer, if that much."""
    room = room_of(node, demand, policy)
    least = least_bytes(demand, policy)
    if room >= least or any(replica_of(r, demand) for r in node.replicas):
        return None
    return f"{mib(least - room)} short of one layer: {mib(room)} free, {mib(least)} needed"


def positions_of(demand: ModelDemand, policy: ModelPolicy) -> int:
    """Positions of KV memory that every replica reserves."""
    return policy.sessions * min(policy.context, demand.shape.context_max)


def least_bytes(demand: ModelDemand, policy: ModelPolicy) -> int:
    """Of a shard of one layer in the middle, with its KV memory."""
    positions = positions_of(demand, policy)
    return demand.shard_bytes + demand.layer_bytes + positions * demand.kv_layer_bytes


def replica_of(replica: Replica, demand: ModelDemand) -> bool:
    """Whether a replica is of this very model, runtime and quantization."""
    shard = replica.shard
    return (shard.model.ref.digest, shard.runtime, shard.quantization) == (
        demand.shape.ref.digest,
        demand.runtime,
        demand.quantization,
    )


def room_of(node: Node, demand: ModelDemand, policy: ModelPolicy) -> int:
    """Bytes free, and those that our own earlier placement takes there; never more than the node has beside what
    stays (what it says of free memory may be a few percent old)."""
    ours = stay = 0
    for r in node.replicas:
        size = r.shard.weight_bytes + r.kv_budget_bytes
        if r.term and r.shard.model.ref.name == demand.shape.ref.name:
            ours += size
        else:
            stay += size
    return min(node.memory_free_bytes + ours, max(0, node.memory_total_bytes - stay))


def stage_overhead_us(snapshot: ClusterSnapshot) -> float:
    """What a stage takes beside its computation: what ingresses measured, half of them less."""
    measured = [n.stage_us for n in snapshot.nodes.values() if n.stage_us > 0]
    return median(measured) if measured else STAGE_US


def _host(
    node: Node, demand: ModelDemand, policy: ModelPolicy, scale: float, stage_us: float, now_s: float
) -> Host:
    known = known_speed(node, demand)
    speed = known or guessed_speed(node, demand, scale)
    unit = speed.layer
    extra = risk_us(hazard_per_s(node, now_s), unit) + battery_us(node, unit, policy.mission)
    extra += 0.0 if known else GUESS_MARGIN * unit
    return Host(
        node,
        room_of(node, demand, policy),
        speed,
        stage_us,
        price_us(node, policy),
        1 + extra / unit,
        tuple(sorted(r.shard.layers for r in node.replicas if replica_of(r, demand))),
        tuple(sorted(r.shard.layers for r in node.replicas if replica_of(r, demand) and not r.term)),
        hazard_per_s(node, now_s),
    )


def known_speed(node: Node, demand: ModelDemand) -> LayerSpeed | None:
    """What the node itself measured of this model."""
    wanted = (demand.shape.ref.digest, demand.runtime, demand.quantization)
    for speed in node.layer_speeds:
        if (speed.model, speed.runtime, speed.quantization) == wanted and _sane(speed):
            return speed
    return None


def _sane(speed: LayerSpeed) -> bool:
    timed = all(isfinite(v) and v > 0 for v in (speed.layer, speed.prefill))
    return timed and isfinite(speed.head) and isfinite(speed.run)


def guessed_speed(node: Node, demand: ModelDemand, scale: float) -> LayerSpeed:
    """From the probe, times what probes were found to be off by."""
    one = LayerRange(1, 2) if demand.layers > 1 else LayerRange(0, 1)
    shape, digest = demand.shape, demand.shape.ref.digest
    shard = ShardInfo(
        shape, one, demand.runtime, demand.quantization, digest, demand.layer_bytes, demand.kv_layer_bytes
    )
    rate = guess(shard, node.capabilities)
    layer = rate.decode * scale
    return LayerSpeed(
        digest,
        demand.runtime,
        demand.quantization,
        layer,
        layer * head_layers(demand),
        rate.row / rate.decode,
        rate.prefill * scale,
        rate.decode_p99 / rate.decode,
        rate.context * scale,
    )


def head_layers(demand: ModelDemand) -> float:
    """How many layers' time the head takes, by its bytes."""
    return HEAD_SHARE * demand.head_bytes / demand.layer_bytes


def _calibration(snapshot: ClusterSnapshot, demand: ModelDemand) -> float:
    """What nodes measured of this model over what their probes let expect."""
    ratios = []
    for node in snapshot.nodes.values():
        known = known_speed(node, demand)
        if known is not None:
            ratios.append(known.layer / guessed_speed(node, demand, 1.0).layer)
    return median(ratios) if ratios else 1.0


def _heads(snapshot: ClusterSnapshot, demand: ModelDemand) -> float | None:
    """How many layers' time the head takes where that was measured: elsewhere bytes say it, or a probe of a few layers
    that stay in caches; both are off by up to a half."""
    known = [known_speed(node, demand) for node in snapshot.nodes.values()]
    ratios = [k.head / k.layer for k in known if k is not None and k.head_known and k.head > 0]
    return median(ratios) if ratios else None


def mib(count: float) -> str:
    """Bytes for people."""
    if count < 0:
        return f"-{mib(-count)}"
    return f"{count / _GIB:.1f} GiB" if count >= 10 * _GIB else f"{count / 2**20:.0f} MiB"
