"""LiteRT shards on the classic interpreter: for boards that have tflite-runtime, and for delegates, which plug in there.

Every run copies its KV memory into the interpreter's tensors and out again: a millisecond for ten layers of a small model,
which an NPU wins back and a board with nothing better has to pay.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError, ShardError
from node_agent.adapters.static_engine import Ends
from node_agent.adapters.worker_threads import WorkerThreads
from node_agent.config import parse_delegate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

_PACKAGES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


def package() -> ModuleType | None:
    """The interpreter's package; ``None`` where there is none."""
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


class InterpreterEngine:
    """See ``static_engine.Engine``."""

    def __init__(self, graph: Path, threads: int, delegate: str = "") -> None:
        """``delegate``: as ``parse_delegate`` reads it. A library that is not what it says may end the process. Raises
        ``ShardError`` where it cannot be loaded, or the graph has what this interpreter does not know."""
        found = package()
        if found is None:
            raise ConfigError("there is no TFLite interpreter; 'pip install inference-mesh[litert]'")
        delegates, self._workers = [], WorkerThreads()
        self.provider = f"XNNPACK in {found.__name__.split('.')[0].replace('_', '-')}"
        if delegate:
            path, options = parse_delegate(delegate)
            try:
                delegates.append(found.load_delegate(path, options))
            except (OSError, ValueError) as error:
                raise ShardError(f"it cannot be loaded: {error}") from None
            self.provider = Path(path).name
        try:
            with self._workers.started():
                self._interpreter = found.Interpreter(
                    str(graph), num_threads=threads or None, experimental_delegates=delegates
                )
            if delegate:
                self._workers = WorkerThreads()  # those of a delegate know where to run
            self._runners: dict[str, Any] = {}
            signatures = self._interpreter.get_signature_list()
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ShardError(f"{self.provider} cannot load {graph}: {said}") from None
        self._ends = {n: Ends(e["inputs"], e["outputs"]) for n, e in signatures.items()}
        self.names: Collection[str] = self._ends.keys()

    def prepare(self, soon: Sequence[str], later: Sequence[str] = ()) -> None:
        pass

    def ends(self, graph: str) -> Ends:
        return self._ends[graph]

    def bind(self, memory: Array) -> Any:
        return memory

    def unbind(self, bound: Any) -> None:
        pass

    def together(self, bound: Sequence[Any]) -> Any:
        return tuple(bound)

    def run(self, graph: str, inputs: Any, outputs: Any) -> None:
        runner = self._runners.get(graph)
        if runner is None:
            runner = self._runners[graph] = self._interpreter.get_signature_runner(graph)
        ends = self._ends[graph]
        self._workers.make_room()
        found = runner(**dict(zip(ends.inputs, inputs, strict=True)))
        for name, memory in zip(ends.outputs, outputs, strict=True):
            memory[:] = found[name].reshape(memory.shape)

    def close(self) -> None:
        self._runners.clear()
        del self._interpreter
