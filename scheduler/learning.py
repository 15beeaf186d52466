"""What an ingress learns from its own sessions: how far predictions are off, and what recoveries take.

The cost model knows computation and links; what an agent adds to each stage, and an ingress to each
start, is learned here as the median of what was left over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from scheduler.cost import RECOVERY_US, STAGE_US

_KEPT = 64
_ENOUGH = 3
_STAGE_MAX_US = 20_000.0


@dataclass(frozen=True, slots=True)
class Learned:
    """Microseconds: what a stage takes beside its computation, what a start takes beside its stages, and what
    a session stands still when it loses one."""

    stage_us: float = STAGE_US
    start_us: float = 0.0
    recovery_us: float = RECOVERY_US


NOTHING_LEARNED = Learned()


class Learner:
    """Folds in sessions that ended; ``learned`` is for the next route."""

    def __init__(self) -> None:
        self._stage: deque[float] = deque(maxlen=_KEPT)
        self._start: deque[float] = deque(maxlen=_KEPT)
        self._recovery: deque[float] = deque(maxlen=_KEPT)
        self.learned = NOTHING_LEARNED

    def ended(self, then: Learned, stages: int, tpot_off_us: float, ttft_off_us: float) -> None:
        """A session over ``stages`` was planned with ``then``; what its tokens and its first one took beyond
        the prediction (negative: less)."""
        self._stage.append(min(_STAGE_MAX_US, max(0.0, then.stage_us + tpot_off_us / stages)))
        self._start.append(then.start_us + ttft_off_us)
        self._renew()

    def recovered(self, us: float) -> None:
        """A session stood still for so long when it lost a stage."""
        self._recovery.append(us)
        self._renew()

    def _renew(self) -> None:
        enough = len(self._stage) >= _ENOUGH
        self.learned = Learned(
            median(self._stage) if enough else STAGE_US,
            median(self._start) if enough else 0.0,
            median(self._recovery) if self._recovery else RECOVERY_US,
        )
