"""Leadership, settling, flapping nodes and moves: stories with a clock of their own."""

from __future__ import annotations

from dataclasses import replace

from mesh.gossip import MemberState
from mesh.types import LayerRange, NodeId, Term
from scheduler.cluster import ClusterSnapshot, Node, NodeJudged, Replica, ReplicaState
from scheduler.leadership import STEADY_S, Leadership, elder, latest_term
from scheduler.placement import place
from scheduler.plan import Plan
from scheduler.reconcile import (
    SETTLE_BROKEN_S,
    SETTLE_S,
    FlapBook,
    Hold,
    Reconciler,
    Refusals,
    Release,
    Settling,
    Wanted,
)
from tests.builders import cluster, node, shard
from tests.unit.test_placement import DEMAND, ONE, host

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
TERM = Term(1, A)


def wanted(name: str, start: int = 0, end: int = 6) -> Wanted:
    return Wanted(NodeId(name), "tiny", LayerRange(start, end), "onnx", "int8", 1, 16)


def holding(name: str, *ranges: tuple[int, int], state: ReplicaState = ReplicaState.SERVING) -> Node:
    replicas = tuple(Replica(shard(a, b), state, term=TERM) for a, b in ranges)
    return replace(node(name), replicas=replicas)


def able(name: str, started: int, draining: bool = False) -> Node:
    return replace(node(name), scheduler=True, started_ms=started, draining=draining)


# -- who leads -------------------------------------------------------------------------------


def test_the_longest_lived_that_may_leads() -> None:
    snapshot = cluster(able("a", 5), able("b", 3), node("c", started_ms=1))
    assert elder(snapshot) == B
    assert elder(snapshot.apply(NodeJudged(B, MemberState.SUSPECT))) == A
    assert elder(cluster(able("a", 5, draining=True))) is None
    assert elder(ClusterSnapshot()) is None


def test_a_leader_waits_then_tops_every_term_that_was_heard_of() -> None:
    snapshot = cluster(able("a", 1), replace(node("b"), term=Term(7, C)))
    leadership = Leadership(A)
    assert leadership.look(snapshot, None, 0.0) is None
    assert leadership.look(snapshot, None, STEADY_S - 0.1) is None
    assert leadership.look(snapshot, None, STEADY_S) == Term(8, A)
    assert leadership.look(snapshot, None, STEADY_S + 1) == Term(8, A)
    # Another has led meanwhile: ours is over, the next is above it.
    later = cluster(able("a", 1), replace(node("b"), term=Term(9, C)))
    assert leadership.look(later, None, STEADY_S + 2) == Term(10, A)
    assert leadership.look(cluster(able("b", 1), able("a", 2)), None, 9.0) is None
    assert leadership.term is None


def test_consuls_lock_decides_where_there_is_one() -> None:
    snapshot = cluster(able("a", 5), able("b", 3))
    leadership = Leadership(A)
    assert leadership.look(snapshot, False, 9.0) is None
    assert leadership.look(snapshot, True, 9.0) == Term(1, A)
    assert leadership.look(snapshot, False, 10.0) is None


def test_terms_are_ordered() -> None:
    assert Term(2, A) > Term(1, B)
    assert Term(1, B) > Term(1, A)
    assert latest_term(cluster(node("a"))) is None


# -- what to do ------------------------------------------------------------------------------


def test_new_replicas_first_old_ones_when_they_serve() -> None:
    plan = frozenset({wanted("a", 0, 3), wanted("b", 3, 6)})
    old = cluster(node("a"), node("b"), holding("c", (0, 6)))
    reconciler = Reconciler(moves=9)
    actions = reconciler.step(plan, frozenset(), old, {}, 0.0)
    assert actions == [Hold(wanted("a", 0, 3)), Hold(wanted("b", 3, 6))]
    loading = cluster(
        holding("a", (0, 3)), holding("b", (3, 6), state=ReplicaState.LOADING), holding("c", (0, 6))
    )
    assert reconciler.step(plan, plan, loading, {}, 1.0) == []
    ready = cluster(holding("a", (0, 3)), holding("b", (3, 6)), holding("c", (0, 6)))
    (release,) = reconciler.step(plan, plan, ready, {}, 2.0)
    assert isinstance(release, Release)
    assert (release.wanted.node, release.why) == (C, "its successors serve")
    done = cluster(holding("a", (0, 3)), holding("b", (3, 6)), node("c"))
    assert reconciler.step(plan, plan, done, {}, 3.0) == []


def test_what_stands_in_the_way_goes_first() -> None:
    plan = frozenset({wanted("a", 0, 5), wanted("b", 5, 6)})
    snapshot = cluster(holding("a", (0, 3)), holding("b", (3, 6)))
    refused = {wanted("a", 0, 5): "no room"}
    actions = Reconciler(moves=9).step(plan, frozenset(), snapshot, refused, 0.0)
    releases = [a for a in actions if isinstance(a, Release)]
    assert [(r.wanted.node, str(r.wanted.layers)) for r in releases] == [("a", "0-3")]
    assert "no room" in releases[0].why


def test_what_nobody_wants_goes_and_other_holders_replicas_are_left_alone() -> None:
    theirs = replace(node("b"), replicas=(Replica(shard(0, 6), ReplicaState.SERVING),))
    actions = Reconciler(moves=9).step(
        frozenset(), frozenset(), cluster(holding("a", (0, 6)), theirs), {}, 0.0
    )
    assert [a.wanted.node for a in actions] == [A]
    assert isinstance(actions[0], Release)


def test_taking_over_is_no_move_and_moves_are_limited() -> None:
    plan = frozenset(wanted(f"n{i}") for i in range(9))
    nodes = [holding("n0", (0, 6)), *(node(f"n{i}") for i in range(1, 9))]
    reconciler = Reconciler(moves=3)
    first = reconciler.step(plan, frozenset(), cluster(*nodes), {}, 0.0)
    assert [a.wanted.node for a in first] == ["n0", "n1", "n2", "n3"]
    held = frozenset(a.wanted for a in first)
    assert reconciler.step(plan, held, cluster(*nodes), {}, 30.0) == []
    assert len(reconciler.step(plan, held, cluster(*nodes), {}, 61.0)) == 3


def test_one_node_that_flaps_never_moves_more_than_was_stated() -> None:
    """A node dies and comes back every three seconds for ten minutes; the plan is made anew each time."""
    flaps, settling, reconciler = FlapBook(), Settling(), Reconciler(moves=4)
    hosts = {"a": host("a", layer_us=100), "b": host("b", layer_us=300)}
    begun: list[float] = []
    held: dict[str, frozenset[Wanted]] = {"a": frozenset(), "b": frozenset()}
    for tick in range(1200):
        now = tick * 0.5
        up = int(now / 3) % 2 == 0
        if not up:
            held["a"] = frozenset()
        made = [
            replace(h, replicas=tuple(Replica(shard(0, 6), ReplicaState.SERVING, term=TERM) for _ in held[n]))
            for n, h in hosts.items()
        ]
        snapshot = cluster(*made)
        if not up:
            snapshot = snapshot.apply(NodeJudged(A, MemberState.SUSPECT))
        flaps.look(snapshot, now)
        answer = place(snapshot, DEMAND, ONE, held_off=flaps.held_off(now))
        assert isinstance(answer, Plan)
        plan = frozenset(Wanted(s.node, "tiny", s.layers, "onnx", "int8", 1, 16) for s in answer.stages)
        current = settling.look(plan, any(w.node == A and not up for w in settling.current or ()), now)
        assert current is not None
        for action in reconciler.step(current, held["a"] | held["b"], snapshot, {}, now):
            if isinstance(action, Hold):
                if action.wanted.place not in {w.place for w in held[action.wanted.node]}:
                    begun.append(now)
                held[action.wanted.node] |= {action.wanted}
            else:
                held[action.wanted.node] = frozenset()
    for start in range(600):
        assert sum(start <= t < start + 60 for t in begun) <= 4
    assert len(begun) <= 6, f"{len(begun)} loads: it should have been held off"
    assert begun[-1] < 30


def test_flaps_are_forgiven_once_and_held_off_ever_longer() -> None:
    flaps = FlapBook()
    up = cluster(node("a"), node("b"))
    down = up.apply(NodeJudged(A, MemberState.DEAD))
    held: list[int] = []
    for i in range(5):
        flaps.look(up, i * 10.0)
        flaps.look(down, i * 10.0 + 5)
        held.append(sum(A in flaps.held_off(i * 10.0 + 5 + s) for s in range(0, 700, 10)))
    assert held[0] == 0
    assert held[1] < held[2] < held[3]
    assert B not in flaps.held_off(45)
    restarted = cluster(replace(node("b"), started_ms=9), node("a"))
    flaps.look(up, 100.0)
    flaps.look(restarted, 101.0)
    flaps.look(cluster(node("a")), 102.0)
    assert B in flaps.held_off(103.0)


def test_refusals_are_asked_again_later_each_time_and_end_in_another_plan() -> None:
    refusals, one = Refusals(), wanted("a")
    refusals.add(one, "no room", 0.0)
    assert refusals.now(1.0) == {one: "no room"}
    assert refusals.now(2.5) == {}
    refusals.add(one, "no room", 2.5)
    assert refusals.now(6.0) == {one: "no room"}
    assert refusals.held_off() == {}
    refusals.add(one, "no room", 7.0)
    assert refusals.held_off() == {A: "it refused 3 times: no room"}
    assert refusals.now(500.0) == {}
    assert refusals.held_off() == {}
    refusals.add(one, "no room", 501.0)
    refusals.clear(one)
    assert refusals.now(501.0) == {}


def test_plans_that_waver_move_nothing() -> None:
    settling = Settling()
    one, other = frozenset({wanted("a")}), frozenset({wanted("b")})
    assert settling.look(one, False, 0.0) == one
    for tick in range(20):
        assert settling.look(other if tick % 2 else one, False, float(tick)) == one
    assert settling.look(one, False, 29.0) == one
    assert settling.look(other, False, 30.0) == one
    assert settling.look(other, False, 30.0 + SETTLE_S) == other
    assert settling.look(one, True, 50.0) == other
    assert settling.look(one, True, 50.0 + SETTLE_BROKEN_S) == one
