"""Plans as JSON for ``/mesh/v1/plan``: times in milliseconds, what would change, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.gossip import MemberState
from mesh.types import LayerRange, NodeId
from scheduler.cluster import ClusterSnapshot, ReplicaState
from scheduler.nomad_view import LeaseAllocation, NomadFacts
from scheduler.plan import Infeasible, Plan

Placed = Mapping[tuple[NodeId, str, LayerRange, str, str], ReplicaState]


def plan_report(plan: Plan, planned: Placed, snapshot: ClusterSnapshot, digest: str) -> dict[str, Any]:
    """``planned``: what schedulers' leases hold of this model now; ``digest``: of its file."""
    names = {n.id: n.name for n in snapshot.nodes.values()}
    there = {
        (node, layers): state
        for (node, _, layers, _, quant), state in planned.items()
        if quant == plan.quantization
    }
    stages = [
        {
            "copy": s.copy,
            "node": s.node,
            "name": names.get(s.node, s.node),
            "layers": [s.layers.start, s.layers.end],
            "change": _change(there.get((s.node, s.layers))),
            "moved_layers": s.moved,
            "memory_bytes": s.memory_bytes,
            "ms": {
                "compute": round(s.compute / 1000, 3),
                "overhead": round(s.overhead / 1000, 3),
                "hop": round(s.hop / 1000, 3),
                "policy": round(s.policy / 1000, 3),
            },
        }
        for s in plan.stages
    ]
    goes = sorted(
        (
            {"node": n, "name": names.get(n, n), "layers": [r.start, r.end]}
            for n, r in there.keys() - plan.replicas
        ),
        key=lambda g: (g["name"], g["layers"]),
    )
    return {
        "feasible": True,
        "digest": digest,
        "runtime": plan.runtime,
        "quantization": plan.quantization,
        "sessions": plan.sessions,
        "context": plan.context,
        "tpot_ms": round(plan.tpot_us / 1000, 3),
        "home_ms": round(plan.home_us / 1000, 3),
        "cost_ms": round(plan.cost / 1000, 3),
        "bound_ms": round(plan.bound / 1000, 3),
        "gap": round(plan.gap, 4),
        "exact": plan.exact,
        "availability": round(plan.availability, 6),
        "stages": stages,
        "goes": goes,
        "idle": [{"node": n, "name": names.get(n, n), "reason": why} for n, why in plan.idle],
    }


def _change(state: ReplicaState | None) -> str:
    if state is None:
        return "load"
    return "stays" if state is ReplicaState.SERVING else state.value


def infeasible_report(answer: Infeasible, names: Mapping[NodeId, str]) -> dict[str, Any]:
    """The limit that binds, and every node's reason."""
    return {
        "feasible": False,
        "limit": answer.limit,
        "reason": answer.reason,
        "would_do": answer.would_do,
        "idle": [{"node": n, "name": names.get(n, n), "reason": why} for n, why in answer.reasons],
    }


def nomad_report(facts: NomadFacts, snapshot: ClusterSnapshot) -> dict[str, Any]:
    """What Nomad says, and where that is not what the mesh sees."""
    alive = {n.name for n in snapshot.nodes.values() if n.state is MemberState.ALIVE}
    return {
        "index": facts.index,
        "avoid": dict(facts.avoid),
        "down_but_alive": sorted(facts.down & alive),
        "rollouts": [
            {
                "job": r.job,
                "version": r.version,
                "deployment": r.id,
                "status": r.status,
                "said": r.said,
                "healthy": r.healthy,
                "total": r.total,
                "canaries": r.canaries,
            }
            for r in facts.rollouts
            if r.status not in ("successful", "cancelled")
        ],
        "allocations": [
            {
                "id": a.id,
                "job": a.job,
                "layers": [a.layers.start, a.layers.end],
                "client": a.client,
                "status": a.status,
                "said": a.said,
                "difference": difference,
            }
            for a in facts.allocations
            if (difference := _difference(a, snapshot))
        ],
    }


def _difference(allocation: LeaseAllocation, snapshot: ClusterSnapshot) -> str:
    """Between an allocation and what its client's agent says that it hosts; empty: none."""
    host = next((n for n in snapshot.nodes.values() if n.name == allocation.client), None)
    alive = host is not None and host.state is MemberState.ALIVE
    states = (
        {r.state for r in host.replicas if r.shard.layers == allocation.layers} if host and alive else set()
    )
    if allocation.status == "running" and allocation.wanted and not alive:
        return "Nomad calls it running; the mesh does not see its node alive"
    if allocation.status == "running" and allocation.wanted and not states & _HELD:
        return "Nomad calls it running; its node holds no such layers"
    if allocation.status == "lost" and ReplicaState.SERVING in states:
        return "Nomad calls it lost; it goes on serving"
    return "not placed yet" if allocation.status == "pending" and allocation.wanted and not states else ""


_HELD = {ReplicaState.LOADING, ReplicaState.SERVING, ReplicaState.DRAINING}
