"""The threads with which an engine computes beside its caller, kept off the processor that the caller is on.

A Linux whose processors are busy most of the time looks for no idle one when it wakes a thread: it takes the one where that ran
last. A worker that came to run beside its caller wakes there for the rest of the step, which then takes one processor twice as
long while another is idle. Where three stages shared two processors, every thirteenth step was like that.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")
_OWN_NAME = Path("/proc/thread-self/comm")
_numbers = itertools.count(1)

# Under the interpreter's lock: to let go of it would cost more than the call.
_PROCESSOR: Callable[[], int] | None = getattr(ctypes.PyDLL(None), "sched_getcpu", None)


class WorkerThreads:
    """Of one engine. Where the system does not tell threads or processors apart, nothing is done."""

    def __init__(self, processor: Callable[[], int] | None = _PROCESSOR) -> None:
        """``processor``: says on which one the calling thread is."""
        self._processor = processor if hasattr(os, "sched_setaffinity") else None
        self._spared = -1
        """The processor that they keep off."""
        self.ids: list[int] = []

    @contextmanager
    def started(self) -> Iterator[None]:
        """Around what starts them. They are known by a name that threads have from whoever starts them, and that ``top -H``
        shows."""
        name = f"compute-{next(_numbers)}"
        before = _renamed(name)
        try:
            yield
        finally:
            if before:
                self.ids += _named(name)
                _renamed(before)

    def make_room(self) -> None:
        """The calling thread is about to compute."""
        if not self.ids or self._processor is None:
            return
        here = self._processor()
        if here == self._spared:
            return
        self._spared = here
        others = os.sched_getaffinity(0) - {here}
        if not others:
            return
        for thread in tuple(self.ids):
            try:
                os.sched_setaffinity(thread, others)
            except ProcessLookupError:
                self.ids.remove(thread)  # it has ended
            except OSError:
                return  # the operator moved all of us elsewhere just now


def _renamed(name: str) -> str:
    """What the calling thread was called; nothing where it cannot be: another system, or a sandbox that hides /proc."""
    try:
        before = _OWN_NAME.read_text().rstrip("\n")
        _OWN_NAME.write_text(name)
    except OSError:
        return ""
    return before


def _named(name: str) -> list[int]:
    """Threads of that name, but for the calling one."""
    found, own = [], threading.get_native_id()
    for task in _TASKS.iterdir():
        with suppress(OSError):  # it has ended
            if int(task.name) != own and (task / "comm").read_text().strip() == name:
                found.append(int(task.name))
    return found
