"""The fleet to try job files on: a real Consul, and a stand-in for the nomad binary that only notes how it was started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hcl2
import pytest

from tests.consul_server import consul_binary

pytestmark = pytest.mark.waits

UP = Path(__file__).parents[2] / "jobs" / "local-fleet" / "up.sh"
NOMAD = """#!/usr/bin/env bash
case "$1 $2" in
"node status") for i in 1 2 3 4; do echo "id-$i dc1 client-$i class false eligible ready"; done ;;
agent*) echo "${2#-config=}" >> "$STARTED"; trap 'exit 0' TERM; while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    """A folder for the PATH."""
    binary = consul_binary()
    if binary is None:
        pytest.skip("no consul binary")
    for port in (8300, 8301, 8500):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} is taken: a Consul runs here already")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "consul").symlink_to(binary)
    (folder / "nomad").write_text(NOMAD)
    (folder / "nomad").chmod(0o755)
    return folder


class Fleet:
    def __init__(self, binaries: Path, folder: Path) -> None:
        self.folder, self.started = folder, folder.parent / "started"
        environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "STARTED": str(self.started),
        }
        self.process = subprocess.Popen(
            [UP, folder], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def fleet(binaries: Path, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(binaries, tmp_path / "fleet")
    yield made
    if made.process.poll() is None:
        os.killpg(made.process.pid, signal.SIGKILL)
    made.process.communicate(timeout=10)
    left_over(made.process.pid)


def alive(group: int) -> list[str]:
    """Commands of the processes in a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,args="], capture_output=True, text=True, check=True)
    lines = [line for line in listed.stdout.splitlines() if "<defunct>" not in line]
    return [line for line in lines if line.split()[0] == str(group)]


def left_over(group: int) -> list[str]:
    """What is still there after a moment."""
    until = time.monotonic() + 3
    while alive(group) and time.monotonic() < until:
        time.sleep(0.1)
    return alive(group)


@pytest.mark.timeout(120)
def test_the_fleet_comes_up_whole_and_goes_whole(fleet: Fleet, binaries: Path) -> None:
    assert fleet.line().startswith("the fleet is up: Consul at http://127.0.0.1:8500")
    members = subprocess.run([binaries / "consul", "members"], capture_output=True, text=True, check=True)
    names = {"drone-1", "drone-2", "gateway-1", "gateway-2"}
    assert {line.split()[0] for line in members.stdout.splitlines()[1:] if " alive " in line} >= names | {
        "server"
    }
    configs = [Path(line) for line in fleet.started.read_text().splitlines()]
    assert {path.stem for path in configs} == names | {"server"}
    ranges = []
    for path in configs:
        text = path.read_text()
        assert not re.search(r"\b(FOLDER|NAME|CLASS|HOST|PORTS)\b", re.sub("#.*", "", text))
        config = hcl2.loads(text)
        if path.stem != "server":
            (client,) = config["client"]
            ranges.append(client["reserved"][0]["reserved_ports"].strip('"'))
    assert sorted(ranges) == [
        "20000-21999,24000-32000",
        "20000-23999,26000-32000",
        "20000-25999,28000-32000",
        "22000-32000",
    ]
    os.kill(fleet.process.pid, signal.SIGINT)
    assert fleet.process.wait(timeout=30) == 130
    assert left_over(fleet.process.pid) == []


@pytest.mark.timeout(120)
def test_a_fleet_with_a_part_missing_says_so_and_ends(fleet: Fleet) -> None:
    assert fleet.line().startswith("the fleet is up")
    found = subprocess.run(
        ["pgrep", "-g", str(fleet.process.pid), "-f", "gateway-2.hcl"],
        capture_output=True,
        text=True,
        check=True,
    )
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    assert fleet.process.wait(timeout=30) == 1
    assert left_over(fleet.process.pid) == []


def test_without_the_binaries_it_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    done = subprocess.run(
        ["/bin/bash", UP],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    assert done.returncode == 2
    assert "consul is not on the PATH" in done.stderr
