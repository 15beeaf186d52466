"""Disks that are full, damaged, read-only or somebody else's: said in one line, and nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from tests.agents import AgentProcess, agent, until
from tests.conftest import MODEL


def refused(data_dir: Path) -> str:
    """What an agent says that does not start on this folder."""
    command = [sys.executable, "-m", "mesh", "agent", "--data-dir", str(data_dir), "--port=0", "--api-port=0"]
    done = subprocess.run(
        [*command, "--mdns=off"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("")
    said = refused(path)
    assert str(path) in said
    assert "--data-dir" in said


def test_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "data", "ro,size=1m") as path:
        said = refused(path)
    assert "Read-only file system" in said
    assert "--data-dir" in said


def test_a_folder_that_another_agent_uses(tmp_path: Path) -> None:
    with agent(tmp_path / "one"):
        assert "in use by another agent" in refused(tmp_path / "one")


def test_a_damaged_database(tmp_path: Path) -> None:
    with agent(tmp_path / "one"):
        pass
    (tmp_path / "one" / "tokens" / "CURRENT").write_text("rubbish")
    said = refused(tmp_path / "one")
    assert "cannot be opened" in said
    assert "move it away" in said


def asked(one: AgentProcess) -> dict[str, Any]:
    body = json.dumps({"model": MODEL, "prompt": "The sea", "max_tokens": 20, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://{one.api}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
    return found


def fill(folder: Path) -> Path:
    """Take all the room there is."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return path


def test_a_full_disk_refuses_answers_and_says_so_until_there_is_room(
    store: ModelStore, tmp_path: Path
) -> None:
    make_shard(store, MODEL, 0, 30, "int8")
    home = str(store.root.parent)
    settings = {"home": home, "shards": f"{MODEL}:0-30/int8", "slots": "4", "context": "256"}
    with mounted(tmp_path / "disk", "size=24m") as disk, agent(disk / "data", **settings) as one:  # type: ignore[arg-type]
        until(lambda: "choices" in asked(one), 40, "no first answer")
        ballast = fill(disk)
        until(
            lambda: "token log" in asked(one).get("error", {}).get("message", ""), 60, "the disk never fills"
        )
        ballast.unlink()
        until(lambda: "choices" in asked(one), 40, "no answer although there is room again")


@pytest.mark.parametrize(
    "command",
    ["ask --nodes 2 hi", "up --api-port 0", "model pull smollm2-135m", "model shard smollm2-135m", "agent"],
)
def test_a_home_that_is_no_folder_is_named(tmp_path: Path, command: str) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    done = subprocess.run(
        [sys.executable, "-m", "mesh", *command.split()],
        env=os.environ | {"MESH_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert str(home) in said
    assert "MESH_HOME" in said or "mesh model pull" in said
