"""``mesh job render`` and ``mesh model deploy --nomad``: a real agent places, a recorded Nomad answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest

from node_agent.adapters.model_store import ModelStore
from tests.agents import AgentProcess, start_agent, until
from tests.conftest import MODEL
from tests.contract.nomad_replay import Replay, recorded, replay


@pytest.fixture(scope="module")
def agent(store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    settings = {"home": str(store.root.parent), "memory": "2000", "scheduler": "on"}
    running = start_agent(tmp_path_factory.mktemp("nomad") / "node", (), None, **settings)
    until(lambda: len(running.report()["nodes"]) == 1)
    yield running
    running.end()


@pytest.fixture
def nomad() -> Iterator[Replay]:
    """One that has no such job yet, and where all goes well."""
    with replay("agent_self") as book:
        book.put("job_read_404", f"/v1/job/{MODEL}")
        book.put("job_plan_create", f"/v1/job/{MODEL}/plan")
        book.put("job_register")
        book.put("job_deployment", f"/v1/job/{MODEL}/deployment")
        yield book


def mesh(*arguments: str, api: str, nomad: str = "") -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NOMAD_")}
    command = [sys.executable, "-m", "mesh", *arguments, f"--api=http://{api}"]
    environment = kept | ({"NOMAD_ADDR": nomad} if nomad else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def registered(nomad: Replay) -> list[Any]:
    return [a.body for a in nomad.asked if (a.method, a.path) == ("POST", "/v1/jobs")]


def deploy(agent: AgentProcess, nomad: Replay, *flags: str) -> subprocess.CompletedProcess[str]:
    return mesh("model", "deploy", MODEL, "--nomad", *flags, api=agent.api, nomad=nomad.url)


def there(nomad: Replay, job: dict[str, Any], **meta: str) -> dict[str, Any]:
    """Nomad has this job from now on."""
    have = job | {"JobModifyIndex": 26, "Stop": False, "Meta": job["Meta"] | meta}
    nomad.say("GET", f"/v1/job/{MODEL}", 200, json.dumps(have), "application/json")
    return have


def test_a_rendered_job_is_hcl_and_the_same_in_json(agent: AgentProcess) -> None:
    text = mesh("job", "render", MODEL, "--sessions=2", "--context=512", api=agent.api)
    assert text.returncode == 0, text.stderr
    ((name, job),) = hcl2.loads(text.stdout)["job"][0].items()
    assert json.loads(name) == MODEL
    spec = json.loads(
        mesh("job", "render", MODEL, "--sessions=2", "--context=512", "--json", api=agent.api).stdout
    )["Job"]
    groups = {json.loads(n): g for block in job["group"] for n, g in block.items()}
    assert set(groups) == {g["Name"] for g in spec["TaskGroups"]} == {"layers-0-30"}
    task = groups["layers-0-30"]["task"][0]['"lease"']
    made = spec["TaskGroups"][0]["Tasks"][0]
    assert [json.loads(a) for a in task["config"][0]["args"]] == made["Config"]["args"]
    assert task["resources"][0]["memory"] == made["Resources"]["MemoryMB"] > 130


def test_a_model_is_planned_registered_and_waited_for(agent: AgentProcess, nomad: Replay) -> None:
    done = deploy(agent, nomad)
    assert done.returncode == 0, done.stderr
    assert "stage: 1 placed" in done.stdout
    assert "Deployment completed successfully" in done.stdout
    (body,) = registered(nomad)
    assert body["EnforceIndex"] is True
    assert body["JobModifyIndex"] == 0
    paths = [a.path for a in nomad.asked]
    assert paths.index(f"/v1/job/{MODEL}/plan") < paths.index("/v1/jobs"), "every plan is dry-run first"


def test_a_job_that_others_touched_is_left_alone(agent: AgentProcess, nomad: Replay) -> None:
    deploy(agent, nomad)
    job = registered(nomad)[0]["Job"]
    edited = json.loads(json.dumps(job))
    edited["TaskGroups"][0]["Tasks"][0]["Resources"]["MemoryMB"] = 4000
    foreign = recorded("job_read")
    for have, meta, said in (
        (edited, {}, "was edited since mesh rendered it"),
        (job, {"mesh.managed": "false"}, "mesh.managed = false"),
        (job, {"mesh.model": "another"}, "holds another"),
        (foreign | {"Meta": {}}, {}, "is no model's"),
    ):
        there(nomad, have, **meta)
        done = deploy(agent, nomad)
        assert done.returncode == 2
        assert said in done.stderr
    assert len(registered(nomad)) == 1


def test_a_redeployment_keeps_counts_and_refuses_to_replace_what_stays(
    agent: AgentProcess, nomad: Replay
) -> None:
    deploy(agent, nomad)
    job = registered(nomad)[0]["Job"]
    job["TaskGroups"][0]["Count"] = 3  # an operator scaled it
    there(nomad, job)
    done = deploy(agent, nomad)
    assert done.returncode == 0, done.stderr
    again = registered(nomad)[1]
    assert again["PreserveCounts"] is True
    assert again["JobModifyIndex"] == 26
    assert again["Job"]["TaskGroups"][0]["Count"] == 3
    harm = recorded("job_plan_canary")
    harm["Annotations"]["DesiredTGUpdates"]["stage"] = {"DestructiveUpdate": 3}
    nomad.say("POST", f"/v1/job/{MODEL}/plan", 200, json.dumps(harm), "application/json")
    done = deploy(agent, nomad)
    assert done.returncode == 2
    assert "although the version stays" in done.stderr
    there(nomad, job, **{"mesh.digest": "00" * 32})  # another version: this is what rolls it out
    assert deploy(agent, nomad).returncode == 0
    assert len(registered(nomad)) == 3


def test_canaries_that_are_healthy_wait_for_people(agent: AgentProcess, nomad: Replay) -> None:
    nomad.put("job_deployment_canary", f"/v1/job/{MODEL}/deployment")
    done = deploy(agent, nomad)
    assert done.returncode == 0
    assert "nomad deployment promote 7b20dadd" in done.stdout


def test_no_room_is_told_by_nomad_and_by_us(agent: AgentProcess, nomad: Replay) -> None:
    nomad.put("job_plan_unplaceable", f"/v1/job/{MODEL}/plan")
    done = deploy(agent, nomad)
    assert done.returncode == 2
    assert "no client has room: g: 1 clients looked at" in done.stderr
    done = deploy(agent, nomad, "--sessions=1000")
    assert done.returncode == 2
    assert "hosts nothing" in done.stderr
    assert not registered(nomad)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--autoscale=3"], "--autoscale is '3'"),
        (["--canaries=-1"], "--canaries is -1"),
        (["--spread=zone"], "spread is not written into Nomad jobs"),
        (["--quantization=int3"], "quantization is 'int3'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    agent: AgentProcess, nomad: Replay, flags: list[str], said: str
) -> None:
    done = deploy(agent, nomad, *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert not registered(nomad)


def test_without_nomad_nothing_is_done(agent: AgentProcess, tmp_path: Path) -> None:
    done = mesh("model", "deploy", MODEL, "--nomad", api=agent.api, nomad="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "Nomad does not answer at http://127.0.0.1:9" in done.stderr


def test_a_model_that_the_mesh_places_is_not_nomads_as_well(
    agent: AgentProcess, nomad: Replay, tmp_path: Path
) -> None:
    policy = tmp_path / "mesh.toml"
    policy.write_text(f"[ models . {MODEL} ]\nsessions = 1\ncontext = 512\n")
    assert mesh("apply", str(policy), "--detach", api=agent.api).returncode == 0
    try:
        done = deploy(agent, nomad)
        assert done.returncode == 2
        assert "is placed by the mesh's own scheduler" in done.stderr
        assert not registered(nomad)
    finally:
        mesh("model", "undeploy", MODEL, "--detach", api=agent.api)


def test_undeploy_stops_the_job_and_no_other(agent: AgentProcess, nomad: Replay) -> None:
    done = mesh("model", "undeploy", MODEL, "--nomad", api=agent.api, nomad=nomad.url)
    assert done.returncode == 2
    assert f"no running job {MODEL}" in done.stderr
    deploy(agent, nomad)
    there(nomad, registered(nomad)[0]["Job"])
    nomad.put("job_deregister", f"/v1/job/{MODEL}")
    done = mesh("model", "undeploy", MODEL, "--nomad", api=agent.api, nomad=nomad.url)
    assert done.returncode == 0, done.stderr
    assert ("DELETE", f"/v1/job/{MODEL}") in [(a.method, a.path) for a in nomad.asked]


def test_a_client_that_nomad_drains_gets_no_shards(store: ModelStore, tmp_path: Path) -> None:
    with replay("nodes_list_fleet") as book:
        nodes = [n | {"Drain": n["Name"] == "drone-1"} for n in recorded("nodes_list_fleet")]
        book.say("GET", "/v1/nodes", 200, json.dumps(nodes), "application/json")
        settings = {"home": str(store.root.parent), "scheduler": "on", "name": "drone-1", "nomad": book.url}
        drained = start_agent(tmp_path / "drone", (), None, **settings)
        try:
            until(lambda: any("wait" in a.query for a in book.asked), 15, "it leads and follows")
            policy = tmp_path / "mesh.toml"
            policy.write_text(f"[models.{MODEL}]\n")
            done = mesh("plan", str(policy), api=drained.api)
            assert done.returncode == 1
            assert "drone-1 hosts nothing: Nomad drains it" in done.stdout
        finally:
            drained.end()
