"""LiteRT's compiled model as an engine: quicker than the classic interpreter, and it takes KV memory of ours without a copy.

XNNPACK's packed weights are kept in a file, which graphs share and the next start maps.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ShardError
from node_agent.adapters.litert_library import CompiledModel, LibraryError, bound, unbound
from node_agent.adapters.static_engine import Ends
from node_agent.shards.static_names import by_bucket
from node_agent.shards.tflite_part import graph_names, keep_graphs

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
    """LiteRT's compiled model on XNNPACK. Every graph takes its time to compile: a model of the smallest bucket's serves until
    one of all that may be wanted, which is compiled in the background, takes its place."""

    provider = "XNNPACK"

    def __init__(self, graph: Path, threads: int, packed: Path | None = None) -> None:
        """``packed``: where packed weights are. Raises ``ShardError`` with what LiteRT said."""
        self._graph, self._threads, self._packed = graph, threads, packed
        with _mapped(graph) as data:
            self.names: Collection[str] = graph_names(data)
        self._model = self._compile(by_bucket(self.names)[0])
        self._next: CompiledModel | None = None
        self._background: threading.Thread | None = None

    def _compile(self, names: Collection[str]) -> CompiledModel:
        return _compiled(self._graph, names, self._threads, self._packed)

    @property
    def loaded(self) -> Collection[str]:
        """Graphs that can be run without a wait."""
        return (self._next or self._model).signatures.keys()

    def prepare(self, graphs: Sequence[str]) -> None:
        groups = by_bucket(self.names)
        wanted = [name for group in groups if not {*graphs}.isdisjoint(group) for name in group]
        if set(wanted) - self._model.signatures.keys():
            names = {*wanted, *groups[0]}
            self._background = threading.Thread(
                target=self._prepare, args=(names,), name="graphs", daemon=True
            )
            self._background.start()

    def _prepare(self, names: Collection[str]) -> None:
        try:
            self._next = self._compile(names)
        except ShardError as error:
            log.warning("%s; it is tried again when a session outgrows the smallest bucket", error)

    def _with(self, graph: str) -> CompiledModel:
        """The model in use, which has the graph from now on."""
        if self._next is not None or graph not in self._model.signatures:
            if self._background is not None:
                self._background.join()
            whole = self._next or self._compile(self.names)
            self._model.close()
            self._model, self._next = whole, None
        return self._model

    def ends(self, graph: str) -> Ends:
        found = self._with(graph).signatures[graph]
        return Ends(found.inputs, found.outputs)

    def bind(self, memory: Array) -> Any:
        return bound(memory)

    def unbind(self, memory: Any) -> None:
        unbound(memory)

    def run(self, graph: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        model = self._with(graph)
        model.run(model.signatures[graph].number, inputs, outputs)

    def close(self) -> None:
        if self._background is not None:
            self._background.join()
        if self._next is not None:
            self._next.close()
        self._model.close()


def pack(graph: Path, threads: int, packed: Path) -> None:
    """Compile all graphs once, and leave their packed weights in a file. Raises ``ShardError`` with what LiteRT said."""
    with _mapped(graph) as data:
        names = graph_names(data)
    _compiled(graph, names, threads, packed).close()


@contextlib.contextmanager
def _mapped(graph: Path) -> Iterator[mmap.mmap]:
    """A copy of the file that costs what is written to it. Raises ``ShardError`` that says which file it was about."""
    try:
        with graph.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        yield data
    except (ShardError, OSError, ValueError) as error:
        raise ShardError(f"LiteRT cannot load {graph}: {error}; make the shard again") from None


def _compiled(graph: Path, names: Collection[str], threads: int, packed: Path | None) -> CompiledModel:
    with _mapped(graph) as data, own_words() as words:
        keep_graphs(data, names)
        try:
            return CompiledModel(data, threads, packed)
        except LibraryError as error:
            raise ShardError(" ".join(words().split()) or str(error)) from None


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
