"""How long a shard of ten layers takes from disk until it serves, where it was held to its test vector before; and then until it
has answered a chunk of 64 positions and a step, for which it may still have to compile graphs.

Forms take turns. The files are in the page cache, packed weights and what the shard proved are kept in a folder.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from mesh.forms import parse_form
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.proven import SETTLED_S
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import RuntimeOptions
from tests.benchmarks.common import MODEL, THREADS, arguments, finish, median, the_store

FORMS = ("litert-int8", "litert-int4", "onnx-int8")
CUT = (10, 20)
CHUNK = 64
WANTED_MS = 50


def timed(store: ModelStore, form: str, cache: Path) -> tuple[float, float]:
    """Milliseconds until it is loaded, and until it has answered."""
    runtime, quantization = parse_form(form)
    folder = store.shard_folder(MODEL, runtime, quantization, *CUT)
    options = RuntimeOptions(threads=THREADS, cache=str(cache))
    begin = time.perf_counter()
    shard = load_shard(folder, store.manifest(folder), slots=4, capacity=1024, options=options)
    loaded = time.perf_counter()
    hidden = np.zeros((CHUNK, shard.info.model.width), dtype=np.float32)
    shard.prefill(0, 0, hidden)
    shard.decode(0, [CHUNK], hidden[:1])
    answered = time.perf_counter()
    shard.close()
    return (loaded - begin) * 1e3, (answered - begin) * 1e3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    said = parser.parse_args()
    store = the_store()
    for form in FORMS:
        runtime, quantization = parse_form(form)
        make_shard(store, MODEL, *CUT, quantization, runtime=runtime)
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as cache:
        time.sleep(SETTLED_S)  # what was just made is not known again yet
        firsts = {form: timed(store, form, Path(cache))[0] for form in FORMS}
        for _ in range(said.rounds):
            for form in FORMS:
                times[form].append(timed(store, form, Path(cache)))
    rows: list[tuple[str, str, str]] = []
    keys: dict[str, float] = {}
    for form, found in times.items():
        loaded, answered = (median([t[i] for t in found]) for i in range(2))
        name = form.replace("-", "_")
        keys |= {f"load_ms_{name}": round(loaded, 1), f"answered_ms_{name}": round(answered, 1)}
        rows.append((f"{form}: loaded again", f"{loaded:.1f} ms", f"<= {WANTED_MS} ms"))
        rows.append((f"{form}: and answered a chunk and a step", f"{answered:.1f} ms", ""))
        rows.append((f"{form}: loaded the first time", f"{firsts[form]:.0f} ms", ""))
    finish(rows, keys, said.json)


if __name__ == "__main__":
    main()
