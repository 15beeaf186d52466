"""Folders that go away with their makers, or with the next one where those were killed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node_agent.adapters.temporary_folder import temporary_folder

MAKER = """
import sys, time
from pathlib import Path
from node_agent.adapters.temporary_folder import temporary_folder
with temporary_folder(Path(sys.argv[1]), "mesh") as folder:
    (folder / "data").write_text("much")
    print(folder, flush=True)
    time.sleep(60)
"""


def make(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", MAKER, str(parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        return process, Path(output.readline().strip())


def grow_old(folder: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(folder, (hour_ago, hour_ago))


def test_it_goes_with_its_maker(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), temporary_folder(tmp_path / "run", "mesh") as folder:
        (folder / "data").write_text("much")
        raise RuntimeError
    assert [*(tmp_path / "run").iterdir()] == []


def test_of_a_killed_maker_it_goes_with_the_next(tmp_path: Path) -> None:
    process, folder = make(tmp_path)
    other = tmp_path / "up-8080"
    other.mkdir()
    grow_old(folder)
    grow_old(other)
    with temporary_folder(tmp_path, "mesh"):
        assert (folder / "data").exists()  # its maker lives
    process.kill()
    process.wait()
    with temporary_folder(tmp_path, "mesh") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])


def test_what_was_just_made_is_not_even_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker would find it locked, go on without a lock, and lose its data to the next."""
    young = tmp_path / "mesh-1-abcdef"
    young.mkdir()
    locked: list[int] = []
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, _: locked.append(os.fstat(descriptor).st_ino))
    with temporary_folder(tmp_path, "mesh") as mine:
        assert locked == [mine.stat().st_ino]


def test_what_was_just_made_stays(tmp_path: Path) -> None:
    young = tmp_path / "mesh-1-abcdef"
    young.mkdir()
    with temporary_folder(tmp_path, "mesh"):
        assert young.exists()
    grow_old(young)
    with temporary_folder(tmp_path, "mesh"):
        assert not young.exists()
