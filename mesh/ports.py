"""What the mesh's pure files ask of the world."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Monotonic for intervals, wall for what is written down."""

    def now_ns(self) -> int:
        """Nanoseconds that never go back."""
        ...

    def unix_s(self) -> float:
        """Seconds since 1970."""
        ...
