"""R8: however often stages are lost, routes change no faster than the budget says."""

from __future__ import annotations

from mesh.retry_budget import MESH_PER_S, NODE_PER_S, RetryBudget

S = 1_000_000_000


def taken(budget: RetryBudget, seconds: int, nodes: int, asked_per_s: int = 1000) -> int:
    """Changes that went through while somebody asks all the time."""
    steps = (i * S // asked_per_s for i in range(seconds * asked_per_s))
    return sum(budget.take(now, nodes) for now in steps)


def test_r8_one_loss_under_every_session_is_no_storm() -> None:
    budget = RetryBudget(64)
    assert all(budget.take(0, 10) for _ in range(64))
    assert not budget.take(0, 10)


def test_r8_a_storm_is_held_to_the_rate() -> None:
    for nodes in (4, 20):
        assert taken(RetryBudget(64), 10, nodes) <= 64 + 10 * MESH_PER_S / nodes


def test_r8_all_nodes_together_stay_within_the_mesh_s_rate() -> None:
    nodes = 40
    together = sum(taken(RetryBudget(8), 5, nodes, 100) for _ in range(nodes))
    assert together <= nodes * 8 + 5 * MESH_PER_S


def test_r8_a_large_mesh_leaves_each_node_a_few() -> None:
    assert taken(RetryBudget(8), 10, 10_000) >= 10 * NODE_PER_S


def test_quiet_fills_the_bucket_and_not_more() -> None:
    budget = RetryBudget(8)
    assert taken(budget, 1, 100) > 8
    assert sum(budget.take(1000 * S, 100) for _ in range(20)) == 8
