"""Routes by cost: against every possible path, with measured speeds and links, under load."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.capabilities import Battery, Speed
from mesh.coordinates import Coordinate
from mesh.errors import NoRoute
from mesh.gossip import MemberState
from mesh.links import LinkEstimate
from mesh.messages import Cause
from mesh.types import Digest, ModelRef, NodeId
from node_agent.adapters.records import node_record, read_node
from node_agent.commands.route import plan_view
from node_agent.hysteresis import links_worth_telling, place_worth_telling
from node_agent.route_report import route_report
from scheduler.cluster import ClusterSnapshot, Node, NodeJudged, NodeSeen
from scheduler.cost import (
    FRAME_HEAD_BYTES,
    STAGE_US,
    Percentile,
    hazard_per_s,
    hop_us,
    link_between,
    transfer_us,
    way_us,
    ways_us,
)
from scheduler.layer_speed import LayerSpeed
from scheduler.learning import Learner
from scheduler.policy import ClassPolicy
from scheduler.route import Kept, RouteRequest, group_of
from scheduler.routing import Router, find_route, mixed, standbys_for, troubled
from scheduler.speed import SpeedMeter, StageSpeed, guess, worth_telling
from tests.builders import CAPABILITIES, SHAPE, cluster, node, shard

HERE = NodeId("a")
MS = 1_000_000


def fast(ms: float) -> StageSpeed:
    return StageSpeed(ms * 1000, ms * 100, ms * 10, ms * 2000, measured=True)


def at_speed(made: Node, *ms: float) -> Node:
    replicas = tuple(replace(r, speed=fast(m)) for r, m in zip(made.replicas, ms, strict=True))
    return replace(made, replicas=replicas)


def link(rtt_ms: float, mbit: float = 100, loss: float = 0.0, p99_ms: float | None = None) -> LinkEstimate:
    return LinkEstimate(
        rtt_p50=int(rtt_ms * MS),
        rtt_p99=int((p99_ms or 2 * rtt_ms) * MS),
        loss_out=loss,
        bandwidth_out_p50=int(mbit * 1e6),
        samples=9,
    )


def linked(made: Node, **links: LinkEstimate) -> Node:
    return replace(made, links={NodeId(n): estimate for n, estimate in links.items()})


def chosen(snapshot: ClusterSnapshot, **request: object) -> list[str]:
    return [s.node for s in find_route(snapshot, RouteRequest("tiny", HERE, **request)).stages]  # type: ignore[arg-type]


def test_the_faster_replica_and_the_nearer_one() -> None:
    ends = at_speed(node("a", shard(0, 3)), 1)
    far_fast = at_speed(node("b", shard(3, 6)), 1)
    near_slow = at_speed(node("c", shard(3, 6)), 9)
    a = linked(ends, b=link(10), c=link(1))
    assert chosen(cluster(a, far_fast, near_slow)) == ["a", "c"]
    a = linked(ends, b=link(4), c=link(1))
    assert chosen(cluster(a, far_fast, near_slow)) == ["a", "b"]


def test_direction_loss_and_tail_count() -> None:
    a, b, c = (
        at_speed(node(n, shard(*layers)), 1) for n, layers in (("a", (0, 3)), ("b", (3, 6)), ("c", (3, 6)))
    )
    assert chosen(cluster(linked(a, b=link(1, mbit=0.05), c=link(5)), b, c)) == ["a", "c"]
    assert chosen(cluster(linked(a, b=link(1, loss=0.1), c=link(5)), b, c)) == ["a", "c"]
    tailed = linked(a, b=link(1, p99_ms=50), c=link(5, p99_ms=6))
    assert chosen(cluster(tailed, b, c)) == ["a", "b"]
    assert chosen(cluster(tailed, b, c), percentile=Percentile.P99) == ["a", "c"]


def test_a_prompt_weighs_prefill_and_bandwidth() -> None:
    a = at_speed(node("a", shard(0, 3)), 1)
    b, c = at_speed(node("b", shard(3, 6)), 1), at_speed(node("c", shard(3, 6)), 1.5)
    b = replace(b, replicas=(replace(b.replicas[0], speed=StageSpeed(1000, 100, 900, 2000, measured=True)),))
    snapshot = cluster(linked(a, b=link(1), c=link(1)), b, c)
    assert chosen(snapshot, tokens=200, prompt=10) == ["a", "b"]
    assert chosen(snapshot, tokens=10, prompt=500) == ["a", "c"]


def test_a_session_that_lost_a_stage_leaves_no_other_for_a_hope() -> None:
    a, b, c = (
        at_speed(node(n, shard(*layers)), 2) for n, layers in (("a", (0, 3)), ("b", (3, 6)), ("c", (3, 6)))
    )
    hoped = replace(c.replicas[0], speed=StageSpeed(2000, 0, 1, 4000, measured=True, hope=1000))
    snapshot = cluster(linked(a, b=link(1), c=link(1)), b, replace(c, replicas=(hoped,)))
    here = frozenset({(NodeId("b"), shard(3, 6).digest)})
    assert chosen(snapshot, tokens=32, prompt=100) == ["a", "c"]
    assert chosen(snapshot, tokens=32, prompt=100, holding=here) == ["a", "b"]
    faster = replace(hoped, speed=StageSpeed(500, 0, 1, 1000, measured=True))
    known = cluster(linked(a, b=link(1), c=link(1)), b, replace(c, replicas=(faster,)))
    assert chosen(known, tokens=32, prompt=100, holding=here) == ["a", "c"]


def test_who_stood_by_takes_a_stage_that_is_lost_and_no_other() -> None:
    a, b, c, d = (
        at_speed(node(n, shard(*layers)), ms)
        for n, layers, ms in (("a", (0, 3), 2), ("b", (3, 6), 2), ("c", (3, 6), 1.7), ("d", (3, 6), 1.8))
    )
    snapshot = cluster(linked(a, b=link(1), c=link(1), d=link(1)), b, c, d)
    told = {
        "tokens": 32,
        "prompt": 100,
        "holding": frozenset((NodeId(n), shard(3, 6).digest) for n in "bc"),
        "standing_by": frozenset({(NodeId("c"), shard(3, 6).digest)}),
    }
    draws = range(1, 30)
    assert {chosen(snapshot, draw=draw, **told)[1] for draw in draws} == {"b"}
    lost = frozenset({NodeId("b")})
    assert {chosen(snapshot, draw=draw, avoid=lost, **told)[1] for draw in draws} == {"c"}
    faster = cluster(linked(a, b=link(1), c=link(1)), b, at_speed(node("c", shard(3, 6)), 0.5))
    assert chosen(faster, **told) == ["a", "c"]


def test_who_stands_by_is_neither_in_the_route_nor_to_be_avoided() -> None:
    snapshot = cluster(*(node(n, shard(0, 3)) for n in "abc"), *(node(n, shard(3, 6)) for n in "de"))
    found = find_route(snapshot, RouteRequest("tiny", HERE))
    first, last = (stage.node for stage in found.stages)
    (spare,) = {"d", "e"} - {last}
    left = sorted({"a", "b", "c"} - {first})
    for avoid, names in ((left[0], (left[1], spare)), (spare, (left[0], None))):
        stood = standbys_for(snapshot, found, frozenset({NodeId(avoid)}))
        assert tuple(s and s.node for s in stood) == names


def test_our_own_sessions_count_before_records_tell_them() -> None:
    snapshot = cluster(node("b", shard()), node("c", shard()))
    assert chosen(snapshot) == ["b"]
    digest = shard().digest
    assert chosen(snapshot, own={(NodeId("b"), digest): 2}) == ["c"]


def test_requests_spread_over_equals_and_flock_to_the_clearly_better() -> None:
    equal = cluster(*(at_speed(node(n, shard()), 5) for n in "bcde"))
    drawn = [chosen(equal, draw=i + 1)[0] for i in range(400)]
    assert {n: drawn.count(n) > 60 for n in "bcde"} == dict.fromkeys("bcde", True)
    unequal = cluster(at_speed(node("b", shard()), 5), at_speed(node("c", shard()), 8))
    assert {chosen(unequal, draw=i + 1)[0] for i in range(100)} == {"b"}


def test_a_newcomer_that_never_ran_is_tried() -> None:
    snapshot = cluster(at_speed(node("b", shard()), 5), node("c", shard()))
    drawn = [chosen(snapshot, draw=i + 1)[0] for i in range(100)]
    assert drawn.count("c") > 20


def test_a_node_slowed_to_a_fifth_gets_nothing_while_others_have_room() -> None:
    slow = cluster(
        at_speed(node("b", shard()), 25), *(at_speed(node(n, shard(), sessions=3), 5) for n in "cd")
    )
    assert "b" not in {chosen(slow, draw=i + 1)[0] for i in range(100)}


def test_alternatives_share_no_machine() -> None:
    nodes = [node(n, shard(0, 3)) for n in "bcd"] + [node(n, shard(3, 6)) for n in "efg"]
    plan = Router().plan(cluster(*nodes), RouteRequest("tiny", HERE, alternatives=5))
    routes = [plan.route, *plan.alternatives]
    assert len(routes) == 3
    used = [s.node for r in routes for s in r.stages]
    assert len(used) == len(set(used))
    # The ingress may be in all of them: if it dies, the request does.
    with_ingress = cluster(node("a", shard(0, 3)), *nodes[3:])
    plan = Router().plan(with_ingress, RouteRequest("tiny", HERE, alternatives=2))
    assert [r.stages[0].node for r in plan.alternatives] == ["a", "a"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000))
def test_an_alternative_is_the_cheapest_without_the_machines_of_those_before(seed: int) -> None:
    snapshot = cluster(*unequal_nodes(Random(seed), 12))
    ingress = NodeId("n0")
    router = Router()
    request = RouteRequest("tiny", ingress, tokens=40, prompt=20)
    try:
        plan = router.plan(snapshot, replace(request, alternatives=3))
    except NoRoute:
        return
    before, used = [plan.route, *plan.alternatives], set[NodeId]()
    for i in range(4):
        used |= {s.node for s in before[i - 1].stages if i and s.node != ingress}
        try:
            alone = router.plan(snapshot, replace(request, avoid=frozenset(used))).route
        except NoRoute:
            assert len(before) == i
            break
        assert before[i] == alone


def test_room_for_the_session_is_demanded() -> None:
    small = node("b", shard())
    small = replace(small, replicas=(replace(small.replicas[0], context_max=100),))
    assert chosen(cluster(small), positions=100) == ["b"]
    with pytest.raises(NoRoute):
        chosen(cluster(small), positions=101)


def test_a_battery_that_runs_dry_is_a_risk() -> None:
    def with_battery(wh: float, charging: bool = False) -> Node:
        battery = Battery(9, charging, wh, 10.0)
        return node("b", capabilities=replace(CAPABILITIES, battery=battery))

    assert hazard_per_s(with_battery(0.5)) > 0.005
    assert hazard_per_s(with_battery(50)) == hazard_per_s(with_battery(0.5, True)) == hazard_per_s(node("b"))


def test_nonsense_from_the_network_steers_nothing() -> None:
    wild = LinkEstimate(rtt_p50=1, rtt_p99=1, bandwidth_out_p50=-5, samples=1)
    assert transfer_us(wild, 1000) == transfer_us(None, 1000) > 0
    assert hop_us(None, None, Percentile.P50) > 0
    assert way_us(node("a"), node("a"), 1 << 20, Percentile.P50) == (0.0, 0.0)
    made = at_speed(node("b", shard()), 1)
    for value in (float("nan"), float("inf"), -1.0, 0.0, 1e15):
        record = node_record(made, "c")
        record.replicas[0].speed.decode = value
        assert read_node(record).replicas[0].speed is None
    record = node_record(linked(made, x=link(1)), "c")
    record.links[0].loss_out = float("nan")
    assert read_node(record).links == {}


def test_records_carry_speeds_links_and_places() -> None:
    made = linked(at_speed(node("b", shard()), 1), x=link(3, 50, 0.25))
    made = replace(made, coordinate=Coordinate((0.5, 0.25, 0.0, 0.0), 0.125, 0.0, 0.5))
    told = LayerSpeed(
        SHAPE.ref.digest, "onnx", "int8", 512.0, 2048.0, 0.25, 64.0, 2.0, head_known=True, run=-96.0
    )
    made = replace(made, layer_speeds=(told,))
    back = read_node(node_record(made, "c"))
    assert back.replicas[0].speed == made.replicas[0].speed
    assert back.layer_speeds == (told,)
    assert back.coordinate == made.coordinate
    there = back.links[NodeId("x")]
    assert (there.rtt_p50, there.loss_out, there.bandwidth_out_p50) == (3 * MS, 0.25, 50_000_000)
    turned = link_between(node("x"), back)
    assert turned is not None
    assert (turned.loss_in, turned.bandwidth_in_p50) == (0.25, 50_000_000)


def test_pairs_without_measurement_use_coordinates() -> None:
    a, b = (
        replace(node(n), coordinate=Coordinate((x, 0.0, 0.0, 0.0), 1e-5))
        for n, x in (("a", 0.0), ("b", 0.04))
    )
    latency, _ = way_us(a, b, 100, Percentile.P50)
    assert latency == pytest.approx(20_000, rel=0.01)


def unequal_nodes(rng: Random, most: int) -> list[Node]:
    """Nodes with unequal shards, speeds, loads and links; half of the links are not measured."""
    cuts = [(0, 2), (0, 3), (2, 3), (2, 6), (3, 6), (3, 4), (4, 6), (0, 6)]
    nodes = []
    for i in range(rng.randrange(1, most + 1)):
        shards = [shard(*c) for c in rng.sample(cuts, rng.randrange(1, 3))]
        made = node(f"n{i}", *shards, sessions=rng.randrange(3))
        made = at_speed(made, *(rng.uniform(0.5, 9) for _ in shards))
        links = {f"n{k}": link(rng.uniform(0.1, 20)) for k in range(most + 1) if rng.random() < 0.5}
        nodes.append(linked(made, **links))
    return nodes


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000))
def test_no_path_is_cheaper(seed: int) -> None:
    """Against every path of a random mesh, with costs summed one by one from the told terms."""
    nodes = unequal_nodes(Random(seed), 6)
    snapshot = cluster(*nodes)
    request = RouteRequest("tiny", NodeId("n0"))
    router = Router()

    def paths(layer: int) -> list[tuple[tuple[str, int, int], ...]]:
        if layer == 6:
            return [()]
        return [
            ((n.id, r.shard.layers.start, r.shard.layers.end), *rest)
            for n in nodes
            for r in n.replicas
            if r.shard.layers.start == layer
            for rest in paths(r.shard.layers.end)
        ]

    every = paths(0)
    if not every:
        with pytest.raises(NoRoute):
            router.plan(snapshot, request)
        return
    plan = router.plan(snapshot, request)

    def price(path: tuple[tuple[str, int, int], ...]) -> float:
        only = cluster(
            *(
                replace(
                    n,
                    replicas=tuple(
                        r for r in n.replicas if (n.id, r.shard.layers.start, r.shard.layers.end) in path
                    ),
                )
                for n in nodes
            )
        )
        return router.plan(only, request).tpot_us

    assert plan.tpot_us == pytest.approx(min(map(price, every)))
    stages = plan.route.stages
    assert all(x.layers.end == y.layers.start for x, y in pairwise(stages))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(list(Percentile)))
def test_all_pairs_at_once_are_the_pairs_one_by_one(seed: int, percentile: Percentile) -> None:
    rng = Random(seed)
    nodes = []
    for i in range(6):
        made = linked(
            node(f"n{i}"),
            **{
                f"n{k}": link(rng.uniform(1, 9), loss=rng.random() / 9)
                for k in range(6)
                if rng.random() < 0.3
            },
        )
        if rng.random() < 0.7:
            made = replace(
                made, coordinate=Coordinate((rng.random() / 99, 0.0, 0.0, 0.0), 1e-4, -rng.random() / 99)
            )
        nodes.append(made)
    before, after = rng.choices(nodes, k=4), rng.choices(nodes, k=5)
    latency, transfer = ways_us(before, after, 2400, percentile)
    for i, a in enumerate(before):
        for k, b in enumerate(after):
            assert (latency[i, k], transfer[i, k]) == pytest.approx(way_us(a, b, 2400, percentile))


def test_a_route_is_explained() -> None:
    snapshot = cluster(
        linked(at_speed(node("a", shard(0, 3)), 1), b=link(4)), at_speed(node("b", shard(3, 6)), 2)
    )
    plan = Router().plan(snapshot, RouteRequest("tiny", HERE, prompt=130))
    report = route_report(plan, {NodeId("b"): "bee"})
    assert [s["name"] for s in report["stages"]] == ["", "bee"]
    assert report["stages"][1]["hop_ms"] == 2.0
    assert report["predicted_tpot_ms"] == pytest.approx(1.25 + 2.25 + 2 + 2, abs=0.2)
    assert report["predicted_ttft_ms"] > report["predicted_tpot_ms"]
    text = plan_view(report)
    assert "bee" in text
    assert "predicted   TPOT" in text


def test_speeds_are_learned_and_old_slowness_fades() -> None:
    prior = StageSpeed(1000, 160, 100, 2000)
    meter = SpeedMeter(prior)
    assert meter.speed(0) == prior
    for i in range(60):
        meter.decoded(1, 2000 + i % 3, 1.0)
        meter.decoded(4, 2900, 1.0)
        meter.prefilled(64, 6400, 1.0)
    learned = meter.speed(1.0)
    assert learned.measured
    assert learned.decode == pytest.approx(2001, abs=1)
    assert learned.prefill == 100
    assert learned.row == pytest.approx(300, abs=2)
    assert learned.step(4) == pytest.approx(2900, abs=10)
    for _ in range(300):
        meter.decoded(1, 2200, 2.0)
    assert meter.speed(3.0).weighed == 2200, "a short rest is no reason to hope"
    for _ in range(300):
        meter.decoded(1, 10_000, 2.0)
    assert meter.speed(2.0).decode == 10_000
    assert meter.speed(600.0).weighed == pytest.approx(0.8 * 2001, abs=1)
    assert meter.speed(600.0).decode == 10_000


def test_a_few_chunks_do_not_outweigh_what_other_cuts_took() -> None:
    guessed, known = (
        SpeedMeter(StageSpeed(1000, 160, 100, 2000)),
        SpeedMeter(StageSpeed(1000, 160, 100, 2000, True)),
    )
    for meter in (guessed, known):
        for _ in range(2):
            meter.prefilled(64, 64 * 140, 1.0)
    assert guessed.speed(1.0).prefill == 140, "a guess counts for nothing"
    assert known.speed(1.0).prefill == pytest.approx(110)
    for _ in range(190):
        known.prefilled(64, 64 * 140, 2.0)
    assert known.speed(2.0).prefill == pytest.approx(140, rel=0.02)


def test_what_a_chunk_takes_more_for_what_came_before_is_learned() -> None:
    meter, rng = SpeedMeter(StageSpeed(1000, 160, 50, 2000)), Random(1)
    for turn in range(30):
        for begin in range(0, 1024, 64):
            around = 100 + 0.05 * (begin + 32)
            meter.prefilled(64, 64 * around * rng.uniform(0.9, 1.1), float(turn), begin)
        learned = meter.speed(float(turn))
    assert learned.prefill_context == pytest.approx(0.05, rel=0.1)
    assert learned.prefill == pytest.approx(100, rel=0.03)
    assert learned.chunk(64, 1024) == pytest.approx(64 * 152.8, rel=0.03)
    assert learned.chunk(1) == learned.decode, "weights are read for one position as for many"


@given(
    st.integers(1, 700), st.lists(st.tuples(st.integers(1, 90), st.integers(0, 30)), min_size=1, max_size=5)
)
def test_a_first_token_comes_when_the_last_chunk_is_through(
    prompt: int, stages: list[tuple[int, int]]
) -> None:
    """Against the plain recursion: a stage begins a chunk when it has come and the one before is done."""
    edges = [0, *range(1, len(stages)), SHAPE.layers]
    names = [f"n{i}" for i in range(len(stages))]
    nodes = []
    for i, (ms, later) in enumerate(stages):
        made = node(names[i], shard(edges[i], edges[i + 1]))
        speed = StageSpeed(ms * 100, 0, ms * 10, ms * 200, True, prefill_context=later / 100)
        replicas = tuple(replace(r, speed=speed) for r in made.replicas)
        nodes.append(linked(replace(made, replicas=replicas), **{n: link(2) for n in names if n != names[i]}))
    here = linked(node("a"), **{n: link(2) for n in names})
    plan = Router().plan(cluster(here, *nodes), RouteRequest("tiny", HERE, prompt=prompt))
    transfer = transfer_us(link(2), SHAPE.width * 4 + FRAME_HEAD_BYTES)
    free = [0.0] * len(stages)
    at = 0.0
    for begin in range(0, prompt, 64):
        size, at = min(64, prompt - begin), 0.0
        for i, made in enumerate(nodes):
            known = made.replicas[0].speed
            assert known is not None
            way = plan.terms[0].hop if i == 0 else 1000 + transfer * size
            free[i] = at = max(free[i], at + way) + STAGE_US + known.chunk(size, begin)
    assert plan.ttft_us == pytest.approx(at + plan.home_us)


def test_who_was_measured_in_a_bad_moment_is_tried_again_and_seen_as_it_is() -> None:
    busy = SpeedMeter(StageSpeed(1000, 160, 100, 2000))
    for i in range(192):
        busy.decoded(1, 1300, i / 100)
    assert busy.speed(1.92).weighed == pytest.approx(1300)
    # One answer of late leaves doubt: a fifth is forgiven, more than equal machines are measured apart.
    assert 0.8 * 1300 < busy.speed(4.5).weighed < 0.9 * 1300
    for i in range(16):
        busy.decoded(1, 1000, 10 + i / 100)
    assert busy.speed(10.2).weighed < 1000, "its last answer counts, not its bad moment"


def test_what_a_step_takes_more_for_what_came_before_is_learned() -> None:
    meter, rng = SpeedMeter(StageSpeed(1000, 160, 100, 2000)), Random(1)
    for turn in range(30):
        for position in range(200, 800, 5):
            meter.decoded(1, 4000 + 2 * position + rng.gauss(0, 200), float(turn), position)
        learned = meter.speed(float(turn))
    assert learned.context == pytest.approx(2, rel=0.1)
    assert learned.decode == pytest.approx(4000, rel=0.03)
    assert learned.step(1, 1000) == pytest.approx(6000, rel=0.03)
    # Steps close together tell nothing, and noise is no growth.
    still = SpeedMeter(StageSpeed(1000, 160, 100, 2000))
    for i in range(300):
        still.decoded(1, 4000 + rng.gauss(0, 900), 0.0, i % 50)
    assert still.speed(0.0).context == 0


def test_runs_too_short_for_the_clock_do_not_grow() -> None:
    meter = SpeedMeter(StageSpeed(1000, 160, 100, 2000))
    for position in range(300):
        meter.decoded(1, 0, 0.0, position)
    assert meter.speed(0.0).context == 0


def test_noise_is_no_growth_where_places_are_close_together() -> None:
    """As on a machine whose quota of a core comes in ticks, and is asked for answers of one length."""
    growth, rng = 0.0004, Random(1)
    meter = SpeedMeter(StageSpeed(4000, 160, 100, 8000, measured=True, context=4000 * growth))
    for turn in range(20):
        for position in range(830, 1120):
            meter.decoded(1, 4000 * (1 + growth * position) * rng.uniform(0.5, 1.5), float(turn), position)
            speed = meter.speed(float(turn))
            assert growth / 4 < speed.context / speed.decode < growth * 2


def test_peers_hear_of_speeds_that_moved() -> None:
    told = worth_telling(None, StageSpeed(1234.56, 0.0, 9.876, 55555), 0)
    assert told == StageSpeed(1230, 0, 9.88, 55600)
    assert worth_telling(told, StageSpeed(1260, 0.0, 9.7, 54000), 60) is told
    assert worth_telling(told, StageSpeed(1300, 0.0, 9.7, 54000), 60).decode == 1300
    assert worth_telling(told, replace(told, measured=True), 0).measured


def test_peers_hear_of_small_changes_later_than_of_great_ones() -> None:
    told = StageSpeed(1000, 0.0, 10, 2000)
    wobble, slowed = replace(told, decode=1080.0), replace(told, decode=2000.0)
    assert worth_telling(told, wobble, 0.5) is told
    assert worth_telling(told, wobble, 3) is not told
    assert worth_telling(told, slowed, 0.5) is not told
    assert worth_telling(told, slowed, 0) is told  # twice in the same instant


def test_a_guess_comes_from_the_probe() -> None:
    held = replace(shard(), weight_bytes=100_000_000)
    slow = guess(held, CAPABILITIES)
    quick = guess(held, replace(CAPABILITIES, speeds=(Speed("onnx", 50.0, 400.0),)))
    other = guess(
        replace(held, runtime="litert"), replace(CAPABILITIES, speeds=(Speed("onnx", 50.0, 400.0),))
    )
    assert other.decode == quick.decode  # known by its other runtime
    assert slow.decode == pytest.approx(10 * quick.decode)
    assert quick.decode == pytest.approx(100e6 / 30e9 * 1e6)


def test_links_are_told_when_they_moved() -> None:
    told = {NodeId("x"): link(10)}
    assert links_worth_telling(told, {NodeId("x"): link(11)}) == told
    moved = {NodeId("x"): link(15)}
    assert links_worth_telling(told, moved) == moved
    assert links_worth_telling(told, {}) == {}
    assert links_worth_telling({}, {NodeId("y"): LinkEstimate()}) == {}
    place = Coordinate((0.0,) * 4, 0.001, 0.0, 0.3)
    assert place_worth_telling(place, replace(place, height=0.0011)) is place
    assert place_worth_telling(place, replace(place, vector=(0.1, 0.0, 0.0, 0.0))) is not place
    assert place_worth_telling(None, place) is place


# -- kept caches, rules, load ----------------------------------------------------------------


def kept_on(snapshot: ClusterSnapshot, name: str, positions: int) -> Kept:
    return Kept(find_route(cluster(snapshot.nodes[NodeId(name)]), RouteRequest("tiny", HERE)), positions)


def test_a_route_that_keeps_the_prompts_beginning_is_preferred_if_that_pays() -> None:
    snapshot = cluster(at_speed(node("b", shard()), 5), at_speed(node("c", shard()), 6))
    router = Router()
    kept = kept_on(snapshot, "c", 300)
    long = router.plan(snapshot, RouteRequest("tiny", HERE, tokens=5, prompt=310, kept=kept))
    assert ([s.node for s in long.route.stages], long.resumed) == (["c"], 300)
    plain = router.plan(snapshot, RouteRequest("tiny", HERE, tokens=5, prompt=310))
    assert ([s.node for s in plain.route.stages], plain.resumed) == (["b"], 0)
    assert long.ttft_us < plain.ttft_us
    # What is kept is context all the same: of steps, and of the ten positions that are left.
    grows = StageSpeed(6000, 0, 60, 9000, True, context=3.0, prefill_context=0.5)
    held = tuple(replace(r, speed=grows) for r in snapshot.nodes[NodeId("c")].replicas)
    far = router.plan(
        cluster(replace(snapshot.nodes[NodeId("c")], replicas=held)),
        RouteRequest("tiny", HERE, tokens=10, prompt=400, kept=kept),
    )
    assert far.resumed == 300
    assert far.terms[0].compute == pytest.approx(STAGE_US + grows.step(1, 405))
    assert far.ttft_us - far.home_us - far.terms[0].hop == pytest.approx(
        2 * STAGE_US + grows.chunk(64, 300) + grows.chunk(36, 364)
    )
    short = kept_on(snapshot, "c", 1)
    assert router.plan(snapshot, RouteRequest("tiny", HERE, tokens=200, prompt=310, kept=short)).resumed == 0
    gone = cluster(snapshot.nodes[NodeId("b")])
    assert router.plan(gone, RouteRequest("tiny", HERE, prompt=310, kept=kept)).resumed == 0


def test_rules_keep_routes_out_and_say_so() -> None:
    def labelled(name: str, tier: str) -> Node:
        made = node(name, shard())
        return replace(made, capabilities=replace(made.capabilities, labels=(("tier", tier),)))

    snapshot = cluster(labelled("b", "cloud"), labelled("c", "onboard"))
    onboard = ClassPolicy(allow=("tier=onboard",))
    assert chosen(snapshot) == ["b"]
    assert chosen(snapshot, rules=(onboard,)) == ["c"]
    assert chosen(snapshot, rules=(ClassPolicy(price=(("tier=cloud", 9999.0),)),)) == ["c"]
    with pytest.raises(
        NoRoute, match="that the rules allow: the policy allows only tier=onboard; the policy denies"
    ):
        chosen(snapshot, rules=(onboard, ClassPolicy(deny=("tier=onboard",))))
    assert chosen(snapshot, avoid=frozenset({NodeId("b")})) == ["c"]
    with pytest.raises(NoRoute):
        chosen(snapshot, avoid=frozenset({NodeId("b"), NodeId("c")}))


def test_a_session_stays_with_its_model_runtime_and_quantization() -> None:
    other = replace(shard(), quantization="fp32", digest=Digest("f" * 64))
    snapshot = cluster(at_speed(node("b", shard()), 1), at_speed(node("c", other), 9))
    assert chosen(snapshot) == ["b"]
    assert chosen(snapshot, pin=(other.model.ref.digest, "onnx", "fp32")) == ["c"]


def test_our_own_sessions_in_a_record_are_not_counted_twice() -> None:
    digest = shard().digest
    snapshot = cluster(node("b", shard(), sessions=3), node("c", shard(), sessions=2))
    assert chosen(snapshot) == ["c"]
    assert chosen(snapshot, ours_told={(NodeId("b"), digest): 3}) == ["b"]
    assert chosen(snapshot, ours_told={(NodeId("b"), digest): 3}, own={(NodeId("b"), digest): 4}) == ["c"]


def test_trouble_of_a_running_route() -> None:
    snapshot = cluster(node("a", shard(0, 3)), node("b", shard(3, 6)))
    route = find_route(snapshot, RouteRequest("tiny", HERE))
    assert troubled(snapshot, route) is None
    silent = snapshot.apply(NodeJudged(NodeId("b"), MemberState.SUSPECT))
    assert troubled(silent, route) == (1, Cause.SILENT, "its node is suspect")
    broken = snapshot.apply(NodeJudged(NodeId("b"), MemberState.SUSPECT, broken=True))
    assert troubled(broken, route) == (
        1,
        Cause.STREAM_BROKEN,
        "our stream from its node broke",
    )
    shunned = snapshot.apply(NodeJudged(NodeId("b"), MemberState.ALIVE, False, broken=True))
    assert troubled(shunned, route) == troubled(broken, route)
    assert troubled(cluster(snapshot.nodes[NodeId("b")]), route) == (0, Cause.SILENT, "its node is gone")
    draining = cluster(node("a", shard(0, 3), draining=True), node("b", shard(3, 6)))
    assert troubled(draining, route) == (0, Cause.DRAINING, "its node drains")
    unloaded = cluster(node("a"), node("b", shard(3, 6)))
    assert troubled(unloaded, route) == (0, Cause.DRAINING, "its replica goes")


def test_an_ingress_learns_what_stages_and_recoveries_take() -> None:
    learner = Learner()
    a, b, c = map(NodeId, "abc")
    for _ in range(5):
        learner.ended(learner.learned, [a, b], left_us=1200.0, ttft_off_us=4000.0)
    assert learner.learned.stage_us == learner.learned.stage_of(a) == learner.learned.stage_of(c) == 600
    assert learner.learned.start_us >= 4000
    learner.recovered(80_000.0)
    assert learner.learned.recovery_us == 80_000
    odd = Learner()
    for _ in range(5):
        odd.ended(odd.learned, [a], left_us=-1e9, ttft_off_us=0)
    assert odd.learned.stage_us == odd.learned.stage_of(a) == 0


def test_an_ingress_learns_whose_stages_take_longer_beside_computing() -> None:
    learner, took = Learner(), {NodeId("a"): 500.0, NodeId("b"): 900.0, NodeId("c"): 5000.0}
    for i in range(60):
        nodes = [list(took)[i % 3], list(took)[(i + 1) % 3]]
        learner.ended(learner.learned, nodes, sum(took[n] for n in nodes), 0.0)
    for name, us in took.items():
        assert learner.learned.stage_of(name) == pytest.approx(us, abs=150)
    a, b, c = (
        at_speed(node(n, shard(*layers)), 5) for n, layers in (("a", (0, 3)), ("b", (3, 6)), ("c", (3, 6)))
    )
    alike = linked(a, b=link(1.1), c=link(1))
    assert chosen(cluster(alike, b, c)) == ["a", "c"]
    plan = find_route(cluster(alike, b, c), RouteRequest("tiny", HERE, learned=learner.learned))
    assert [s.node for s in plan.stages] == ["a", "b"]


def mixed_cluster() -> ClusterSnapshot:
    """Layers 3 to 6 are there in another form only."""
    other = replace(shard(3, 6), runtime="litert", quantization="int4", digest=Digest("e" * 64))
    return cluster(at_speed(node("b", shard(0, 3)), 1), at_speed(node("c", other), 1))


def test_a_route_mixes_forms_only_where_there_is_no_other() -> None:
    plan = Router().plan(mixed_cluster(), RouteRequest("tiny", HERE))
    assert [s.node for s in plan.route.stages] == ["b", "c"]
    assert mixed(plan.group)
    # However slow, a route of one form goes first.
    slow = mixed_cluster().apply(NodeSeen(at_speed(node("d", shard(3, 6)), 900)))
    plan = Router().plan(slow, RouteRequest("tiny", HERE))
    assert [s.node for s in plan.route.stages] == ["b", "d"]
    assert not mixed(plan.group)


def test_r7_what_must_be_exact_is_not_mixed_once_it_runs() -> None:
    pin = group_of(shard(0, 3))
    request = RouteRequest("tiny", HERE, pin=pin)
    assert mixed(Router().plan(mixed_cluster(), request).group)
    with pytest.raises(NoRoute, match="no node serves the layers 3-6"):
        Router().plan(mixed_cluster(), replace(request, mix=False))
    # One that began over several forms may go on so, and takes one form where that has come.
    again = replace(request, pin=(pin[0], "", ""), mix=False)
    assert mixed(Router().plan(mixed_cluster(), again).group)


def test_another_models_layers_are_not_mixed_in() -> None:
    strange = shard(3, 6, replace(SHAPE, ref=ModelRef("tiny", Digest("1" * 64))))
    strange = replace(strange, quantization="fp32", digest=Digest("d" * 64))
    snapshot = cluster(node("b", shard(0, 3)), node("c", strange))
    with pytest.raises(NoRoute):
        Router().plan(snapshot, RouteRequest("tiny", HERE))
