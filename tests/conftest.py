"""Fixtures that many tests share; the real model and a mesh that serves it are made once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from node_agent.adapters.model_pull import pull_model
from node_agent.adapters.model_store import ModelStore
from node_agent.paths import default_home

settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A shell that runs us in the background has us ignore Ctrl-C, and the processes that tests start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL = "smollm2-135m"
START_TIMEOUT_S = 90


@pytest.fixture(scope="session")
def store() -> ModelStore:
    """The store of MESH_HOME with the real model in it (downloaded once)."""
    store = ModelStore(default_home())
    pull_model(store, MODEL)
    return store


@dataclass
class RunningMesh:
    """A ``mesh up`` process and where it answers."""

    process: subprocess.Popen[bytes]
    base: str
    log: Path

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


def start_mesh(log: Path, *flags: str) -> RunningMesh:
    """Run ``mesh up`` and wait for its endpoint; on ONNX Runtime unless told otherwise, for what is fastest here may be another."""
    named = "--runtime" in flags or "--quantization" in flags
    runtime = () if named else ("--runtime", "onnx")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mesh", "up", "--api-port", "0", *runtime, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"MESH_HOME": str(default_home())},
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        match = re.search(r"endpoint\s+(http://\S+)/v1", log.read_text(errors="replace"))
        if match:
            return RunningMesh(process, match[1], log)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the mesh did not start: {log.read_text(errors='replace')[-2000:]}")


Starter = Callable[..., RunningMesh]


@pytest.fixture
def starter(store: ModelStore, tmp_path: Path) -> Iterator[Starter]:
    """Starts meshes of a test's own; whatever still runs when the test ends is killed."""
    running: list[RunningMesh] = []

    def start(*flags: str) -> RunningMesh:
        running.append(start_mesh(tmp_path / f"up-{len(running)}.log", *flags))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.fixture(scope="session")
def mesh(store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Three agents serving the real model."""
    running = start_mesh(tmp_path_factory.mktemp("mesh") / "up.log", "--nodes", "3")
    yield running
    assert running.stop() == 0
