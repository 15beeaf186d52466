"""A folder that goes away with whoever made it, at the latest when the next one is made: nobody who is killed cleans up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from node_agent.adapters.model_store import make_folder

_YOUNG_S = 60
"""One that was made just now may not be locked yet, so nobody else locks it either; and agents of a mesh that was killed just now
may not have ended."""


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in ``parent`` whose name begins with ``name``. Those of the same name whose makers are gone are removed first.
    Raises ``InputError`` where none can be made."""
    make_folder(parent)
    for left in parent.glob(f"{name}-*"):
        _remove_abandoned(left)
    folder = parent / f"{name}-{os.getpid()}-{os.urandom(3).hex()}"
    make_folder(folder)
    held = os.open(folder, os.O_RDONLY)
    try:
        # A lock and not a process's number: another container may share the folder, and has numbers of its own.
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can remove it but we
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _remove_abandoned(folder: Path) -> None:
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone by now, or not ours
        return
    try:
        if time.time() - os.fstat(held).st_mtime > _YOUNG_S:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody has it
        pass
    finally:
        os.close(held)
