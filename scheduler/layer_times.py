"""A machine's time for layers, head and each run of a model, learned from the cuts of it that ran there.

Microseconds throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from mesh.types import ShardInfo
from scheduler.layer_speed import LayerSpeed, coarse_layer, head_layers_of, stage_speed
from scheduler.speed import FAR, TOLD_HASTE_S, StageSpeed

_CUTS = 16
"""That are remembered, the latest of them."""
_TOGETHER_S = 10.0
"""Cuts that were measured within so long of each other met the same machine."""
_SPELL_S, _SPELLS = 30.0, 4
"""A cut's time is the mean of so many spells of work, each at most so long: a machine that is shared is a tenth slower in one than
in the next."""
_OTHERWISE = 1.5
"""A cut that takes so many times what it took, or so much less, runs on a machine that works otherwise than it did (another
power mode, somebody else's work): others take as much longer. Less than that is a wobble of a shared machine, which others do not
inherit: after eight cuts had, each was off by more than it wobbles itself."""
_TOLD = 0.01
"""Share by which a figure must move before peers hear of it, however long ago they did: plans are chosen by less than a
twentieth."""
_LONG = 8
"""Layers of a shard of which ``run`` is looked at as a part."""
_OFF, _HEAD_OFF, _RUN_OFF = 0.05, 0.5, 2.0
"""Standard deviations: of what a cut was measured at in a spell, as a share of it; of what a head is held for before it was measured, as
a share of that; and of ``run`` around nothing, in layers."""
_LEAST_LAYER = 0.4
"""Of the mean, that a layer's time is believed to be at least: what says less contradicts itself."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A number of layers, with the head or without, and what it took in each spell, the latest first. ``last_us`` is what it was
    measured at ``at_s``, in a spell that began at ``since_s``."""

    layers: int
    last: bool
    spells: tuple[float, ...]
    last_us: float
    at_s: float
    since_s: float

    @property
    def decode(self) -> float:
        return sum(self.spells) / len(self.spells)

    def measured(self, decode: float, now_s: float) -> _Cut:
        """The same spell goes on, or another has begun."""
        if now_s - self.at_s > _TOGETHER_S or now_s - self.since_s > _SPELL_S:
            spells, since_s = (decode, *self.spells[: _SPELLS - 1]), now_s
        else:
            spells, since_s = (decode, *self.spells[1:]), self.since_s
        return _Cut(self.layers, self.last, spells, decode, now_s, since_s)

    def moved(self, decode: float) -> float:
        """How many times what it took it takes now; 1 where that is a wobble."""
        moved = decode / self.decode
        return moved if max(moved, 1 / moved) > _OTHERWISE else 1.0

    def scaled(self, moved: float) -> _Cut:
        return replace(self, spells=tuple(s * moved for s in self.spells))


class LayerTimes:
    """Folds in what cuts of a model in one form were measured at on this machine."""

    def __init__(self, known: LayerSpeed | None = None) -> None:
        """``known`` before any of them ran: of it the proportion of head and layer is believed until that is measured,
        and no more."""
        self._known = known
        self._heads = known.head / known.layer if known and known.layer > 0 else None
        self._told: LayerSpeed | None = None
        self._told_s = 0.0
        self._cuts: tuple[_Cut, ...] = ()
        """The latest first, each by its kind once."""
        self._latest: tuple[ShardInfo, StageSpeed] | None = None

    def add(self, shard: ShardInfo, speed: StageSpeed, now_s: float) -> None:
        """A replica's measured ``speed``. A machine that works otherwise than it did does so for cuts that were not measured
        since: what they are to each other is what is kept."""
        if self._latest == (shard, speed):
            return
        self._latest, self._known = (shard, speed), None
        before = self._like(shard)
        if before is not None and before.last_us == speed.decode:
            return
        if before is None:
            cut = _Cut(len(shard.layers), shard.last, (speed.decode,), speed.decode, now_s, now_s)
            moved = 1.0
        else:
            moved = before.moved(speed.decode)
            cut = before.scaled(moved).measured(speed.decode, now_s)
        others = (
            c if now_s - c.at_s < _TOGETHER_S else c.scaled(moved) for c in self._cuts if c is not before
        )
        self._cuts = (cut, *islice(others, _CUTS - 1))

    def speed(self) -> LayerSpeed | None:
        """By the layer; ``None`` where nothing is known."""
        if self._known is None and self._latest is not None:
            self._known = self._found(*self._latest)
        return self._known

    @property
    def ran(self) -> bool:
        """Something ran here."""
        return self._latest is not None

    def stage(self, shard: ShardInfo) -> StageSpeed | None:
        """What a shard is expected to take: as it did, where it ran before."""
        known = self.speed()
        if known is None:
            return None
        expected, before = stage_speed(shard, known), self._like(shard)
        return expected if before is None else replace(expected, decode=before.decode)

    def _like(self, shard: ShardInfo) -> _Cut | None:
        return next((c for c in self._cuts if (c.layers, c.last) == (len(shard.layers), shard.last)), None)

    def told(self, now_s: float) -> LayerSpeed | None:
        """What peers are told: with few digits, and the old figures while the new ones are close."""
        known = self.speed()
        if known is not None and not self._near(known, now_s):
            self._told, self._told_s = coarse_layer(known), now_s
        return self._told

    def _near(self, known: LayerSpeed, now_s: float) -> bool:
        told, age_s = self._told, now_s - self._told_s
        if told is None or told.head_known != known.head_known:
            return False
        moved = max(_TOLD, TOLD_HASTE_S / max(age_s, TOLD_HASTE_S))
        figures = ((told.layer, known.layer), (told.head, known.head), (told.prefill, known.prefill))
        layers = _LONG * known.layer
        return (
            all(abs(a - b) <= moved * b for a, b in figures)
            and abs(told.run - known.run) <= moved * layers
            and abs(told.context - known.context) * FAR <= moved * known.layer
            and abs(told.row_share - known.row_share) <= 4 * moved
        )

    def _found(self, shard: ShardInfo, speed: StageSpeed) -> LayerSpeed:
        """Rows, tail and contexts are the latest cut's."""
        layers = len(shard.layers)
        run, layer, head = _fitted(self._cuts, self._heads or head_layers_of(shard))
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
            len({c.last for c in self._cuts}) > 1,
            run,
        )


def _fitted(cuts: tuple[_Cut, ...], heads: float) -> tuple[float, float, float]:
    """``run``, ``layer`` and ``head`` that are likeliest for what cuts took, with what is likely beforehand (least squares with
    Gaussian priors, as in every text on ridge regression): ``run`` near nothing, ``head`` near ``heads`` layers."""
    unit = sum(c.decode for c in cuts) / sum(c.layers + heads * c.last for c in cuts)
    weights = [len(c.spells) ** 0.5 / (_OFF * c.decode) for c in cuts]
    rows = [(w, c.layers * w, c.last * w) for c, w in zip(cuts, weights, strict=True)]
    came = [c.decode * w for c, w in zip(cuts, weights, strict=True)]
    run_w, head_w = 1 / (_RUN_OFF * unit), 1 / (_HEAD_OFF * max(1.0, heads) * unit)
    rows += [(run_w, 0.0, 0.0), (0.0, -heads * head_w, head_w)]
    came += [0.0, 0.0]
    run, layer, head = (float(v) for v in np.linalg.lstsq(np.array(rows), np.array(came), rcond=None)[0])
    if layer < _LEAST_LAYER * unit or head < 0:
        return 0.0, unit, heads * unit
    return run, layer, head
