"""The machine's clocks."""

from __future__ import annotations

import time


class SystemClock:
    """``mesh.ports.Clock`` on the system."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def unix_s(self) -> float:
        return time.time()
