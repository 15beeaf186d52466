"""A machine's time for layers, head and each run, from shards of other cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.types import Digest, LayerRange, ModelRef, ModelShape, ShardInfo
from scheduler.layer_speed import (
    LEAST_SHARE,
    LayerSpeed,
    growth_of,
    head_layers_of,
    probed_layer,
    stage_speed,
)
from scheduler.layer_times import LayerTimes
from scheduler.speed import SpeedMeter, StageSpeed, guess
from tests.builders import CAPABILITIES

SHAPE = ModelShape(ModelRef("llm", Digest("a" * 64)), 30, 576, 49_152, 2048)


def shard(start: int, end: int) -> ShardInfo:
    """As of a model of 135 M parameters at int8."""
    weights = (end - start) * 4_100_000 + (33_000_000 if end == 30 else 0)
    return ShardInfo(SHAPE, LayerRange(start, end), "onnx", "int8", Digest("d" * 64), weights, 1536)


def steps(decode: float) -> StageSpeed:
    return StageSpeed(decode, 100.0, 400.0, 2 * decode, measured=True)


def measured(
    *cuts: tuple[int, int, float], known: LayerSpeed | None = None, every_s: float = 1.0
) -> LayerSpeed:
    """From shards of these layers that took so long, one after another."""
    times = LayerTimes(known)
    for i, (start, end, decode) in enumerate(cuts):
        times.add(shard(start, end), steps(decode), i * every_s)
    found = times.speed()
    assert found is not None
    return found


def limited(layers: int, share: float = 0.3, layer: float = 800.0) -> float:
    """A step on a processor of which a quota leaves ``share``, the first millisecond of each free."""
    return (layers * layer - 1000) / share


def probed() -> LayerSpeed:
    """On a machine that was eight times as fast as it is now."""
    return probed_layer(SHAPE.ref.digest, "onnx", "int8", 150.0, 800.0, 34.0)


def test_nothing_is_known_until_something_ran_or_was_probed() -> None:
    assert LayerTimes().speed() is None
    assert LayerTimes(probed()).speed() == probed()


def test_a_head_is_not_blamed_for_a_machine_that_is_slower_than_its_probe() -> None:
    """Only a last shard ran: layers and head keep the probe's proportion."""
    known = measured(*[(22, 30, 16_000.0)] * 5, known=probed())
    assert known.layer == pytest.approx(1200, rel=0.01)
    assert known.head == pytest.approx(6400, rel=0.01)
    assert known.stage(LayerRange(22, 30), 30) == pytest.approx(16_000)
    assert not known.head_known


def test_a_head_is_what_layers_leave_once_they_were_measured_without_it() -> None:
    assert not measured((0, 8, 8 * 1000.0), known=probed()).head_known
    known = measured((0, 8, 8 * 1000.0), (22, 30, 8 * 1000 + 7000.0), known=probed())
    assert (known.layer, known.head) == pytest.approx((1000, 7000), rel=0.1)
    assert known.head_known


def test_cuts_that_were_not_measured_since_slow_down_with_the_one_that_was() -> None:
    cuts = [(0, 8, 8 * 1000.0), (22, 30, 13_000.0)]
    before = measured(*cuts)
    for last in (20_000.0, 65_000.0):
        # Each a spell of its own, until all that count are of the slower machine.
        after = measured(*cuts, *[(22, 30, last), (22, 30, last + 1)] * 2, every_s=30.5)
        assert after.layer / before.layer == pytest.approx(last / 13_000, rel=0.01)
        assert after.head / before.head == pytest.approx(last / 13_000, rel=0.01)


def test_a_wobble_of_one_cut_is_not_inherited_by_others() -> None:
    """Each of forty spells of one cut is a tenth off: what another took is known as it was."""
    wobbling = [(22, 30, 13_000 * (0.9 if i % 3 else 1.1)) for i in range(40)]
    times = LayerTimes()
    for i, (start, end, decode) in enumerate([(0, 8, 8_000.0), *wobbling]):
        times.add(shard(start, end), steps(decode), i * 31.0)
    expected = times.stage(shard(0, 8))
    assert expected is not None
    assert expected.decode == 8_000


def test_cuts_that_are_measured_together_keep_their_own_figures() -> None:
    """Two shards at work on one node tell in turn."""
    cuts = [(0, 8, 8 * 1000.0), (22, 30, 13_000.0)] * 3 + [(0, 8, 8 * 900.0), (22, 30, 14_200.0)]
    known = measured(*cuts)  # one spell: what was measured last is of more steps
    assert known.stage(LayerRange(0, 8), 30) == pytest.approx(7200, rel=0.05)
    assert known.stage(LayerRange(22, 30), 30) == pytest.approx(14_200, rel=0.05)


def test_nothing_known_is_parted_by_bytes() -> None:
    known = measured((22, 30, 16_000.0))
    assert known.head / known.layer == pytest.approx(head_layers_of(shard(22, 30)))


def test_what_a_run_takes_beside_its_layers_is_learned_from_cuts_of_unlike_length() -> None:
    """Of what it takes off short steps on a processor with a quota, most is known after two cuts."""
    one = measured((0, 15, limited(15)))
    two = measured((0, 15, limited(15)), (15, 20, limited(5)))
    assert one.run == pytest.approx(0, abs=1e-6)
    for layers in (3, 8, 20):
        far, near = (k.stage(LayerRange(0, layers), 30) / limited(layers) - 1 for k in (one, two))
        assert abs(near) < abs(far) / 2
    begins = measured((0, 15, 15 * 250.0 + 900), (0, 4, 4 * 250.0 + 900), (4, 8, 4 * 250.0 + 900))
    assert begins.run == pytest.approx(900, rel=0.5)


def test_cuts_that_contradict_each_other_tell_a_rate_only() -> None:
    """Fifteen layers in a quick moment, five in a very slow one: no layer takes less than nothing."""
    known = measured((0, 15, 10_000.0), (0, 5, 20_000.0))
    assert (known.run, known.layer) == pytest.approx((0, 30_000 / 20), abs=1e-6)


@given(
    st.lists(
        st.tuples(st.integers(0, 29), st.integers(1, 30), st.floats(1.0, 1e7)), min_size=1, max_size=20
    ).map(lambda cuts: [(start, end, us) for start, end, us in cuts if start < end]),
    st.floats(0.01, 100.0),
)
def test_whatever_was_measured_every_step_takes_time(
    cuts: list[tuple[int, int, float]], every_s: float
) -> None:
    if not cuts:
        return
    known = measured(*cuts, every_s=every_s)
    assert known.layer > 0
    assert known.head >= 0
    for start, end in ((0, 1), (29, 30), (0, 30)):
        linear = (end - start) * known.layer + (known.head if end == 30 else 0)
        assert known.stage(LayerRange(start, end), 30) >= LEAST_SHARE * linear > 0


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


def test_peers_hear_of_a_layer_when_it_moved_and_the_sooner_the_more() -> None:
    times = LayerTimes()
    assert times.told(0.0) is None
    times.add(shard(0, 8), steps(8_000), 0.0)
    first = times.told(0.0)
    assert first is not None
    times.add(shard(0, 8), steps(8_400), 1.0)
    assert times.told(1.0) is first
    moved = times.told(5.0)
    assert moved is not None
    assert moved.layer == pytest.approx(1050)
    times.add(shard(0, 8), steps(8_450), 60.0)
    assert times.told(60.0) is moved


def test_spells_of_a_shared_machine_are_averaged() -> None:
    """In one it was a tenth faster, in another a tenth slower: a plan that hung on the last would be a tenth off."""
    wobbling = [(0, 10, 10_000 * share) for share in (1.1, 0.9, 1.05, 0.95)]
    assert measured(*wobbling, every_s=60.0).layer == pytest.approx(1000, rel=0.01)
    assert measured(*wobbling, every_s=1.0).layer == pytest.approx(950, rel=0.01)


def test_what_ran_here_before_counts_until_enough_has_run_again() -> None:
    prior = steps(1000)
    known, guessed = SpeedMeter(prior, ran=True), SpeedMeter(prior)
    for meter in (known, guessed):
        assert meter.own is None
        for _ in range(12 + 96):
            meter.decoded(1, 1200.0, 1.0)
    assert known.speed(1.0).decode == pytest.approx(1100)
    assert guessed.speed(1.0).decode == pytest.approx(1200)
    assert known.own is not None
    assert known.own.decode == pytest.approx(1200)
    for _ in range(96):
        known.decoded(1, 1200.0, 1.0)
    assert known.speed(1.0).decode == pytest.approx(1200)


def test_a_cut_that_ran_before_is_expected_to_take_what_it_took() -> None:
    times = LayerTimes()
    assert times.stage(shard(0, 8)) is None
    for start, end, decode in ((0, 8, 8_000.0), (8, 20, 15_000.0), (22, 30, 13_000.0)):
        times.add(shard(start, end), steps(decode), 0.0)
    for start, end, decode in ((8, 16, 8_000.0), (8, 20, 15_000.0), (22, 30, 13_000.0)):
        expected = times.stage(shard(start, end))
        assert expected is not None
        assert expected.decode == decode
