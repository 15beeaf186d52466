"""How fast a replica computes: measured while it works, guessed from the machine's probe before.

A decode step of ``b`` sessions at position ``p`` takes ``decode + p * context + (b - 1) * row``: reading the
weights once, looking at what came before, then a little for each further row. A chunk of a prompt takes ``prefill +
prefill_context * before`` a position, and no less than a step. All in microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import exp

from mesh.capabilities import Capabilities
from mesh.types import ShardInfo

_WINDOW = 192
_TRIMMED = 0.02
"""Of the slowest steps, left out of a mean: they are somebody else's doing."""
_COLD_STEPS = 12
"""The first steps after loading bring weights into memory and caches: they say nothing of later ones."""
_ENOUGH_STEPS = 24
"""Until so many were measured, a replica counts as one that never ran: routes go on trying it."""
_RECENT_S, _RECENT_STEPS, _SPIKES = 3.0, 16, 0.1
"""What routes weigh is of so long, or of so many steps where that is longer ago: whoever was measured while its machine
was busy with something else needs one more answer to be seen as it is."""
_IDLE_S = 2.0
_DOUBT = 0.8
"""Of what was measured, hoped for where little or nothing ran of late: equal machines are often measured a tenth apart,
whoever is used is measured faster for it, and whoever was measured in a bad moment must get another one."""
_SURE_STEPS = 96
"""So many of late leave no doubt."""
_FIT_STEPS, _FIT_CHUNKS, _FIT_SPREAD, _FIT_GAIN = 64, 24, 96, 0.2
_GROWTH = 4e-4
"""Share by which runs grow for each position before them, as models of this size have it: what is fitted counts the less the
less sure it is by that measure."""
FAR = 1000
_TOLD, TOLD_HASTE_S = 0.04, 0.15
"""Share by which a figure must move before peers hear of it, and what that share is times the seconds since they last did: a
machine that is half as fast is told of at once, a wobble of a twentieth after three seconds, and a mesh of n agents that work
is spared most of its n * (n - 1) records a half second."""
ROW_SHARE = 0.16
"""Of a step, for each further row, until it is measured: ONNX Runtime, int8, 135 M parameters."""
GUESSED_TAIL = 2.0
"""99th percentile over the median, until it is measured."""
EFFICIENCY = 0.6
"""Of the probe's bandwidth and arithmetic that a whole shard reaches."""
_GB_S, _GFLOP_S = 5.0, 20.0
"""Of a machine that was not measured: a small board's."""
_FADES_S = 5.0
_KNOWN_CHUNKS = 6
"""Chunks of a prompt are few, and equal ones are measured a fifth apart: what this machine took for other cuts of the model
counts as so many."""
_KNOWN_STEPS = 96
"""So do steps, where other cuts ran here, until there are enough of its own: of equal answers one after the other each is up to a tenth
slower or faster than their mean, so the last one alone says less of the next than it does together with what was known."""
_US = 1e6


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """Microseconds; ``decode_p99`` is that of single steps, ``measured`` is false for a guess."""

    decode: float
    row: float
    prefill: float
    decode_p99: float
    measured: bool = False
    context: float = 0.0
    hope: float = 0.0
    """What routes weigh in place of ``decode``: steps without the slowest tenth; the longer nothing ran, the
    closer to the best that was ever measured. 0 is the same as ``decode``."""
    prefill_context: float = 0.0

    @property
    def weighed(self) -> float:
        """What routes are chosen by."""
        return self.hope or self.decode

    def step(self, sessions: int, position: float = 0.0) -> float:
        """A decode step of so many sessions together."""
        return self.decode + self.context * position + max(0, sessions - 1) * self.row

    def chunk(self, positions: int, begin: int = 0) -> float:
        """So many positions of a prompt together, from ``begin`` on. Weights are read once, as for a step."""
        before = begin + positions / 2
        return max(self.decode, positions * (self.prefill + self.prefill_context * before))


def worth_telling(told: StageSpeed | None, now: StageSpeed, age_s: float) -> StageSpeed:
    """What peers are told: the old figures while the new ones are close, so that they do not hear of every
    run; else the new ones with three digits. What was told ``age_s`` seconds ago must have moved the more the later that was."""
    if told is not None and told.measured == now.measured:
        moved = max(_TOLD, TOLD_HASTE_S / max(age_s, TOLD_HASTE_S))
        near = (
            abs(told.decode - now.decode) <= moved * now.decode,
            abs(told.prefill - now.prefill) <= moved * now.prefill,
            abs(told.row - now.row) <= 4 * moved * now.row,
            abs(told.decode_p99 - now.decode_p99) <= 4 * moved * now.decode_p99,
            abs(told.context - now.context) * FAR <= moved * now.decode,
            abs(told.prefill_context - now.prefill_context) * FAR <= moved * now.prefill,
            abs(told.weighed - now.weighed) <= moved * now.weighed,
        )
        if all(near):
            return told
    decode, row, prefill, p99, context, hope, later = (
        float(f"{v:.3g}")
        for v in (
            now.decode,
            now.row,
            now.prefill,
            now.decode_p99,
            now.context,
            now.hope,
            now.prefill_context,
        )
    )
    return StageSpeed(decode, row, prefill, p99, now.measured, context, hope, later)


def guess(shard: ShardInfo, have: Capabilities) -> StageSpeed:
    """From the probe: decode reads every weight once, prefill takes two operations a weight and position."""
    probed = [s for s in have.speeds if s.gb_s > 0 and s.gflop_s > 0]
    # A machine that is slow with one runtime is slow with the other.
    known = [s for s in probed if s.runtime == shard.runtime] or probed
    gb_s, gflop_s = (known[0].gb_s, known[0].gflop_s) if known else (_GB_S, _GFLOP_S)
    decode = shard.weight_bytes / (gb_s * 1e9 * EFFICIENCY) * _US
    prefill = 2 * shard.weight_bytes / (gflop_s * 1e9 * EFFICIENCY) * _US
    context = shard.kv_bytes_per_token / (gb_s * 1e9 * EFFICIENCY) * _US
    return StageSpeed(decode, decode * ROW_SHARE, prefill, GUESSED_TAIL * decode, context=context)


class SpeedMeter:
    """Means of the last runs, without the very slowest: what a token takes on average is the sum of such. While
    nothing runs, ``hope`` fades into the best that was ever measured here, so that a node that was slow, and
    therefore shunned, is tried again; what tokens are predicted to take does not."""

    def __init__(self, prior: StageSpeed, ran: bool = False) -> None:
        """``ran``: ``prior`` is from what ran on this machine, and no guess."""
        self._prior, self._known = prior, _KNOWN_STEPS if ran else 0
        self.own: StageSpeed | None = None
        """The estimate as it was last asked for, from what ran here alone; none until that was enough."""
        # Until enough is seen growth is as it was known: a machine that is slower than its probe is so there, too.
        self._steps = _Growing(prior.context / prior.decode if prior.decode else 0.0, _FIT_STEPS)
        self._chunks = _Growing(prior.prefill_context / prior.prefill if prior.prefill else 0.0, _FIT_CHUNKS)
        self._times: deque[float] = deque(maxlen=_WINDOW)
        """When each step was."""
        self._rows: deque[float] = deque(maxlen=_WINDOW)
        self._best: StageSpeed | None = None
        self._last_s = 0.0
        self._cold = _COLD_STEPS

    def decoded(self, rows: int, us: float, now_s: float, position: int = 0) -> None:
        """A step of ``rows`` sessions, the first of them at ``position``, took ``us``."""
        self._last_s = now_s
        if self._cold:
            self._cold -= 1
        elif rows == 1:
            self._steps.add(position, us)
            self._times.append(now_s)
        else:
            alone = _mean(self._steps.runs) or self._prior.decode
            self._rows.append(max(0.0, us - alone) / (rows - 1))

    def prefilled(self, positions: int, us: float, now_s: float, begin: int = 0) -> None:
        """A chunk of ``positions`` from ``begin`` on took ``us``."""
        self._last_s = now_s
        self._chunks.add(begin + positions / 2, us / positions)

    @property
    def ran(self) -> bool:
        """Enough for its figures to be its own."""
        return len(self._steps.runs) + len(self._rows) >= _ENOUGH_STEPS

    def _with_known(self, decode: float) -> float:
        """What was known fills the window, up to a share, until that is full."""
        seen = len(self._steps.runs)
        known = min(self._known, _WINDOW - seen)
        return (decode * seen + self._prior.decode * known) / (seen + known) if seen else decode

    def speed(self, now_s: float) -> StageSpeed:
        """The estimate of now."""
        guessed, steps, chunks = self._best or self._prior, self._steps, self._chunks
        if not (steps.runs or self._rows or chunks.runs):
            return guessed
        steps.fit()
        chunks.fit()
        middle = sum(steps.places) / len(steps.places) if steps.places else 0.0
        grown = 1 + steps.growth * middle
        single, prefill = _mean(steps.runs), self._prefill_us()
        decode = guessed.decode if single is None else single / grown
        own, decode = decode, self._with_known(decode)
        p99 = _quantile(steps.runs, 99)
        now = StageSpeed(
            decode,
            _or(_mean(self._rows), guessed.row),
            prefill,
            guessed.decode_p99 if p99 is None else p99 - decode * (grown - 1),
            self._prior.measured or self.ran,
            decode * steps.growth,
            prefill_context=prefill * chunks.growth,
        )
        if self.ran:
            self.own = replace(now, decode=own, context=own * steps.growth)
        usual = self._usual()
        typical = decode if usual is None else usual / grown
        enough = len(steps.runs) >= _WINDOW // 4
        if self._best is None or (enough and typical < self._best.weighed):
            self._best = replace(now, hope=typical)
        trust = exp(-max(0.0, now_s - self._last_s - _IDLE_S) / _FADES_S)
        late = sum(1 for at in self._times if at >= now_s - _RECENT_S)
        sure = min(1.0, late / _SURE_STEPS)
        likely = typical * (_DOUBT + (1 - _DOUBT) * sure)
        hoped = _DOUBT * min(typical, self._best.weighed)
        return replace(now, hope=likely * trust + hoped * (1 - trust))

    def _prefill_us(self) -> float:
        """A position of a chunk with nothing before it."""
        known = [self._prior.prefill] * _KNOWN_CHUNKS if self._prior.measured else []
        chunks = self._chunks
        first = [
            us / (1 + chunks.growth * middle) for us, middle in zip(chunks.runs, chunks.places, strict=True)
        ]
        return _or(_mean([*known, *first]), self._prior.prefill)

    def _usual(self) -> float | None:
        """A step of late, without spikes."""
        since = self._last_s - _RECENT_S
        runs = self._steps.runs
        recent = [us for us, at in zip(runs, self._times, strict=True) if at >= since]
        if len(recent) < _RECENT_STEPS:
            recent = list(runs)[-_RECENT_STEPS:]
        return _mean(recent, _SPIKES)


class _Growing:
    """Runs of late, and the share by which one takes longer for each position before it."""

    def __init__(self, growth: float, enough: int) -> None:
        """``growth`` is believed until ``enough`` runs are seen; each is looked at as one of so many new ones."""
        self.growth, self._enough, self._new = growth, enough, 0
        self.places: deque[float] = deque(maxlen=_WINDOW)
        self.runs: deque[float] = deque(maxlen=_WINDOW)

    def add(self, place: float, us: float) -> None:
        self.places.append(place)
        self.runs.append(us)
        self._new += 1

    def fit(self) -> None:
        """Move the growth towards the least squares of the window, the less the more noise could have made of it: runs whose
        places are close together hardly tell. A run does not double within ``FAR`` positions, whatever noise says."""
        if self._new < self._enough or max(self.places) - min(self.places) < _FIT_SPREAD:
            return
        self._new = 0
        limit = _quantile(self.runs, 98) or 0.0
        pairs = [(p, u) for p, u in zip(self.places, self.runs, strict=True) if u <= limit]
        mean_p = sum(p for p, _ in pairs) / len(pairs)
        mean_u = sum(u for _, u in pairs) / len(pairs)
        spread = sum((p - mean_p) ** 2 for p, _ in pairs)
        if not spread or not mean_u:
            return
        slope = sum((p - mean_p) * (u - mean_u) for p, u in pairs) / spread
        first = mean_u - slope * mean_p
        found = min(max(0.0, slope / first), 1 / FAR) if first > 0 else 1 / FAR
        # The variance of a slope (as every text on least squares has it), as a share of a run as it was known to begin.
        noise = sum((u - mean_u - slope * (p - mean_p)) ** 2 for p, u in pairs) / len(pairs)
        begins = mean_u / (1 + self.growth * mean_p)
        sure = _GROWTH**2 / (_GROWTH**2 + noise / spread / begins**2)
        self.growth += (found - self.growth) * _FIT_GAIN * sure


def _or(measured: float | None, guessed: float) -> float:
    return guessed if measured is None else measured


def _mean(values: Collection[float], trimmed: float = _TRIMMED) -> float | None:
    if not values:
        return None
    kept = sorted(values)[: len(values) - int(len(values) * trimmed)]
    return sum(kept) / len(kept)


def _quantile(values: deque[float], percent: int) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)]
