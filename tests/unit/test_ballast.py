"""Memory of killed agents that the chaos trials hold."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.agents import until
from tests.chaos import ballast
from tests.chaos.ballast import Ballast, anonymous_bytes

SIZE = 64 << 20


def test_memory_is_held_until_it_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballast, "REPORTING", tmp_path)
    held, before = Ballast(), anonymous_bytes(os.getpid())
    held.hold(SIZE)
    until(lambda: anonymous_bytes(os.getpid()) >= before + SIZE * 0.9, 5)
    held.free()
    assert anonymous_bytes(os.getpid()) < before + SIZE * 0.1


def test_nothing_is_held_where_the_kernel_gives_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballast, "REPORTING", tmp_path / "none")
    held = Ballast()
    held.hold(SIZE)
    assert not [t for t in threading.enumerate() if t.name == "ballast"]
    held.free()
