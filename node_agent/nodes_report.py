"""What ``/mesh/v1/nodes`` and ``mesh nodes`` say: membership, records and links, as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mesh.gossip import MemberState
from mesh.links import LinkEstimate
from mesh.member import Member
from mesh.types import Address
from scheduler.cluster import Node, Replica

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from mesh.membership import Membership
    from mesh.types import NodeId
    from scheduler.cluster import ClusterSnapshot

    class View(Protocol):
        """What is read of the agent's view."""

        snapshot: ClusterSnapshot
        twins: dict[NodeId, Address]
        digests: dict[NodeId, str]

        @property
        def membership(self) -> Membership: ...


def nodes_report(
    cluster: str,
    view: View,
    discovery: Mapping[str, str],
    twin: Address | None,
    started: int,
    now: int,
) -> dict[str, Any]:
    """All members with their reasons; times are ns of one monotonic clock."""
    machine, snapshot = view.membership, view.snapshot
    own = snapshot.nodes.get(machine.me.node)
    nodes = []
    if own is not None:
        report = _node(own)
        nodes.append(
            {
                **report,
                "state": "draining" if own.draining else "alive",
                "reason": f"an older agent at {twin} has this node id" if twin else "",
                "since_s": round((now - started) / 1e9, 1),
                "sources": ["self"],
                "link": None,
                "rtt_estimate_ms": None,
            }
        )
    for node_id, member in sorted(machine.members.items()):
        nodes.append(_member(view, node_id, member, now))
    nodes.sort(key=lambda n: str(n["id"]))
    waiting = not machine.members
    return {
        "self": machine.me.node,
        "cluster": cluster,
        "profile": machine.profile.name,
        "health": machine.health,
        "nodes": nodes,
        "discovery": dict(discovery),
        "waiting_for": _waiting(discovery) if waiting else "",
        "unanswered": [
            {"address": address, "sources": list(sources), "error": error}
            for address, sources, error in machine.unresolved()
        ],
        "regions": [asdict(r) for r in machine.summaries() if r.region != machine.me.region],
    }


def _waiting(discovery: Mapping[str, str]) -> str:
    directories = "; ".join(f"{name}: {status}" for name, status in discovery.items())
    return f"no other agent yet ({directories or 'discovery is off: name one with --peers'})"


def _member(view: View, node_id: NodeId, member: Member, now: int) -> dict[str, Any]:
    node = view.snapshot.nodes.get(node_id)
    fact = member.fact
    state, reason = fact.state.name.lower(), member.reason
    if fact.state is MemberState.ALIVE and not member.reachable:
        state = "unreachable"
    elif fact.state is MemberState.ALIVE and node is not None and node.draining:
        state = "draining"
    if node_id in view.twins:
        reason = "; ".join(
            filter(None, [reason, f"another agent at {view.twins[node_id]} has the same node id"])
        )
    advertised = view.digests.get(node_id)
    if node is not None and advertised and advertised != node.capabilities.digest():
        note = "its advert and its record differ" if fact.state is MemberState.ALIVE else ""
        reason = "; ".join(filter(None, [reason, note]))
    base = (
        _node(node)
        if node is not None
        else {"id": node_id, "name": "", "api_address": "", "replicas": [], "models": [], "version": ""}
    )
    there = member.coordinate
    estimate = view.membership.vivaldi.here.rtt_to(there) * 1000 if there is not None else None
    return {
        **base,
        "address": fact.address,
        "region": fact.region,
        "state": state,
        "reason": reason,
        "since_s": round((now - member.since) / 1e9, 1),
        "sources": sorted(member.sources),
        "incarnation": fact.incarnation,
        "by_stream": member.by_stream,
        "link": _link(member.meter.estimate()),
        "rtt_estimate_ms": None if estimate is None else round(estimate, 3),
    }


def _link(link: LinkEstimate) -> dict[str, Any] | None:
    if not link.samples:
        return None
    return {
        "rtt_ms_p50": round(link.rtt_p50 / 1e6, 3),
        "rtt_ms_p99": round(link.rtt_p99 / 1e6, 3),
        "jitter_ms": round(link.jitter / 1e6, 3),
        "loss_out": link.loss_out,
        "loss_in": link.loss_in,
        "mbit_s_out_p50": round(link.bandwidth_out_p50 / 1e6, 1),
        "mbit_s_out_p10": round(link.bandwidth_out_p10 / 1e6, 1),
        "mbit_s_in_p50": round(link.bandwidth_in_p50 / 1e6, 1),
        "mbit_s_in_p10": round(link.bandwidth_in_p10 / 1e6, 1),
        "samples": link.samples,
    }


def _node(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "name": node.name,
        "address": node.address,
        "api_address": node.api_address,
        "region": node.region,
        "version": node.version,
        "memory_total_bytes": node.memory_total_bytes,
        "memory_free_bytes": node.memory_free_bytes,
        "models": list(node.models),
        "capabilities": {**asdict(node.capabilities), "digest": node.capabilities.digest()},
        "public_key": node.public_key.hex(),
        "replicas": [_replica(r) for r in node.replicas],
    }


def _replica(replica: Replica) -> dict[str, Any]:
    shard = replica.shard
    return {
        "shard": str(shard),
        "model": shard.model.ref.name,
        "layers": [shard.layers.start, shard.layers.end],
        "model_layers": shard.model.layers,
        "runtime": shard.runtime,
        "quantization": shard.quantization,
        "state": replica.state.value,
        "reason": replica.reason,
        "provider": replica.provider,
        "sessions": replica.sessions,
        "slots": replica.slots,
        "weight_bytes": shard.weight_bytes,
        "kv_reserved_bytes": replica.kv_reserved_bytes,
        "kv_budget_bytes": replica.kv_budget_bytes,
        "leases": replica.leases,
        "planned": replica.term is not None,
        "step_ms": round(replica.speed.decode / 1000, 3) if replica.speed else None,
        "weighed_ms": round(replica.speed.weighed / 1000, 3) if replica.speed else None,
    }
