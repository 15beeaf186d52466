"""Time of a pure machine: what now is, and actions for later, moved together when we were held up."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[..., object]


class Timers:
    """Times are ns. Actions that are due at one time run in the order in which they were set."""

    def __init__(self, now: int) -> None:
        self.now = now
        self._heap: list[tuple[int, int, Action, tuple[object, ...]]] = []
        self._order = 0

    def after(self, delay: int, action: Action, *arguments: object) -> None:
        """Run ``action(*arguments)`` in ``delay``."""
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay, self._order, action, arguments))

    @property
    def next_due(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def run(self) -> None:
        """Run everything that is due."""
        while self._heap and self._heap[0][0] <= self.now:
            _, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)

    def postpone(self, by: int) -> None:
        """Move everything into the future."""
        self._heap = [(due + by, order, action, arguments) for due, order, action, arguments in self._heap]

    def clear(self) -> None:
        self._heap.clear()
