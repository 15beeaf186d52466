"""Runtime over ONNX Runtime: fused attention on pre-allocated KV buffers, bound by pointer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from node_agent.adapters.onnx_session import CPU, open_session
from node_agent.adapters.pages import forget_pages, pages, trim_heap
from node_agent.adapters.worker_threads import WorkerThreads
from node_agent.ports import RuntimeOptions
from node_agent.shards.manifest import GRAPH_FILE, ShardManifest
from node_agent.stage import BATCH_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BINDINGS_KEPT = 64
_PREFILL_STEPS_MAX = 4096


class _Binding:
    """Everything bound for one row range: runs again by writing into ``inputs`` and ``seqlens``."""

    def __init__(self, shard: OnnxShard, slot: int, batch: int, steps: int, rows: int) -> None:
        info, session = shard.info, shard.session
        self.io = session.io_binding()
        self.seqlens = np.zeros(batch, dtype=np.int32)
        self.total = np.zeros((), dtype=np.int32)
        self.inputs: NDArray[Any] = (
            np.zeros((batch, steps), dtype=np.int64)
            if info.first
            else np.zeros((batch, steps, info.model.width), dtype=np.float32)
        )
        self.rows = np.arange(steps - rows, steps, dtype=np.int64)
        self.output = (
            np.zeros((batch, len(self.rows), info.model.vocabulary), dtype=np.float32)
            if info.last
            else np.zeros((batch, steps, info.model.width), dtype=np.float32)
        )
        self._input("tokens" if info.first else "hidden", self.inputs)
        self._input("seqlens_k", self.seqlens)
        self._input("total_len", self.total)
        if info.last:
            self._input("logit_rows", self.rows)
        self._output("logits" if info.last else "hidden_out", self.output)
        for layer, (keys, values) in zip(range(info.layers.start, info.layers.end), shard.cache, strict=True):
            for side, buffer in (("k", keys), ("v", values)):
                view = buffer[slot : slot + batch]
                self._input(f"past_{side}.{layer}", view)
                self._output(f"present_{side}.{layer}", view)

    def _input(self, name: str, array: NDArray[Any]) -> None:
        self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self.io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class OnnxShard:
    """A shard on ONNX Runtime; see ``node_agent.ports.Runtime``."""

    batch, batch_exact = BATCH_MAX, True

    def __init__(
        self,
        folder: Path,
        manifest: ShardManifest,
        *,
        slots: int,
        capacity: int,
        options: RuntimeOptions,
        keep: bool = False,
    ) -> None:
        """``keep``: weights as the library lays them out, for the next load. Raises ``ConfigError``."""
        self.info = manifest.info
        self.slots, self.capacity = slots, capacity
        self._workers = WorkerThreads()
        with self._workers.started():
            digest = manifest.digest if keep else ""
            self.session, self.provider = open_session(folder / GRAPH_FILE, options, digest)
        if not self.provider.startswith(CPU):
            self._workers = WorkerThreads()  # those of other providers know where to run
        start, end = manifest.layers
        shape = (slots, manifest.kv_heads, capacity, manifest.head_dim)
        self.cache = [(pages(shape), pages(shape)) for _ in range(end - start)]
        self._bindings: OrderedDict[tuple[int, int, int], _Binding] = OrderedDict()

    def _decode_binding(self, slot: int, batch: int, rows: int) -> _Binding:
        key = (slot, batch, rows)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = _Binding(self, slot, batch, 1, rows)
            if len(self._bindings) > _BINDINGS_KEPT:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        return binding

    def _run(self, binding: _Binding) -> None:
        self._workers.make_room()
        self.session.run_with_iobinding(binding.io)

    def decode(
        self, slot: int, positions: Sequence[int], inputs: NDArray[Any], logits: bool = True
    ) -> NDArray[Any]:
        binding = self._decode_binding(slot, len(positions), int(logits))
        binding.seqlens[:] = positions
        binding.total[()] = max(positions) + 1
        binding.inputs[:, 0] = inputs
        self._run(binding)
        result: NDArray[Any] = binding.output[:, 0] if binding.output.shape[1] else binding.output
        return result

    def prefill(self, slot: int, position: int, inputs: NDArray[Any], logits: int = 1) -> NDArray[Any]:
        steps = len(inputs)
        if not 0 < steps <= _PREFILL_STEPS_MAX or position + steps > self.capacity:
            raise ValueError(f"a chunk of {steps} at {position} exceeds the capacity {self.capacity}")
        binding = _Binding(self, slot, 1, steps, logits)
        binding.seqlens[0] = position + steps - 1
        binding.total[()] = position + steps
        binding.inputs[0] = inputs
        self._run(binding)
        result: NDArray[Any] = binding.output[0]
        return result

    def prepare(self) -> None:
        pass

    def hold_to_steps(self, inputs: NDArray[Any]) -> bool:
        return True

    def replay(self, slot: int, position: int, inputs: NDArray[Any]) -> NDArray[Any]:
        # Attention over several rows rounds otherwise than over one.
        rows = [
            self.decode(slot, [position + i], inputs[i : i + 1], False).copy() for i in range(len(inputs))
        ]
        return np.concatenate(rows)

    def copy(self, source: int, target: int, positions: int) -> None:
        for layer in self.cache:
            for buffer in layer:
                buffer[target, :, :positions] = buffer[source, :, :positions]

    def settle(self) -> None:
        """A run writes where its rows belong."""

    def release(self, slot: int) -> None:
        for layer in self.cache:
            for buffer in layer:
                forget_pages(buffer, slot)

    def close(self) -> None:
        self._bindings.clear()
        self.cache.clear()
        del self.session
        trim_heap()
