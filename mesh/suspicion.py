"""How long the accused may refute before it counts as dead."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

from mesh.types import NodeId

CONFIRMATIONS = 3
"""Accusers besides the first after which waiting longer tells nothing."""


@dataclass(slots=True)
class Suspicion:
    """Who accuses, since when. The deadline comes nearer with each independent accuser, by Lifeguard's
    formula (Dadgar, Phillips, Currey, 2018): ``max - (max - min) log(c + 1) / log(k + 1)``."""

    since: int
    minimum: int
    maximum: int
    expected: int
    """Confirmations that can come at all: a mesh of two has nobody else to ask."""
    accusers: set[NodeId] = field(default_factory=set)

    def confirm(self, by: NodeId) -> bool:
        """Add an accuser; whether that is news."""
        if by in self.accusers or len(self.accusers) > self.expected:
            return False
        self.accusers.add(by)
        return True

    def deadline(self) -> int:
        """When the accused is dead unless it refutes, ns."""
        if self.expected < 1:
            return self.since + self.minimum
        confirmations = max(0, len(self.accusers) - 1)
        share = log(confirmations + 1) / log(self.expected + 1)
        return self.since + max(self.minimum, int(self.maximum - (self.maximum - self.minimum) * share))
