"""How fast a machine computes a model, by the layer, and what that says of shards that did not run there.

A decode step over ``n`` layers takes ``run + n * layer``, and ``head`` more where the last of the model is among them. ``run`` is
what a runtime takes to begin; on a processor with a quota it is below zero, for who idled has the next of it at once.
Microseconds throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh.types import Digest, LayerRange, ShardInfo
from scheduler.speed import GUESSED_TAIL, ROW_SHARE, StageSpeed

LEAST_SHARE = 1 / 3
"""Of what layers and head take that a step takes at least, however much of it ``run`` takes off."""
HEAD_SHARE = 0.65
"""Time of the head by its bytes, against a layer's: one large product where a layer is many small ones."""
_WEIGHT_BYTES = {"int8": 1 + 5 / 32, "fp32": 4.0}
"""Bytes a weight: blocks of 32 with a scale and a zero point, or none."""


@dataclass(frozen=True, slots=True)
class LayerSpeed:
    """What a node takes for a layer of a model and for its head: a decode step alone, each further row, a position of
    prefill. ``tail`` is the 99th percentile over the median."""

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
    head_known: bool = False
    """Both shards with the head and without it ran here: ``head`` over ``layer`` is no guess."""
    run: float = 0.0
    """Of each step, beside layers and head."""

    def stage(self, shard_layers: LayerRange, layers: int) -> float:
        """A decode step over a range of layers."""
        linear = len(shard_layers) * self.layer + (self.head if shard_layers.end == layers else 0.0)
        return max(linear + self.run, LEAST_SHARE * linear)


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


def probed_layer(
    model: Digest, runtime: str, quantization: str, layer: float, head: float, prefill: float
) -> LayerSpeed:
    """Of a form that was measured on a few layers and never ran. What batches and the tail take is guessed."""
    return LayerSpeed(model, runtime, quantization, layer, head, ROW_SHARE, prefill, GUESSED_TAIL)


def coarse_layer(speed: LayerSpeed) -> LayerSpeed:
    """Three digits of the two that plans are made with, one less of the others."""
    layer, head = float(f"{speed.layer:.3g}"), float(f"{speed.head:.3g}")
    row, prefill, tail, context, later, run = (
        float(f"{v:.2g}")
        for v in (
            speed.row_share,
            speed.prefill,
            speed.tail,
            speed.context,
            speed.prefill_context,
            speed.run,
        )
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
        run=run,
    )
