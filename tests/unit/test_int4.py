"""4-bit matrices whose offsets are folded into them, and inputs that are evened out for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from node_agent.shards.quantize import (
    BLOCK,
    SUMS_PART,
    BlockedInt4,
    fold_offsets,
    quantize_int4,
    times_blocks,
)
from node_agent.shards.reference import even_blocks, rounded

Array = NDArray[np.float32]


def values(matrix: BlockedInt4) -> NDArray[np.float64]:
    """What a matrix stands for, ``[rows, columns]``."""
    nibbles = np.stack([matrix.packed & 15, matrix.packed >> 4], axis=2).astype(np.int64)
    numbers = (nibbles.reshape(len(nibbles), -1, BLOCK) ^ 8) - 8
    made = numbers * matrix.scales[..., None].astype(np.float64) + matrix.offsets[..., None]
    return np.asarray(made.reshape(matrix.shape))


def with_sums(x: Array) -> Array:
    """An input as a folded matrix wants it."""
    sums = SUMS_PART * x.reshape(len(x), -1, BLOCK).sum(axis=2)
    wide = np.pad(sums, ((0, 0), (0, -sums.shape[1] % BLOCK)))
    return np.concatenate([x, wide, wide], axis=1)


def some(seed: int, rows: int, blocks: int) -> tuple[Array, BlockedInt4]:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((3, blocks * BLOCK)).astype(np.float32)
    matrix = draw.standard_normal((rows, blocks * BLOCK)) * draw.uniform(0.01, 2.0, (rows, 1)) + 0.1
    return x, quantize_int4(matrix.astype(np.float32))


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([1, 2, 18, 31, 32, 33, 48, 64, 65]))
def test_folded_offsets_are_off_by_half_a_unit_of_255(seed: int, rows: int, blocks: int) -> None:
    x, matrix = some(seed, rows, blocks)
    folded = fold_offsets(matrix)
    assert folded.packed.shape == (rows, with_sums(x).shape[1] // 2)
    assert folded.scales.shape == folded.offsets.shape == (rows, with_sums(x).shape[1] // BLOCK)
    assert not folded.offsets.any()
    error = np.abs(with_sums(x) @ values(folded).T - x @ values(matrix).T)
    # A unit is rounded up to a number of 8 bits, and offsets to a whole number of units.
    unit = np.abs(matrix.offsets).max(axis=1) / 119 * (1 + 2**-7)
    moved = np.abs(x.reshape(len(x), -1, BLOCK).sum(axis=2)).sum(axis=1)
    assert (error <= 0.51 * np.outer(moved, unit) + 1e-5).all()


def test_offsets_of_nothing_and_of_the_least_fold() -> None:
    _, matrix = some(1, 4, 2)
    for size in (0.0, 1e-7):
        folded = fold_offsets(replace(matrix, offsets=np.full_like(matrix.offsets, size)))
        assert np.isfinite(folded.scales).all()
        assert (folded.scales > 0).all()
        assert np.abs(values(folded)[:, 2 * BLOCK :]).max() <= size / SUMS_PART


@given(st.integers(0, 1000), st.lists(st.integers(-2, 4), min_size=3, max_size=3))
def test_blocks_times_powers_of_two_are_exact(seed: int, powers: list[int]) -> None:
    _, matrix = some(seed, 4, 3)
    factors = np.exp2(np.array(powers)).astype(np.float32)
    assert np.array_equal(values(times_blocks(matrix, factors)), values(matrix) * np.repeat(factors, BLOCK))


def lost(x: Array, matrix: Array, factors: Array) -> float:
    """By rounding what is given of an evened input, over what the product is."""
    given_ = with_sums((x / np.repeat(factors, BLOCK)).astype(np.float32))
    columns = x.shape[1]
    off = (rounded(given_) - given_)[:, :columns] * np.repeat(factors, BLOCK)
    return float(np.linalg.norm(off @ matrix.T) / np.linalg.norm(x @ matrix.T))


@given(st.integers(0, 1000), st.floats(20, 200))
def test_a_loud_block_takes_less_from_the_others_when_inputs_are_evened(seed: int, loud: float) -> None:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((64, 18 * BLOCK)).astype(np.float32)
    which = int(draw.integers(0, 18)) * BLOCK + int(draw.integers(0, BLOCK))
    x[:, which] *= loud
    matrix = draw.standard_normal((96, 18 * BLOCK)).astype(np.float32)
    matrix[:, which] /= loud  # as trained matrices have it: the loud channel is not all that matters
    factors = even_blocks(x[:24], matrix)
    assert factors[which // BLOCK] > 1
    assert lost(x[24:], matrix, factors) < 0.8 * lost(x[24:], matrix, np.ones(18, dtype=np.float32))


def test_inputs_that_are_even_stay_as_they_are_and_silent_blocks_keep_their_digits() -> None:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((64, 6 * BLOCK)).astype(np.float32)
    matrix = draw.standard_normal((8, 6 * BLOCK)).astype(np.float32)
    assert np.array_equal(even_blocks(x, matrix), np.ones(6))
    x[:, :BLOCK] = 0.0
    assert even_blocks(x, matrix).min() >= 0.25
    assert np.isfinite(even_blocks(np.zeros_like(x), matrix)).all()
