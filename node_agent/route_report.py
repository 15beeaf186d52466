"""What ``/mesh/v1/route`` and ``mesh route`` say of a planned route, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.types import LayeredRoute, NodeId
from scheduler.route import RoutePlan


def route_report(plan: RoutePlan, names: Mapping[NodeId, str]) -> dict[str, Any]:
    """Every term in milliseconds a token; ``names`` are nodes' names for people."""
    stages = [
        {
            "stage": i,
            "node": stage.node,
            "name": names.get(stage.node, ""),
            "layers": [stage.layers.start, stage.layers.end],
            "compute_ms": round(terms.compute / 1000, 4),
            "queue_ms": round(terms.queue / 1000, 4),
            "hop_ms": round(terms.hop / 1000, 4),
            "transfer_ms": round(terms.transfer / 1000, 4),
            "risk_ms": round(terms.risk / 1000, 6),
            "policy_ms": round(terms.policy / 1000, 4),
        }
        for i, (stage, terms) in enumerate(zip(plan.route.stages, plan.terms, strict=True))
    ]
    return {
        "predicted_tpot_ms": round(plan.tpot_us / 1000, 3),
        "predicted_ttft_ms": round(plan.ttft_us / 1000, 3),
        "home_ms": round(plan.home_us / 1000, 4),
        "stages": stages,
        "alternatives": [_short(route, names) for route in plan.alternatives],
    }


def _short(route: LayeredRoute, names: Mapping[NodeId, str]) -> str:
    return " -> ".join(f"{names.get(s.node) or s.node}[{s.layers}]" for s in route.stages)
