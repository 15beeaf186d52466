"""How many sessions' steps to compute in one run, where runs are made for fixed numbers of rows. Pure.

A run costs what it is made for, and how much that is depends on the processor and the quantization: four rows of 4-bit weights take
from two to four times as long as one. So it is measured, and the cheapest runs are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

_SMOOTHING = 0.125
_FADES = 0.999
"""As much is left, with each choice, of what a size took that was not chosen: one that was measured in a bad moment is tried
again."""


class Bunches:
    """Of one context bucket."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """``sizes``: rows that runs are made for; 1 is among them."""
        self._sizes = sorted(sizes)
        self._took: dict[int, float] = {}
        """Smoothed time of a run by its size, nanoseconds."""
        self._begun: set[int] = set()
        """Sizes that ran; the first time takes longer than any other."""

    def plan(self, count: int) -> list[int]:
        """Sizes of the runs that compute ``count`` rows; the last may have room to spare. A size that was never measured counts
        as nothing, and so is tried."""
        most = next((size for size in self._sizes if size >= count), self._sizes[-1])
        sizes = [size for size in self._sizes if size <= most]
        costs, first = [0.0], [0]
        for rows in range(1, count + 1):
            cost, size = min((self._took.get(s, 0.0) + costs[max(0, rows - s)], -s) for s in sizes)
            costs.append(cost)
            first.append(-size)
        chosen = []
        while count > 0:
            chosen.append(first[count])
            count -= first[count]
        for size in sizes:
            if size not in chosen and size in self._took:
                self._took[size] *= _FADES
        return chosen

    def took(self, size: int, ns: int) -> None:
        """A run of that size took so long."""
        if size not in self._begun:
            self._begun.add(size)
            return
        before = self._took.get(size, float(ns))
        self._took[size] = before + _SMOOTHING * (ns - before)
