"""Static ONNX graphs on ONNX Runtime, with whatever execution provider takes them: OpenVINO, say.

A provider compiles a graph when it is opened, which may take seconds: those of the smallest bucket are opened with the shard, the
others when a session outgrows it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from node_agent.adapters.onnx_session import open_session
from node_agent.adapters.static_engine import Ends
from node_agent.ports import RuntimeOptions
from node_agent.shards.static_names import by_bucket

if TYPE_CHECKING:
    import onnxruntime as ort
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

SUFFIX = ".onnx"


class OnnxStaticEngine:
    """See ``static_engine.Engine``."""

    def __init__(self, folder: Path, files: Collection[str], options: RuntimeOptions) -> None:
        """``files``: of the shard. Raises ``ConfigError`` where no provider takes them."""
        self._folder, self._options = folder, options
        self._sessions: dict[str, ort.InferenceSession] = {}
        names = {Path(file).stem for file in files if file.endswith(SUFFIX)}
        self.names: Collection[str] = names
        self.provider = ""
        for name in by_bucket(names)[0]:
            self._open(name)

    def _open(self, name: str) -> ort.InferenceSession:
        session = self._sessions.get(name)
        if session is None:
            session, self.provider = open_session(self._folder / f"{name}{SUFFIX}", self._options)
            self._sessions[name] = session
        return session

    def prepare(self, soon: Sequence[str], later: Sequence[str] = ()) -> None:
        pass

    def ends(self, graph: str) -> Ends:
        session = self._open(graph)
        return Ends([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])

    def bind(self, memory: Array) -> Any:
        return memory

    def unbind(self, bound: Any) -> None:
        pass

    def together(self, bound: Sequence[Any]) -> Any:
        return tuple(bound)

    def run(self, graph: str, inputs: Any, outputs: Any) -> None:
        session = self._open(graph)
        binding = session.io_binding()
        for end, memory in zip(session.get_inputs(), inputs, strict=True):
            binding.bind_input(end.name, "cpu", 0, np.float32, memory.shape, memory.ctypes.data)
        for end, memory in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_output(end.name, "cpu", 0, np.float32, memory.shape, memory.ctypes.data)
        session.run_with_iobinding(binding)

    def close(self) -> None:
        self._sessions.clear()
