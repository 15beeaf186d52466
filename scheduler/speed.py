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
from mesh.types import Digest, LayerRange, ShardInfo

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
_FAR = 1000
_TOLD, _TOLD_HASTE_S = 0.04, 0.15
"""Share by which a figure must move before peers hear of it, and what that share is times the seconds since they last did: a
machine that is half as fast is told of at once, a wobble of a twentieth after three seconds, and a mesh of n agents that work
is spared most of its n * (n - 1) records a half second."""
_ROW_SHARE = 0.16
"""Of a step, for each further row, until it is measured: ONNX Runtime, int8, 135 M parameters."""
_GUESSED_TAIL = 2.0
"""99th percentile over the median, until it is measured."""
EFFICIENCY = 0.6
"""Of the probe's bandwidth and arithmetic that a whole shard reaches."""
_GB_S, _GFLOP_S = 5.0, 20.0
"""Of a machine that was not measured: a small board's."""
_FADES_S = 5.0
_KNOWN_CHUNKS = 6
"""Chunks of a prompt are few, and equal ones are measured a fifth apart: what this machine took for other cuts of the model
counts as so many."""
_WEIGHT_BYTES = {"int8": 1 + 5 / 32, "fp32": 4.0}
"""Bytes a weight: blocks of 32 with a scale and a zero point, or none."""
HEAD_SHARE = 0.65
"""Time of the head by its bytes, against a layer's: one large product where a layer is many small ones."""
_HEAD_WITHIN = 2.0
"""Of what a head takes by its bytes: what layers leave beyond that is the machine's doing, not the head's."""
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


@dataclass(frozen=True, slots=True)
class LayerSpeed:
    """What a node takes for a layer of a model and for its head, microseconds: a decode step alone, each
    further row, a position of prefill. ``tail`` is the 99th percentile over the median."""

    model: Digest
    runtime: str
    quantization: str
    layer: float
    head: float
    row_share: float
    prefill: float
    tail: float
    context: float = 0.0
    prefill_context: float = 0.0
    apart: bool = False
    """``layer`` was measured here in a shard without the head; peers are not told."""
    head_known: bool = False
    """So was, after that, what a last shard takes beyond its layers: ``head`` over ``layer`` is no guess."""

    def stage(self, shard_layers: LayerRange, layers: int) -> float:
        """A decode step over a range of layers."""
        return len(shard_layers) * self.layer + (self.head if shard_layers.end == layers else 0.0)


def head_layers_of(shard: ShardInfo) -> float:
    """How many layers' time the head of a shard's model takes, by its bytes."""
    head, layer = _bytes_of(shard)
    return HEAD_SHARE * head / layer


def growth_of(shard: ShardInfo) -> float:
    """Share by which a decode step over the shard's layers takes longer for each position before it, by bytes: its keys
    and values are read as the weights are."""
    return shard.kv_bytes_per_token / len(shard.layers) / _bytes_of(shard)[1]


def _bytes_of(shard: ShardInfo) -> tuple[float, float]:
    """Of the head, and of a layer."""
    head = shard.model.vocabulary * shard.model.width * _WEIGHT_BYTES.get(shard.quantization, 1.0)
    edges = head if shard.first or shard.last else 0.0
    return head, max(head / 1000, (shard.weight_bytes - edges) / len(shard.layers))


def stage_speed(shard: ShardInfo, known: LayerSpeed) -> StageSpeed:
    """Of another cut of a model whose layers were measured on this machine. A chunk of a prompt passes the head
    with one position only."""
    decode = known.stage(shard.layers, shard.model.layers)
    context = known.context or known.layer * growth_of(shard)
    prefill, context, later = (
        each * len(shard.layers) for each in (known.prefill, context, known.prefill_context)
    )
    row, tail = decode * known.row_share, decode * known.tail
    return StageSpeed(decode, row, prefill, tail, True, context, prefill_context=later)


def layer_speed(shard: ShardInfo, speed: StageSpeed, known: LayerSpeed | None) -> LayerSpeed:
    """By the layer, of a shard's measured ``speed``. A last shard tells layers and head together: the head is what the
    layers leave, where their time is ``known`` of another cut and leaves a head's; else both are as much slower or faster than
    they were known to be. What a machine of another speed was probed at says how they compare, no more."""
    layers, by_bytes = len(shard.layers), head_layers_of(shard)
    heads = known.head / known.layer if known and known.layer > 0 else by_bytes
    layer = speed.decode / (layers + heads if shard.last else layers)
    head, apart, head_known = layer * heads, not shard.last, known is not None and known.head_known
    if shard.last and known and known.apart:
        left, usual, apart = speed.decode - layers * known.layer, known.layer * by_bytes, True
        if usual / _HEAD_WITHIN < left < usual * _HEAD_WITHIN:
            layer, head, head_known = known.layer, left, True
    return LayerSpeed(
        shard.model.ref.digest,
        shard.runtime,
        shard.quantization,
        layer,
        head,
        speed.row / speed.decode,
        speed.prefill / layers,
        max(1.0, speed.decode_p99 / speed.decode),
        speed.context / layers,
        speed.prefill_context / layers,
        apart,
        head_known,
    )


def probed_layer(
    model: Digest, runtime: str, quantization: str, layer: float, head: float, prefill: float
) -> LayerSpeed:
    """Of a form that was measured on a few layers and never ran; microseconds. What batches and the tail take is guessed."""
    return LayerSpeed(model, runtime, quantization, layer, head, _ROW_SHARE, prefill, _GUESSED_TAIL)


def coarse_layer(speed: LayerSpeed) -> LayerSpeed:
    """Three digits of the two that plans are made with, one less of the others, as ``coarse``."""
    layer, head = float(f"{speed.layer:.3g}"), float(f"{speed.head:.3g}")
    row, prefill, tail, context, later = (
        float(f"{v:.2g}")
        for v in (speed.row_share, speed.prefill, speed.tail, speed.context, speed.prefill_context)
    )
    return replace(
        speed,
        layer=layer,
        head=head,
        row_share=row,
        prefill=prefill,
        tail=tail,
        context=context,
        prefill_context=later,
    )


def worth_telling(told: StageSpeed | None, now: StageSpeed, age_s: float) -> StageSpeed:
    """What peers are told: the old figures while the new ones are close, so that they do not hear of every
    run; else the new ones with three digits. What was told ``age_s`` seconds ago must have moved the more the later that was."""
    if told is not None and told.measured == now.measured:
        moved = max(_TOLD, _TOLD_HASTE_S / max(age_s, _TOLD_HASTE_S))
        near = (
            abs(told.decode - now.decode) <= moved * now.decode,
            abs(told.prefill - now.prefill) <= moved * now.prefill,
            abs(told.row - now.row) <= 4 * moved * now.row,
            abs(told.decode_p99 - now.decode_p99) <= 4 * moved * now.decode_p99,
            abs(told.context - now.context) * _FAR <= moved * now.decode,
            abs(told.prefill_context - now.prefill_context) * _FAR <= moved * now.prefill,
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
    return StageSpeed(decode, decode * _ROW_SHARE, prefill, _GUESSED_TAIL * decode, context=context)


class SpeedMeter:
    """Means of the last runs, without the very slowest: what a token takes on average is the sum of such. While
    nothing runs, ``hope`` fades into the best that was ever measured here, so that a node that was slow, and
    therefore shunned, is tried again; what tokens are predicted to take does not."""

    def __init__(self, prior: StageSpeed) -> None:
        self._prior = prior
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
        p99 = _quantile(steps.runs, 99)
        now = StageSpeed(
            decode,
            _or(_mean(self._rows), guessed.row),
            prefill,
            guessed.decode_p99 if p99 is None else p99 - decode * (grown - 1),
            self._prior.measured or len(steps.runs) + len(self._rows) >= _ENOUGH_STEPS,
            decode * steps.growth,
            prefill_context=prefill * chunks.growth,
        )
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
        places are close together hardly tell. A run does not double within ``_FAR`` positions, whatever noise says."""
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
        found = min(max(0.0, slope / first), 1 / _FAR) if first > 0 else 1 / _FAR
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
