"""What is measured of the link to one peer, each direction for itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

_RTTS = 64
_COUNTS = 64
_TRAINS = 16
_JITTER_GAIN = 16
"""RFC 3550, section 6.4.1: jitter moves by a sixteenth of each difference."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """A link as the snapshot carries it. Times are ns, bandwidths bits per second, 0 is unknown;
    ``out`` is from us to the peer. Bandwidths are lower bounds: a sender may be slower than the wire."""

    rtt_p50: int = 0
    rtt_p99: int = 0
    jitter: int = 0
    loss_out: float = 0.0
    loss_in: float = 0.0
    bandwidth_out_p50: int = 0
    bandwidth_out_p10: int = 0
    bandwidth_in_p50: int = 0
    bandwidth_in_p10: int = 0
    samples: int = 0


class LinkMeter:
    """Folds in probe answers and packet trains.

    Loss needs no packets of its own: each ping says how many came before it, each answer how many
    arrived and how many answers were sent.
    """

    def __init__(self) -> None:
        self._rtts: deque[int] = deque(maxlen=_RTTS)
        self._jitter = 0
        self.pings_sent = self.pings_seen = self.acks_sent = self.acks_seen = 0
        """``pings_seen`` and ``acks_sent`` are of the peer's pings, the others of ours."""
        self._counts: deque[tuple[int, int, int, int]] = deque(maxlen=_COUNTS)
        self._out: deque[int] = deque(maxlen=_TRAINS)
        self._in: deque[int] = deque(maxlen=_TRAINS)

    def answered(self, rtt: int | None, sent: int, seen: int, answers: int) -> None:
        """An answer came: of ``sent`` pings the peer saw ``seen`` and has sent ``answers``."""
        self.acks_seen += 1
        if rtt is not None:
            if self._rtts:
                self._jitter += (abs(rtt - self._rtts[-1]) - self._jitter) // _JITTER_GAIN
            self._rtts.append(max(rtt, 1))
        if self._counts and (seen < self._counts[-1][1] or answers < self._counts[-1][2]):
            self._counts.clear()  # the peer began to count anew, or an older answer came late
        self._counts.append((sent, seen, answers, self.acks_seen))

    def train_out(self, bits_per_second: int) -> None:
        """The peer reported how fast a train of ours arrived."""
        self._out.append(bits_per_second)

    def train_in(self, bits_per_second: int) -> None:
        """A train of the peer's arrived."""
        self._in.append(bits_per_second)

    def estimate(self) -> LinkEstimate:
        """The figures of now."""
        rtts, outs, ins = sorted(self._rtts), sorted(self._out), sorted(self._in)
        loss_out = loss_in = 0.0
        if len(self._counts) > 1:
            sent, seen, answers, got = (b - a for a, b in zip(self._counts[0], self._counts[-1], strict=True))
            loss_out = max(0.0, 1 - seen / sent) if sent else 0.0
            loss_in = max(0.0, 1 - got / answers) if answers else 0.0
        return LinkEstimate(
            quantile(rtts, 50),
            quantile(rtts, 99),
            self._jitter,
            round(loss_out, 4),
            round(loss_in, 4),
            quantile(outs, 50),
            quantile(outs, 10),
            quantile(ins, 50),
            quantile(ins, 10),
            len(rtts),
        )


def quantile(ordered: list[int], percent: int) -> int:
    """The value that ``percent`` of the ordered values do not exceed; 0 of nothing."""
    if not ordered:
        return 0
    return ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1 if percent else 0)]


def train_speed(arrivals: Iterable[int], size: int) -> int:
    """Bits per second of packets of ``size`` bytes by their arrival times (ns); 0 if they tell nothing."""
    times = sorted(arrivals)
    if len(times) < 2:
        return 0
    return (len(times) - 1) * size * 8 * 1_000_000_000 // max(1, times[-1] - times[0])
