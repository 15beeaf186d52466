"""Work on a thread of its own, due a moment after somebody asks for it: once for all who ask meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Later:
    """Does ``work`` at most once in ``after_s`` seconds, and not while nobody asks. ``work`` raises nothing."""

    def __init__(self, name: str, after_s: float, work: Callable[[], None]) -> None:
        self._after_s, self._work = after_s, work
        self._asked, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have it done soon; returns at once, on any thread."""
        if not self._asked.is_set():  # to set it takes a lock
            self._asked.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._asked.wait()
            self._stop.wait(self._after_s)
            self._asked.clear()
            self._work()

    def close(self) -> None:
        """Do it once more, and end."""
        self._stop.set()
        self._asked.set()
        self._thread.join()
        self._work()
