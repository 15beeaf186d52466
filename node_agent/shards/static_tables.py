"""What a LiteRT shard keeps beside its graph for the host to look up: rotary tables, and the embedding of a first shard.

A row of the embedding is a look-up, not arithmetic: gathering it here costs microseconds, and leaves the graph with one
kind of input whatever the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from node_agent.shards.quantize import BLOCK, QuantizedMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_TURNS_LEAST = 256
"""Positions that are made at once, at least."""
_ROPE, _EMBEDDING = "rope.npy", "embedding.npy"
_BLOCKS = {part: f"embedding.{part}.npy" for part in ("values", "scales", "zeros")}


@dataclass(frozen=True, slots=True)
class Tables:
    """``turns`` float32 ``[2, positions, head_dim]``: cosines and sines, of the halves of a head, the first one's sines negated;
    ``embedding`` of a first shard."""

    turns: Array
    embedding: Array | QuantizedMatrix | None

    def embed(self, tokens: NDArray[np.int64]) -> Array:
        """Rows of the embedding, float32 ``[tokens, width]``."""
        table = self.embedding
        assert table is not None
        # A step waits for its token's row, which is sooner looked at where it is than gathered.
        which: Any = slice(tokens[0], tokens[0] + 1) if len(tokens) == 1 else tokens
        if not isinstance(table, QuantizedMatrix):
            found: Array = table[which]
            return found
        count, width = len(tokens), table.values.shape[1]
        rows: Array = table.values[which].reshape(count, width // BLOCK, BLOCK).astype(np.float32)
        rows -= table.zeros[which][..., None]
        rows *= table.scales[which][..., None]
        return rows.reshape(count, width)


class Turns:
    """Cosines and sines as ``static_network`` wants them, ``[2, positions, group + 2, head_dim]``, of as many positions as sessions came
    to: those of a whole context take megabytes, and to make a position's takes a step longer than to look it up."""

    def __init__(self, turns: Array, group: int) -> None:
        """``turns`` as tables have them; ``group``: queries that share a key."""
        self._turns, self._group = turns, group
        self._made = self._of(0)

    def _of(self, positions: int) -> Array:
        turns = self._turns[:, :positions, None]
        made = np.zeros((2, turns.shape[1], self._group + 2, turns.shape[3]), dtype=np.float32)
        made[:, :, : self._group] = turns * np.float32(turns.shape[3] ** -0.5)
        made[:, :, self._group : -1] = turns
        made[0, :, -1] = 1.0
        return made

    def between(self, begin: int, end: int) -> Array:
        if end > self._made.shape[1]:
            self._made = self._of(max(_TURNS_LEAST, 2 * end))
        return self._made[:, begin:end]

    def at(self, position: int) -> Array:
        """Of one: ``[2, group + 2, head_dim]``."""
        return self.between(position, position + 1)[:, 0]


def table_files(
    cos: Array, sin: Array, embedding: Array | QuantizedMatrix | None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Files by name; ``cos`` and ``sin`` as ``architecture.rope_tables`` makes them."""
    yield _ROPE, np.stack([np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)])
    if isinstance(embedding, QuantizedMatrix):
        for part, file in _BLOCKS.items():
            yield file, getattr(embedding, part)
    elif embedding is not None:
        yield _EMBEDDING, embedding


def read_tables(files: Collection[str], read: Callable[[str], NDArray[Any]]) -> Tables:
    """``files``: of the shard; ``read`` gives the array in one of them, mapped: only the rows that are used are read."""

    def plain(file: str) -> NDArray[Any]:
        return np.asarray(read(file))  # each operation on a ``memmap`` runs some of its class

    embedding: Array | QuantizedMatrix | None = None
    if _EMBEDDING in files:
        embedding = plain(_EMBEDDING)
    elif _BLOCKS["values"] in files:
        embedding = QuantizedMatrix(*(plain(file) for file in _BLOCKS.values()))
    return Tables(plain(_ROPE), embedding)
