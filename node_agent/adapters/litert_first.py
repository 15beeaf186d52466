"""The first load of a LiteRT shard on a machine, in a process of its own: whatever it dies of, the agent lives.

    python -m node_agent.adapters.litert_first GRAPH THREADS PACKED

It leaves the packed weights in the file PACKED. A graph that no manifest vouches for, or a delegate, may crash the library.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from mesh.errors import ShardError

_LONGEST_S = 120
_SAID_MAX = 300


def load_first(graph: Path, threads: int, packed: Path) -> None:
    """Raises ``ShardError`` with what it said or died of."""
    words = [sys.executable, "-m", __name__, str(graph), str(threads), str(packed)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        raise ShardError(f"LiteRT did not load {graph} within {_LONGEST_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ShardError(f"LiteRT died of {graph} ({name}); make the shard again")
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()[-_SAID_MAX:]
        raise ShardError(said or f"LiteRT cannot load {graph}")


def main() -> int:
    """The child."""
    from node_agent.adapters.litert_runtime import open_graph

    graph, threads, packed = sys.argv[1:]
    try:
        open_graph(Path(graph), int(threads), Path(packed)).close()
    except ShardError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
