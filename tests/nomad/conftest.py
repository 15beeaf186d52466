"""The local fleet with an agent on every client; skipped by name where there is no nomad."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.nomad_api import NomadAccess, NomadApi
from tests.consul_server import consul_binary

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
NOMAD = "http://127.0.0.1:4646"
HOSTS = {
    "drone-1": "127.0.0.11",
    "drone-2": "127.0.0.12",
    "gateway-1": "127.0.0.13",
    "gateway-2": "127.0.0.14",
}
MESH = Path(sys.executable).with_name("mesh")
DEPLOY = ("--agent", "${meta.mesh_host}:7070", "--mesh-command", str(MESH))
"""What several clients on one machine need beside the README's words."""


@dataclass
class Fleet:
    """``environment`` is what an operator's terminal would have."""

    folder: Path
    process: subprocess.Popen[str]
    environment: dict[str, str]
    nomad: NomadApi = field(default_factory=lambda: NomadApi(NomadAccess(NOMAD)))

    @property
    def api(self) -> str:
        """Of the first client's agent."""
        return f"http://{HOSTS['drone-1']}:8080"

    def run(self, *words: str, timeout_s: float = 180) -> str:
        """A command that must succeed."""
        done = subprocess.run(
            words,
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def mesh(self, *words: str) -> str:
        return self.run(str(MESH), *words)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = ApiClient(self.api).get("/mesh/v1/nodes")
        return found

    def serving(self, quantization: str = "int8") -> int:
        """Replicas that serve, over all nodes that are alive."""
        nodes = [n for n in self.report()["nodes"] if n["state"] == "alive"]
        replicas = [r for n in nodes for r in n["replicas"]]
        return sum(r["state"] == "serving" and r["quantization"] == quantization for r in replicas)

    def until(self, true: Callable[[], bool], timeout_s: float, what: str) -> float:
        """Seconds that it took."""
        begin = time.monotonic()
        while not true():
            assert time.monotonic() < begin + timeout_s, f"not within {timeout_s:g} s: {what}"
            assert self.process.poll() is None, "the fleet ended"
            time.sleep(0.2)
        return time.monotonic() - begin

    def deploy(self, *more: str) -> str:
        return self.mesh("model", "deploy", MODEL, "--nomad", *more, *DEPLOY)


def timed(what: str, seconds: float) -> None:
    """For people: ``make test-nomad`` shows what tests print."""
    sys.stdout.write(f"\n{what:60} {seconds:6.1f} s\n")


@pytest.fixture(scope="session")
def fleet(store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    consul = consul_binary()
    if shutil.which("nomad") is None or consul is None:
        pytest.skip("no nomad on the PATH" if shutil.which("nomad") is None else "no consul binary")
    folder = tmp_path_factory.mktemp("fleet")
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "consul").symlink_to(consul)
    for name in HOSTS:
        home = folder / "mesh" / name
        home.mkdir(parents=True)
        (home / "models").symlink_to(store.root)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{MESH.parent}:{os.environ['PATH']}",
        "NOMAD_ADDR": NOMAD,
        "NOMAD_VAR_command": str(MESH),
        "NOMAD_VAR_host": "${meta.mesh_host}",
        "NOMAD_VAR_api_host": "${meta.mesh_host}",
        "NOMAD_VAR_consul": "http://${meta.mesh_host}:8500",
        "NOMAD_VAR_data_dir": f"{folder}/mesh/${{node.unique.name}}",
        "MESH_API": f"http://{HOSTS['drone-1']}:8080",
    }
    up = ROOT / "jobs" / "local-fleet" / "up.sh"
    process = subprocess.Popen(
        [up, folder / "data"], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the fleet is up")
        yield Fleet(folder, process, environment)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
