"""Runtime over static graphs: one for each chunk length and context bucket, on whatever engine, with KV memory of ours.

A slot is in the smallest bucket that holds its session, and moves to the next as that grows: its rows are copied, once, over the
last steps before. One that goes back moves back: a bucket is paid for in full, and rounds otherwise than another. What a run computes for
the cache comes out as new rows, which are written to their place here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mesh.errors import ShardError
from node_agent.adapters.pages import arrays, pages, trim_heap
from node_agent.adapters.static_engine import Engine
from node_agent.shards.manifest import ShardManifest
from node_agent.shards.static_names import HEAD_NAME, batch_name, run_name, steps_name
from node_agent.shards.static_tables import read_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_RUN = re.compile(r"(run|batch|steps)_(\d+)_(\d+)")
_BATCH_LEAST = 3
"""Fewer sessions are computed one after the other: a batch costs what it is made for, as 2.3 single steps of four."""
_STEPS_LEAST = 4
"""Fewer steps are replayed one by one: a chunk that stands for steps costs what it is made for."""
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


class _Signature:
    """Everything bound for one graph, but for the KV memory of slots."""

    def __init__(
        self, shard: StaticShard, name: str, rows: int, following: Mapping[str, _Given], new: tuple[int, ...]
    ) -> None:
        engine, manifest = shard.engine, shard.manifest
        self.name, self.engine = name, engine
        inputs, outputs = engine.ends(name)
        self.following = list(following.values())
        self.hidden = pages((rows, manifest.boundary.width))
        self.cos, self.sin = (pages((rows, 1, manifest.head_dim)) for _ in range(2))
        self.out = pages((rows, manifest.boundary.width))
        names = _names(manifest)
        self.new = arrays(len(names), new)
        """The rows that a run adds to each array of KV memory."""
        given = {"hidden": self.hidden, "cos": self.cos, "sin": self.sin}
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


def _names(manifest: ShardManifest) -> list[str]:
    """Of the arrays of KV memory."""
    return [f"{side}.{layer}" for layer in range(*manifest.layers) for side in "kv"]


def _chunk_signature(shard: StaticShard, chunk: int, bucket: int) -> _Signature:
    manifest = shard.manifest
    rows = 1 if chunk == 1 else manifest.heads // manifest.kv_heads * chunk
    mask = _Mask((1, 1, rows, bucket + chunk), bucket)
    if chunk > 1:
        within = np.tril(np.ones((chunk, chunk), dtype=bool))
        by_group = mask.array[0, 0, :, bucket:].reshape(-1, chunk, chunk)
        by_group[:] = np.where(within, np.float32(0.0), _MASKED)
    new = (1, manifest.kv_heads, chunk, manifest.head_dim)
    return _Signature(shard, run_name(chunk, bucket), chunk, {"mask": mask}, new)


def _steps_signature(shard: StaticShard, chunk: int, bucket: int) -> _Signature:
    manifest = shard.manifest
    rows = manifest.heads // manifest.kv_heads * chunk
    given: dict[str, _Given] = {
        "mask": _OwnMask((1, 1, rows, bucket + 1), chunk),
        "places": _Places((1, manifest.kv_heads, chunk, bucket)),
    }
    new = (1, manifest.kv_heads, chunk, manifest.head_dim)
    return _Signature(shard, steps_name(chunk, bucket), chunk, given, new)


def _batch_signature(shard: StaticShard, rows: int, bucket: int) -> _Signature:
    manifest = shard.manifest
    masks = {f"mask.{row}": _Mask((1, 1, 1, bucket + 1), bucket) for row in range(rows)}
    new = (rows, manifest.kv_heads, manifest.head_dim)
    return _Signature(shard, batch_name(rows, bucket), rows, masks, new)


_MAKERS = {"run": _chunk_signature, "batch": _batch_signature, "steps": _steps_signature}


class _Slot:
    """KV memory of one session, in one bucket. The next one's is filled an array a step as the end comes near: to move all of
    them in one step takes as long as several steps."""

    def __init__(self, engine: Engine, manifest: ShardManifest, bucket: int) -> None:
        self._engine, self._manifest, self.bucket = engine, manifest, bucket
        self._names = _names(manifest)
        self.memory = arrays(len(self._names), (1, manifest.kv_heads, bucket, manifest.head_dim))
        """By array as they are named, in one piece: a step's rows are written at once."""
        self.bound: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        """By graph, all that it is given."""
        self._rows = [0] * len(self._names)
        """Of each array, those that it has from the slot before."""
        self.filled = 0
        """Positions that its session has, as of the last run."""
        self._next: _Slot | None = None

    def begin(self) -> None:
        """Of a session that has nothing."""
        for number in range(len(self._names)):
            self._bind(number)

    def _bind(self, number: int) -> None:
        name = self._names[number]
        if name not in self.bound:
            self.bound[name] = self._engine.bind(self.memory[number])

    def run(self, signature: _Signature) -> None:
        """Compute a graph over this memory."""
        inputs = self._inputs.get(signature.name)
        if inputs is None:
            inputs = self._inputs[signature.name] = signature.inputs(self.bound)
        signature.run(inputs)

    def near(self, position: int, bucket: int) -> None:
        """A step at ``position`` was written; ``bucket`` comes after this one."""
        left = self.bucket - 1 - position
        if 0 <= left < len(self._names):
            self._next = self._next or _Slot(self._engine, self._manifest, bucket)
            self._next._copy(self, left, position + 1)

    def _copy(self, before: _Slot, number: int, positions: int) -> None:
        self._bind(number)
        rows = slice(self._rows[number], positions)
        self.memory[number, :, :, rows] = before.memory[number, :, :, rows]
        self._rows[number] = positions

    def moved(self, positions: int, bucket: int) -> _Slot:
        """One for another bucket, with so many of these rows; this one is no more."""
        after, self._next = self._next, None
        if after is None or after.bucket != bucket:
            if after is not None:
                after.close()
            after = _Slot(self._engine, self._manifest, bucket)
        for number in range(len(self._names)):
            after._copy(self, number, positions)
        after.filled = min(self.filled, positions)
        self.close()
        return after

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
        """One of a step of several sessions, ``[arrays, sessions, kv_heads, head_dim]``."""
        self._written(position, 1)
        self.memory[:, 0, :, position] = new[:, row]


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
        self.batch = max((int(n) for kind, n, _ in found if kind == "batch"), default=1)
        # One position of a capacity is for rows that nobody reads; there are none here.
        wanted = capacity - 1
        buckets = sorted({int(bucket) for _, _, bucket in found})
        if not buckets or buckets[-1] < wanted:
            raise ShardError(
                f"{folder} has context buckets up to {max(buckets, default=0)}, {wanted} positions are asked for; "
                "make the shard again with --context, or lower the setting 'context'"
            )
        self._buckets = [b for i, b in enumerate(buckets) if i == 0 or buckets[i - 1] < wanted]
        self._tables = read_tables(manifest.files, lambda name: np.load(folder / name, mmap_mode="r"))
        self._signatures: dict[tuple[str, int, int], _Signature] = {}
        self._held: dict[int, _Slot] = {}
        if self.info.last:
            self._last = pages((1, manifest.boundary.width))
            self._logits = pages((1, manifest.vocabulary))
            ends = (engine.together([engine.bind(end)]) for end in (self._last, self._logits))
            self._head = (HEAD_NAME, *ends)

    def decode(
        self, slot: int, positions: Sequence[int], inputs: NDArray[Any], logits: bool = True
    ) -> NDArray[Any]:
        rows = [
            (slot + i, position, self._memory(slot + i, position, 1)) for i, position in enumerate(positions)
        ]
        together = _BATCH_LEAST <= len(rows) <= self.batch
        if together and len({memory.bucket for _, _, memory in rows}) == 1:
            hidden = self._together(rows, inputs)
            self._near(rows)
            if not self.info.last:
                return hidden
            if not logits:
                return self._logits[:0]
            return np.concatenate([self._logits_of(row).copy() for row in hidden])
        found = [
            self._chunk(at, position, inputs[i : i + 1], int(logits)).copy()
            for i, (at, position, _) in enumerate(rows)
        ]
        self._near(rows)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _together(self, rows: list[tuple[int, int, _Slot]], inputs: NDArray[Any]) -> Array:
        """A step of several sessions in one run: activations ``[rows, width]``."""
        count, bucket = len(rows), rows[0][2].bucket
        signature = self._signature("batch", self.batch, bucket)
        signature.hidden[:count] = self._tables.embed(inputs) if self.info.first else inputs
        memory: dict[str, Any] = {}
        for row in range(self.batch):
            # Rows past the last are computed over its memory, for nobody.
            _, position, slot = rows[min(row, count - 1)]
            signature.cos[row, 0], signature.sin[row, 0] = (
                self._tables.cos[position],
                self._tables.sin[position],
            )
            signature.following[row].open_to(position)
            memory |= {f"{name}.{row}": buffer for name, buffer in slot.bound.items()}
        signature.run(signature.inputs(memory))
        for row, (_, position, slot) in enumerate(rows):
            slot.write_row(signature.new, position, row)
        return signature.out[:count]

    def prefill(self, slot: int, position: int, inputs: NDArray[Any], logits: int = 1) -> NDArray[Any]:
        steps = self._fitting(position, inputs)
        parts, done = [], 0
        for length in pieces(steps, self._chunks):
            after = steps - done - length
            wanted = min(length, max(0, logits - after))
            part = self._chunk(slot, position + done, inputs[done : done + length], wanted)
            parts.append(part.copy() if after else part)
            done += length
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _fitting(self, position: int, inputs: NDArray[Any]) -> int:
        steps = len(inputs)
        if not steps or position + steps > self._buckets[-1]:
            raise ValueError(f"a chunk of {steps} at {position} exceeds the capacity {self.capacity}")
        return steps

    def prepare(self) -> None:
        self.engine.prepare([run_name(self._chunks[0], bucket) for bucket in self._buckets])

    def hold_to_steps(self, inputs: NDArray[Any]) -> bool:
        """Whether a chunk that stands for steps has their bits on this machine, tried on a few ``inputs``; else it is not used.
        It rests on kernels that sum up a row the same way however many rows they are given."""
        few = inputs[:_STEPS_LEAST]
        if self._steps == 1 or len(few) < _STEPS_LEAST:
            return True
        bucket, singly = self._buckets[0], []
        for i in range(len(few)):
            self._chunk(0, i, few[i : i + 1], 0)
            singly.append(self._signature("run", 1, bucket).out[0].copy())
        self._at_once(0, 0, few)
        same = np.array_equal(singly, self._signature("steps", self._steps, bucket).out[: len(few)])
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
            border = next(b for b in self._buckets if b > at)
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
        signature = self._signature("steps", self._steps, memory.bucket)
        self._place(signature, position, inputs)
        memory.clear(position, steps)
        memory.run(signature)
        memory.write(signature.new, position, steps)
        return self._logits[:0] if self.info.last else signature.out[:steps].copy()

    def _place(self, signature: _Signature, position: int, inputs: NDArray[Any]) -> None:
        """What a chunk is given. Rows past its steps are computed for nobody."""
        steps = len(inputs)
        signature.hidden[:steps] = self._tables.embed(inputs) if self.info.first else inputs
        signature.cos[:steps, 0] = self._tables.cos[position : position + steps]
        signature.sin[:steps, 0] = self._tables.sin[position : position + steps]
        for given in signature.following:
            given.open_to(position)

    def _chunk(self, slot: int, position: int, inputs: NDArray[Any], logits: int) -> Array:
        """One run: activations ``[steps, width]``, or of a last shard ``[logits, vocabulary]``."""
        steps = len(inputs)
        memory = self._memory(slot, position, steps)
        signature = self._signature("run", next(c for c in self._chunks if c >= steps), memory.bucket)
        self._place(signature, position, inputs)
        memory.run(signature)
        memory.write(signature.new, position, steps)
        if not self.info.last:
            return signature.out[:steps]
        if logits == 1:
            return self._logits_of(signature.out[steps - 1])
        rows = [self._logits_of(hidden).copy() for hidden in signature.out[steps - logits : steps]]
        return np.concatenate(rows) if rows else self._logits[:0]

    def _logits_of(self, hidden: Array) -> Array:
        self._last[0] = hidden
        self.engine.run(*self._head)
        return self._logits

    def _memory(self, slot: int, position: int, steps: int) -> _Slot:
        """A slot's memory, in the bucket for what comes."""
        held = self._held.get(slot)
        bucket = next(b for b in self._buckets if b >= position + steps)
        if held is None:
            held = self._held[slot] = _Slot(self.engine, self.manifest, bucket)
            held.begin()
        elif held.bucket < bucket or (held.bucket > bucket and position <= held.filled):
            held = self._held[slot] = held.moved(min(position, held.bucket), bucket)
        return held

    def _near(self, rows: Sequence[tuple[int, int, _Slot]]) -> None:
        for _, position, memory in rows:
            after = next((b for b in self._buckets if b > memory.bucket), None)
            if after is not None:
                memory.near(position, after)

    def _signature(self, kind: str, size: int, bucket: int) -> _Signature:
        key = (kind, size, bucket)
        if key not in self._signatures:
            self._signatures[key] = _MAKERS[kind](self, size, bucket)
        return self._signatures[key]

    def release(self, slot: int) -> None:
        held = self._held.pop(slot, None)
        if held is not None:
            held.close()

    def close(self) -> None:
        for slot in list(self._held):
            self.release(slot)
        for signature in self._signatures.values():
            signature.close()
        self._signatures.clear()
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
