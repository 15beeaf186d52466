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

_ROPE, _EMBEDDING = "rope.npy", "embedding.npy"
_BLOCKS = {part: f"embedding.{part}.npy" for part in ("values", "scales", "zeros")}


@dataclass(frozen=True, slots=True)
class Tables:
    """``cos`` and ``sin`` float32 ``[positions, head_dim]``, as the graph wants them; ``embedding`` of a first shard."""

    cos: Array
    sin: Array
    embedding: Array | QuantizedMatrix | None

    def embed(self, tokens: NDArray[np.int64]) -> Array:
        """Rows of the embedding, float32 ``[tokens, width]``."""
        table = self.embedding
        assert table is not None
        if not isinstance(table, QuantizedMatrix):
            return np.asarray(table[tokens])
        count, width = len(tokens), table.values.shape[1]
        values = table.values[tokens].reshape(count, width // BLOCK, BLOCK).astype(np.float32)
        rows: Array = (values - table.zeros[tokens][..., None]) * table.scales[tokens][..., None]
        return rows.reshape(count, width)


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
    cos, sin = np.asarray(read(_ROPE))
    embedding: Array | QuantizedMatrix | None = None
    if _EMBEDDING in files:
        embedding = read(_EMBEDDING)
    elif _BLOCKS["values"] in files:
        embedding = QuantizedMatrix(*(read(file) for file in _BLOCKS.values()))
    return Tables(cos, sin, embedding)
