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
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ShardError
from node_agent.adapters.fingerprint.memory import probe_memory
from node_agent.adapters.litert_library import CompiledModel, LibraryError, bound, tensor_buffers, unbound
from node_agent.adapters.static_engine import Ends
from node_agent.shards.static_names import by_bucket, needed_first
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
    """LiteRT's compiled model on XNNPACK. A graph takes its time to compile, on a core that sessions want as well, and its memory (ten
    layers of a small model: 20 ms and 3 MB at ``int4``), and the library compiles one at a time. So a load compiles the step alone;
    what somebody waits for, or soon will, comes next, a model each. When nothing has been computed for a while, all graphs of a
    bucket are compiled into one model, which takes the place of those that it covers: each model maps packed weights anew. Where
    there is memory to spare, that of buckets that nobody came to as well."""

    provider = "XNNPACK"
    quiet_s = 1.0
    """A shard that has computed and compiled nothing for so long compiles a bucket that is not wanted yet."""
    spare_bytes = 1 << 30
    """Free memory from which on it may take some for what is never wanted, perhaps."""

    def __init__(self, graph: Path, threads: int, packed: Path | None = None) -> None:
        """``packed``: where packed weights are. Raises ``ShardError`` with what LiteRT said."""
        self._graph, self._threads, self._packed = graph, threads, packed
        with _mapped(graph) as data:
            self.names: Collection[str] = graph_names(data)
        # Without that file every model packs weights of its own: then there is but one, of the smallest bucket or of all graphs.
        self._shared = packed is not None and packed.exists()
        smallest = by_bucket(self.names)[0]
        self._models = [self._compile(needed_first(self.names) if self._shared else smallest)]
        self._in_use = _by_graph(self._models)
        self._worked_s = time.monotonic()
        self._changed = threading.Condition()
        """Guards what follows, and the models."""
        self._arrived: list[CompiledModel] = []
        """Whoever runs graphs takes them into use: nobody else may close those that they cover."""
        self._soon: list[str] = []
        self._later: set[str] = set()
        self._compiling: Sequence[str] = ()
        self._failed: dict[str, Exception] = {}
        """What did not come, and why: it is compiled again only where somebody waits for it."""
        self._at_work = self._closing = False
        self._background: list[threading.Thread] = []

    def _compile(self, names: Collection[str]) -> CompiledModel:
        return _compiled(self._graph, names, self._threads, self._packed)

    @property
    def loaded(self) -> set[str]:
        """Graphs that can be run without a wait."""
        with self._changed:
            return {name for model in (*self._models, *self._arrived) for name in model.signatures}

    def prepare(self, soon: Sequence[str], later: Sequence[str] = ()) -> None:
        with self._changed:
            self._later |= {*later}
            known = {*self.loaded, *self._compiling, *self._soon, *self._failed}
            self._soon += [name for name in soon if name in self.names and name not in known]
            self._begin()

    def _begin(self) -> None:
        """Have what is wanted compiled."""
        self._changed.notify_all()
        if not self._at_work and not self._closing and (self._soon or self._rest()):
            self._at_work = True
            self._aside(self._work)

    def _aside(self, work: Callable[..., None], *given: Any) -> None:
        thread = threading.Thread(target=work, args=given, name="graphs", daemon=True)
        self._background = [*(t for t in self._background if t.is_alive()), thread]
        thread.start()

    def _rest(self, spare: bool = True) -> list[str]:
        """All graphs of a bucket that sessions came to, or where there is memory to ``spare`` may come to, where they are not in
        one model yet."""
        wanted, models = self.loaded | (self._later if spare else set()), (*self._models, *self._arrived)
        for group in by_bucket(self.names) if self._shared else ():
            together = any(model.signatures.keys() >= {*group} for model in models)
            if not together and not wanted.isdisjoint(group) and self._failed.keys().isdisjoint(group):
                return group
        return []

    def _spare(self) -> bool:
        try:
            return probe_memory().free >= self.spare_bytes
        except OSError:  # a sandbox that hides /proc
            return False

    def _work(self) -> None:
        """Compile what is wanted, until nothing is; whoever wants something then starts another thread."""
        while names := self._next():
            try:
                model = self._compile(names)
                self._worked_s = time.monotonic()
            except Exception as error:  # whatever it is: somebody may wait for what does not come
                log.warning("%s; it is tried again when a session needs it", error)
                with self._changed:
                    self._failed |= dict.fromkeys(names, error)
                    self._compiling = ()
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._arrived.append(model)
                    self._compiling = ()
                    self._changed.notify_all()

    def _next(self) -> Sequence[str]:
        """What is compiled next, when it is time for it; empty where nothing is wanted."""
        with self._changed:
            while not self._closing and not self._compiling:
                quiet_s = time.monotonic() - self._worked_s
                if self._soon:
                    if (name := self._soon.pop(0)) not in self.loaded:
                        self._compiling = [name] if self._shared else [*self.names]
                elif not self._rest():
                    break
                elif quiet_s < self.quiet_s:
                    self._changed.wait(self.quiet_s - quiet_s)
                elif rest := self._rest(self._spare()):
                    self._compiling = rest
                else:
                    break
            self._at_work = bool(self._compiling)
            return self._compiling

    def _with(self, graph: str) -> CompiledModel:
        """The model in use that has the graph, which comes before all others that are wanted. Raises what its compilation raised."""
        if not self._arrived and (found := self._in_use.get(graph)) is not None:
            return found  # a step asks for it: no lock, and no look at every model
        asked = False
        with self._changed:
            while True:
                self._take_over()
                if (found := self._in_use.get(graph)) is not None:
                    return found
                if graph not in self.names:
                    raise ShardError(f"{self._graph} has no graph {graph!r}; make the shard again")
                failed = self._failed.pop(graph, None)
                if failed is not None and asked:
                    raise failed
                if graph not in self._compiling:
                    asked = True
                    self._soon = [graph, *(name for name in self._soon if name != graph)]
                    self._begin()
                self._changed.wait()

    def _take_over(self) -> None:
        """Use the models that arrived."""
        for model in self._arrived:
            covered = [m for m in self._models if m.signatures.keys() <= model.signatures.keys()]
            self._models = [*(m for m in self._models if m not in covered), model]
            if covered:
                self._aside(_close, covered)  # it takes as long as a step or two
        self._arrived.clear()
        self._in_use = _by_graph(self._models)

    def ends(self, graph: str) -> Ends:
        found = self._with(graph).signatures[graph]
        return Ends(found.inputs, found.outputs)

    def bind(self, memory: Array) -> Any:
        return bound(memory)

    def unbind(self, memory: Any) -> None:
        unbound(memory)

    def together(self, bound: Sequence[Any]) -> Any:
        return tensor_buffers(bound)

    def run(self, graph: str, inputs: Any, outputs: Any) -> None:
        model = self._with(graph)
        model.run(model.signatures[graph].number, inputs, outputs)
        self._worked_s = time.monotonic()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._background:
            thread.join()
        _close((*self._models, *self._arrived))


def _by_graph(models: Iterable[CompiledModel]) -> dict[str, CompiledModel]:
    return {name: model for model in models for name in model.signatures}


def _close(models: Iterable[CompiledModel]) -> None:
    for model in models:
        model.close()


def pack(graph: Path, threads: int, packed: Path) -> None:
    """Compile a graph of every kind once, and leave the packed weights of all in a file: a bucket's are those of the others.
    Raises ``ShardError`` with what LiteRT said."""
    with _mapped(graph) as data:
        names = graph_names(data)
    _compiled(graph, by_bucket(names)[0], threads, packed).close()


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
    """A model of these graphs."""
    with own_words() as words, _mapped(graph) as data:
        keep_graphs(data, names)
        try:
            return CompiledModel(data, threads, packed)
        except LibraryError as error:
            raise ShardError(" ".join(words().split()) or str(error)) from None


@contextlib.contextmanager
def own_words() -> Iterator[Callable[[], str]]:
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
