"""What runs a LiteRT shard's graphs: LiteRT's compiled model, or the classic interpreter (``tflite_engine``).

The compiled model is quicker and takes KV memory of ours without a copy; XNNPACK's packed weights are kept in a file, which
signatures share and the next start maps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError, ShardError
from node_agent.adapters.litert_first import first_interpreted, first_packed
from node_agent.adapters.litert_library import CompiledModel, LibraryError, bound, library_path, unbound
from node_agent.adapters.static_engine import Ends, Engine
from node_agent.ports import RuntimeOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

log = logging.getLogger(__name__)

_OWN_WORDS = re.compile(rb"(INFO|WARNING|ERROR|VERBOSE): |\xe2\x94\x94|\s*$")
"""How LiteRT's lines on stderr begin."""
_STDERR = threading.Lock()
"""Shards are loaded on threads, and there is one stderr."""


class CompiledEngine:
    """LiteRT's compiled model on XNNPACK."""

    provider = "XNNPACK"

    def __init__(self, graph: Path, threads: int, packed: Path | None = None) -> None:
        """``packed``: where packed weights are, or go. Raises ``ShardError`` with what LiteRT said."""
        self._model = _compiled(graph, threads, packed)
        self.names: Collection[str] = self._model.signatures.keys()

    def ends(self, graph: str) -> Ends:
        found = self._model.signatures[graph]
        return Ends(found.inputs, found.outputs)

    def bind(self, memory: Array) -> Any:
        return bound(memory)

    def unbind(self, memory: Any) -> None:
        unbound(memory)

    def run(self, graph: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._model.run(self._model.signatures[graph].number, inputs, outputs)

    def close(self) -> None:
        self._model.close()


def open_engine(folder: Path, graph: Path, name: str, options: RuntimeOptions) -> Engine:
    """The first delegate that computes what the shard's test vector wants, else LiteRT, else tflite-runtime. ``name`` is of
    the packed weights. Raises ``ShardError``, or ``ConfigError`` where neither is installed."""
    refused: list[str] = []
    engine: Engine | None = None
    for told in options.delegates:
        try:
            engine = _interpreted(folder, graph, options.threads, told)
            break
        except ShardError as error:
            log.warning("the delegate %s is not used for %s: %s", told, folder.name, error)
            refused.append(f"{told}: {error}")
    engine = engine or _plain(folder, graph, name, options)
    if refused:
        engine.provider += f" (not {'; '.join(refused)})"
    return engine


def _interpreted(folder: Path, graph: Path, threads: int, delegate: str = "") -> Engine:
    from node_agent.adapters.tflite_engine import InterpreterEngine

    first_interpreted(folder, threads, delegate)
    return InterpreterEngine(graph, threads, delegate)


def _plain(folder: Path, graph: Path, name: str, options: RuntimeOptions) -> Engine:
    if library_path() is None:
        from node_agent.adapters.tflite_engine import package

        if package() is None:
            raise ConfigError(
                "LiteRT shards need LiteRT, and ai-edge-litert is not installed; "
                "'pip install inference-mesh[litert]'"
            )
        return _interpreted(folder, graph, options.threads)
    if not options.cache:
        return CompiledEngine(graph, options.threads)
    return _packed(graph, options.threads, Path(options.cache) / f"{name}.xnnpack")


def _packed(graph: Path, threads: int, packed: Path) -> CompiledEngine:
    """With a file of packed weights, which appears whole, or not at all."""
    packed.parent.mkdir(parents=True, exist_ok=True)
    if packed.exists():
        try:
            return CompiledEngine(graph, threads, packed)
        except ShardError as error:
            log.warning("%s is packed anew: %s", packed, error)
            packed.unlink()
    fresh = packed.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        first_packed(graph, threads, fresh)
        if fresh.exists():
            fresh.rename(packed)
    finally:
        fresh.unlink(missing_ok=True)
    return CompiledEngine(graph, threads, packed)


def _compiled(graph: Path, threads: int, packed: Path | None) -> CompiledModel:
    with own_words() as words:
        try:
            return CompiledModel(graph, threads, packed)
        except LibraryError as error:
            reason = " ".join(words().split()) or str(error)
            raise ShardError(f"LiteRT cannot load {graph}: {reason}; make the shard again") from None


@contextlib.contextmanager
def own_words() -> Iterator[Any]:
    """Keep what LiteRT says on stderr while it loads out of our logs; yields what reads its errors."""
    with _STDERR, tempfile.TemporaryFile() as file:
        kept = os.dup(2)

        def lines() -> list[bytes]:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            return file.read().splitlines(keepends=True)

        def errors() -> str:
            return b"".join(w for w in lines() if w.startswith((b"ERROR", "└".encode()))).decode(
                errors="replace"
            )

        os.dup2(file.fileno(), 2)
        try:
            yield errors
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            for line in lines():
                if not _OWN_WORDS.match(line):
                    os.write(2, line)
