"""KV memory of a static shard's sessions, one after the other in context buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from node_agent.adapters.pages import arrays
from node_agent.adapters.static_engine import Engine
from node_agent.adapters.static_graphs import BoundGraph, kv_names
from node_agent.shards.manifest import ShardManifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


class Slot:
    """KV memory of one session, in one bucket. The next one's is filled an array a step as the end comes near: to move all of
    them in one step takes as long as several steps."""

    def __init__(self, engine: Engine, manifest: ShardManifest, bucket: int) -> None:
        self._engine, self._manifest, self.bucket = engine, manifest, bucket
        self._names = kv_names(manifest)
        self.memory = arrays(len(self._names), (1, manifest.kv_heads, bucket, manifest.head_dim))
        """By array as they are named, in one piece: a step's rows are written at once."""
        self.bound: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        """By graph, all that it is given."""
        self._rows = [0] * len(self._names)
        """Of each array, those that it has from the slot before."""
        self.filled = 0
        """Positions that its session has, as of the last run."""
        self._next: Slot | None = None

    def begin(self) -> None:
        """Of a session that has nothing."""
        for number in range(len(self._names)):
            self._bind(number)

    def _bind(self, number: int) -> None:
        name = self._names[number]
        if name not in self.bound:
            self.bound[name] = self._engine.bind(self.memory[number])

    def run(self, graph: BoundGraph) -> None:
        """Compute a graph over this memory."""
        inputs = self._inputs.get(graph.name)
        if inputs is None:
            inputs = self._inputs[graph.name] = graph.inputs(self.bound)
        graph.run(inputs)

    def near(self, position: int, bucket: int) -> None:
        """A step at ``position`` was written; ``bucket`` comes after this one."""
        left = self.bucket - 1 - position
        if 0 <= left < len(self._names):
            self._next = self._next or Slot(self._engine, self._manifest, bucket)
            self._next._copy(self, left, position + 1)

    def _copy(self, before: Slot, number: int, positions: int) -> None:
        self._bind(number)
        rows = slice(self._rows[number], positions)
        self.memory[number, :, :, rows] = before.memory[number, :, :, rows]
        self._rows[number] = positions

    def moved(self, positions: int, bucket: int) -> Slot:
        """One for another bucket, with so many of these rows; this one is no more."""
        after, self._next = self._next, None
        if after is None or after.bucket != bucket:
            if after is not None:
                after.close()
            after = Slot(self._engine, self._manifest, bucket)
        after._take(self, positions)
        self.close()
        return after

    def copied(self, positions: int, bucket: int) -> Slot:
        """Another session's, in a bucket, that begins with so many of these rows."""
        after = Slot(self._engine, self._manifest, bucket)
        after._take(self, positions)
        return after

    def _take(self, before: Slot, positions: int) -> None:
        for number in range(len(self._names)):
            self._copy(before, number, positions)
        self.filled = min(before.filled, positions)

    def _written(self, position: int, steps: int) -> None:
        """Rows from ``position`` on are others now."""
        if position <= self.filled:  # else it is a row that nobody reads
            self.filled = position + steps
        if self._next is not None:
            self._next._rows = [min(rows, position) for rows in self._next._rows]

    def write(self, new: Array, position: int, steps: int) -> None:
        """Rows of a chunk, ``[arrays, 1, kv_heads, chunk, head_dim]``."""
        self._written(position, steps)
        self.memory[:, :, :, position : position + steps] = new[:, :, :, :steps]

    def close(self) -> None:
        """Let go of the memory."""
        for bound in self.bound.values():
            self._engine.unbind(bound)
        if self._next is not None:
            self._next.close()

    def clear(self, position: int, steps: int) -> None:
        """Zeros, where rows of a chunk are to come."""
        self.memory[:, :, :, position : position + steps] = 0.0

    def write_row(self, new: Array, position: int, row: int) -> None:
        """One of a step of several sessions, ``[arrays, sessions, kv_heads, 1, head_dim]``."""
        self._written(position, 1)
        self.memory[:, 0, :, position] = new[:, row, :, 0]
