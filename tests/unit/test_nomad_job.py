"""Job files parse, say only what our settings know, and rendered jobs are the same in HCL and in JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hcl2
import pytest

from mesh.errors import InputError
from mesh.types import LayerRange
from node_agent.config import fields, load_config, variable
from scheduler.nomad_change import change
from scheduler.nomad_hcl import job_text
from scheduler.nomad_job import (
    Autoscale,
    Constraint,
    JobSettings,
    LeaseGroup,
    ModelJob,
    constraints_of,
    fingerprint,
    groups_of,
    job_spec,
)
from scheduler.policy import ModelPolicy
from simulations.command import configure as simulate_flags

JOBS = Path(__file__).parents[2] / "jobs"
EXAMPLE = ModelJob(
    "smollm2-135m",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "onnx",
    "int8",
    4,
    2048,
    (LeaseGroup(LayerRange(0, 15), 2, 150), LeaseGroup(LayerRange(15, 30), 2, 150)),
)
"""What jobs/smollm2-135m.nomad.hcl is rendered from."""


def parsed(text: str) -> dict[str, Any]:
    """hcl2's answer without its quotes and marks."""
    found: dict[str, Any] = _plain(hcl2.loads(text))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items() if not k.startswith("__")}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, str) and value.startswith('"'):
        return json.loads(value)
    return value


def job_of(text: str) -> dict[str, Any]:
    (found,) = parsed(text)["job"][0].values()
    job: dict[str, Any] = found
    return job


def named(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: body for block in blocks for name, body in block.items()}


FILES = sorted(JOBS.glob("*.nomad.hcl"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_job_files_parse_and_keep_the_rules(path: Path) -> None:
    job = job_of(path.read_text())
    for group in named(job["group"]).values():
        for task in named(group["task"]).values():
            logs = task["logs"][0]
            assert group["ephemeral_disk"][0]["size"] > logs["max_files"] * logs["max_file_size"]
            assert task["resources"][0]["memory"] >= 64
    newer = re.findall(
        r"^\s*(disconnect|max_client_disconnect|provider|sysbatch|numa|ui)\b", path.read_text(), re.M
    )
    assert not newer, "these need a Nomad newer than 1.1"


def test_there_are_job_files() -> None:
    assert [p.name.partition(".")[0] for p in FILES] == [
        "churn-simulation",
        "ingress",
        "node-agent",
        "scheduler",
        "smollm2-135m",
    ]


@pytest.mark.parametrize("name", ["node-agent", "scheduler", "ingress"])
def test_agents_are_told_settings_that_there_are(name: str) -> None:
    text = (JOBS / f"{name}.nomad.hcl").read_text()
    document = parsed(text)
    defaults = {key: body["default"] for key, body in named(document["variable"]).items()}
    (group,) = named(job_of(text)["group"]).values()
    (task,) = named(group["task"]).values()
    environment = {}
    for key, value in task["env"][0].items():
        told = re.sub(
            r"^\$\{var\.(\w+)\}$|\$\{var\.(\w+)\}", lambda m: str(defaults[m[1] or m[2]]), str(value)
        )
        told = str(defaults[told[4:]]) if told.startswith("var.") else told
        told = told.replace("${NOMAD_PORT_grpc}", "7070").replace("${NOMAD_PORT_api}", "8080")
        environment[key] = re.sub(r"\$\{[^}]*\}", "10.0.0.1", told)
    assert set(environment) <= {variable(f.name) for f in fields()}
    config = load_config(None, "", environment, {})
    assert (config.port, config.api_port) == (7070, 8080)
    assert task["kill_signal"] == "SIGTERM"


def test_the_simulation_is_told_flags_that_there_are() -> None:
    import argparse

    (group,) = named(job_of((JOBS / "churn-simulation.nomad.hcl").read_text())["group"]).values()
    (task,) = named(group["task"]).values()
    given = [re.sub(r"\$\{[^}]*\}", "7", a) for a in task["config"][0]["args"]]
    parser = argparse.ArgumentParser()
    simulate_flags(parser)
    read = parser.parse_args(given[1:])
    assert (read.scenario, read.seed, read.time, read.set) == ("7", 7, "7h", ["nodes=7"])


def test_the_example_is_what_we_render() -> None:
    assert (JOBS / "smollm2-135m.nomad.hcl").read_text() == job_text(EXAMPLE)


SCALED = ModelJob(
    "smollm2-135m",
    "ab" * 32,
    "onnx",
    "int8",
    4,
    2048,
    (LeaseGroup(LayerRange(0, 15), 2, 150, ("gw-1", "drone-1")), LeaseGroup(LayerRange(15, 30), 3, 160)),
    (Constraint("${meta.tier}", "set_contains_any", "edge,onboard"), Constraint("${meta.x}", "is_set", "")),
    JobSettings("chat", ("dc1", "dc2"), "edge", "exec", "/opt/mesh", canaries=0, autoscale=Autoscale(1, 3)),
)


@pytest.mark.parametrize("job", [EXAMPLE, SCALED], ids=["example", "scaled"])
def test_hcl_and_json_say_the_same(job: ModelJob) -> None:
    said, spec = job_of(job_text(job)), job_spec(job)
    assert said["datacenters"] == spec["Datacenters"]
    assert said["namespace"] == spec["Namespace"]
    assert said["meta"] == spec["Meta"]
    update = said["update"][0]
    assert update["canary"] == spec["Update"]["Canary"]
    assert ns(update["healthy_deadline"]) == spec["Update"]["HealthyDeadline"]
    assert ns(update["progress_deadline"]) == spec["Update"]["ProgressDeadline"]
    assert [_constraint(c) for c in said.get("constraint", [])] == spec["Constraints"]
    groups = named(said["group"])
    assert list(groups) == [g["Name"] for g in spec["TaskGroups"]]
    for made in spec["TaskGroups"]:
        group = groups[made["Name"]]
        assert group["count"] == made["Count"]
        assert [_constraint(c) for c in group["constraint"]] == made["Constraints"]
        assert [a["value"] for a in group.get("affinity", [])] == [a["RTarget"] for a in made["Affinities"]]
        assert ns(group["restart"][0]["interval"]) == made["RestartPolicy"]["Interval"]
        assert ns(group["reschedule"][0]["max_delay"]) == made["ReschedulePolicy"]["MaxDelay"]
        assert ns(group["migrate"][0]["healthy_deadline"]) == made["Migrate"]["HealthyDeadline"]
        assert group["scaling"][0]["max"] == made["Scaling"]["Max"]
        check = group["service"][0]["check"][0]
        assert ns(check["interval"]) == made["Services"][0]["Checks"][0]["Interval"]
        task = named(group["task"])["lease"]
        assert task["driver"] == made["Tasks"][0]["Driver"]
        assert task["config"][0] == made["Tasks"][0]["Config"]
        assert task["resources"][0]["memory"] == made["Tasks"][0]["Resources"]["MemoryMB"]
        assert ns(task["kill_timeout"]) == made["Tasks"][0]["KillTimeout"]
        query = made["Scaling"]["Policy"].get("check")
        if query:
            said_query = named(group["scaling"][0]["policy"][0]["check"])["load"]["query"]
            assert said_query == query[0]["load"][0]["query"]


def ns(text: str) -> int:
    return int(text.removesuffix("s")) * 1_000_000_000


def _constraint(said: dict[str, str]) -> dict[str, str]:
    return {
        "LTarget": said.get("attribute", ""),
        "Operand": said["operator"],
        "RTarget": said.get("value", ""),
    }


def test_stages_of_the_same_layers_are_replicas_of_a_group() -> None:
    def stage(name: str, start: int, end: int, memory: int) -> dict[str, Any]:
        return {"name": name, "layers": [start, end], "memory_bytes": memory}

    report = {"stages": [stage("b", 10, 30, 5 << 20), stage("a", 0, 10, 1), stage("c", 0, 10, 3 << 20)]}
    assert groups_of(report) == (
        LeaseGroup(LayerRange(0, 10), 2, 3, ("a", "c")),
        LeaseGroup(LayerRange(10, 30), 1, 5, ("b",)),
    )


def test_rules_about_labels_become_constraints() -> None:
    policy = ModelPolicy(allow=("tier=onboard", "tier=edge"), deny=("node=kiosk-3", "loud=*"))
    assert constraints_of(policy) == (
        Constraint("${node.unique.name}", "!=", "kiosk-3"),
        Constraint("${meta.loud}", "is_not_set", ""),
        Constraint("${meta.tier}", "set_contains_any", "edge,onboard"),
    )
    with pytest.raises(InputError, match=r"several keys \(tier, zone\)"):
        constraints_of(ModelPolicy(allow=("tier=a", "zone=b")))


def test_counts_are_not_in_the_fingerprint_and_all_else_is() -> None:
    spec = job_spec(EXAMPLE)
    assert spec["Meta"]["mesh.rendered"] == fingerprint(spec)
    scaled = json.loads(json.dumps(spec))
    scaled["TaskGroups"][0]["Count"] = 9
    assert fingerprint(scaled) == fingerprint(spec)
    for edit in (
        '"Canary": 1',
        '"CPU": 50',
        '"raw_exec"',
        '"distinct_hosts"',
        "0-15",
        '"dc1"',
        '"Attempts": 3',
    ):
        text = json.dumps(spec)
        assert edit in text
        edited = json.loads(
            text.replace(
                edit,
                edit.replace("1", "2")
                .replace("5", "6")
                .replace("3", "4")
                .replace("dist", "x")
                .replace("raw_", ""),
            )
        )
        assert fingerprint(edited) != fingerprint(spec), edit


def _registered(job: ModelJob) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(job_spec(job)))
    return read | {"JobModifyIndex": 7, "Stop": False}


def test_cuts_and_affinities_stay_until_a_version_rolls_out() -> None:
    current = _registered(SCALED)
    elsewhere = (
        LeaseGroup(LayerRange(0, 15), 1, 150, ("gw-9",)),
        LeaseGroup(LayerRange(15, 30), 1, 160, ("gw-8",)),
    )
    moved = replace(SCALED, groups=elsewhere)
    same = change(current, moved)
    assert (same.index, same.rolls_out, same.keeps_counts) == (7, False, True)
    assert same.spec["TaskGroups"] == job_spec(SCALED)["TaskGroups"]
    newer = replace(moved, digest="cd" * 32)
    rolled = change(current, newer)
    assert rolled.rolls_out
    assert [a["RTarget"] for a in rolled.spec["TaskGroups"][0]["Affinities"]] == ["gw-9"]
    assert [g["Count"] for g in rolled.spec["TaskGroups"]] == [2, 3]
    other = replace(moved, groups=(LeaseGroup(LayerRange(0, 30), 1, 300),))
    kept = change(current, other)
    assert [g["Name"] for g in kept.spec["TaskGroups"]] == ["layers-0-15", "layers-15-30"]
    assert "--recut" in kept.notes[0]
    assert [g["Name"] for g in change(current, other, recut=True).spec["TaskGroups"]] == ["layers-0-30"]


def test_counts_have_one_writer() -> None:
    by_hand = replace(SCALED, settings=JobSettings("chat"))
    with pytest.raises(InputError, match="counts of chat are the Autoscaler's"):
        change(_registered(SCALED), by_hand, replicas=2)
    asked = change(_registered(by_hand), by_hand, replicas=5)
    assert not asked.keeps_counts
    assert [g["Count"] for g in asked.spec["TaskGroups"]] == [5, 5]


def test_a_stopped_job_is_registered_anew() -> None:
    stopped = _registered(SCALED) | {"Stop": True}
    assert change(stopped, SCALED).index == 7
    assert change(None, SCALED).index == 0
