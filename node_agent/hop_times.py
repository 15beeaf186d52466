"""How long hops take, one way: from when frames were sent and acknowledged. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from mesh.messages import Ack, Frame
from mesh.types import Address, SessionId

_SENT_KEPT = 1024
_SAMPLES = 32


class HopTimes:
    """Of one node, to each of its next stages."""

    def __init__(self) -> None:
        self._sent_ns: OrderedDict[tuple[SessionId, int, int], int] = OrderedDict()
        """By session, stage and the position where the frame ends."""
        self._samples: dict[Address, deque[int]] = {}

    def sent(self, frames: Iterable[Frame], now_ns: int) -> None:
        """Frames leave for another node; the oldest that nobody acknowledged are forgotten."""
        for frame in frames:
            self._sent_ns[frame.session, frame.stage, frame.position + frame.length] = now_ns
        while len(self._sent_ns) > _SENT_KEPT:
            self._sent_ns.popitem(last=False)

    def acknowledged(self, address: Address, ack: Ack, now_ns: int) -> bool:
        """Half of the round trip, without the time for which the frame was held there; whether we knew when it was sent."""
        sent = self._sent_ns.pop((ack.session, ack.stage, ack.position), None)
        if sent is None:
            return False
        samples = self._samples.setdefault(address, deque(maxlen=_SAMPLES))
        samples.append(max(0, ((now_ns - sent) // 1000 - ack.held_us) // 2))
        return True

    def one_way_us(self, address: Address) -> int:
        """Estimate of the one-way time to an address, microseconds; 0 if unknown.

        The least of the last samples: an acknowledgement that found us computing says nothing of the
        hop.
        """
        return min(self._samples.get(address, (0,)))

    def forget(self, address: Address) -> None:
        """Its link is gone: another one may take another way."""
        self._samples.pop(address, None)
