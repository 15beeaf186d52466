"""Reading the small files of /proc and /sys, which may be missing, empty or refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def text(path: Path) -> str | None:
    """The stripped text of a small file, ``None`` where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The integer in a small file, ``None`` where there is none (``max`` included)."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def cgroups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version (2 or 1) and folder of the cgroups that bound this process, innermost first.

    A process in a container sees its own cgroup as the top; elsewhere every cgroup on the way up
    counts.
    """
    top = root / "sys/fs/cgroup"
    paths = {2: "/", 1: "/"}
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        number_, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number_ == "0":
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    for version, base in ((2, top), (2, top / "unified"), (1, top / controller)):
        inner = Path(paths[version].lstrip("/"))
        for folder in (inner, *inner.parents):
            if (base / folder).is_dir():
                yield version, base / folder
