"""The first use of a LiteRT graph or a delegate, in a process of its own: whatever it dies of, the agent lives.

    python -m node_agent.adapters.litert_first packed GRAPH THREADS FILE
    python -m node_agent.adapters.litert_first interpreted FOLDER THREADS DELEGATE

The first compiles a graph of every kind and leaves packed weights in FILE: what no manifest vouches for may crash the library. The
second holds a shard on the classic interpreter, with a delegate if one is named, to its test vector.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from mesh.errors import MeshError, ShardError

_LONGEST_S = 120
_SAID_MAX = 300


def first_packed(graph: Path, threads: int, packed: Path) -> None:
    """Raises ``ShardError`` with what it said or died of."""
    try:
        _first("packed", graph, threads, str(packed))
    except _EndedError as error:
        raise ShardError(f"LiteRT died of {graph} ({error}); make the shard again") from None


def first_interpreted(folder: Path, threads: int, delegate: str) -> None:
    """``delegate``: may be empty. Raises ``ShardError`` with what it said or died of."""
    try:
        _first("interpreted", folder, threads, delegate)
    except _EndedError as error:
        raise ShardError(f"the process that tried it died ({error})") from None


class _EndedError(Exception):
    """The child ended without a word; says of what."""


def _first(what: str, path: Path, threads: int, last: str) -> None:
    words = [sys.executable, "-m", __name__, what, str(path), str(threads), last]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        raise _EndedError(f"nothing came of it within {_LONGEST_S} s") from None
    if done.returncode < 0:
        raise _EndedError(signal.Signals(-done.returncode).name)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()[-_SAID_MAX:]
        if not said:
            raise _EndedError(f"status {done.returncode}")
        raise ShardError(said)


def _packed(graph: Path, threads: int, packed: str) -> None:
    from node_agent.adapters.litert_compiled import pack

    pack(graph, threads, Path(packed))


def _interpreted(folder: Path, threads: int, delegate: str) -> None:
    from node_agent.adapters.shard_loader import hold_to_vector
    from node_agent.adapters.static_runtime import StaticShard
    from node_agent.adapters.tflite_engine import InterpreterEngine
    from node_agent.shards.manifest import LITERT_GRAPH_FILE, MANIFEST_FILE, ShardManifest, read_document

    path = folder / MANIFEST_FILE
    manifest = read_document(path.read_bytes(), ShardManifest, str(path))
    engine = InterpreterEngine(folder / LITERT_GRAPH_FILE, threads, delegate)
    hold_to_vector(StaticShard(folder, manifest, engine, slots=1, capacity=2), folder, manifest)


def main() -> int:
    """The child."""
    what, path, threads, last = sys.argv[1:]
    try:
        (_packed if what == "packed" else _interpreted)(Path(path), int(threads), last)
    except MeshError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
