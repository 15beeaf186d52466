"""What runs a LiteRT shard's graphs: LiteRT's compiled model (``litert_compiled``), or the classic interpreter (``tflite_engine``)."""

from __future__ import annotations

import logging
from pathlib import Path

from mesh.errors import ConfigError, ShardError
from node_agent.adapters.litert_first import first_interpreted, first_packed
from node_agent.adapters.litert_library import library_path
from node_agent.adapters.packed_weights import made_anew, packed_path
from node_agent.adapters.static_engine import Engine
from node_agent.ports import RuntimeOptions

log = logging.getLogger(__name__)


def open_engine(folder: Path, graph: Path, digest: str, options: RuntimeOptions) -> Engine:
    """The first delegate that computes what the shard's test vector wants, else LiteRT, else tflite-runtime. ``digest`` is the
    shard's. Raises ``ShardError``, or ``ConfigError`` where neither is installed."""
    refused: list[str] = []
    engine: Engine | None = None
    for told in options.delegates:
        try:
            engine = _interpreted(folder, graph, options.threads, told)
            break
        except ShardError as error:
            log.warning("the delegate %s is not used for %s: %s", told, folder.name, error)
            refused.append(f"{told}: {error}")
    engine = engine or _plain(folder, graph, digest, options)
    if refused:
        engine.provider += f" (not {'; '.join(refused)})"
    return engine


def _interpreted(folder: Path, graph: Path, threads: int, delegate: str = "") -> Engine:
    from node_agent.adapters.tflite_engine import InterpreterEngine

    first_interpreted(folder, threads, delegate)
    return InterpreterEngine(graph, threads, delegate)


def _plain(folder: Path, graph: Path, digest: str, options: RuntimeOptions) -> Engine:
    if library_path() is None:
        from node_agent.adapters.tflite_engine import package

        if package() is None:
            raise ConfigError(
                "LiteRT shards need LiteRT, and ai-edge-litert is not installed; "
                "'pip install inference-mesh[litert]'"
            )
        return _interpreted(folder, graph, options.threads)
    if not options.cache:
        from node_agent.adapters.litert_compiled import CompiledEngine

        return CompiledEngine(graph, options.threads)
    return _packed(graph, options.threads, packed_path(options.cache, digest, "xnnpack"))


def _packed(graph: Path, threads: int, packed: Path) -> Engine:
    """With a file of packed weights."""
    from node_agent.adapters.litert_compiled import CompiledEngine

    if packed.exists():
        try:
            return CompiledEngine(graph, threads, packed)
        except ShardError as error:
            log.warning("%s is packed anew: %s", packed, error)
            packed.unlink()
    with made_anew(packed) as fresh:
        first_packed(graph, threads, fresh)
    return CompiledEngine(graph, threads, packed)
