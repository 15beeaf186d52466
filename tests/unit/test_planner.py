"""Routes of an ingress: what a request shares with others, and what it would rather have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mesh.types import NodeId, SessionId
from node_agent.adapters.planner import RoutePlanner
from node_agent.config import AgentConfig
from node_agent.prefixes import KeptSession
from scheduler.cluster import ClusterSnapshot
from scheduler.learning import NOTHING_LEARNED
from scheduler.policy import Policy
from scheduler.route import RouteRequest
from scheduler.routing import find_route
from tests.builders import SHAPE, cluster, node, order, shard
from tests.unit.test_routing import at_speed


def planner(snapshot: ClusterSnapshot, recovery: str) -> RoutePlanner:
    driver: Any = SimpleNamespace(
        learner=SimpleNamespace(learned=NOTHING_LEARNED), own_sessions=lambda but: {}, ours_told={}
    )
    cold: Any = SimpleNamespace(note=lambda route: None)
    config = AgentConfig(recovery=recovery)
    return RoutePlanner(config, NodeId("a"), lambda: snapshot, driver, Policy, lambda: 0, cold)


@pytest.mark.parametrize(
    ("recovery", "hosts", "shares", "stands_by"),
    [("warm", 2, True, False), ("hot", 2, False, True), ("hot", 1, True, False)],
)
def test_a_session_with_a_standby_begins_with_nothing_of_another(
    recovery: str, hosts: int, shares: bool, stands_by: bool
) -> None:
    nodes = [at_speed(node(f"h{i}", shard(0, 6)), 10) for i in range(hosts)]
    snapshot = cluster(node("a"), *nodes)
    route = find_route(snapshot, RouteRequest("tiny", NodeId("a")))
    wanted = order(prompt=tuple(range(50)))
    kept = KeptSession(SessionId("b" * 32), SHAPE.ref.digest, wanted.prompt, route)
    plan = planner(snapshot, recovery).plan("tiny", wanted, kept=(kept, 40))
    assert plan.resumed == (40 if shares else 0)
    assert any(plan.standbys) == stands_by
