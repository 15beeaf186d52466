"""What ``mesh plan`` says of Nomad beside what the mesh sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.gossip import MemberState
from mesh.types import LayerRange
from node_agent.commands.plan import nomad_view
from node_agent.plan_report import nomad_report
from scheduler.cluster import ClusterSnapshot, ReplicaState
from scheduler.nomad_view import LeaseAllocation, NomadFacts, Rollout
from tests.builders import cluster, node, shard

RUNNING = LeaseAllocation("a1b2c3d4-0", "llm", LayerRange(0, 3), "n", True, "running", "", 9)
LOST = replace(RUNNING, wanted=False, status="lost")
PENDING = replace(RUNNING, status="pending")
CANARY = Rollout(
    "7b20dadd-b664", "llm", 2, "running", "Deployment is running but requires manual promotion", 1, 3, 1, 5, 9
)


def hosting(state: ReplicaState | None = None, member: MemberState = MemberState.ALIVE) -> ClusterSnapshot:
    host = node("n", shard(0, 3), state=member)
    replicas = () if state is None else (replace(host.replicas[0], state=state),)
    return cluster(replace(host, replicas=replicas))


def view(facts: NomadFacts, snapshot: ClusterSnapshot) -> str:
    return "\n".join(nomad_view(nomad_report(facts, snapshot)))


@pytest.mark.parametrize(
    ("allocation", "snapshot", "said"),
    [
        (RUNNING, hosting(), "Nomad calls it running; its node holds no such layers"),
        (RUNNING, hosting(ReplicaState.FAILED), "Nomad calls it running; its node holds no such layers"),
        (RUNNING, hosting(ReplicaState.SERVING, MemberState.DEAD), "the mesh does not see its node alive"),
        (RUNNING, cluster(), "the mesh does not see its node alive"),
        (LOST, hosting(ReplicaState.SERVING), "Nomad calls it lost; it goes on serving"),
        (PENDING, hosting(), "not placed yet"),
        (RUNNING, hosting(ReplicaState.SERVING), ""),
        (RUNNING, hosting(ReplicaState.LOADING), ""),
        (LOST, hosting(), ""),
        (PENDING, hosting(ReplicaState.LOADING), ""),
    ],
)
def test_an_allocation_is_told_where_the_mesh_sees_it_otherwise(
    allocation: LeaseAllocation, snapshot: ClusterSnapshot, said: str
) -> None:
    shown = view(NomadFacts(allocations=(allocation,)), snapshot)
    assert shown.endswith(said)
    assert bool(shown) == bool(said), "nothing to say: nothing"


def test_a_client_that_is_down_is_told_while_the_mesh_sees_it() -> None:
    facts = NomadFacts(down=frozenset({"n", "elsewhere"}))
    assert (
        view(facts, hosting())
        == "Nomad\n  n: Nomad calls it down; the mesh sees it alive, and it goes on serving"
    )
    assert view(facts, hosting(member=MemberState.DEAD)) == ""


def test_a_canary_that_waits_is_told_with_what_to_do() -> None:
    shown = view(NomadFacts(rollouts=(CANARY,)), cluster())
    assert "llm, version 2: Deployment is running but requires manual promotion (1 of 3 healthy)" in shown
    assert "nomad deployment promote 7b20dadd" in shown


@pytest.mark.parametrize("status", ["successful", "cancelled"])
def test_a_rollout_that_is_over_is_not_told(status: str) -> None:
    over: dict[str, Any] = nomad_report(NomadFacts(rollouts=(replace(CANARY, status=status),)), cluster())
    assert over["rollouts"] == []
