"""Membership in virtual time: who is suspected, who dies, who comes back, and who is told apart."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import Fact, MemberState, Packet, Ping, Rumours
from mesh.membership import FULL_VIEW_MAX, Membership
from mesh.membership_events import (
    Found,
    Gone,
    Received,
    Send,
    StreamLost,
    Sync,
    Synced,
    SyncReceived,
    Tick,
    TwinSeen,
)
from mesh.profiles import LAN, PROFILES, RADIO, WAN, Profile
from mesh.suspicion import Suspicion
from mesh.types import Address, NodeId
from tests.virtual_network import MS, S, VirtualNetwork

ALIVE, SUSPECT, DEAD, LEFT = MemberState


def knit(nodes: int, **options: object) -> VirtualNetwork:
    net = VirtualNetwork(nodes, **options)  # type: ignore[arg-type]
    net.knit()
    net.run(3)
    return net


def test_one_seed_is_enough_to_meet_everybody() -> None:
    net = VirtualNetwork(20)
    net.meet()
    took = net.until(lambda: all(len(m.members) == 19 for m in net.machines.values()), 5)
    assert took < 2
    net.run(10)
    assert {c.state for c in net.changes} == {ALIVE}


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_loss_is_suspected_within_two_seconds_and_then_dead(how: str, nodes: int) -> None:
    worst = 0.0
    for seed in range(20):
        net = knit(nodes, seed=seed)
        net.run(0.1 * seed)
        getattr(net, how)("n1")
        worst = max(worst, net.until(lambda net=net: net.states("n1") == {SUSPECT}, 3))  # type: ignore[misc]
        net.until(lambda net=net: net.states("n1") == {DEAD}, 20)  # type: ignore[misc]
        first = {c.state: c.at for c in reversed(net.changes) if c.member == "n1"}
        assert first[DEAD] - first[SUSPECT] >= LAN.suspicion_min  # it had time to refute
    assert worst < 2


def test_a_frozen_node_is_back_at_once_and_accuses_nobody() -> None:
    for pause in (2.0, 30.0):
        net = knit(5)
        net.freeze("n1")
        net.run(pause)
        assert net.states("n1") == {SUSPECT if pause < 4 else DEAD}
        net.changes.clear()
        net.thaw("n1")
        assert net.until(lambda net=net: net.states("n1") == {ALIVE}, 2) < 2  # type: ignore[misc]
        net.run(20)
        assert {c.member for c in net.changes} == {"n1"}


def test_who_leaves_is_out_at_once_and_stays_out() -> None:
    net = knit(5, loss=0.05)
    net.leave("n2")
    assert net.until(lambda: net.states("n2") == {LEFT}, 2) < 1
    net.run(60)
    assert net.states("n2") == {LEFT}
    net.start("n2", instance=999_999)
    net.give(Address("n2"), Found(Address("n0"), "static"))
    net.until(lambda: net.states("n2") == {ALIVE}, 2)


def test_the_dead_are_forgotten_in_the_end() -> None:
    net = knit(3)
    net.kill("n1")
    net.run(LAN.forget / S + 30)
    assert net.states("n1") == {None}


def test_a_partition_is_said_by_both_halves_and_heals() -> None:
    net = knit(6)
    left = {"n0", "n1", "n2"}
    net.cut = lambda a, b: (a in left) != (b in left)
    net.until(lambda: all(net.state("n0", f"n{i}") is DEAD for i in (3, 4, 5)), 30)
    net.until(lambda: all(net.state("n5", f"n{i}") is DEAD for i in (0, 1, 2)), 30)
    assert net.state("n0", "n1") is ALIVE
    net.run(120)
    net.cut = lambda a, b: False
    everybody = [f"n{i}" for i in range(6)]
    assert net.until(lambda: all(net.states(n) == {ALIVE} for n in everybody), 10) < 5


def test_one_broken_pair_is_no_death_but_no_route_either() -> None:
    net = knit(5, streams=False)
    pair = {"n0", "n1"}
    net.cut = lambda a, b: {a, b} == pair
    net.run(60)
    assert all(c.state is not DEAD for c in net.changes)
    assert net.state("n2", "n1") is ALIVE
    member = net.machines[Address("n0")].members[NodeId("n1")]
    assert member.fact.state is ALIVE
    assert not member.reachable
    assert "not us" in member.reason
    net.cut = lambda a, b: False
    net.run(5)
    assert member.reachable


def test_blocked_datagrams_are_no_death_where_grpc_gets_through() -> None:
    net = knit(4)
    net.cut = lambda a, b: False
    net.loss = 1.0
    net.changes.clear()
    net.run(60)
    assert not [c for c in net.changes if c.state in (SUSPECT, DEAD)]
    assert net.machines[Address("n0")].members[NodeId("n1")].by_stream


def test_a_broken_stream_is_evidence_at_once_and_refuted_at_once() -> None:
    net = knit(5)
    victim = net.machines[Address("n0")].members[NodeId("n1")]
    net.give(Address("n0"), StreamLost(NodeId("n1"), victim.fact.instance, "reset by peer"))
    assert (victim.fact.state, victim.reason, victim.broken) == (SUSPECT, "reset by peer", True)
    assert net.until(lambda: net.states("n1") == {ALIVE}, 2) < 0.2
    assert not victim.broken
    net.give(Address("n0"), StreamLost(NodeId("n1"), victim.fact.instance - 1, "of an earlier life"))
    assert victim.fact.state is ALIVE


def test_a_node_that_is_slow_itself_accuses_nobody() -> None:
    """It gets the processor for a moment every 1.5 s: everything it does is late."""
    net = knit(5)
    net.changes.clear()
    for _ in range(60):
        net.freeze("n4")
        net.run(0.55)
        net.thaw("n4")
        net.run(0.05)
    accused = {c.member for c in net.changes if c.state is SUSPECT}
    assert accused <= {"n4"}
    assert net.machines[Address("n4")].health > 0
    net.run(60)
    assert net.machines[Address("n4")].health == 0


@pytest.mark.parametrize("profile", [WAN, RADIO])
def test_other_profiles_see_losses_too(profile: Profile) -> None:
    net = VirtualNetwork(6, profile=profile, delay=(50 * MS, 300 * MS), loss=0.05)
    net.knit()
    net.run(60)
    assert not [c for c in net.changes if c.state is DEAD]
    net.kill("n1")
    seen = net.until(lambda: not net.states("n1") & {ALIVE}, 120)
    assert seen < 4 * profile.probe_interval / S
    net.until(lambda: net.states("n1") == {DEAD}, 400, 1.0)


def test_a_restart_on_another_port_replaces_the_old_process() -> None:
    for seed in range(5):
        net = knit(4, seed=seed)
        net.kill("n1")
        net.start("m1", node="n1", instance=5_000_000)
        net.give(Address("m1"), Found(Address("n0"), "static"))
        net.until(
            lambda net=net: all(  # type: ignore[misc]
                m.members[NodeId("n1")].fact.address == "m1" and net.state(a, "n1") is ALIVE
                for a, m in net.machines.items()
                if a not in net.down and a != "m1"
            ),
            10,
        )
        assert net.twins == []


def test_a_restart_with_a_clock_set_back_is_believed() -> None:
    net = knit(4)
    net.kill("n1")
    net.start("n1", instance=1)
    net.give(Address("n1"), Found(Address("n0"), "static"))
    net.run(20)
    assert net.states("n1") == {ALIVE}
    assert net.machines[Address("n0")].members[NodeId("n1")].fact.instance == 1


def test_two_agents_with_one_id_are_told_apart() -> None:
    for seed in range(5):
        net = knit(4, seed=seed)
        net.start("copy", node="n1", instance=5_000_000)
        net.give(Address("copy"), Found(Address("n0"), "mdns"))
        net.until(lambda net=net: net.machines[Address("copy")].twin == "n1", 10)  # type: ignore[misc]
        told = [t for a, t in net.twins if a == "copy"]
        assert told == [TwinSeen(NodeId("n1"), Address("n1"), ours=True)]
        assert any(t == TwinSeen(NodeId("n1"), Address("copy"), ours=False) for _, t in net.twins)
        net.run(30)
        assert net.states("n1") >= {ALIVE}
        assert all(
            m.members[NodeId("n1")].fact.address == "n1"
            for a, m in net.machines.items()
            if a not in ("copy", "n1")
        )
        assert net.machines[Address("n1")].twin is None


def test_discovery_alone_makes_nobody_a_member_nor_kills_anybody() -> None:
    net = knit(3)
    ghosts = [Address(f"ghost{i}:1") for i in range(10_000)]
    for ghost in ghosts:
        net.give(Address("n0"), Found(ghost, "consul"))
    net.run(30)
    machine = net.machines[Address("n0")]
    assert set(machine.members) == {"n1", "n2"}
    assert machine.unresolved()[0][1:] == (("consul",), "no answer")
    for ghost in ghosts:
        net.give(Address("n0"), Gone(ghost, "consul"))
    assert machine.unresolved() == []
    net.give(Address("n0"), Found(Address("n1"), "mdns"))
    assert "mdns" in machine.members[NodeId("n1")].sources
    net.give(Address("n0"), Gone(Address("n1"), "mdns"))
    net.run(10)
    assert net.states("n1") == {ALIVE}


def test_a_dead_record_elsewhere_does_not_kill_who_answers_us() -> None:
    net = knit(4)
    known = net.machines[Address("n0")].members[NodeId("n1")].fact
    slander = Fact(known.node, known.address, known.instance, known.incarnation, DEAD, by=NodeId("n3"))
    net.give(
        Address("n0"),
        Received(Packet(net.machines[Address("n3")].me, None, (slander,)), Address("n3"), net.now),
    )
    assert net.state("n0", "n1") is SUSPECT
    assert net.until(lambda: net.states("n1") == {ALIVE}, 2) < 0.5


def test_links_are_measured_each_way() -> None:
    net = knit(3, delay=(4 * MS, 6 * MS))
    net.run(300)
    meter = net.machines[Address("n0")].members[NodeId("n1")].meter
    link = meter.estimate()
    assert 8 * MS < link.rtt_p50 < 12 * MS
    assert link.rtt_p50 <= link.rtt_p99
    assert (link.loss_out, link.loss_in) == (0, 0)
    assert link.bandwidth_out_p50 > 0
    assert link.bandwidth_in_p50 > 0
    lossy = knit(3, loss=0.3)
    lossy.run(600)
    estimate = lossy.machines[Address("n0")].members[NodeId("n1")].meter.estimate()
    assert 0.1 < estimate.loss_out < 0.5
    assert 0.1 < estimate.loss_in < 0.5


def test_large_meshes_keep_other_regions_as_summaries() -> None:
    me = Fact(NodeId("me"), Address("me:1"), 1, region="a")
    machine = Membership(me, LAN, Random(1), 0)
    near = tuple(Fact(NodeId(f"a{i}"), Address(f"a{i}:1"), 1, region="a") for i in range(FULL_VIEW_MAX + 50))
    far = tuple(Fact(NodeId(f"b{i}"), Address(f"b{i}:1"), 1, region="b") for i in range(50))
    gateway = Membership(far[0], LAN, Random(2), 0)
    gateway.handle(SyncReceived(far[1], far), 1)
    machine.handle(SyncReceived(near[0], near), 1)
    machine.handle(SyncReceived(far[0], far, gateway.summaries()), 2)
    assert len(machine.members) == FULL_VIEW_MAX + 50
    summary = machine.regions["b"]
    assert (summary.alive, len(summary.gateways)) == (50, 3)
    # Some exchanges go to the other region's gateways, so that summaries stay fresh.
    syncs: set[str] = set()
    now = 0
    while now < 20_000 * S and not syncs & set(summary.gateways):
        now = machine.next_deadline() or now
        for effect in machine.handle(Tick(), now):
            if isinstance(effect, Sync):
                syncs.add(effect.address)
                machine.handle(Synced(effect.address, error="no answer"), now)
    assert syncs & set(summary.gateways)


def test_suspicion_shortens_with_each_accuser() -> None:
    suspicion = Suspicion(since=0, minimum=4 * S, maximum=12 * S, expected=3)
    waits = []
    for accuser in "abcd":
        assert suspicion.confirm(NodeId(accuser))
        assert not suspicion.confirm(NodeId(accuser))
        waits.append(suspicion.deadline() / S)
    assert waits == [12, 8, pytest.approx(5.66, abs=0.01), 4]
    assert not suspicion.confirm(NodeId("e"))
    assert Suspicion(5, 4 * S, 12 * S, expected=0).deadline() == 4 * S + 5


def test_rumours_are_told_often_enough_and_then_dropped() -> None:
    rumours = Rumours(per_packet=2)
    facts = [Fact(NodeId(f"n{i}"), Address("x:1"), 1) for i in range(3)]
    for fact in facts:
        rumours.add(fact)
    told = [f for _ in range(9) for f in rumours.take(limit=4)]
    assert {f.node: told.count(f) for f in facts} == {f.node: 4 for f in facts}
    assert len(rumours) == 0
    accusations = [Fact(NodeId("v"), Address("x:1"), 1, 0, SUSPECT, by=NodeId(b)) for b in "ab"]
    for fact in (Fact(NodeId("v"), Address("x:1"), 1), *accusations):
        rumours.add(fact)
    assert set(rumours.take(9)) == set(accusations)
    rumours.add(Fact(NodeId("v"), Address("x:1"), 1, 1))
    assert len(rumours) == 1


facts = st.builds(
    Fact,
    st.sampled_from([NodeId("me"), NodeId("a"), NodeId("b")]),
    st.sampled_from([Address("x:1"), Address("y:1")]),
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from(list(MemberState)),
    st.just(""),
    st.sampled_from([NodeId(""), NodeId("b"), NodeId("me")]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(facts, st.lists(facts, max_size=3), st.integers(0, 2 * S)), max_size=30))
def test_no_gossip_breaks_the_machine(story: list[tuple[Fact, list[Fact], int]]) -> None:
    """Whatever is said, our own incarnation only grows and we never call ourselves anything but alive."""
    machine = Membership(Fact(NodeId("me"), Address("me:1"), 1), LAN, Random(3), 0)
    now = 0
    for sender, news, pause in story:
        now += pause
        before = machine.me.incarnation
        due = machine.next_deadline()
        if due is not None and due <= now:
            machine.handle(Tick(), now)
        packet = Packet(sender, Ping(1, NodeId("me"), 1, 1), tuple(news))
        for effect in machine.handle(Received(packet, sender.address, now), now):
            if isinstance(effect, Send):
                assert effect.packet.sender.state is ALIVE
        assert machine.me.incarnation >= before
        assert machine.me.state is ALIVE
        assert NodeId("me") not in machine.members


def test_profiles_bear_a_round_trip_of_their_network() -> None:
    for profile in PROFILES.values():
        assert profile.probe_timeout * 2 <= profile.probe_interval
        assert profile.suspicion_min >= 4 * profile.probe_timeout
        assert profile.train_packets * profile.train_bytes < 16_000


def test_virtual_runs_repeat() -> None:
    def story(seed: int) -> list[tuple[int, str, str]]:
        net = VirtualNetwork(8, seed=seed, loss=0.2)
        net.meet()
        net.run(30)
        net.kill("n3")
        net.run(30)
        return [(c.at, c.observer, c.member) for c in net.changes]

    assert story(4) == story(4)
    assert story(4) != story(5)


def test_who_waits_for_nobody_wakes_up_a_few_times_a_second() -> None:
    """Wake-ups cost a battery. Somebody to knock at is another matter."""

    def ticks(machine: Membership, begin: int) -> int:
        count, now = 0, begin
        while (due := machine.next_deadline()) is not None and due <= begin + 20 * S:
            now = max(now, due)
            machine.handle(Tick(), now)
            count += 1
        return count

    machine = Membership(Fact(NodeId("n0"), Address("n0:1"), 1), LAN, Random(1), 0)
    assert ticks(machine, 0) <= 2.2 * 20
    machine.handle(Found(Address("n1:1"), "join"), 20 * S)
    assert ticks(machine, 20 * S) >= 4 * 20
