"""Snapshot, placement and routes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import NoRoute
from mesh.gossip import MemberState
from mesh.types import Digest, LayerRange, ModelRef, NodeId
from scheduler.cluster import ClusterSnapshot, NodeForgotten, NodeJudged, NodeSeen, ReplicaState
from scheduler.demand import ModelDemand
from scheduler.even_split import DoesNotFit, EvenSplit, NodeRoom, split_evenly
from scheduler.route import RouteRequest
from scheduler.routing import find_route, missing_layers
from tests.builders import SHAPE, cluster, node, shard

ASK = RouteRequest("tiny", NodeId("a"))


def names(snapshot: ClusterSnapshot, request: RouteRequest = ASK) -> list[tuple[str, str]]:
    return [(s.node, str(s.layers)) for s in find_route(snapshot, request).stages]


@pytest.mark.parametrize(
    "judged",
    [
        NodeJudged(NodeId("b"), MemberState.SUSPECT),
        NodeJudged(NodeId("b"), MemberState.DEAD),
        NodeJudged(NodeId("b"), MemberState.ALIVE, reachable=False),
    ],
)
def test_a_suspect_is_out_of_routes_and_back_when_it_refutes(judged: NodeJudged) -> None:
    snapshot = cluster(node("a", shard(0, 3)), node("b", shard(3, 6)))
    assert names(snapshot) == [("a", "0-3"), ("b", "3-6")]
    suspect = snapshot.apply(judged)
    with pytest.raises(NoRoute, match="no node serves the layers 3-6 of tiny"):
        find_route(suspect, ASK)
    # Its own record does not clear it: who is alive is membership's to say.
    told = suspect.apply(NodeSeen(node("b", shard(3, 6))))
    with pytest.raises(NoRoute):
        find_route(told, ASK)
    assert names(told.apply(NodeJudged(NodeId("b"), MemberState.ALIVE))) == names(snapshot)


def test_snapshots_do_not_change() -> None:
    snapshot = cluster(node("a", shard()))
    assert snapshot.apply(NodeForgotten(NodeId("x"))) is snapshot
    assert snapshot.apply(NodeJudged(NodeId("x"), MemberState.DEAD)) is snapshot
    assert snapshot.apply(NodeForgotten(NodeId("a"))).nodes == {}
    assert list(snapshot.nodes) == ["a"]


def test_the_ingress_is_its_own_first_stage_and_fewer_hops_win() -> None:
    snapshot = cluster(node("b", shard(0, 3)), node("a", shard(0, 3)), node("c", shard(3, 6)))
    assert names(snapshot) == [("a", "0-3"), ("c", "3-6")]
    together = cluster(node("b", shard(0, 3)), node("c", shard(0, 3), shard(3, 6)))
    assert names(together) == [("c", "0-3"), ("c", "3-6")]
    alone = cluster(node("a", shard(0, 6)), node("b", shard(0, 3), shard(3, 6)))
    assert names(alone) == [("a", "0-6")]


def test_less_loaded_replicas_are_preferred_and_ties_are_stable() -> None:
    busy = cluster(node("b", shard(), sessions=3), node("c", shard(), sessions=1))
    assert names(busy) == [("c", "0-6")]
    equal = cluster(node("c", shard()), node("b", shard()))
    assert names(equal) == [("b", "0-6")]


def test_draining_and_loading_replicas_are_not_used() -> None:
    loading = node("a", shard())
    loading = replace(loading, replicas=(replace(loading.replicas[0], state=ReplicaState.LOADING),))
    for snapshot in (cluster(loading), cluster(node("a", shard(), draining=True))):
        with pytest.raises(NoRoute, match="no replica of tiny is ready"):
            find_route(snapshot, ASK)
    with pytest.raises(NoRoute, match="no node serves tiny"):
        find_route(cluster(node("a")), ASK)


def test_a_route_never_mixes_digests_nor_quantizations_where_it_must_not() -> None:
    other = replace(shard(3, 6), quantization="fp32")
    exact = replace(ASK, mix=False)
    with pytest.raises(NoRoute):
        find_route(cluster(node("a", shard(0, 3)), node("b", other)), exact)
    strange = shard(3, 6, replace(SHAPE, ref=ModelRef("tiny", Digest("1" * 64))))
    for request in (ASK, exact):
        with pytest.raises(NoRoute):
            find_route(cluster(node("a", shard(0, 3)), node("b", strange)), request)


def test_overlapping_shards_that_do_not_join_are_explained() -> None:
    with pytest.raises(NoRoute, match="do not join"):
        find_route(cluster(node("a", shard(0, 4)), node("b", shard(3, 6))), ASK)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 3)), max_size=8))
def test_a_route_covers_every_layer_once_or_none_exists(held: list[tuple[int, int, int]]) -> None:
    shards = [(f"n{n}", shard(a, b)) for a, b, n in held if a < b]
    by_node = {name: [s for n, s in shards if n == name] for name, _ in shards}
    snapshot = cluster(
        *(node(n, *{s.layers: s for s in held_}.values() or ()) for n, held_ in by_node.items())
    )
    reachable = {0}
    for _ in range(6):
        reachable |= {s.layers.end for _, s in shards if s.layers.start in reachable}
    try:
        stages = find_route(snapshot, ASK).stages
    except NoRoute:
        assert 6 not in reachable
        return
    assert [layer for s in stages for layer in range(s.layers.start, s.layers.end)] == list(range(6))


def test_missing_layers_are_ranges() -> None:
    assert missing_layers([LayerRange(1, 2), LayerRange(4, 5)], 6) == [
        LayerRange(0, 1),
        LayerRange(2, 4),
        LayerRange(5, 6),
    ]


def place(layers: int, memories: list[int], layer: int = 10, first: int = 0, last: int = 0) -> object:
    rooms = [NodeRoom(NodeId(f"n{i}"), m) for i, m in enumerate(memories)]
    shape = replace(SHAPE, layers=layers)
    return split_evenly(ModelDemand(shape, "onnx", "int8", layer - 2, first, last, 1), 2, rooms)


def counts(answer: object) -> list[int]:
    assert isinstance(answer, EvenSplit), answer
    return [len(r) for _, r in answer.shards]


def test_an_even_split() -> None:
    assert counts(place(30, [1000] * 3)) == [10, 10, 10]
    assert counts(place(31, [1000] * 3)) == [11, 10, 10]


def test_memory_decides_where_it_binds() -> None:
    assert counts(place(30, [50, 1000, 1000])) == [5, 13, 12]
    assert counts(place(30, [1000, 1000, 130], last=50)) == [11, 11, 8]


def test_every_node_that_holds_nothing_has_its_reason() -> None:
    answer = place(4, [100, 5, 100])
    assert isinstance(answer, EvenSplit)
    assert [n for n, _ in answer.idle] == ["n1"]
    surplus = place(2, [100] * 3)
    assert isinstance(surplus, EvenSplit)
    assert surplus.idle == ((NodeId("n2"), "the model has only 2 layers"),)


def test_infeasible_names_the_figures() -> None:
    answer = place(30, [50, 50])
    assert isinstance(answer, DoesNotFit)
    assert "room for 10 of 30 layers" in answer.reason
    assert place(3, []) == DoesNotFit("there are no nodes")


@given(
    st.integers(1, 40),
    st.lists(st.integers(0, 400), min_size=1, max_size=8),
    st.integers(0, 50),
    st.integers(0, 50),
)
def test_a_plan_covers_the_model_and_never_exceeds_memory(
    layers: int, memories: list[int], first: int, last: int
) -> None:
    answer = place(layers, memories, first=first, last=last)
    if isinstance(answer, DoesNotFit):
        return
    assert isinstance(answer, EvenSplit)
    edges = [r for _, r in answer.shards]
    assert edges[0].start == 0
    assert edges[-1].end == layers
    assert all(a.end == b.start for a, b in pairwise(edges))
    rooms = {NodeId(f"n{i}"): m for i, m in enumerate(memories)}
    for i, (name, held) in enumerate(answer.shards):
        extra = (first if i == 0 else 0) + (last if i == len(edges) - 1 else 0)
        assert len(held) * 10 + extra <= rooms[name]
    assert {n for n, _ in answer.shards} | {n for n, _ in answer.idle} == set(rooms)
