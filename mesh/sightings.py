"""Addresses that discovery named and nobody answered at yet: where to knock, and when again."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from mesh.types import Address

SIGHTINGS_MAX = 16_384
_RETRY_MAX_NS = 30_000_000_000


@dataclass(slots=True)
class _Sighting:
    sources: set[str]
    wait: int
    due: int
    error: str = ""


class Sightings:
    """Each address is tried at once, then ever more rarely, for as long as some directory lists it."""

    def __init__(self, first_wait: int) -> None:
        self._first_wait = first_wait
        self._known: dict[Address, _Sighting] = {}
        self._queue: list[tuple[int, Address]] = []
        """A heap; entries whose time is not the sighting's any more are skipped."""

    def __len__(self) -> int:
        return len(self._known)

    def add(self, address: Address, source: str, now: int) -> None:
        """A directory lists it; beyond ``SIGHTINGS_MAX`` nothing new is taken."""
        known = self._known.get(address)
        if known is None and len(self._known) < SIGHTINGS_MAX:
            known = self._known[address] = _Sighting(set(), self._first_wait, now)
            heapq.heappush(self._queue, (now, address))
        if known is not None:
            known.sources.add(source)

    def remove(self, address: Address, source: str) -> None:
        """A directory lists it no more."""
        known = self._known.get(address)
        if known is not None:
            known.sources.discard(source)
            if not known.sources:
                del self._known[address]

    def resolved(self, address: Address) -> set[str]:
        """Somebody answered there: the sources that listed it."""
        known = self._known.pop(address, None)
        return known.sources if known else set()

    def failed(self, address: Address, error: str, now: int) -> None:
        """Nobody did."""
        known = self._known.get(address)
        if known is not None:
            known.error = error
            known.wait = min(known.wait * 2, _RETRY_MAX_NS)
            self._again(address, known, now)

    def due(self, now: int, room: int) -> list[Address]:
        """At most ``room`` addresses to try now, the longest due first."""
        ready: list[Address] = []
        while self._queue and len(ready) < room and self._queue[0][0] <= now:
            due, address = heapq.heappop(self._queue)
            known = self._known.get(address)
            if known is not None and known.due == due:
                ready.append(address)
                self._again(address, known, now)  # should nobody tell how it went
        return ready

    def _again(self, address: Address, known: _Sighting, now: int) -> None:
        known.due = now + known.wait
        heapq.heappush(self._queue, (known.due, address))

    def unanswered(self) -> list[tuple[Address, tuple[str, ...], str]]:
        """Address, sources and error of those that were tried in vain."""
        return [(a, tuple(sorted(s.sources)), s.error) for a, s in sorted(self._known.items()) if s.error]
