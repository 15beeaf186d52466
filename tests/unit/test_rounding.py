"""Inputs that peak, rounded to 8 bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from node_agent.shards.reference import peak_limit, rounded, rounding_loss


def peaking(seed: int, peak: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An input with one entry a row that is larger by ``peak``, a matrix, and their product."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((20, 96)).astype(np.float32)
    x[np.arange(20), draw.integers(0, 96, 20)] *= np.float32(peak)
    matrix = draw.standard_normal((32, 96)).astype(np.float32)
    return x, matrix, x @ matrix.T


@given(st.integers(0, 1000), st.floats(50, 1000))
def test_parted_at_the_limit_that_is_found_half_as_much_is_lost(seed: int, peak: float) -> None:
    x, matrix, out = peaking(seed, peak)
    assert rounding_loss(x, matrix, out, peak_limit(x, matrix, out)) < 0.5 * rounding_loss(x, matrix, out)


def test_what_is_beyond_a_limit_that_nothing_reaches_is_zero() -> None:
    x, matrix, out = peaking(1, 50.0)
    assert rounding_loss(x, matrix, out, 1e6) == rounding_loss(x, matrix, out)
    assert not rounded(np.zeros((2, 3), dtype=np.float32)).any()
