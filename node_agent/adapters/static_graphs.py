"""Graphs of a static shard with everything bound that they are given and give, but for the KV memory of slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from node_agent.adapters.pages import arrays, pages
from node_agent.adapters.static_engine import Engine
from node_agent.shards.manifest import ShardManifest
from node_agent.shards.static_names import batch_name, head_name, run_name, steps_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_MASKED = np.float32(-1e9)


class _Mask:
    """What is added to a row's scores. ``shape`` ends in ``bucket`` positions before the chunk and the chunk itself."""

    def __init__(self, shape: tuple[int, ...], bucket: int) -> None:
        self.array = pages(shape)
        self.array[..., :bucket] = _MASKED
        self._open = 0
        """Positions before the chunk that are seen."""

    def open_to(self, position: int) -> None:
        if position > self._open:
            self.array[..., self._open : position] = 0.0
        else:
            self.array[..., position : self._open] = _MASKED
        self._open = position


class _OwnMask:
    """What is added to the scores of rows that stand for steps: each sees what is before it, and itself."""

    def __init__(self, shape: tuple[int, ...], chunk: int) -> None:
        self.array = pages(shape)
        self._by_row = self.array[0, 0, :, :-1].reshape(-1, chunk, shape[-1] - 1)

    def open_to(self, position: int) -> None:
        for row in range(self._by_row.shape[1]):
            self._by_row[:, row, : position + row] = 0.0
            self._by_row[:, row, position + row :] = _MASKED


class _Places:
    """Where in the cache a chunk's rows stand: ``[1, kv_heads, chunk, bucket]``, a one each."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.array = pages(shape)

    def open_to(self, position: int) -> None:
        self.array[:] = 0.0
        _, _, chunk, bucket = self.array.shape
        for row in range(min(chunk, bucket - position)):
            self.array[:, :, row, position + row] = 1.0


class _Given(Protocol):
    """An input that follows the position."""

    array: Array

    def open_to(self, position: int) -> None: ...


class BoundGraph:
    """Everything bound for one graph, but for the KV memory of slots."""

    def __init__(
        self,
        engine: Engine,
        manifest: ShardManifest,
        name: str,
        rows: int,
        following: Mapping[str, _Given],
        new: tuple[int, ...],
    ) -> None:
        self.name, self.engine = name, engine
        inputs, outputs = engine.ends(name)
        self.following = list(following.values())
        self.hidden = pages((rows, manifest.boundary.width))
        group = manifest.heads // manifest.kv_heads
        self.turns = arrays(2, (rows, 1, group + 2, manifest.head_dim))
        """Cosines and sines of where each row stands."""
        self.out = pages((rows, manifest.boundary.width))
        names = kv_names(manifest)
        self.new = arrays(len(names), new)
        """The rows that a run adds to each array of KV memory."""
        given = {"hidden": self.hidden, "cos": self.turns[0], "sin": self.turns[1]}
        given |= {k: m.array for k, m in following.items()}
        self._given = {k: engine.bind(v) for k, v in given.items()}
        self._inputs = inputs
        results = {"hidden_out": self.out, **{f"new_{k}": v for k, v in zip(names, self.new, strict=True)}}
        self._given_back = [engine.bind(results[k]) for k in outputs]
        self._results = engine.together(self._given_back)

    def close(self) -> None:
        """Let go of the memory."""
        for bound in (*self._given.values(), *self._given_back):
            self.engine.unbind(bound)

    def inputs(self, memory: Mapping[str, Any]) -> Any:
        """All of them, as ``run`` takes them; ``memory``: those that are KV memory."""
        given = self._given
        return self.engine.together([given[k] if k in given else memory[k] for k in self._inputs])

    def run(self, inputs: Any) -> None:
        self.engine.run(self.name, inputs, self._results)


def kv_names(manifest: ShardManifest) -> list[str]:
    """Of the arrays of KV memory."""
    return [f"{side}.{layer}" for layer in range(*manifest.layers) for side in "kv"]


def _chunk_graph(engine: Engine, manifest: ShardManifest, chunk: int, bucket: int) -> BoundGraph:
    rows = 1 if chunk == 1 else manifest.heads // manifest.kv_heads * chunk
    mask = _Mask((1, 1, rows, bucket + chunk), bucket)
    if chunk > 1:
        within = np.tril(np.ones((chunk, chunk), dtype=bool))
        by_group = mask.array[0, 0, :, bucket:].reshape(-1, chunk, chunk)
        by_group[:] = np.where(within, np.float32(0.0), _MASKED)
    new = (1, manifest.kv_heads, chunk, manifest.head_dim)
    return BoundGraph(engine, manifest, run_name(chunk, bucket), chunk, {"mask": mask}, new)


def _steps_graph(engine: Engine, manifest: ShardManifest, chunk: int, bucket: int) -> BoundGraph:
    rows = manifest.heads // manifest.kv_heads * chunk
    given: dict[str, _Given] = {
        "mask": _OwnMask((1, 1, rows, bucket + 1), chunk),
        "places": _Places((1, manifest.kv_heads, chunk, bucket)),
    }
    new = (1, manifest.kv_heads, chunk, manifest.head_dim)
    return BoundGraph(engine, manifest, steps_name(chunk, bucket), chunk, given, new)


def _batch_graph(engine: Engine, manifest: ShardManifest, rows: int, bucket: int) -> BoundGraph:
    masks = {f"mask.{row}": _Mask((1, 1, 1, bucket + 1), bucket) for row in range(rows)}
    new = (rows, manifest.kv_heads, 1, manifest.head_dim)
    return BoundGraph(engine, manifest, batch_name(rows, bucket), rows, masks, new)


_MAKERS = {"run": _chunk_graph, "batch": _batch_graph, "steps": _steps_graph}


def bound_graph(engine: Engine, manifest: ShardManifest, kind: str, size: int, bucket: int) -> BoundGraph:
    """``kind``: ``run``, ``batch`` or ``steps``."""
    return _MAKERS[kind](engine, manifest, size, bucket)


class Head:
    """The head of so many rows, and its memory."""

    def __init__(self, engine: Engine, manifest: ShardManifest, rows: int) -> None:
        self._engine, self._name = engine, head_name(rows)
        self._last, self._logits = pages((rows, manifest.boundary.width)), pages((rows, manifest.vocabulary))
        self._bound = [engine.bind(end) for end in (self._last, self._logits)]
        self._ends = [engine.together([end]) for end in self._bound]

    def run(self, hidden: Array) -> Array:
        """Logits of these rows, of which there may be fewer, until the next run."""
        self._last[: len(hidden)] = hidden
        self._engine.run(self._name, *self._ends)
        return self._logits[: len(hidden)]

    def close(self) -> None:
        """Let go of the memory."""
        for end in self._bound:
            self._engine.unbind(end)
