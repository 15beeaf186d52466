"""Where a replica's runs are computed: on a thread of their own, or, where a run is known to be brief, at once."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from mesh.clock import Clock

Work = Callable[[], Any]
Done = Callable[[Any, int, int], None]
"""Takes what the work gave, and when it began and ended, nanoseconds."""


class Compute(Protocol):
    """One run at a time; whoever hands over the next waits until ``done`` was called on the event loop."""

    inline: bool
    """Whether brief runs may be computed on the event loop instead."""

    def submit(self, work: Work, done: Done) -> None: ...

    async def close(self, last: Callable[[], None]) -> None:
        """Do ``last`` after everything else, and end."""
        ...


class ComputeThread:
    """A thread that the event loop feeds."""

    inline = True

    def __init__(self, name: str, clock: Clock) -> None:
        self._clock, self._loop = clock, asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        self._last: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Work, done: Done) -> None:
        self._jobs.put((work, done))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            started = self._clock.monotonic_ns()
            outcome = work()
            ended = self._clock.monotonic_ns()
            try:
                self._loop.call_soon_threadsafe(done, outcome, started, ended)
            except RuntimeError:
                return  # the loop is closed: we are shutting down
        self._last()

    def stop(self) -> None:
        """End without waiting."""
        self._jobs.put(None)

    async def close(self, last: Callable[[], None]) -> None:
        self._last = last
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
