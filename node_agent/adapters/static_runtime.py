"""Runtime over static graphs: one for each chunk length and context bucket, on whatever engine, with KV memory of ours.

A slot is in the smallest bucket that holds its session, and moves to the next as that grows: its rows are copied, once, over the
last steps before. One that goes back moves back: a bucket is paid for in full, and rounds otherwise than another. What a run computes for
the cache comes out as new rows, which are written to their place here.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mesh.errors import ShardError
from node_agent.adapters.pages import trim_heap
from node_agent.adapters.static_engine import Engine
from node_agent.adapters.static_graphs import BoundGraph, Head, bound_graph
from node_agent.adapters.static_slots import Slot
from node_agent.bunches import Bunches
from node_agent.shards.manifest import ShardManifest
from node_agent.shards.static_names import graph_name
from node_agent.shards.static_tables import Turns, read_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_RUN = re.compile(r"(run|batch|steps)_(\d+)_(\d+)")
_HEAD = re.compile(r"head(?:_(\d+))?")
_STEPS_LEAST = 4
"""Fewer steps are replayed one by one: a chunk that stands for steps costs what it is made for."""
_AHEAD = 16
"""Positions before the end of a bucket, from where on the next one's graphs are wanted."""


class _Row(NamedTuple):
    """Of a step of several sessions."""

    number: int
    position: int
    memory: Slot


class _Due(NamedTuple):
    """A run whose new rows are not in its session's memory yet."""

    graph: BoundGraph
    memory: Slot
    position: int
    steps: int


class StaticShard:
    """A shard of static graphs; see ``node_agent.ports.Runtime``."""

    batch_exact = False

    def __init__(
        self, folder: Path, manifest: ShardManifest, engine: Engine, *, slots: int, capacity: int
    ) -> None:
        self.info, self.manifest = manifest.info, manifest
        self.slots, self.capacity = slots, capacity
        self.engine, self.provider = engine, engine.provider
        found = [m.groups() for m in map(_RUN.fullmatch, engine.names) if m]
        self._chunks = sorted({int(n) for kind, n, _ in found if kind == "run"})
        self._steps = max((int(n) for kind, n, _ in found if kind == "steps"), default=1)
        self._batches = sorted({int(n) for kind, n, _ in found if kind == "batch"})
        self.batch = max(self._batches, default=1)
        # One position of a capacity is for rows that nobody reads; there are none here.
        wanted = capacity - 1
        buckets = sorted({int(bucket) for _, _, bucket in found})
        if not buckets or buckets[-1] < wanted:
            raise ShardError(
                f"{folder} has context buckets up to {max(buckets, default=0)}, {wanted} positions are asked for; "
                "make the shard again with --context, or lower the setting 'context'"
            )
        self._buckets = [b for i, b in enumerate(buckets) if i == 0 or buckets[i - 1] < wanted]
        self._after = dict(pairwise(self._buckets))
        self._tables = read_tables(manifest.files, lambda name: np.load(folder / name, mmap_mode="r"))
        self._turns = Turns(self._tables.turns, manifest.heads // manifest.kv_heads)
        self._graphs: dict[tuple[str, int, int], BoundGraph] = {}
        self._held: dict[int, Slot] = {}
        self._due: _Due | None = None
        self._bunches: dict[int, Bunches] = {}
        """By bucket."""
        heads = sorted(int(m[1] or 1) for m in map(_HEAD.fullmatch, engine.names) if m)
        self._heads = {rows: Head(engine, manifest, rows) for rows in heads}
        self._no_logits: Array = np.empty((0, manifest.vocabulary), dtype=np.float32)

    def decode(
        self, slot: int, positions: Sequence[int], inputs: NDArray[Any], logits: bool = True
    ) -> NDArray[Any]:
        if len(positions) == 1:
            return self._chunk(slot, positions[0], inputs, int(logits))
        rows = [_Row(i, p, self._memory(slot + i, p, 1)) for i, p in enumerate(positions)]
        hidden = np.empty((len(rows), self.manifest.boundary.width), dtype=np.float32)
        for bucket in sorted({row.memory.bucket for row in rows}):
            beside = [row for row in rows if row.memory.bucket == bucket]
            bunches = self._bunches.setdefault(bucket, Bunches([1, *self._batches]))
            for size in bunches.plan(len(beside)):
                bunch, beside = beside[:size], beside[size:]
                begun = time.perf_counter_ns()
                self._step(size, bunch, inputs, hidden)
                bunches.took(size, time.perf_counter_ns() - begun)
        self.settle()
        for row in rows:
            self._near(row.memory, row.position)
        if not self.info.last:
            return hidden
        return self._logits_of(hidden) if logits else self._no_logits

    def _step(self, size: int, bunch: list[_Row], inputs: NDArray[Any], hidden: Array) -> None:
        """A step of a bunch, in a run made for ``size``; activations go to each one's row of ``hidden``."""
        numbers = [row.number for row in bunch]
        if size == 1:
            graph = self._ran("run", 1, bunch[0].memory, bunch[0].position, inputs[numbers])
        else:
            graph = self._together(size, bunch, inputs[numbers])
        hidden[numbers] = graph.out[: len(bunch)]

    def _together(self, size: int, bunch: list[_Row], inputs: NDArray[Any]) -> BoundGraph:
        """A step of several sessions in one run."""
        graph = self._graph("batch", size, bunch[0].memory.bucket)
        graph.hidden[: len(bunch)] = self._tables.embed(inputs) if self.info.first else inputs
        memory: dict[str, Any] = {}
        for i in range(size):
            # Rows past the last are computed over its memory, for nobody.
            row = bunch[min(i, len(bunch) - 1)]
            graph.turns[:, i, 0] = self._turns.at(row.position)
            graph.following[i].open_to(row.position)
            memory |= {f"{name}.{i}": buffer for name, buffer in row.memory.bound.items()}
        graph.run(graph.inputs(memory))
        for i, row in enumerate(bunch):
            row.memory.write_row(graph.new, row.position, i)
            self._ahead("batch", size, row.memory.bucket, row.position + 1)
        return graph

    def prefill(self, slot: int, position: int, inputs: NDArray[Any], logits: int = 1) -> NDArray[Any]:
        steps = self._fitting(position, inputs)
        parts, done = [], 0
        for length in pieces(steps, self._chunks):
            after = steps - done - length
            wanted = min(length, max(0, logits - after))
            part = self._chunk(slot, position + done, inputs[done : done + length], wanted)
            parts.append(part.copy() if after else part)
            done += length
        self._soon("run", 1, self._held[slot].bucket)  # a prompt's end is not told, and steps follow it
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _fitting(self, position: int, inputs: NDArray[Any]) -> int:
        steps = len(inputs)
        if not steps or position + steps > self._buckets[-1]:
            raise ValueError(f"a chunk of {steps} at {position} exceeds the capacity {self.capacity}")
        return steps

    def prepare(self) -> None:
        smallest, *larger = self._buckets
        soon = [graph_name("run", chunk, smallest) for chunk in self._chunks]
        self.engine.prepare(soon, [graph_name("run", 1, bucket) for bucket in larger])

    def hold_to_steps(self, inputs: NDArray[Any]) -> bool:
        """Whether a chunk that stands for steps has their bits on this machine, tried on a few ``inputs``; else it is not used.
        It rests on kernels that sum up a row the same way however many rows they are given."""
        few = inputs[:_STEPS_LEAST]
        if self._steps == 1 or len(few) < _STEPS_LEAST:
            return True
        bucket, singly = self._buckets[0], []
        for i in range(len(few)):
            self._chunk(0, i, few[i : i + 1], 0)
            singly.append(self._graph("run", 1, bucket).out[0].copy())
        self._at_once(0, 0, few)
        same = np.array_equal(singly, self._graph("steps", self._steps, bucket).out[: len(few)])
        self.release(0)
        if not same:
            self._steps = 1
        return same

    def replay(self, slot: int, position: int, inputs: NDArray[Any]) -> NDArray[Any]:
        steps, done = self._fitting(position, inputs), 0
        parts = []
        while done < steps:
            at = position + done
            # Each bucket's positions are computed in it, as they were one by one.
            border = self._bucket(at + 1)
            left = inputs[done : done + min(self._steps, border - at)]
            run = self._at_once if len(left) >= _STEPS_LEAST else self._one_by_one
            parts.append(run(slot, at, left))
            done += len(left)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _one_by_one(self, slot: int, position: int, inputs: NDArray[Any]) -> Array:
        rows = [self._chunk(slot, position + i, inputs[i : i + 1], 0).copy() for i in range(len(inputs))]
        return np.concatenate(rows)

    def _at_once(self, slot: int, position: int, inputs: NDArray[Any]) -> Array:
        steps = len(inputs)
        memory = self._memory(slot, position, steps)
        memory.clear(position, steps)
        graph = self._ran("steps", self._steps, memory, position, inputs)
        return self._no_logits if self.info.last else graph.out[:steps].copy()

    def _ran(self, kind: str, size: int, memory: Slot, position: int, inputs: NDArray[Any]) -> BoundGraph:
        """A graph that computed ``inputs`` of one session, whose new rows are due in its memory."""
        self.settle()  # of a step of several sessions, the one before
        graph = self._graph(kind, size, memory.bucket)
        self._place(graph, position, inputs)
        memory.run(graph)
        self._due = _Due(graph, memory, position, len(inputs))
        self._ahead(kind, size, memory.bucket, position + len(inputs))
        return graph

    def settle(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            due.memory.write(due.graph.new, due.position, due.steps)
            if due.steps == 1:
                self._near(due.memory, due.position)

    def _ahead(self, kind: str, size: int, bucket: int, end: int) -> None:
        """A session stands at ``end``: as it goes on, it may want the next bucket's graph of this kind, which takes as long to
        open as a step or two."""
        if bucket - end > max(size, _AHEAD):
            return
        if bucket in self._after:
            self._soon(kind, size, self._after[bucket])

    def _soon(self, kind: str, size: int, bucket: int) -> None:
        if (kind, size, bucket) not in self._graphs:
            self.engine.prepare([graph_name(kind, size, bucket)])

    def _place(self, graph: BoundGraph, position: int, inputs: NDArray[Any]) -> None:
        """What a chunk is given. Rows past its steps are computed for nobody."""
        steps = len(inputs)
        graph.hidden[:steps] = self._tables.embed(inputs) if self.info.first else inputs
        graph.turns[:, :steps, 0] = self._turns.between(position, position + steps)
        for given in graph.following:
            given.open_to(position)

    def _chunk(self, slot: int, position: int, inputs: NDArray[Any], logits: int) -> Array:
        """One run: activations ``[steps, width]``, or of a last shard ``[logits, vocabulary]``."""
        steps = len(inputs)
        size = next(c for c in self._chunks if c >= steps)
        graph = self._ran("run", size, self._memory(slot, position, steps), position, inputs)
        if not self.info.last:
            return graph.out[:steps]
        return self._logits_of(graph.out[steps - logits : steps]) if logits else self._no_logits

    def _logits_of(self, hidden: Array) -> Array:
        """``[rows, vocabulary]`` of ``[rows, width]``; of a single row until the next run."""
        if len(hidden) == 1:
            return self._heads[1].run(hidden)
        found = np.empty((len(hidden), self.manifest.vocabulary), dtype=np.float32)
        done = 0
        while done < len(hidden):
            left = len(hidden) - done
            size = next((n for n in self._heads if n >= left), max(self._heads))
            end = done + min(size, left)
            found[done:end] = self._heads[size].run(hidden[done:end])
            done = end
        return found

    def _memory(self, slot: int, position: int, steps: int) -> Slot:
        """A slot's memory, in the bucket for what comes."""
        self.settle()
        held = self._held.get(slot)
        bucket = self._bucket(position + steps)
        if held is None:
            held = self._held[slot] = Slot(self.engine, self.manifest, bucket)
            held.begin()
        elif held.bucket < bucket or (held.bucket > bucket and position <= held.filled):
            held = self._held[slot] = held.moved(min(position, held.bucket), bucket)
        return held

    def _bucket(self, positions: int) -> int:
        """The smallest that holds them."""
        return self._buckets[bisect_left(self._buckets, positions)]

    def _near(self, memory: Slot, position: int) -> None:
        if memory.bucket in self._after:
            memory.near(position, self._after[memory.bucket])

    def _graph(self, kind: str, size: int, bucket: int) -> BoundGraph:
        key = (kind, size, bucket)
        if key not in self._graphs:
            self._graphs[key] = bound_graph(self.engine, self.manifest, kind, size, bucket)
        return self._graphs[key]

    def copy(self, source: int, target: int, positions: int) -> None:
        self.release(target)  # which settles
        bucket = self._bucket(positions)
        self._held[target] = self._held[source].copied(positions, bucket)

    def release(self, slot: int) -> None:
        self.settle()
        held = self._held.pop(slot, None)
        if held is not None:
            held.close()

    def close(self) -> None:
        for slot in list(self._held):
            self.release(slot)
        for graph in self._graphs.values():
            graph.close()
        for head in self._heads.values():
            head.close()
        self._graphs.clear()
        self._heads.clear()
        self.engine.close()
        trim_heap()


def pieces(steps: int, chunks: Sequence[int]) -> list[int]:
    """Lengths of the runs that ``steps`` positions take, by ``chunks`` that rise from 1. A run costs what its chunk is long,
    however little of it is used, but a chunk of several costs half of as many single steps."""
    found = []
    while steps:
        chunk = chunks[0]
        for smaller, longer in pairwise(chunks):
            if steps > (longer // 2 if smaller == 1 else longer - smaller):
                chunk = longer
        found.append(min(chunk, steps))
        steps -= found[-1]
    return found
