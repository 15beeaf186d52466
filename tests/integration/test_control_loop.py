"""Deploying the real model on agent processes: plans, leases that outlive leaders, terms, policies, Consul."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from node_agent.adapters.model_store import ModelStore
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from tests.agents import AgentProcess, agent, start_agent, until
from tests.conftest import MODEL
from tests.consul_server import ConsulServer, consul_binary

pytestmark = pytest.mark.waits

SMALL = {"memory": "130", "threads": "1"}
"""MiB: three such nodes hold the model between them, two do not."""


@contextlib.contextmanager
def agents(folder: Path, store: ModelStore, count: int, **settings: str) -> Iterator[list[AgentProcess]]:
    """The first is the longest-lived."""
    with contextlib.ExitStack() as stack:
        started: list[AgentProcess] = []
        for i in range(count):
            peers = {"peers": started[0].address} if started else {}
            made = agent(
                folder / f"n{i}", (), None, home=str(store.root.parent), **{**SMALL, **peers, **settings}
            )
            started.append(stack.enter_context(made))
        until(
            lambda: all(len(a.states()) == count - 1 for a in started), 20, "they do not all know each other"
        )
        yield started


def command(api: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesh", *words],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "MESH_API": f"http://{api}"},
        check=False,
    )


def plan(one: AgentProcess) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{one.api}/mesh/v1/plan", timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def held(observer: AgentProcess) -> dict[str, list[str]]:
    """Serving shards by node, nodes that are alive only."""
    return {
        n["name"]: sorted(r["shard"] for r in n["replicas"] if r["state"] == "serving")
        for n in observer.report()["nodes"]
        if n["state"] == "alive"
    }


def answers(one: AgentProcess) -> bool:
    return command(one.api, "ask", "--json", "What is the capital of France?").returncode == 0


def test_deploy_kill_the_leader_and_go_on(store: ModelStore, tmp_path: Path) -> None:
    with agents(tmp_path, store, 4) as nodes:
        leader, *others = nodes
        ready = command(others[0].api, "model", "deploy", MODEL, "--sessions", "2", "--context", "1024")
        assert ready.returncode == 0, ready.stdout + ready.stderr
        assert "ms per token predicted (exact)" in ready.stdout
        assert ready.stdout.rstrip().endswith("everything serves")
        assert answers(others[1])
        before = plan(others[0])
        assert before["leader"] == leader.node
        # Whoever leads dies; what it placed elsewhere stays loaded, and another takes over in a later term.
        kept = {n: shards for n, shards in held(others[0]).items() if n != "n0"}
        leader.process.kill()
        until(lambda: plan(others[0])["leader"] == others[0].node, 15, "nobody took over")
        assert plan(others[0])["term"] > before["term"]
        now = held(others[0])
        assert all(set(shards) <= set(now[n]) for n, shards in kept.items()), (kept, now)
        until(lambda: answers(others[1]), 30, "no answer after the leader died")
        gone = command(others[1].api, "model", "undeploy", MODEL)
        assert gone.returncode == 0, gone.stdout + gone.stderr
        assert not any(held(others[0]).values())


def test_replicas_survive_a_loss_and_are_made_whole(store: ModelStore, tmp_path: Path) -> None:
    with agents(tmp_path, store, 3, memory="400") as nodes:
        done = command(nodes[0].api, "model", "deploy", MODEL, "--replicas", "2", "--sessions", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        copies = {n: s for n, s in held(nodes[0]).items() if s}
        assert len(copies) >= 2
        victim = next(a for a in nodes[1:] if a.log.parent.name in copies)
        rest = [a for a in nodes if a is not victim]
        victim.process.kill()
        assert answers(rest[0])
        until(
            lambda: len([s for s in held(rest[0]).values() if s]) == 2, 20, "the second copy was not replaced"
        )


def test_classes_of_requests_go_only_where_their_rules_allow(store: ModelStore, tmp_path: Path) -> None:
    with agents(tmp_path, store, 1, memory="400", labels="tier=cloud,zone=a") as (one,):
        policy = tmp_path / "mesh.toml"
        policy.write_text(
            f"""
            [models.{MODEL}]
            sessions = 2
            context = 512
            [classes.private]
            allow = ["tier=onboard"]
            [classes.cheap]
            deny = ["zone=b"]
            """
        )
        done = command(one.api, "apply", str(policy))
        assert done.returncode == 0, done.stdout + done.stderr

        def ask(class_name: str) -> tuple[int, str]:
            body = {"model": MODEL, "prompt": "The sea", "max_tokens": 3}
            request = urllib.request.Request(
                f"http://{one.api}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json", "X-Mesh-Class": class_name},
            )
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        assert ask("cheap")[0] == 200
        status, said = ask("private")
        assert status == 503
        assert "that the rules allow: the policy allows only tier=onboard" in said
        status, said = ask("nope")
        assert status == 400
        assert "the policy has these classes: cheap, private" in said
        route = command(one.api, "route", "--class", "cheap", "--explain")
        assert "predicted   TPOT" in route.stdout


def test_late_joiners_learn_the_policy_and_keep_it(store: ModelStore, tmp_path: Path) -> None:
    with agents(tmp_path, store, 1) as (first,):
        text = f"[models.{MODEL}]\nsessions = 1\ncontext = 64\nallow = ['tier=none']\n"
        put(first, text, None)
        with agent(
            tmp_path / "late", (), None, home=str(store.root.parent), peers=first.address, **SMALL
        ) as late:
            until(lambda: plan(late)["policy"] == text, 10, "it did not learn the policy")
            report = plan(late)
        (model,) = report["models"].values()
        assert not model["feasible"]
        assert "2 x the policy allows only tier=none" in model["reason"]
        again = start_agent(tmp_path / "late", (), None, home=str(store.root.parent), **SMALL)
        try:
            assert plan(again)["version"] == report["version"]
        finally:
            again.end()


def put(one: AgentProcess, text: str, version: Any) -> Any:
    request = urllib.request.Request(
        f"http://{one.api}/mesh/v1/policy",
        json.dumps({"policy": text, "name": "mesh.toml", "version": version}).encode(),
        {"Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_wrong_policies_are_refused_at_the_edge(store: ModelStore, tmp_path: Path) -> None:
    with agents(tmp_path, store, 1, memory="400") as (one,):

        def refused(text: str, version: Any = None) -> tuple[int, str]:
            with pytest.raises(urllib.error.HTTPError) as error:
                put(one, text, version)
            with error.value as answer:
                return answer.code, json.load(answer)["error"]["message"]

        assert refused("[models.x]\nreplicas = -1")[1].startswith("mesh.toml, line 2: replicas is -1")
        assert refused("[models.x]\n", [3, "n-nobody"])[0] == 409
        assert refused("[models.x]\n", "yes")[0] == 400
        assert put(one, "[models.x]\n", [0, ""])["version"][0] == 1
        file = tmp_path / "mesh.toml"
        file.write_text("[models.x]\nmax_tpot = 30\n")
        said = command(one.api, "plan", str(file))
        assert said.returncode == 2
        assert "line 2: max_tpot is 30; it must be a time with its unit" in said.stderr
        missing = command(one.api, "plan", str(tmp_path / "none.toml"))
        assert missing.returncode == 2
        assert "cannot be read" in missing.stderr
        unknown = command(one.api, "model", "deploy", "no-such-model")
        assert unknown.returncode == 1
        assert "the model 'no-such-model' is not here" in unknown.stdout
        assert "nothing was changed" in unknown.stderr
        vast = command(one.api, "model", "deploy", MODEL, "--sessions", "1000")
        assert vast.returncode == 1
        assert "what would do: " in vast.stdout


def test_terms_fence_and_leases_of_leaders_outlive_their_streams(store: ModelStore, tmp_path: Path) -> None:
    async def story(one: AgentProcess) -> None:
        async with grpc.aio.insecure_channel(one.address) as channel:
            stub = rpc.AgentStub(channel)

            def request(counter: int, leader: str, end: int = 2) -> pb.HoldShardRequest:
                return pb.HoldShardRequest(
                    cluster="test",
                    model=MODEL,
                    layer_start=0,
                    layer_end=end,
                    term=pb.Term(counter=counter, leader=leader),
                    sessions=1,
                    context=64,
                )

            async def serving(stream: Any) -> None:
                while (await stream.read()).state != pb.REPLICA_STATE_SERVING:
                    pass

            first = stub.HoldShard(request(5, "n-a"), timeout=30)
            await serving(first)
            first.cancel()
            await asyncio.sleep(0.3)
            assert held(one) == {"n0": [f"{MODEL}:0-2/onnx-int8"]}
            for older in (request(4, "n-z"), request(5, "n-A")):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.HoldShard(older, timeout=30).read()
                assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert "n-a leads in term 5" in str(error.value.details())
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.ReleaseShard(pb.ReleaseShardRequest(shard=older), timeout=10)
            # A later leader takes the lease over; the earlier one's stream ends and ends nothing else.
            mine = stub.HoldShard(request(5, "n-a"), timeout=30)
            await serving(mine)
            theirs = stub.HoldShard(request(6, "n-b"), timeout=30)
            await serving(theirs)
            async with asyncio.timeout(5):
                while await mine.read() is not grpc.aio.EOF:
                    pass
            assert held(one) == {"n0": [f"{MODEL}:0-2/onnx-int8"]}
            nonsense = request(0, "n-b")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.HoldShard(nonsense, timeout=10).read()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await stub.ReleaseShard(pb.ReleaseShardRequest(shard=request(6, "n-b")), timeout=10)
            await asyncio.sleep(0.5)
            assert held(one) == {"n0": []}

    with agents(tmp_path, store, 1, scheduler="off") as (one,):
        asyncio.run(story(one))


@pytest.mark.skipif(consul_binary() is None, reason="no Consul on the PATH, nor could it be fetched")
def test_consuls_lock_says_who_leads(store: ModelStore, tmp_path: Path) -> None:
    server = ConsulServer(tmp_path / "consul")
    server.start()
    try:
        server.wait_for_leader()
        with agents(tmp_path, store, 2, consul=server.url) as nodes:
            until(lambda: any(plan(n)["leader"] for n in nodes), 20, "nobody leads")
            leader = next(n for n in nodes if n.node == plan(nodes[0])["leader"])
            other = next(n for n in nodes if n is not leader)
            term = plan(other)["term"]
            leader.process.kill()
            until(lambda: plan(other)["leader"] == other.node, 40, "the lock did not pass on")
            assert plan(other)["term"] > term
            # Consul goes away: what serves goes on, and nobody leads until it is back.
            server.kill()
            assert other.report()["nodes"]
    finally:
        server.kill()
