"""What a static shard's host looks up: rows of an embedding, and how far positions are turned."""

from __future__ import annotations

import numpy as np
import pytest

from node_agent.shards.quantize import BLOCK, QuantizedMatrix, quantize_int8
from node_agent.shards.static_tables import Tables, Turns

RANDOM = np.random.default_rng(5)
VALUES = RANDOM.standard_normal((20, 2 * BLOCK)).astype(np.float32)
TURNS = RANDOM.standard_normal((2, 1000, 64)).astype(np.float32)


@pytest.mark.parametrize("table", [VALUES, quantize_int8(VALUES)])
def test_a_row_of_the_embedding_is_the_same_alone_and_among_others(
    table: np.ndarray | QuantizedMatrix,
) -> None:
    tables, tokens = Tables(TURNS, table), np.array([7, 0, 19, 7])
    rows = tables.embed(tokens)
    assert np.abs(rows - VALUES[tokens]).max() < 0.02
    for token in tokens:
        alone = tables.embed(np.array([token]))
        assert alone.shape == (1, 2 * BLOCK)
        assert np.array_equal(alone[0], tables.embed(np.array([3, token]))[1])


def test_queries_turn_scaled_keys_as_they_are_and_values_not_at_all() -> None:
    turns = Turns(TURNS, 3)
    for begin, end in ((0, 1), (5, 69), (255, 260), (990, 1000)):
        found = turns.between(begin, end)
        assert found.shape == (2, end - begin, 5, 64)
        wanted = TURNS[:, begin:end]
        assert np.array_equal(found[:, :, 2], wanted * np.float32(0.125))  # 64 ** -0.5 rounds nothing
        assert np.array_equal(found[:, :, 3], wanted)
        assert (found[0, :, 4] == 1).all()
        assert not found[1, :, 4].any()
    assert np.array_equal(turns.at(700), turns.between(700, 701)[:, 0])
