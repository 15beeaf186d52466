"""A test vector has to see what is wrong in any position, however large the first one's activations are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.shards.deviation import deviation, logits_deviation, relative_error

POSITIONS, WIDTH = 18, 64
TOLERANCE = 0.25
"""The widest that any form has."""


def passing_through(seed: int = 0) -> tuple[Any, Any]:
    """Inputs and outputs of a layer in the middle of a model: the first position's are a hundred times all others', and pass."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((POSITIONS, WIDTH))
    inputs[0] *= 100
    return inputs, inputs + 0.3 * draw.standard_normal((POSITIONS, WIDTH))


def test_what_is_wanted_deviates_by_nothing() -> None:
    inputs, outputs = passing_through()
    assert deviation(inputs, outputs, outputs) == 0.0
    tokens = np.arange(POSITIONS)
    assert deviation(tokens, outputs, outputs) == 0.0
    assert logits_deviation(outputs + 1000.0, outputs) < 1e-9  # no softmax sees that


@pytest.mark.parametrize("wrong", [slice(1, 17), slice(17, 18), slice(0, 18)], ids=["chunk", "last", "all"])
def test_a_shard_that_adds_nothing_is_seen_to_be_wrong(wrong: slice) -> None:
    inputs, outputs = passing_through()
    computed = outputs.copy()
    computed[wrong] = inputs[wrong]
    assert relative_error(computed, outputs) < 0.02  # by this alone it would serve
    assert deviation(inputs, computed, outputs) > 2 * TOLERANCE


def test_one_value_that_is_none_is_seen() -> None:
    inputs, outputs = passing_through()
    computed = outputs.copy()
    computed[5, 5] = np.nan
    assert not deviation(inputs, computed, outputs) <= TOLERANCE
    assert not logits_deviation(computed, outputs) <= TOLERANCE


def test_a_shard_that_is_to_add_nothing_must_add_nothing() -> None:
    inputs, _ = passing_through()
    assert deviation(inputs, inputs, inputs) == 0.0
    assert deviation(inputs, inputs + 1e-3, inputs) > TOLERANCE


def test_another_shape_is_as_wrong_as_can_be() -> None:
    inputs, outputs = passing_through()
    assert deviation(inputs, outputs[:-1], outputs) == float("inf")
    assert logits_deviation(outputs[:-1], outputs) == float("inf")


@given(st.integers(0, 2**32), st.floats(0, 2))
def test_it_is_never_less_than_the_error_of_the_whole(seed: int, size: float) -> None:
    inputs, outputs = passing_through(seed)
    computed = outputs + size * np.random.default_rng(seed + 1).standard_normal(outputs.shape)
    assert deviation(inputs, computed, outputs) >= relative_error(computed, outputs)


def test_of_logits_the_worst_position_counts() -> None:
    _, logits = passing_through()
    computed = logits.copy()
    computed[1] = 0.0
    assert relative_error(computed, logits) < 0.02
    assert logits_deviation(computed, logits) == pytest.approx(1.0)
