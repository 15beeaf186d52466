"""A session's stage on this node."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.adapters.grpc_links import Upstream
from mesh.messages import HopLost, Open
from mesh.types import LayeredRoute, SessionId, Stage
from node_agent.adapters.metrics import StageMetrics
from node_agent.adapters.replica import Replica

Key = tuple[SessionId, int]
"""The session, and which stage of its route."""


@dataclass(slots=True)
class Placed:
    """A session at one of our replicas, and who feeds it."""

    replica: Replica
    metrics: StageMetrics
    upstream: Upstream
    order: Open
    report: HopLost | None = None
    """What the owner was told and has not acted on: told again at ``report_ns``, and ever more rarely."""
    report_ns: int = 0
    report_wait_ns: int = 0

    @property
    def waits(self) -> bool:
        """It is fed no more, until a later epoch."""
        session = self.replica.book.sessions.get(self.order.session)
        return session is None or session.orphan_ns > 0


def next_stage(order: Open) -> Stage | None:
    """The stage after the receiver's."""
    route = order.route
    if not isinstance(route, LayeredRoute) or order.stage + 1 >= len(route.stages):
        return None
    return route.stages[order.stage + 1]
