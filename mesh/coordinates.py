"""Network coordinates: round trips between pairs that never measured each other.

Vivaldi (Dabek et al., SIGCOMM 2004) with the height vector of its section 5.4 and the refinements
that Serf's network adopted: an adjustment term (Ledlie et al., NSDI 2007) and gravity towards the
origin. A node moves a little with each measured round trip, as if springs tied it to its peers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import hypot, isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

DIMENSIONS = 4
ERROR_MAX = 1.5
_CE = _CC = 0.25
HEIGHT_MIN = 1e-5
_ADJUSTMENT_WINDOW = 20
_GRAVITY_RHO = 150.0
_NEAR_ZERO = 1e-6
RTT_MAX_S = 10.0
"""Longer round trips are not believed."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A place in the latency space. All lengths are seconds; ``error`` is relative, 0 to 1.5."""

    vector: tuple[float, ...] = (0.0,) * DIMENSIONS
    height: float = HEIGHT_MIN
    adjustment: float = 0.0
    error: float = ERROR_MAX

    def valid(self) -> bool:
        """Finite, of our dimension, and of this planet: a peer's word is not trusted further."""
        values = (*self.vector, self.height, self.adjustment, self.error)
        return len(self.vector) == DIMENSIONS and all(isfinite(v) and abs(v) < RTT_MAX_S for v in values)

    def rtt_to(self, other: Coordinate) -> float:
        """Estimated round trip, seconds."""
        raw = self._raw(other)
        adjusted = raw + self.adjustment + other.adjustment
        return adjusted if adjusted > 0 else raw

    def _raw(self, other: Coordinate) -> float:
        apart = hypot(*(a - b for a, b in zip(self.vector, other.vector, strict=True)))
        return apart + self.height + other.height


class Vivaldi:
    """Our own coordinate, moved by measurements."""

    def __init__(self, rng: Random) -> None:
        self.here = Coordinate()
        self._rng = rng
        self._residues: deque[float] = deque(maxlen=_ADJUSTMENT_WINDOW)

    def measured(self, other: Coordinate, rtt_s: float) -> None:
        """Fold in one round trip to a peer at ``other``; nonsense is ignored."""
        if not (0 < rtt_s < RTT_MAX_S) or not other.valid():
            return
        here = self.here
        total = here.error + other.error
        weight = here.error / total if total > _NEAR_ZERO else 0.5
        wrong = abs(here._raw(other) - rtt_s) / rtt_s
        error = min(ERROR_MAX, wrong * _CE * weight + here.error * (1 - _CE * weight))
        force = _CC * weight * (rtt_s - here._raw(other))
        vector, height = self._pushed(here, other, force)
        self._residues.append(rtt_s - Coordinate(vector, height)._raw(other))
        adjustment = sum(self._residues) / (2 * _ADJUSTMENT_WINDOW)
        self.here = Coordinate(_pulled_home(vector), height, adjustment, error)

    def _pushed(self, here: Coordinate, other: Coordinate, force: float) -> tuple[tuple[float, ...], float]:
        away = [a - b for a, b in zip(here.vector, other.vector, strict=True)]
        length = hypot(*away)
        if length <= _NEAR_ZERO:
            # Two nodes at one place are pushed apart in any direction.
            away = [self._rng.random() - 0.5 for _ in here.vector]
            norm, length = hypot(*away) or 1.0, 0.0
        else:
            norm = length
        vector = tuple(v + a / norm * force for v, a in zip(here.vector, away, strict=True))
        height = here.height
        if length > _NEAR_ZERO:
            height = max(HEIGHT_MIN, (here.height + other.height) * force / length + here.height)
        return vector, height


def _pulled_home(vector: tuple[float, ...]) -> tuple[float, ...]:
    """Gravity keeps the whole cloud from drifting away from the origin."""
    distance = hypot(*vector)
    if distance <= _NEAR_ZERO:
        return vector
    pull = min(1.0, (distance / _GRAVITY_RHO) ** 2 / distance)
    return tuple(v - v * pull for v in vector)
