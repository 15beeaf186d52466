"""Who loads what nobody serves any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from mesh.gossip import MemberState
from mesh.session import Session
from mesh.types import NO_POLICY, Address, NodeId
from node_agent.adapters import cold_loads as adapter
from node_agent.adapters.cold_loads import ColdLoads
from node_agent.lease import Promise, ShardKey
from scheduler.cluster import Node, ReplicaState
from scheduler.cold_load import SESSIONS, cold_loads, served_beside
from scheduler.layer_speed import LayerSpeed
from scheduler.policy import ClassPolicy, Policy
from tests.builders import ADDRESS, OWNER, cluster, node, order, route, shard

LOST = shard(2, 4)
POSITIONS = 100
NEEDS = LOST.weight_bytes + SESSIONS * POSITIONS * LOST.kv_bytes_per_token


def able(name: str, layer_us: float = 100.0, **changes: object) -> Node:
    """A node that has the model and room for the shard."""
    speed = LayerSpeed(
        LOST.model.ref.digest, LOST.runtime, LOST.quantization, layer_us, layer_us, 0.2, layer_us / 5, 1.5
    )
    settings = {
        "models": (LOST.model.ref.name,),
        "memory_free_bytes": NEEDS,
        "layer_speeds": (speed,),
        **changes,
    }
    return replace(node(name), **settings)  # type: ignore[arg-type]


def chosen(*nodes: Node, avoid: str = "", rules: tuple[ClassPolicy, ...] = ()) -> list[str]:
    found = cold_loads(cluster(*nodes), [LOST], POSITIONS, 50, frozenset({NodeId(avoid)}), rules)
    assert all(load.shard == LOST for load in found)
    return [load.node for load in found]


def test_the_node_that_replays_soonest_loads_it() -> None:
    assert chosen(able("a", 300.0), able("b", 100.0), able("c", 200.0)) == ["b"]
    assert chosen(able("b"), able("a")) == ["a"]


def test_who_cannot_is_not_asked() -> None:
    assert chosen(able("a", memory_free_bytes=NEEDS - 1)) == []
    assert chosen(able("a", models=())) == []
    assert chosen(able("a", draining=True)) == []
    assert chosen(able("a"), avoid="a") == []
    assert chosen(able("a", state=MemberState.SUSPECT), able("b", 900.0)) == ["b"]
    rules = ClassPolicy(deny=("node=a",))
    assert chosen(able("a"), able("b", 900.0), rules=(rules,)) == ["b"]


def test_what_is_served_or_on_its_way_is_not_loaded_again() -> None:
    holder = node("a", LOST)
    assert chosen(holder, able("b")) == []
    loading = replace(holder, replicas=(replace(holder.replicas[0], state=ReplicaState.LOADING),))
    assert chosen(loading, able("b")) == []
    failed = replace(holder, replicas=(replace(holder.replicas[0], state=ReplicaState.FAILED),))
    assert chosen(failed, able("b")) == ["b"]
    assert chosen(replace(holder, state=MemberState.DEAD), able("b")) == ["b"]


def test_two_shards_do_not_take_the_same_memory() -> None:
    other = shard(4, 6)
    nodes = cluster(able("a"), able("b", 900.0))
    found = cold_loads(nodes, [LOST, other], POSITIONS, 50, frozenset())
    assert [(load.shard, load.node) for load in found] == [(LOST, "a"), (other, "b")]


def test_others_that_serve_it_again_are_seen() -> None:
    lent = node("a", LOST)
    assert not served_beside(cluster(lent, node("b", shard(4, 6))), LOST.digest, lent.id)
    assert served_beside(cluster(lent, node("b", LOST)), LOST.digest, lent.id)
    assert not served_beside(cluster(lent, node("b", LOST, draining=True)), LOST.digest, lent.id)
    dead = replace(node("b", LOST), state=MemberState.DEAD)
    assert not served_beside(cluster(lent, dead), LOST.digest, lent.id)


class Lender:
    """``using`` sessions of ours go over what was lent; an agent lends."""

    def __init__(self) -> None:
        self.view = cluster(able("a"))
        self.holds, self.using = 0, 1
        self.loads = ColdLoads(lambda: self.view, self, lambda node, shard: self.using, self, POSITIONS)  # type: ignore[arg-type]
        self.policy = Policy()
        self.version = NO_POLICY

    async def borrow(self, address: Address, key: ShardKey, promise: Promise) -> AsyncGenerator[bool]:
        self.holds += 1
        try:
            yield True
            await asyncio.sleep(60)
        finally:
            self.holds -= 1


def test_a_shard_goes_back_when_others_serve_it_again_though_sessions_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter, "_LOOK_S", 0.01)
    monkeypatch.setattr(adapter, "LINGER_S", 0.1)
    monkeypatch.setattr(adapter, "_UNUSED_S", 0.1)

    async def story() -> None:
        lender = Lender()
        held = route(2, 4)
        lender.view = cluster(node("n1", LOST), able("a"))
        lender.loads.note(held)
        lender.view = cluster(able("a"))
        lender.loads.want(Session(order(), held, OWNER, ADDRESS, 0), frozenset(), ())
        await asyncio.sleep(0.3)
        assert lender.holds == 1  # nobody else has it
        lender.view = cluster(able("a"), node("n1", LOST))
        await asyncio.sleep(0.3)
        assert lender.holds == 0

    asyncio.run(story())


def test_a_shard_that_no_session_came_to_use_goes_back_when_none_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter, "_LOOK_S", 0.01)
    monkeypatch.setattr(adapter, "_UNUSED_S", 0.2)

    async def story() -> None:
        lender = Lender()
        lender.using = 0
        held = route(2, 4)
        lender.view = cluster(node("n1", LOST), able("a"))
        lender.loads.note(held)
        lender.view = cluster(able("a"))
        waits = Session(order(), held, OWNER, ADDRESS, 0)
        for _ in range(5):  # it loads for longer than unused ones are held
            lender.loads.want(waits, frozenset(), ())
            await asyncio.sleep(0.1)
        assert lender.holds == 1
        lender.view = cluster(able("a"), node("n1", LOST))  # the session was told of, or taken over
        await asyncio.sleep(0.4)
        assert lender.holds == 0

    asyncio.run(story())
