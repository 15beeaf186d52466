"""Weights as a runtime lays them out for this processor, kept for a shard's next load: files of this process alone, which are made
anew from the shard when they are not there, or not what they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

_KEPT = 8
"""Shards whose packed weights are kept: a node that is given others again and again must not fill its disk with those it had."""
_RECORD = ".json"


def record_path(cache: str, digest: str) -> Path | None:
    """Where it is kept what the shard with this digest proved; ``None`` where there is no cache."""
    return Path(cache) / f"{digest[:16]}{_RECORD}" if cache else None


def packed_path(cache: str, digest: str, kind: str) -> Path:
    """Where a shard's packed weights are kept, a file or a folder; ``kind`` says whose they are."""
    return Path(cache) / f"{digest[:16]}.{kind}"


def packed_files(cache: str, digest: str) -> list[Path]:
    """All files of a shard's packed weights."""
    found = [file for path in _of(cache, digest) for file in (path, *path.rglob("*"))]
    return sorted(file for file in found if file.is_file())


def forget(cache: str, digest: str) -> None:
    """Remove a shard's packed weights."""
    _remove(_of(cache, digest))


@contextlib.contextmanager
def made_anew(target: Path) -> Iterator[Path]:
    """Where to make a file or a folder of packed weights, which takes its place whole, or not at all. What a process that died in
    between leaves there is not what was kept, and goes with the next load of that shard."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _make_room(target.parent)
    fresh = target.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        yield fresh
        if fresh.exists():
            fresh.rename(target)
    finally:
        _remove([fresh])


def _make_room(cache: Path) -> None:
    """For packed weights of one more shard: the oldest go. Whoever has them mapped keeps them."""
    ages = {}
    for path in cache.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # another load may have renamed it
            ages[path] = path.stat().st_mtime
    _remove(sorted((path for path in ages if path.suffix != _RECORD), key=ages.__getitem__)[: 1 - _KEPT])


def _of(cache: str, digest: str) -> list[Path]:
    found = Path(cache).glob(f"{digest[:16]}.*") if cache else ()
    return [path for path in found if path.suffix != _RECORD]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
