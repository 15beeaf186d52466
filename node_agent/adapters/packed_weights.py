"""Weights as a runtime lays them out for this processor, kept for a shard's next load: files of this process alone, which are made
anew from the shard when they are not there, or not what they were.

A step reads all of them, and the larger the pages that they lie in, the faster: at ``int4`` a step takes 5 to 7 % less in large
pages than in those that come of a runtime's many small writes. So they are written at once, and read at once.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_LARGE = 2 << 20
"""Bytes of a large page, of most processors; a smaller file gains nothing."""
_MADV_POPULATE_READ = 22
"""Linux 5.14 and later; not in the module."""
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
    return _files(_of(cache, digest))


def read_at_once(files: list[Path]) -> None:
    """Have files in memory, in large pages where they come from the disk. Whoever maps them next takes those."""
    for path in files:
        # The kernel may be too old, or the file be gone or empty: then it is read piece by piece, by who maps it.
        with (
            contextlib.suppress(OSError, ValueError),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as whole,
        ):
            whole.madvise(mmap.MADV_HUGEPAGE)
            whole.madvise(_MADV_POPULATE_READ)


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
            for file in _files([fresh]):
                _write_at_once(file)
            fresh.rename(target)
    finally:
        _remove([fresh])


def _write_at_once(file: Path) -> None:
    """Write a file over again, for the kernel to keep it in large pages."""
    if file.stat().st_size < _LARGE:
        return
    again = file.with_name(f"{file.name}.again")
    try:
        with (
            file.open("rb") as old,
            again.open("xb", buffering=0) as new,
            mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as whole,
        ):
            # What is not mapped yet when it is copied comes to the new file a small page at a time.
            mapped.madvise(_MADV_POPULATE_READ)
            written = 0
            while written < len(whole):
                written += new.write(whole[written:])
        again.rename(file)
    except OSError as error:  # a full disk, for one
        log.info("%s stays in small pages, and steps take a little longer: %s", file, error)
        again.unlink(missing_ok=True)


def _files(paths: list[Path]) -> list[Path]:
    """Files among them, and in those that are folders."""
    found = [file for path in paths for file in (path, *path.rglob("*"))]
    return sorted(file for file in found if file.is_file())


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
