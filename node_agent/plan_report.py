"""Plans as JSON for ``/mesh/v1/plan``: times in milliseconds, what would change, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.types import LayerRange, NodeId
from scheduler.cluster import ClusterSnapshot, ReplicaState
from scheduler.placement import Infeasible, Plan

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
