"""Placement: chains against exhaustive search, limits, reasons, moving as little as possible."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.capabilities import Battery
from mesh.gossip import MemberState
from mesh.types import LayerRange, NodeId
from scheduler.availability import availability, down_share
from scheduler.chain import ChainProblem, solve, solve_exact, solve_heuristic
from scheduler.cluster import ClusterSnapshot, Node, NodeForgotten, NodeJudged
from scheduler.demand import ModelDemand
from scheduler.feasibility import hosts_of
from scheduler.layer_speed import LayerSpeed
from scheduler.placement import place
from scheduler.plan import Infeasible, Plan
from scheduler.policy import ModelPolicy
from tests.benchmarks.baselines import published
from tests.benchmarks.placement import exhaustive, random_mesh, realistic_mesh
from tests.builders import CAPABILITIES, SHAPE, cluster, node, shard

DEMAND = ModelDemand(SHAPE, "onnx", "int8", 100, 50, 30, 1)
"""Six layers of 100 bytes; KV of one byte a layer and position."""
ONE = ModelPolicy(sessions=1, context=16)


def host(name: str, room: int = 10_000, layer_us: float = 500.0, **changes: Any) -> Node:
    speed = LayerSpeed(SHAPE.ref.digest, "onnx", "int8", layer_us, layer_us, 0.2, 50.0, 2.0)
    labels = changes.pop("labels", ())
    battery = changes.pop("battery", None)
    base = node(name, memory_free_bytes=room, models=("tiny",), layer_speeds=(speed,))
    have = replace(CAPABILITIES, labels=labels, battery=battery)
    return replace(base, capabilities=have, **changes)


def planned(snapshot: ClusterSnapshot, policy: ModelPolicy = ONE, **kwargs: Any) -> Plan:
    answer = place(snapshot, DEMAND, policy, **kwargs)
    assert isinstance(answer, Plan), answer
    return answer


def refused(snapshot: ClusterSnapshot, policy: ModelPolicy = ONE, **kwargs: Any) -> Infeasible:
    answer = place(snapshot, DEMAND, policy, **kwargs)
    assert isinstance(answer, Infeasible), answer
    return answer


def random_problem(rng: np.random.Generator, nodes: int, layers: int) -> ChainProblem:
    lengths = np.arange(layers + 1)[None] - np.arange(layers + 1)[:, None]
    most = rng.integers(1, layers + 1, nodes)
    block = rng.uniform(10, 500, nodes)[:, None, None] * lengths + rng.uniform(0, 300, nodes)[:, None, None]
    block = np.where((lengths > 0) & (lengths <= most[:, None, None]), block, np.inf)
    hop = rng.uniform(10, 3000, (nodes, nodes))
    hop[rng.random((nodes, nodes)) < 0.1] = np.inf
    np.fill_diagonal(hop, np.inf)
    return ChainProblem(block, hop, rng.uniform(10, 900, nodes), rng.uniform(10, 900, nodes))


@pytest.mark.parametrize("seed", range(25))
def test_the_exact_program_is_exhaustive_searchs_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(1, 5)), int(rng.integers(2, 8)))
    found = solve_exact(problem)
    best = exhaustive(problem)
    if not found.chain:
        assert not np.isfinite(best)
        return
    assert found.cost == pytest.approx(best)
    assert problem.cost(found.chain) == pytest.approx(found.cost)
    assert len({n for n, _, _ in found.chain}) == len(found.chain)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_heuristics_bound_holds_and_its_chain_is_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(2, 10)), int(rng.integers(2, 16)))
    best, quick = solve_exact(problem), solve_heuristic(problem)
    if not best.chain:
        assert not quick.chain
        return
    assert quick.bound <= best.cost * (1 + 1e-9)
    if quick.chain:
        assert quick.cost >= best.cost * (1 - 1e-9)
        assert quick.cost == pytest.approx(problem.cost(quick.chain))
        edges = [0, *(b for _, _, b in quick.chain)]
        assert edges[-1] == problem.layers
        assert [a for _, a, _ in quick.chain] == edges[:-1]
        assert len({n for n, _, _ in quick.chain}) == len(quick.chain)
    if quick.exact:
        assert quick.cost == pytest.approx(best.cost)


def test_baselines_reproduce_their_own_examples() -> None:
    assert [what for what, same in published() if not same] == []


def test_the_fast_node_gets_all_if_it_fits_and_unequal_cuts_if_not() -> None:
    fast, slow = host("fast", layer_us=100), host("slow", layer_us=900)
    assert [(s.node, str(s.layers)) for s in planned(cluster(fast, slow)).stages] == [("fast", "0-6")]
    tight = replace(fast, memory_free_bytes=600)
    stages = planned(cluster(tight, slow)).stages
    held = {s.node: len(s.layers) for s in stages}
    assert held == {"fast": 4, "slow": 2}
    assert all(s.memory_bytes <= (600 if s.node == "fast" else 10_000) for s in stages)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_plans_hold_their_limits(seed: int) -> None:
    rng = Random(seed)
    made = rng.choice((random_mesh, realistic_mesh))(rng, rng.randint(2, 9), rng.randint(4, 24))
    policy = replace(made.policy, replicas=rng.choice((1, 2)))
    answer = place(made.snapshot, made.demand, policy)
    if isinstance(answer, Infeasible):
        assert answer.reason
        return
    used: dict[NodeId, int] = {}
    layers: dict[NodeId, list[int]] = {}
    for stage in answer.stages:
        used[stage.node] = used.get(stage.node, 0) + stage.memory_bytes
        layers.setdefault(stage.node, []).extend(range(stage.layers.start, stage.layers.end))
    assert all(used[n] <= made.snapshot.nodes[n].memory_free_bytes for n in used)
    assert all(len(held) == len(set(held)) for held in layers.values()), "a layer twice on a node"
    for layer in range(made.demand.layers):
        assert sum(layer in held for held in layers.values()) == max(s.copy for s in answer.stages) + 1
    assert set(used) | {n for n, _ in answer.idle} == set(made.snapshot.nodes)
    assert answer.cost >= answer.bound


def test_copies_stand_on_different_nodes_and_values_of_a_label() -> None:
    nodes = [host(f"n{i}", labels=(("zone", "ab"[i // 2]),)) for i in range(4)]
    plan = planned(cluster(*nodes), replace(ONE, replicas=2, spread="zone"))
    assert {s.node[:2] in ("n0", "n1") for s in plan.stages} == {True, False}
    answer = refused(cluster(*nodes), replace(ONE, replicas=3, spread="zone"))
    assert answer.limit == "replicas"
    assert answer.would_do == "replicas = 2 would fit"


def test_a_node_may_hold_different_layers_of_two_copies() -> None:
    nodes = [host(f"n{i}", room=560) for i in range(3)]
    plan = planned(cluster(*nodes), replace(ONE, replicas=2))
    assert {s.copy for s in plan.stages} == {0, 1}


def test_replicas_are_added_until_the_availability_is_met() -> None:
    nodes = [host(f"n{i}") for i in range(5)]
    assert len(planned(cluster(*nodes)).stages) == 1
    plan = planned(cluster(*nodes), replace(ONE, availability=0.9999))
    assert len(plan.stages) == 2
    assert plan.availability == pytest.approx(1 - down_share(1 / 86_400) ** 2)
    answer = refused(cluster(*nodes[:1]), replace(ONE, availability=0.9999))
    assert answer.limit in ("availability", "replicas")


def test_nodes_that_were_lost_often_weigh_more() -> None:
    snapshot = cluster(host("a"), host("b"))
    for _ in range(40):
        snapshot = snapshot.apply(NodeJudged(NodeId("a"), MemberState.DEAD))
        snapshot = snapshot.apply(NodeJudged(NodeId("a"), MemberState.ALIVE))
    assert snapshot.nodes[NodeId("a")].losses == 40
    assert [s.node for s in planned(snapshot).stages] == ["b"]


def test_availability_of_independent_replicas() -> None:
    a, b = NodeId("a"), NodeId("b")
    hazards = {a: 1e-4, b: 2e-4}
    down = {n: down_share(h) for n, h in hazards.items()}
    both = [(a, LayerRange(0, 6)), (b, LayerRange(0, 6))]
    assert availability(both, 6, hazards) == pytest.approx(1 - down[a] * down[b])
    chain = [(a, LayerRange(0, 3)), (b, LayerRange(3, 6))]
    assert availability(chain, 6, hazards) == pytest.approx((1 - down[a]) * (1 - down[b]))
    assert availability(chain[:1], 6, hazards) == 0
    many = {NodeId(f"n{i}"): 1e-4 for i in range(20)}
    sampled = availability(
        [(n, LayerRange(0, 6)) for n in list(many)[:1]] + [(n, LayerRange(1, 2)) for n in many], 6, many
    )
    assert sampled == pytest.approx(1 - down[a], abs=0.003)


def test_what_is_there_stays_unless_a_move_pays() -> None:
    there = replace(host("b", layer_us=520), replicas=node("b", shard()).replicas)
    snapshot = cluster(host("a", layer_us=500), there)
    stages = planned(snapshot, replace(ONE, move=50.0)).stages
    assert [(s.node, s.moved) for s in stages] == [("b", 0)]
    assert [s.node for s in planned(snapshot, replace(ONE, move=0.0)).stages] == ["a"]
    slow = cluster(host("a", layer_us=300), there)
    assert [(s.node, s.moved) for s in planned(slow, replace(ONE, move=50.0)).stages] == [("a", 6)]


def test_what_another_plan_will_take_is_not_free() -> None:
    snapshot = cluster(host("a", room=800, layer_us=100), host("b", room=800))
    first = planned(snapshot)
    assert first.takes() == {NodeId("a"): 776}
    second = planned(snapshot, taken=first.takes())
    assert [s.node for s in second.stages] == ["b"]
    assert dict(second.idle)[NodeId("a")].startswith("0 MiB short")
    there = replace(snapshot.nodes[NodeId("a")], replicas=node("a", shard()).replicas)
    assert planned(cluster(there)).takes() == {}


def test_a_flapping_node_is_held_off() -> None:
    snapshot = cluster(host("a", layer_us=100), host("b"))
    plan = planned(snapshot, held_off={NodeId("a"): "it came and went lately"})
    assert [s.node for s in plan.stages] == ["b"]
    assert dict(plan.idle)[NodeId("a")].startswith("it came and went lately")


def test_policies_keep_nodes_out_and_say_so() -> None:
    snapshot = cluster(
        host("a", labels=(("tier", "onboard"),)), host("b", layer_us=1, labels=(("tier", "cloud"),))
    )
    plan = planned(snapshot, replace(ONE, allow=("tier=onboard",)))
    assert [s.node for s in plan.stages] == ["a"]
    assert dict(plan.idle)[NodeId("b")] == "the policy allows only tier=onboard"
    assert [s.node for s in planned(snapshot, replace(ONE, deny=("tier=cloud",))).stages] == ["a"]
    nobody = refused(snapshot, replace(ONE, allow=("tier=moon",)))
    assert nobody.limit == "nodes"
    assert "none of 2 nodes may host it: 2 x the policy allows only tier=moon" in nobody.reason
    dear = replace(ONE, price=(("tier=cloud", 10_000.0),))
    assert [s.node for s in planned(snapshot, dear).stages] == ["a"]


def test_batteries_have_a_floor_and_a_mission() -> None:
    empty = host("a", layer_us=100, battery=Battery(12, False, 5.0, 10.0))
    plan = planned(cluster(empty, host("b")))
    assert [s.node for s in plan.stages] == ["b"]
    assert dict(plan.idle)[NodeId("a")] == "its battery is at 12 %, the floor is 20 %"
    short = host("a", layer_us=400, battery=Battery(60, False, 5.0, 10.0))
    assert [s.node for s in planned(cluster(short, host("b")), replace(ONE, mission=1800e6)).stages] == ["a"]
    assert [s.node for s in planned(cluster(short, host("b")), replace(ONE, mission=7200e6)).stages] == ["b"]


def test_infeasible_says_what_binds_and_what_would_do() -> None:
    assert refused(ClusterSnapshot()).reason == "there are no nodes"
    small = refused(cluster(host("a", room=90), host("b", room=80)))
    assert small.limit == "memory"
    assert "one layer of tiny fits on no node" in small.reason
    giant, both = (
        replace(DEMAND, layer_bytes=2 << 30),
        cluster(host("a", room=90 << 20), host("b", room=900 << 20)),
    )
    assert "the roomiest is 1148 MiB short of one layer" in str(place(both, giant, ONE))
    less = place(both, giant, ONE, taken={NodeId("b"): 850 << 20})
    assert "the roomiest is 1958 MiB short of one layer" in str(less)
    few = refused(cluster(host("a", room=300), host("b", room=250)))
    assert "2 nodes have room for" in few.reason
    assert "of 6 layers" in few.reason
    int4 = replace(DEMAND, quantization="int4", layer_bytes=40)
    assert place(cluster(host("a", room=430)), DEMAND, ONE, [int4]) == replace(
        refused(cluster(host("a", room=430))), would_do="int4 shards would fit"
    )
    wide = refused(cluster(host("a", room=900)), replace(ONE, sessions=64))
    assert wide.would_do.startswith("sessions = ")
    late = refused(cluster(host("a", layer_us=9000)), replace(ONE, max_tpot=30_000))
    assert late.limit == "tpot"
    assert "max_tpot is 30.0 ms" in late.reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"room": 0}, "it reports 0 bytes free"),
        ({"room": 10**15}, "which nobody has"),
        ({"draining": True}, "it is draining"),
        ({"state": MemberState.SUSPECT}, "it is suspect"),
        ({"reachable": False}, "it does not answer us"),
        ({"models": ()}, "mesh model pull tiny"),
        ({"layer_us": float("nan")}, ""),
        ({"layer_us": -5.0}, ""),
    ],
)
def test_nonsense_and_unfit_nodes_have_their_reason(changes: dict[str, Any], why: str) -> None:
    made = host("bad", **changes)
    snapshot = ClusterSnapshot({made.id: made, NodeId("good"): host("good")})
    plan = planned(snapshot)
    assert all(np.isfinite(s.compute) and s.compute > 0 for s in plan.stages)
    if why:
        assert why in dict(plan.idle)[NodeId("bad")]
    assert planned(snapshot.apply(NodeForgotten(NodeId("good")))) if not why else True


def test_equal_snapshots_give_equal_plans() -> None:
    rng = Random(5)
    made = realistic_mesh(rng, 9, 24)
    backwards = ClusterSnapshot(dict(reversed(list(made.snapshot.nodes.items()))))
    assert place(made.snapshot, made.demand, made.policy) == place(backwards, made.demand, made.policy)


def test_large_meshes_carry_a_bound() -> None:
    nodes = [host(f"n{i:03}", layer_us=100 + 37 * i % 900) for i in range(60)]
    plan = planned(cluster(*nodes))
    assert 0 < plan.bound <= plan.cost
    assert len(plan.idle) == 60 - len({s.node for s in plan.stages})


def with_run(n: Node, run: float) -> Node:
    return replace(n, layer_speeds=(replace(n.layer_speeds[0], run=run),))


def test_what_each_run_takes_beside_its_layers_decides_how_many_stages_there_are() -> None:
    """A saving of each run is worth a hop; a price is none."""
    nodes = [host(f"n{i}", layer_us=3000.0) for i in range(3)]
    stages = [
        [str(s.layers) for s in planned(cluster(*(with_run(n, run) for n in nodes))).stages]
        for run in (-4500.0, 0.0, 4500.0)
    ]
    assert list(map(len, stages)) == [3, 1, 1]
    saved, plain, paid = (
        planned(cluster(*(with_run(n, run) for n in nodes[:1]))) for run in (-4500.0, 0.0, 4500.0)
    )
    assert plain.tpot_us - saved.tpot_us == pytest.approx(4500)
    assert paid.tpot_us - plain.tpot_us == pytest.approx(4500)


@pytest.mark.parametrize("run", [-900.0, -150.0, 400.0])
def test_bounds_of_large_meshes_hold_with_what_runs_take(run: float) -> None:
    nodes = [with_run(host(f"n{i:02}", layer_us=200.0 + 10 * i), run * (1 + i % 3)) for i in range(40)]
    here = replace(ONE, ingress=("node=n00",))
    plan, few = planned(cluster(*nodes), here), planned(cluster(*nodes[:8]), here)
    assert few.bound == pytest.approx(few.cost)
    assert plan.bound <= few.cost * (1 + 1e-9)
    assert plan.bound <= plan.cost <= few.cost * (1 + 1e-9)


def test_solve_is_exact_on_small_meshes() -> None:
    rng = np.random.default_rng(3)
    assert solve(random_problem(rng, 6, 9)).exact


def test_a_head_that_was_measured_anywhere_is_no_guess_elsewhere() -> None:
    a, b = host("a"), host("b", layer_us=800.0)
    measured = replace(a.layer_speeds[0], head=4 * 500.0, head_known=True)
    hosts, _ = hosts_of(cluster(replace(a, layer_speeds=(measured,)), b), DEMAND, ONE)
    assert [h.speed.head for h in hosts] == [2000, 3200]
    hosts, _ = hosts_of(cluster(a, b), DEMAND, ONE)
    assert [h.speed.head for h in hosts] == [500, 800]
