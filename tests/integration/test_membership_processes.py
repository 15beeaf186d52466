"""Real agents: frozen, killed, copied, alone, fed garbage, and what they say of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.agents import AgentProcess, agent, start_agent, until

pytestmark = pytest.mark.waits


def met(*agents: AgentProcess) -> bool:
    everybody = {a.node for a in agents}
    return all(
        {n for n, state in a.states().items() if state == "alive"} == everybody - {a.node} for a in agents
    )


def mesh(*words: str, api: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MESH_", "CONSUL_"))}
    return subprocess.run(
        [sys.executable, "-m", "mesh", *words],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        env={**environment, "MESH_API": f"http://{api}"},
    )


def test_frozen_killed_and_left(tmp_path: Path) -> None:
    with agent(tmp_path / "a") as one:
        with (
            agent(tmp_path / "b", peers=one.address) as two,
            agent(tmp_path / "c", peers=one.address, labels="rack=7,kind=drone") as three,
        ):
            until(lambda: met(one, two, three))
            two.sends(signal.SIGSTOP)
            assert until(lambda: one.states()[two.node] != "alive") < 2.5
            assert "no answer" in _node(one, two.node)["reason"]
            two.sends(signal.SIGCONT)
            assert until(lambda: met(one, two, three)) < 2
            table = mesh("nodes", api=one.api)
            assert table.returncode == 0
            assert two.node in table.stdout
            assert "kind=drone" in table.stdout
            assert "RTT p50 ms" in table.stdout
            whole = json.loads(mesh("nodes", "--json", api=one.api).stdout)
            assert {n["id"] for n in whole["nodes"]} == {one.node, two.node, three.node}
            until(lambda: _node(one, three.node)["link"] is not None)
            link = _node(one, three.node)["link"]
            assert 0 < link["rtt_ms_p50"] <= link["rtt_ms_p99"] < 1000
            three.sends(signal.SIGKILL)
            assert until(lambda: one.states()[three.node] != "alive") < 2
        assert until(lambda: one.states()[two.node] == "left") < 1


def _node(observer: AgentProcess, node: str) -> dict[str, Any]:
    found: dict[str, Any] = next(n for n in observer.report()["nodes"] if n["id"] == node)
    return found


def test_a_copied_data_directory_is_told_apart(tmp_path: Path) -> None:
    with agent(tmp_path / "a") as one, agent(tmp_path / "b", peers=one.address) as two:
        until(lambda: met(one, two))
        (tmp_path / "copy").mkdir()
        for name in ("node-id", "node-key.pem", "node-key.pub"):
            shutil.copy(tmp_path / "b" / name, tmp_path / "copy" / name)
        with agent(tmp_path / "copy", peers=one.address) as copy:
            assert copy.node == two.node
            until(lambda: f"older agent at {two.address}" in _node(copy, copy.node)["reason"])
            until(lambda: "same node id" in str(_node(one, two.node)["reason"]))
            assert _node(one, two.node)["address"] == two.address
            assert _node(one, two.node)["state"] == "alive"
            assert "give each agent a data directory" in copy.log.read_text().lower()


def test_an_agent_alone_says_what_it_waits_for(tmp_path: Path) -> None:
    with agent(tmp_path / "a", peers="127.0.0.1:9") as one:
        until(lambda: bool(one.report()["unanswered"]))
        report = one.report()
        assert report["waiting_for"] == "no other agent yet (static: 1 addresses in the settings)"
        assert report["unanswered"][0]["address"] == "127.0.0.1:9"
        until(lambda: "waiting for peers" in one.log.read_text())
        assert "listed, but nobody answers there" in mesh("nodes", api=one.api).stdout


def test_garbage_on_the_socket_harms_nobody(tmp_path: Path) -> None:
    with agent(tmp_path / "a") as one, agent(tmp_path / "b", peers=one.address) as two:
        until(lambda: met(one, two))
        host, port = one.address.split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for i in range(2000):
                sock.sendto(os.urandom(i % 1400), (host, int(port)))
        time.sleep(0.5)
        assert met(one, two)
        assert "garbage from 127.0.0.1" in one.log.read_text()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
        with pytest.raises(AssertionError, match=f"UDP port {port} on 127.0.0.1 is taken"):
            start_agent(tmp_path / "a", port=port)


@pytest.mark.parametrize("host", ["203.0.113.9", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_named(tmp_path: Path, host: str) -> None:
    with pytest.raises(AssertionError, match=f"{host} is no address of this machine"):
        start_agent(tmp_path / "a", host=host)


def test_agents_at_a_name_find_each_other(tmp_path: Path) -> None:
    cluster = f"named-{os.getpid()}"
    with (
        agent(tmp_path / "a", host="localhost", mdns="on", cluster=cluster) as one,
        agent(tmp_path / "b", host="localhost", mdns="on", cluster=cluster) as two,
    ):
        assert one.address.startswith("localhost:")
        until(lambda: met(one, two), 15)


def test_doctor_says_what_to_do(tmp_path: Path) -> None:
    folders = (f"--data-dir={tmp_path / 'd'}", f"--home={tmp_path / 'h'}")
    with agent(tmp_path / "a") as one:
        well = mesh(
            "doctor",
            *folders,
            "--port=0",
            "--api-port=0",
            "--mdns=off",
            "--cluster=test",
            f"--peers={one.address}",
        )
        assert well.returncode == 0, well.stdout + well.stderr
        assert f"{one.node} answers at {one.address}" in well.stdout
        port = one.address.split(":")[1]
        ill = mesh(
            "doctor",
            *folders,
            f"--port={port}",
            "--api-port=0",
            "--mdns=off",
            "--cluster=other",
            "--consul=http://127.0.0.1:9",
            f"--peers=127.0.0.1:9,{one.address}",
            "--providers=NoSuchProvider",
            "--json",
        )
    assert ill.returncode == 1
    findings = json.loads(ill.stdout)
    bad = {f["check"]: f for f in findings if f["verdict"] == "bad"}
    assert bad.keys() == {"peer port", "Consul", "other agents", "runtimes"}
    assert all(f["advice"] for f in bad.values())
    assert "http://127.0.0.1:9" in bad["Consul"]["found"]
    said = [f["found"] for f in findings if f["check"] == "other agents"]
    assert any("this is cluster 'test'" in text for text in said)


def _cpu_cgroup() -> Path | None:
    """A new cgroup of version 1 whose quota we may set."""
    folder = Path(f"/sys/fs/cgroup/cpu/mesh-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "cpu.cfs_period_us").write_text("100000")
    except OSError:
        return None
    return folder


def test_a_changed_cgroup_is_told_within_seconds(tmp_path: Path) -> None:
    cgroup = _cpu_cgroup()
    if cgroup is None:
        pytest.skip("no cgroup v1 of the cpu controller that we may change")
    try:
        with agent(tmp_path / "a") as one, agent(tmp_path / "b", peers=one.address) as two:
            until(lambda: met(one, two))
            until(lambda: "capabilities" in _node(one, two.node))
            (cgroup / "cgroup.procs").write_text(str(two.process.pid))
            (cgroup / "cpu.cfs_quota_us").write_text("50000")

            def quota() -> float:
                cpu: dict[str, float] = _node(one, two.node)["capabilities"]["cpu"]
                return cpu["quota"]

            assert until(lambda: quota() == 0.5) < 5
            (cgroup / "cpu.cfs_quota_us").write_text("-1")
            assert until(lambda: quota() > 0.5) < 5
    finally:
        for _ in range(50):
            try:
                cgroup.rmdir()
                break
            except OSError:
                time.sleep(0.1)
