"""What an agent says of its view, and how people see it."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

from mesh.capabilities import Accelerator, Battery, Speed, Thermal
from mesh.gossip import Fact, MemberState
from mesh.membership import Membership
from mesh.membership_events import Found, StreamLost, Synced, SyncReceived
from mesh.profiles import LAN
from mesh.types import Address, NodeId
from node_agent.commands.nodes import nodes_table, whole_view
from node_agent.nodes_report import nodes_report
from scheduler.cluster import ClusterSnapshot, NodeSeen
from tests.builders import CAPABILITIES, cluster, node, shard

S = 1_000_000_000


def view(**changes: Any) -> Any:
    """``a`` sees ``b``, ``c`` (no record yet) and ``d`` (its stream broke)."""
    me = Fact(NodeId("a"), Address("a:1"), 1)
    machine = Membership(me, LAN, Random(1), 0)
    others = tuple(Fact(NodeId(n), Address(f"{n}:1"), 1) for n in "bcd")
    machine.handle(SyncReceived(others[0], others), S)
    machine.handle(StreamLost(NodeId("d"), 1, "reset by peer"), 2 * S)
    machine.handle(Found(Address("ghost:1"), "consul"), 2 * S)
    machine.handle(Synced(Address("ghost:1"), error="refused"), 3 * S)
    rich = replace(
        CAPABILITIES,
        accelerators=(Accelerator("device", "coral", "usb"),),
        battery=Battery(61, True),
        thermal=Thermal("cpu", 83, True),
        speeds=(Speed("onnx", 12.3, 80.0),),
        labels=(("rack", "7"),),
    )
    snapshot: ClusterSnapshot = cluster(node("a", shard(0, 3)), node("b", shard(3, 6), capabilities=rich))
    base = {"snapshot": snapshot, "membership": machine, "twins": {}, "digests": {}}
    return SimpleNamespace(**{**base, **changes})


def report(given: Any, twin: Address | None = None) -> dict[str, Any]:
    found = nodes_report("c", given, {"mdns": "on 10.0.0.1"}, twin, 0, 5 * S)
    return {**found, "by_id": {n["id"]: n for n in found["nodes"]}}


def test_every_member_has_a_state_a_reason_and_an_age() -> None:
    found = report(view())["by_id"]
    assert [(n, found[n]["state"], found[n]["reason"], found[n]["since_s"]) for n in sorted(found)] == [
        ("a", "alive", "", 5.0),
        ("b", "alive", "", 4.0),
        ("c", "alive", "", 4.0),
        ("d", "suspect", "reset by peer", 3.0),
    ]
    assert found["a"]["sources"] == ["self"]
    assert report(view())["waiting_for"] == ""


def test_people_see_it_all() -> None:
    text = whole_view(report(view()))
    for words in (
        "record not here yet",
        "suspect: reset by peer",
        "battery 61 % charging",
        "83 °C throttled",
        "coral",
        "onnx 12 GB/s",
        "rack=7",
        "tiny:3-6/onnx-int8",
        "nobody answers there (1)",
        "ghost:1 (consul): refused",
        "link to",
    ):
        assert words in text, words
    assert "record not here" not in nodes_table(report(view()))


def test_a_peer_that_lies_about_its_digest_is_reported() -> None:
    honest = view()
    digest = honest.snapshot.nodes[NodeId("b")].capabilities.digest()
    assert report(view(digests={NodeId("b"): digest}))["by_id"]["b"]["reason"] == ""
    lied = report(view(digests={NodeId("b"): "0" * 16}))["by_id"]["b"]
    assert (lied["state"], lied["reason"]) == ("alive", "its advert and its record differ")


def test_twins_are_told_on_both_sides() -> None:
    assert "same node id" in report(view(twins={NodeId("b"): Address("x:1")}))["by_id"]["b"]["reason"]
    assert "older agent at x:1" in report(view(), Address("x:1"))["by_id"]["a"]["reason"]


def test_alone_it_says_what_it_waits_for() -> None:
    machine = Membership(Fact(NodeId("a"), Address("a:1"), 1), LAN, Random(1), 0)
    found = report(view(membership=machine))
    assert found["waiting_for"] == "no other agent yet (mdns: on 10.0.0.1)"
    assert "waiting for peers: no other agent yet" in whole_view(found)


def test_draining_and_unreachable_have_names_of_their_own() -> None:
    given = view()
    draining = given.snapshot.apply(NodeSeen(node("b", draining=True)))
    assert report(view(snapshot=draining))["by_id"]["b"]["state"] == "draining"
    given.membership.members[NodeId("c")].missed = 3
    assert report(given)["by_id"]["c"]["state"] == "unreachable"
    assert given.membership.members[NodeId("c")].fact.state is MemberState.ALIVE


def test_what_computes_is_told_where_it_is_not_the_usual() -> None:
    told = node("a", shard(0, 3), shard(3, 6))
    odd = "XNNPACK (not libnone.so: it cannot be loaded)"
    replicas = tuple(
        replace(r, provider=p) for r, p in zip(told.replicas, ("CPUExecutionProvider", odd), strict=True)
    )
    table = nodes_table(report(view(snapshot=cluster(replace(told, replicas=replicas)))))
    assert f"serving on {odd}" in table
    assert "CPUExecutionProvider" not in table
