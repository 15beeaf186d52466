"""A machine's time for layers and head, from shards of other cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.types import Digest, LayerRange, ModelRef, ModelShape, ShardInfo
from scheduler.speed import (
    LayerSpeed,
    SpeedMeter,
    StageSpeed,
    growth_of,
    guess,
    head_layers_of,
    layer_speed,
    probed_layer,
    stage_speed,
)
from tests.builders import CAPABILITIES

SHAPE = ModelShape(ModelRef("llm", Digest("a" * 64)), 30, 576, 49_152, 2048)


def shard(start: int, end: int) -> ShardInfo:
    """As of a model of 135 M parameters at int8."""
    weights = (end - start) * 4_100_000 + (33_000_000 if end == 30 else 0)
    return ShardInfo(SHAPE, LayerRange(start, end), "onnx", "int8", Digest("d" * 64), weights, 1536)


def steps(decode: float) -> StageSpeed:
    return StageSpeed(decode, 100.0, 400.0, 2 * decode, measured=True)


def probed() -> LayerSpeed:
    """On a machine that was eight times as fast as it is now."""
    return probed_layer(SHAPE.ref.digest, "onnx", "int8", 150.0, 800.0, 34.0)


def test_a_head_is_not_blamed_for_a_machine_that_is_slower_than_its_probe() -> None:
    """Only a last shard ran: layers and head keep the probe's proportion."""
    known = probed()
    for _ in range(5):
        known = layer_speed(shard(22, 30), steps(16_000), known)
    assert known.layer == pytest.approx(1200, rel=0.01)
    assert known.head == pytest.approx(6400, rel=0.01)
    assert known.stage(LayerRange(22, 30), 30) == pytest.approx(16_000)
    # The next cut has no head: what it says of layers is not multiplied into a monstrous one.
    known = layer_speed(shard(0, 8), steps(8 * 1000), known)
    assert (known.layer, known.head) == pytest.approx((1000, 5333), rel=0.01)


def test_a_head_is_what_layers_leave_once_they_were_measured_without_it() -> None:
    known = layer_speed(shard(0, 8), steps(8 * 1000), probed())
    assert not known.head_known
    known = layer_speed(shard(22, 30), steps(8 * 1000 + 7000), known)
    assert (known.layer, known.head) == pytest.approx((1000, 7000))
    assert known.head_known
    assert layer_speed(shard(8, 15), steps(7 * 1500), known).head == pytest.approx(1.5 * 7000)


def test_a_machine_that_slows_down_slows_layers_and_head() -> None:
    known = layer_speed(
        shard(22, 30), steps(8 * 1000 + 5000), layer_speed(shard(0, 8), steps(8 * 1000), None)
    )
    assert (known.layer, known.head) == pytest.approx((1000, 5000))
    for percent in range(100, 501, 5):
        known = layer_speed(shard(22, 30), steps(13_000 * percent / 100), known)
    assert known.layer > 2500
    assert known.head < 3 * head_layers_of(shard(22, 30)) * known.layer


def test_nothing_known_is_parted_by_bytes() -> None:
    last = shard(22, 30)
    known = layer_speed(last, steps(16_000), None)
    assert known.head / known.layer == pytest.approx(head_layers_of(last))


def test_a_step_grows_with_its_context_before_that_was_seen() -> None:
    """By bytes: keys and values of what came before are read as weights are. Of 135 M parameters at int8, a third in 1,000
    positions; measured were 0.36 to 0.39 in 920."""
    part = replace(shard(5, 25), kv_bytes_per_token=20 * 1536)
    assert growth_of(part) * 1000 == pytest.approx(0.375, rel=0.01)
    for prior in (guess(part, CAPABILITIES), stage_speed(part, probed())):
        meter = SpeedMeter(prior)
        for i in range(60):
            # Eight times slower than its prior: the proportion is what is kept.
            meter.decoded(1, 8 * prior.step(1, 100 + i % 40), 1.0, 100 + i % 40)
        learned = meter.speed(1.0)
        assert learned.step(1, 1000) == pytest.approx(8 * prior.step(1, 1000), rel=0.01)
        assert learned.step(1, 1000) > 1.2 * learned.decode


def test_what_was_fitted_of_contexts_counts_more_than_bytes() -> None:
    part = replace(shard(5, 25), kv_bytes_per_token=20 * 1536)
    fitted = replace(probed(), context=0.1)
    assert stage_speed(part, fitted).context == pytest.approx(20 * 0.1)
    assert stage_speed(part, probed()).context == pytest.approx(20 * 150 * growth_of(part))
