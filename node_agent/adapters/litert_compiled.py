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
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mesh.errors import ShardError
from node_agent.adapters.litert_library import CompiledModel, LibraryError, bound, tensor_buffers, unbound
from node_agent.adapters.static_engine import Ends
from node_agent.shards.static_names import by_bucket, in_order, needed_first
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


class _Wanted(NamedTuple):
    """Graphs to be compiled into one model."""

    names: Collection[str]
    alone: bool
    """Whether that model takes the place of all others."""


class CompiledEngine:
    """LiteRT's compiled model on XNNPACK. Every graph takes its time to compile, and the library compiles one at a time: the step
    comes first, then the smallest bucket's others, in models of their own, and before others what somebody waits for. One model
    of all that may be wanted then takes their place."""

    provider = "XNNPACK"

    def __init__(self, graph: Path, threads: int, packed: Path | None = None) -> None:
        """``packed``: where packed weights are. Raises ``ShardError`` with what LiteRT said."""
        self._graph, self._threads, self._packed = graph, threads, packed
        with _mapped(graph) as data:
            self.names: Collection[str] = graph_names(data)
        # Without that file every model packs weights of its own: then there is but one.
        shared = packed is not None and packed.exists()
        self._models = [self._compile(needed_first(self.names) if shared else by_bucket(self.names)[0])]
        self._changed = threading.Condition()
        """Guards what follows, and what is added to the models."""
        self._next: CompiledModel | None = None
        self._wanted: deque[_Wanted] = deque()
        """What is being compiled in the background, and what is to be."""
        self._closing = False
        self._background: list[threading.Thread] = []

    def _compile(self, names: Collection[str]) -> CompiledModel:
        return _compiled(self._graph, names, self._threads, self._packed)

    @property
    def loaded(self) -> set[str]:
        """Graphs that can be run without a wait."""
        with self._changed:
            models = [*self._models, *([] if self._next is None else [self._next])]
            return {name for model in models for name in model.signatures}

    def prepare(self, graphs: Sequence[str]) -> None:
        smallest, *larger = by_bucket(self.names)
        rest = in_order({*smallest} - self.loaded)
        wanted = [name for group in larger if not {*graphs}.isdisjoint(group) for name in group]
        everything = [_Wanted([*smallest, *wanted], alone=True)] if wanted else []
        self._want([*(_Wanted([name], alone=False) for name in rest), *everything])

    def _want(self, groups: Sequence[_Wanted]) -> None:
        with self._changed:
            idle = not self._wanted
            self._wanted += groups
            if idle and groups:
                self._aside(self._work)

    def _aside(self, work: Callable[..., None], *given: Any) -> None:
        thread = threading.Thread(target=work, args=given, name="graphs", daemon=True)
        self._background = [*(t for t in self._background if t.is_alive()), thread]
        thread.start()

    def _work(self) -> None:
        """Compile what is wanted, until nothing is; whoever wants something then starts another thread."""
        more = True
        while more:
            names, alone = self._wanted[0]
            model = None
            try:
                if not self._closing:
                    model = self._compile(names)
            except (ShardError, OSError) as error:
                log.warning("%s; it is tried again when a session needs it", error)
            finally:
                with self._changed:
                    self._wanted.popleft()
                    more = bool(self._wanted)
                    if model is not None and alone:
                        self._next = model
                    elif model is not None:
                        self._models = [*self._models, model]
                    self._changed.notify_all()

    def _with(self, graph: str) -> CompiledModel:
        """The model in use that has the graph."""
        with self._changed:
            while True:
                if self._next is not None:
                    before, self._models, self._next = self._models, [self._next], None
                    self._aside(_close, before)  # it takes as long as a step or two
                for model in self._models:
                    if graph in model.signatures:
                        return model
                if graph not in self.names:
                    raise ShardError(f"{self._graph} has no graph {graph!r}; make the shard again")
                if self._wanted:
                    self._hurry(graph)
                    self._changed.wait()
                else:
                    self._next = self._compile(self.names)

    def _hurry(self, graph: str) -> None:
        """What is wanted for one graph comes after what is being compiled."""
        for number, wanted in enumerate(self._wanted):
            if number > 1 and graph in wanted.names and not wanted.alone:
                del self._wanted[number]
                self._wanted.insert(1, wanted)
                return

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

    def close(self) -> None:
        self._closing = True
        for thread in self._background:
            thread.join()
        if self._next is not None:
            self._next.close()
        _close(self._models)


def _close(models: Iterable[CompiledModel]) -> None:
    for model in models:
        model.close()


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
