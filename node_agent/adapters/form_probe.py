"""Measures which form of a model this machine computes fastest, on the model itself.

Four layers from the middle and the last four, which have the head, of each form that is installed: they tell what a layer and
the head take. Rounds of the forms take turns, and the quickest counts: what disturbs this machine now is not what it is.

    python -m node_agent.adapters.form_probe HOME MODEL
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mesh.errors import ConfigError, ShardError
from node_agent.adapters.fingerprint.cpu import probe_cpu
from node_agent.adapters.form_times import PACKAGES, FormTime
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import Runtime, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_LAYERS, _POSITION, _CHUNK = 4, 128, 64
_ROUNDS, _STEPS = 5, 12


def _measure(store: ModelStore, model: str, threads: int) -> dict[str, FormTime]:
    layers = store.card(model).architecture.layers
    few = min(_LAYERS, layers)
    middle = (layers - few) // 2
    cuts = ((middle, middle + few), (layers - few, layers))
    shards: dict[str, list[Runtime]] = {}
    for runtime in PACKAGES:
        try:
            shards[runtime] = [_load(store, model, cut, runtime, threads) for cut in cuts]
        except (ShardError, ConfigError, RuntimeError) as error:
            log.warning("%s is no choice here: %s", runtime, error)
    best = {runtime: [float("inf")] * (len(cuts) + 1) for runtime in shards}
    for _ in range(_ROUNDS):
        for runtime, loaded in shards.items():
            times = [*(_step_us(shard) for shard in loaded), _chunk_us(loaded[0])]
            best[runtime] = [min(a, b) for a, b in zip(best[runtime], times, strict=True)]
    for loaded in shards.values():
        for shard in loaded:
            shard.close()
    return {
        runtime: FormTime(_short(inner / few), _short(max(0.0, last - inner)), _short(chunk / few / _CHUNK))
        for runtime, (inner, last, chunk) in best.items()
    }


def _short(us: float) -> float:
    return float(f"{us:.4g}")


def _load(store: ModelStore, model: str, cut: tuple[int, int], runtime: str, threads: int) -> Runtime:
    folder = make_shard(store, model, *cut, runtime=runtime)
    options = RuntimeOptions(threads=threads)
    shard = load_shard(folder, store.manifest(folder), slots=1, capacity=2 * _POSITION, options=options)
    shard.prefill(0, 0, _inputs(shard, _POSITION), 0)
    return shard


def _step_us(shard: Runtime) -> float:
    inputs = _inputs(shard, 1)
    begin = time.perf_counter()
    for i in range(_STEPS):
        shard.decode(0, [_POSITION + i], inputs)
    return (time.perf_counter() - begin) / _STEPS * 1e6


def _chunk_us(shard: Runtime) -> float:
    inputs = _inputs(shard, _CHUNK)
    begin = time.perf_counter()
    shard.prefill(0, _POSITION - _CHUNK, inputs, 0)
    return (time.perf_counter() - begin) * 1e6


def _inputs(shard: Runtime, count: int) -> NDArray[Any]:
    info = shard.info
    if info.first:
        return np.arange(count, dtype=np.int64) % info.model.vocabulary
    return np.random.default_rng(1).standard_normal((count, info.model.width), dtype=np.float32)


def main() -> int:
    """The child."""
    home, model = sys.argv[1:]
    found = _measure(ModelStore(Path(home)), model, probe_cpu().cores)
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
