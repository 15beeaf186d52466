"""Reading the small files of /proc and /sys, which may be missing, empty or refuse."""

from __future__ import annotations

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
