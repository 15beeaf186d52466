"""What we send has the shape that a real Nomad was sent, and what it answered is read right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mesh.errors import InputError, PeerError, Unavailable
from mesh.types import LayerRange
from node_agent.adapters.nomad_api import NomadAccess, NomadApi, nomad_access
from node_agent.adapters.nomad_follow import NomadFollower
from scheduler.nomad_change import Change, dry_run, nowhere
from scheduler.nomad_job import Autoscale, JobSettings, LeaseGroup, ModelJob, fingerprint, job_spec
from scheduler.nomad_view import NomadFacts, NomadView
from tests.agents import until
from tests.contract.nomad_replay import Replay, cassette, recorded, replay

JOB = ModelJob(
    "smollm2-135m",
    "ab" * 32,
    "onnx",
    "int8",
    4,
    2048,
    (LeaseGroup(LayerRange(0, 15), 2, 150, ("gw-1", "drone-1")), LeaseGroup(LayerRange(15, 30), 2, 160)),
    settings=JobSettings(name="llm-stage", autoscale=Autoscale(1, 3)),
)
FREE = ("Meta", "Env", "Config", "Policy", "Datacenters", "Tags")
"""Whose keys and values are the job's own."""
NOT_RECORDED = {"PreserveCounts"}
"""Documented by Nomad since 0.12, in no recorded exchange."""


@contextmanager
def nomad(*names: str, **access: str) -> Iterator[tuple[NomadApi, Replay]]:
    with replay(*names) as book:
        api = NomadApi(NomadAccess(book.url, **access))
        try:
            yield api, book
        finally:
            api.close()


def misfits(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Keys that no recorded request has, and values of another type; what was null says nothing."""
    found: list[str] = []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in theirs:
                found += [] if key in NOT_RECORDED else [f"{where}.{key}"]
            elif key not in FREE:
                found += misfits(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        found += [m for each in ours for m in (misfits(each, theirs[0], f"{where}[]") if theirs else [])]
    elif theirs is not None and type(ours) is not type(theirs):
        found.append(f"{where}: {type(ours).__name__}, not {type(theirs).__name__}")
    return found


def requests_of(name: str) -> Any:
    return cassette(name)["request"]["body"]


def test_a_job_has_the_shape_of_recorded_ones() -> None:
    assert misfits({"Job": job_spec(JOB)}, requests_of("job_register_canary")) == []
    assert misfits({"Job": {"ID": 1, "Groups": []}}, requests_of("job_register_canary")) == [
        ".Job.ID: int, not str",
        ".Job.Groups",
    ]


def test_requests_have_the_recorded_shapes() -> None:
    spec = job_spec(JOB)
    names = ("job_plan_canary", "job_register", "job_scale_up", "agent_self", "job_read", "job_deployment")
    with nomad(*names, token="secret", namespace="edge") as (api, book):
        assert api.check_version() == "1.1.2"
        plan = api.plan(spec)
        registered = api.register(spec, 26, keep_counts=True)
        scaled = api.scale("llm-stage", "stage", 3, "load")
        read, deployment = api.job("llm-stage"), api.deployment("llm-stage")
    assert plan["JobModifyIndex"] == 26
    assert registered["JobModifyIndex"] == recorded("job_register")["JobModifyIndex"]
    assert scaled["EvalID"] == recorded("job_scale_up")["EvalID"]
    assert read is not None
    assert read["ID"] == "llm-stage"
    assert deployment is not None
    assert deployment["Status"] == "successful"
    sent = {(a.method, a.path): a for a in book.asked}
    for name in ("job_plan_canary", "job_register_enforce_conflict", "job_scale_up"):
        request = cassette(name)["request"]
        ours = sent[request["method"], request["path"]]
        extra = {"PolicyOverride"} if "plan" in name else set()
        assert misfits({k: v for k, v in ours.body.items() if k not in extra}, request["body"]) == []
    assert sent["POST", "/v1/jobs"].body["EnforceIndex"] is True
    assert sent["POST", "/v1/jobs"].body["JobModifyIndex"] == 26
    assert all(a.headers["x-nomad-token"] == "secret" for a in book.asked)
    assert sent["POST", "/v1/job/llm-stage/scale"].query["namespace"] == ["edge"]
    assert sent["GET", "/v1/job/llm-stage"].query["namespace"] == ["edge"]


def test_a_job_that_nomad_filled_in_has_the_fingerprint_that_it_had() -> None:
    """Of a real job: as it was parsed, and as it was read after it had been registered and given implied constraints."""
    parsed, read = recorded("jobs_parse"), recorded("job_read")
    assert parsed["TaskGroups"][0]["Constraints"] != read["TaskGroups"][0]["Constraints"]
    assert fingerprint(parsed) == fingerprint(read)
    changed = dict(read, Datacenters=["dc2"])
    assert fingerprint(changed) != fingerprint(read)


def test_a_job_that_is_not_there_is_none() -> None:
    with nomad("job_read_404") as (api, _):
        assert api.job("none") is None


def test_a_dry_run_tells_canaries_and_reasons() -> None:
    rolls, stays = Change({}, 26, True, False), Change({}, 26, False, True)
    assert dry_run(recorded("job_plan_canary"), rolls) == ["stage: 1 as canaries, 3 as they are"]
    assert dry_run(recorded("job_plan_create"), rolls) == ["stage: 1 placed"]
    (why,) = nowhere(recorded("job_plan_unplaceable"))
    assert why == (
        "g: 1 clients looked at, 1 ruled out, 1 of them by ${node.unique.id} = 00000000-0000-0000-0000-000000000000"
    )
    with pytest.raises(InputError, match=r"no client has room: g: 1 clients"):
        dry_run(recorded("job_plan_unplaceable"), rolls)
    destructive = recorded("job_plan_canary")
    destructive["Annotations"]["DesiredTGUpdates"]["stage"] |= {"Canary": 0, "DestructiveUpdate": 3}
    with pytest.raises(
        InputError, match=r"replace replicas of stage although the version stays: stage/worker Env\[REV\]"
    ):
        dry_run(destructive, stays)


@pytest.mark.parametrize(
    ("name", "path", "call", "said"),
    [
        ("job_register_enforce_conflict", "", "register", "Enforcing job modify index 0: job already exists"),
        ("job_register_invalid", "", "register", "Missing job task groups"),
        ("job_scale_bad_group", "", "scale", 'task group "zz" specified for scaling does not exist'),
        ("job_scale_over_max", "", "scale", "group count was greater than scaling policy maximum: 9 > 6"),
    ],
)
def test_what_nomad_refuses_is_told_in_its_words(name: str, path: str, call: str, said: str) -> None:
    with nomad() as (api, book):
        book.put(name, path)
        with pytest.raises(InputError, match=said) as raised:
            if call == "register":
                api.register(job_spec(JOB), 0, keep_counts=False)
            else:
                api.scale("llm-stage", "zz", 9, "load")
        assert book.url in str(raised.value)


@pytest.mark.parametrize(
    ("status", "text", "kind", "error", "said"),
    [
        (500, "No cluster leader", "text/plain", Unavailable, "No cluster leader"),
        (403, "Permission denied", "text/plain", InputError, "set NOMAD_TOKEN"),
        (200, "<html>login</html>", "text/html", PeerError, "is it Nomad's"),
        (502, "<html>bad gateway</html>", "text/html", InputError, "a page of HTML"),
        (200, "[1, 2]", "application/json", PeerError, r"is it Nomad's"),
        (301, "moved", "text/plain", PeerError, "is it Nomad"),
    ],
)
@pytest.mark.parametrize("call", ["job", "scale"])
def test_strange_answers_are_errors(
    status: int, text: str, kind: str, error: type[Exception], said: str, call: str
) -> None:
    with nomad() as (api, book):
        book.say("GET", "/v1/job/x", status, text, kind)
        book.say("POST", "/v1/job/x/scale", status, text, kind)
        with pytest.raises(error, match=said):
            api.job("x") if call == "job" else api.scale("x", "g", 1, "")


@pytest.mark.parametrize("call", ["job", "nodes"])
def test_no_nomad_is_told_with_its_address(call: str) -> None:
    api = NomadApi(NomadAccess("http://127.0.0.1:9"))
    with pytest.raises(Unavailable, match=r"Nomad does not answer at http://127.0.0.1:9"):
        api.job("x") if call == "job" else api.nodes()
    api.close()


def recorded_stream() -> list[tuple[int, list[dict[str, Any]]]]:
    """The recorded events, of a job whose group is one of ours."""
    lines = cassette("event_stream")["response"]["body_ndjson"]
    ours = json.loads(json.dumps(lines).replace('"TaskGroup": "g"', '"TaskGroup": "layers-0-15"'))
    for line in ours:
        for event in line.get("Events") or ():
            deployment = event["Payload"].get("Deployment")
            if deployment:
                deployment["TaskGroups"] = {"layers-0-15": deployment["TaskGroups"]["g"]}
    return [(int(line.get("Index") or 0), line.get("Events") or []) for line in ours]


def test_clients_are_kept_from_the_recorded_stream() -> None:
    view = NomadView()
    seen = {}
    for index, events in recorded_stream():
        assert view.apply(index, events)
        seen[view.index] = view.facts()
    assert seen[42].avoid == {"drone-2": "Nomad calls it ineligible"}
    assert not any(facts.avoid for index, facts in seen.items() if index != 42), "down is no reason"
    assert seen[24].down >= {"drone-2"}
    assert "drone-2" not in seen[30].down
    assert not view.apply(7, ()), "an index that went backwards asks for a new list"
    assert view.apply(0, ()), "a heartbeat says nothing"


def test_allocations_are_kept_from_the_recorded_stream() -> None:
    view = NomadView()
    seen = {}
    for index, events in recorded_stream():
        view.apply(index, events)
        seen[index] = [(a.client, a.wanted, a.status) for a in view.facts().allocations]
    assert seen[20] == [("drone-2", True, "pending")]
    assert seen[23] == [("drone-2", True, "running")]
    # Its client is down: Nomad wants another, and cannot know whether the task of the first goes on.
    assert seen[26] == [("drone-1", True, "pending"), ("drone-2", False, "lost")]
    assert seen[36] == [("drone-1", False, "running")], "the client came back and had ended its task"
    assert seen[37] == [], "the job was stopped"
    assert view.facts().allocations[0].said == "alloc is lost since its node is down"


def test_what_is_repeated_after_a_list_changes_nothing() -> None:
    events = recorded_stream()
    through, listed = NomadView(), NomadView()
    for index, batch in events:
        through.apply(index, batch)
    last = [a for _, batch in events for e in batch if (a := e["Payload"].get("Allocation"))]
    listed.replace(20, (), list({a["ID"]: a for a in last}.values()))
    wanted = [(a.id, a.status) for a in through.facts().allocations]
    for index, batch in events:
        if index > 20:
            listed.apply(index, batch)
            now = {a.id: a.status for a in listed.facts().allocations}
            assert all(now[i] == status for i, status in wanted), f"older news of index {index} came through"


def test_other_jobs_are_none_of_ours() -> None:
    view = NomadView()
    view.replace(163, (), recorded("allocations_list"), recorded("deployments_list"))
    assert view.facts().allocations == ()
    assert view.facts().rollouts == ()


def of_ours(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment | {"TaskGroups": {"layers-0-15": deployment["TaskGroups"]["stage"]}}


def test_the_latest_rollout_of_a_job_is_kept() -> None:
    view = NomadView()
    view.replace(85, (), (), [of_ours(d) for d in recorded("job_deployments_after_revert")])
    (rollout,) = view.facts().rollouts
    assert (rollout.version, rollout.status) == (4, "running"), "Nomad reverted version 3 by a fourth"
    canary = of_ours(recorded("job_deployment_canary"))
    view.replace(46, (), (), [canary])
    (rollout,) = view.facts().rollouts
    assert (rollout.healthy, rollout.total, rollout.canaries) == (1, 3, 1)
    promoted = json.loads(json.dumps(canary))
    promoted["TaskGroups"]["layers-0-15"]["Promoted"] = True
    promoted["ModifyIndex"] += 1
    view.apply(47, [{"Topic": "Deployment", "Type": "PlanResult", "Payload": {"Deployment": promoted}}])
    assert view.facts().rollouts[0].canaries == 0


def test_a_draining_client_is_avoided_until_its_deadline() -> None:
    view = NomadView()
    view.replace(120, [*recorded("nodes_list_one_down"), recorded("node_read_draining")])
    assert view.facts().avoid == {"drone-2": "Nomad drains it, until 2026-11-21T04:43:23"}
    view.replace(22, recorded("nodes_list_fleet"))
    assert view.facts().avoid == {}


@pytest.mark.parametrize("stream", [True, False])
def test_the_follower_lists_and_then_listens(stream: bool) -> None:
    with replay("nodes_list_fleet", "allocations_list") as book:
        canary = of_ours(recorded("job_deployment_canary"))
        book.say("GET", "/v1/deployments", 200, json.dumps([canary]), "application/json")
        node = recorded("node_read_draining")
        event = {"Topic": "Node", "Type": "NodeDrain", "Payload": {"Node": node}}
        if stream:
            book.say("GET", "/v1/event/stream", 200, json.dumps({"Index": 126, "Events": [event]}) + "\n")
        follower = NomadFollower(NomadAccess(book.url))
        follower.follow(True)
        try:
            if not stream:
                until(
                    lambda: any("wait" in a.query for a in book.asked),
                    10,
                    "without a stream it asks and waits",
                )
                listed = json.dumps([node])
                book.say("GET", "/v1/nodes", 200, listed, "application/json")
            until(lambda: "drone-2" in follower.facts().avoid, 10)
            assert [r.canaries for r in follower.facts().rollouts] == [1]
        finally:
            follower.follow(False)
        assert follower.facts() == NomadFacts()
        if stream:
            (asked,) = [a for a in book.asked if a.path == "/v1/event/stream"][:1]
            assert asked.query["index"] == ["23"], "from the list's index on"
            assert asked.query["topic"] == cassette("event_stream")["request"]["query"]["topic"]


def test_clients_are_followed_without_a_right_to_jobs() -> None:
    with replay() as book:
        book.say("GET", "/v1/nodes", 200, json.dumps([recorded("node_read_draining")]), "application/json")
        book.say("GET", "/v1/allocations", 403, "Permission denied")
        book.say("GET", "/v1/event/stream", 403, "Permission denied")
        follower = NomadFollower(NomadAccess(book.url))
        follower.follow(True)
        try:
            until(lambda: "drone-2" in follower.facts().avoid, 10)
            until(lambda: any("wait" in a.query for a in book.asked), 10)
            assert "drone-2" in follower.facts().avoid
        finally:
            follower.follow(False)


def test_an_old_nomad_is_refused() -> None:
    with nomad("agent_self") as (api, book):
        status, headers, body = book.answers["GET", "/v1/agent/self"]
        book.answers["GET", "/v1/agent/self"] = (status, headers, body.replace(b"1.1.2", b"1.0.4"))
        with pytest.raises(InputError, match=r"is Nomad 1.0.4; 1.1 or newer is needed"):
            api.check_version()


def test_access_is_read_as_the_nomad_command_reads_it() -> None:
    assert nomad_access({}).url == "http://127.0.0.1:4646"
    told = {
        "NOMAD_ADDR": "https://n:4646/",
        "NOMAD_TOKEN": "t",
        "NOMAD_CACERT": "ca.pem",
        "NOMAD_NAMESPACE": "e",
    }
    assert nomad_access(told) == NomadAccess("https://n:4646", "t", "e", "", "ca.pem")
    with pytest.raises(InputError, match=r"Nomad's address is 'n:4646'"):
        nomad_access({"NOMAD_ADDR": "n:4646"})
    with pytest.raises(InputError, match="go together"):
        nomad_access({"NOMAD_CLIENT_CERT": "c.pem"})
