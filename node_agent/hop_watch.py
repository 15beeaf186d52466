"""When is the next stage silent: by what its signs of life usually leave between them. Pure.

While something is outstanding at a peer (a frame without acknowledgement, an ``Open`` without answer), it gives a
sign at least every beacon: an acknowledgement, or a beacon while work is queued. How long the gaps between signs are is
learned for each address; three times their 99th percentile without one, and at least ``FLOOR_NS``, means silent. A busy
peer's gaps grow with its load, and the limit with them. Nobody is accused by one look: two in a row must say so, and whoever was
held up itself adds that to everybody's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

FLOOR_NS = 100_000_000
FACTOR = 3
_UNKNOWN_NS = 1_000_000_000
"""The limit until a few gaps were seen."""
_FEW_GAPS, _FEW_FLOOR_NS = 4, 4 * FLOOR_NS
"""From a few on it is ``FACTOR`` times the longest, with more room below: a peer that has just started has shown little."""
_CAP_NS = 5_000_000_000
_GAPS, _ENOUGH_GAPS = 512, 24
_HELD_UP_NS = 20_000_000
_RELEARN = 32

A = TypeVar("A")


@dataclass(slots=True)
class _Peer:
    heard_ns: int = 0
    since_ns: int = 0
    """When something became outstanding; 0: nothing is."""
    doubted: bool = False
    gaps: deque[int] = field(default_factory=lambda: deque(maxlen=_GAPS))
    fresh: int = 0
    limit_ns: int = _UNKNOWN_NS

    def learn(self, gap: int) -> None:
        self.gaps.append(gap)
        self.fresh += 1
        if _FEW_GAPS <= len(self.gaps) < _ENOUGH_GAPS:
            self.limit_ns = min(_UNKNOWN_NS, max(_FEW_FLOOR_NS, FACTOR * max(self.gaps)))
        elif len(self.gaps) == _ENOUGH_GAPS or self.fresh >= _RELEARN:
            self.fresh = 0
            ordered = sorted(self.gaps)
            usual = ordered[-1 - len(ordered) // 100]
            self.limit_ns = min(_CAP_NS, max(FLOOR_NS, FACTOR * usual))


class HopWatch(Generic[A]):
    """Silence by address. Times are nanoseconds of one clock."""

    def __init__(self) -> None:
        self._peers: dict[A, _Peer] = {}
        self._looked_ns = 0

    def heard(self, address: A, now: int) -> None:
        """A sign of life."""
        peer = self._peers.setdefault(address, _Peer())
        if peer.since_ns:
            peer.learn(now - max(peer.heard_ns, peer.since_ns))
        peer.heard_ns, peer.doubted = now, False

    def limit_ns(self, address: A) -> int:
        """How long it may be silent."""
        peer = self._peers.get(address)
        return peer.limit_ns if peer else _UNKNOWN_NS

    def forget(self, address: A) -> None:
        """Its link broke: what comes next is another process."""
        self._peers.pop(address, None)

    def rest(self) -> None:
        """Nobody looks for a while, since nobody owes anything."""
        self._looked_ns = 0
        for peer in self._peers.values():
            peer.since_ns, peer.doubted = 0, False

    def look(self, outstanding: Iterable[A], now: int, every_ns: int) -> list[tuple[A, int]]:
        """Those that are silent, and for how long; called every ``every_ns`` with everybody who owes a sign. An
        address that was told is told again only after another whole limit."""
        held_up = now - self._looked_ns - every_ns if self._looked_ns else 0
        self._looked_ns = now
        owing = set(outstanding)
        silent = []
        for address in owing - self._peers.keys():
            self._peers[address] = _Peer()
        for address, peer in self._peers.items():
            if address not in owing:
                peer.since_ns, peer.doubted = 0, False
                continue
            if not peer.since_ns:
                peer.since_ns = now
            if held_up > _HELD_UP_NS:
                peer.since_ns += held_up
                peer.heard_ns += held_up
            for_ns = now - max(peer.heard_ns, peer.since_ns)
            if for_ns <= peer.limit_ns:
                peer.doubted = False
            elif not peer.doubted:
                peer.doubted = True
            else:
                silent.append((address, for_ns))
                peer.since_ns, peer.doubted = now, False
        return silent
