"""KV memory of a session that outgrows its bucket."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from node_agent.adapters.static_slots import Slot

MANIFEST: Any = SimpleNamespace(kv_heads=2, head_dim=3, layers=(4, 6))
ARRAYS = ("k.4", "v.4", "k.5", "v.5")


class Engine:
    """Counts what is bound."""

    def __init__(self) -> None:
        self.bound = 0

    def bind(self, memory: Any) -> int:
        self.bound += 1
        return id(memory)

    def unbind(self, memory: Any) -> None:
        self.bound -= 1


def begun(engine: Any, bucket: int = 16) -> Slot:
    slot = Slot(engine, MANIFEST, bucket)
    slot.begin()
    return slot


def wrote(slot: Slot, position: int, value: float, steps: int = 1) -> None:
    """Every array gets rows of its own."""
    rows = np.zeros((len(ARRAYS), 1, 2, steps, 3), dtype=np.float32)
    rows += value + np.arange(len(ARRAYS), dtype=np.float32)[:, None, None, None, None] / 8
    slot.write(rows, position, steps)


def test_memory_of_the_next_bucket_comes_an_array_a_step_and_is_let_go_of_with_the_session() -> None:
    engine = Engine()
    slot = begun(engine)
    found = []
    for position in range(10, 16):
        wrote(slot, position, position)
        slot.near(position, 32)
        found.append(engine.bound - len(ARRAYS))
    assert found == [0, 0, 1, 2, 3, 4]
    slot.close()
    assert engine.bound == 0


def test_memory_that_came_for_another_bucket_is_let_go_of() -> None:
    engine = Engine()
    slot = begun(engine)
    wrote(slot, 15, 15.0)
    slot.near(15, 32)
    grown = slot.moved(16, 48)
    assert grown.memory.shape == (len(ARRAYS), 1, 2, 48, 3)
    assert grown.memory[-1, 0, 0, 15, 0] == 15 + 3 / 8
    assert engine.bound == len(ARRAYS)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 3), st.booleans()), max_size=40))
def test_rows_are_what_was_written_last_however_the_session_went_back(
    moves: list[tuple[int, int, bool]],
) -> None:
    slot, expected = begun(Engine()), np.zeros(16, dtype=np.float32)
    for at, (position, steps, stepped) in enumerate(moves):
        length = 1 if stepped else min(steps, 16 - position)
        wrote(slot, position, at + 1, length)
        expected[position : position + length] = at + 1
        if stepped:
            slot.near(position, 32)
    grown = slot.moved(16, 32)
    for i in range(len(ARRAYS)):
        rows = grown.memory[i, 0, 1, :16, 2]
        assert np.array_equal(rows[expected > 0], expected[expected > 0] + i / 8)
