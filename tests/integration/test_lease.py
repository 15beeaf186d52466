"""``mesh lease``: a shard is loaded for as long as the process runs, whatever happens to the agent."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node_agent.adapters.model_store import ModelStore
from tests.agents import AgentProcess, start_agent, until
from tests.conftest import MODEL


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def lease(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mesh", "lease", *arguments, "--cluster=test"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def leased(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = lease(*arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


def replicas(agent: AgentProcess) -> list[dict[str, Any]]:
    (own,) = [n for n in agent.report()["nodes"] if n["id"] == agent.node]
    found: list[dict[str, Any]] = own["replicas"]
    return found


@pytest.fixture
def settings(store: ModelStore) -> dict[str, str]:
    return {
        "home": str(store.root.parent),
        "port": str(free_port()),
        "api_port": str(free_port()),
        "memory": "2000",
    }


@pytest.fixture
def agent(tmp_path: Path, settings: dict[str, str]) -> Iterator[AgentProcess]:
    running = start_agent(tmp_path / "node", (), None, **settings)
    yield running
    running.end()


def test_a_shard_is_loaded_from_the_first_lease_to_the_end_of_the_last(agent: AgentProcess) -> None:
    port = free_port()
    shard, where = f"{MODEL}:0-2", f"--agent={agent.address}"
    with leased(shard, where, f"--health=127.0.0.1:{port}") as first, leased(shard, where) as second:
        until(lambda: listens(port), 30, "it serves")
        until(
            lambda: [(r["state"], r["leases"]) for r in replicas(agent)] == [("serving", 2)],
            10,
            "both hold it",
        )
        first.terminate()
        told, _ = first.communicate(timeout=10)
        assert first.returncode == 0
        assert f"{shard} serves, after" in told
        assert told.splitlines()[-1] == f"let go of {shard}"
        assert not listens(port)
        assert len(replicas(agent)) == 1, "the second lease holds it"
        second.kill()
        until(lambda: not replicas(agent), 10, "the last lease is gone, killed or not")


def test_an_agent_that_is_killed_gets_its_shard_again(
    agent: AgentProcess, tmp_path: Path, settings: dict[str, str]
) -> None:
    port = free_port()
    with leased(f"{MODEL}:0-2", f"--agent={agent.address}", f"--health=127.0.0.1:{port}"):
        until(lambda: listens(port), 30, "it serves")
        agent.process.kill()
        until(lambda: not listens(port), 5, "no agent, no health")
        agent.end()
        again = start_agent(tmp_path / "node", (), None, **settings)
        try:
            until(lambda: listens(port), 30, "it serves again")
            assert [r["state"] for r in replicas(again)] == ["serving"]
        finally:
            again.end()


def test_no_agent_for_too_long_is_an_error(agent: AgentProcess) -> None:
    agent.end()
    with leased(f"{MODEL}:0-2", f"--agent={agent.address}", "--patience=1") as process:
        _, said = process.communicate(timeout=20)
        assert process.returncode == 2
        assert f"no agent at {agent.address} for 1 s" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smollm2-135m@000000000000:0-2"], "pull that version onto this node"),
        (["no-such-model:0-2"], "no-such-model"),
        ([f"{MODEL}:0-2", "--sessions=900", "--context=2048"], "MiB are free"),
        ([f"{MODEL}:0-99"], "99"),
        (["--sessions=2", f"{MODEL}:0-2"], "--sessions and --context go together"),
        ([f"{MODEL}:5-2"], "is no shard"),
        ([f"{MODEL}"], "is no shard"),
        ([f"{MODEL}@abc:0-2"], "odd number"),
        ([f"{MODEL}:0-2", "--health=x"], "--health is 'x'"),
        ([f"{MODEL}:0-2", "--patience=-1"], "--patience is -1"),
    ],
)
def test_what_cannot_be_held_says_why(agent: AgentProcess, arguments: list[str], said: str) -> None:
    with leased(*arguments, f"--agent={agent.address}") as process:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert said in errors
