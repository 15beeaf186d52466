"""Which form of a model this machine computes fastest: measured on the model itself, kept beside the agents' data.

Four layers from the middle and the last four, which have the head, of each form that is installed: their single steps tell what
a token of the whole model takes. Rounds of the forms take turns, and the quickest counts: what disturbs this machine now is not
what it is. All this happens in a process of its own, which may die of a runtime.

    python -m node_agent.adapters.form_probe HOME MODEL
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import ConfigError, ShardError
from mesh.forms import QUANTIZATIONS, fastest, form_of
from node_agent.adapters.fingerprint.cpu import probe_cpu
from node_agent.adapters.model_store import ModelStore, Progress, new_file, no_progress
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import Runtime, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FILE = "forms.json"
_PACKAGES = {"onnx": "onnxruntime", "litert": "ai-edge-litert"}
_LAYERS, _POSITION = 4, 128
_ROUNDS, _STEPS = 5, 12
_LONGEST_S = 300


def chosen_form(
    store: ModelStore,
    model: str,
    runtime: str,
    quantization: str,
    data_dir: Path,
    progress: Progress = no_progress,
) -> tuple[str, str]:
    """Runtime and quantization, as they were asked for, or the fastest here where neither was. Measures when it must, some
    seconds; raises ``InputError`` for what there is not."""
    if runtime or quantization:
        return form_of(runtime, quantization)
    return form_of(fastest(probe_forms(store, model, data_dir, progress)))


def probe_forms(
    store: ModelStore, model: str, data_dir: Path, progress: Progress = no_progress
) -> dict[str, float]:
    """Microseconds that a token of the whole model takes alone on this machine, by runtime in its default quantization. Without
    a choice nothing is measured, and it is empty."""
    installed = {}
    for runtime, package in _PACKAGES.items():
        with contextlib.suppress(PackageNotFoundError):
            installed[runtime] = version(package)
    if len(installed) < 2:
        return {}
    cpu, card = probe_cpu(), store.card(model)
    key = f"{card.digest} {installed} {cpu.model} {cpu.cores} {cpu.quota}"
    path = data_dir / FILE
    kept = _read(path)
    if key not in kept:
        progress("measuring runtimes", 0, 1)
        found = _measured(store, model)
        progress("measuring runtimes", 1, 1)
        if not found:
            return {}
        kept[key] = found
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(json.dumps(kept, indent=1).encode() + b"\n")
    return kept[key]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing where that cannot be read."""
    try:
        kept = json.loads(path.read_text())
        return {k: {r: float(us) for r, us in v.items() if r in QUANTIZATIONS} for k, v in kept.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _measured(store: ModelStore, model: str) -> dict[str, float]:
    """By the child; nothing where it fails."""
    words = [sys.executable, "-m", __name__, str(store.root.parent), model]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_LONGEST_S, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        log.warning("the runtimes were not measured: %s", error)
        return {}
    return found


def _measure(store: ModelStore, model: str, threads: int) -> dict[str, float]:
    layers = store.card(model).architecture.layers
    few = min(_LAYERS, layers)
    middle = (layers - few) // 2
    cuts = ((middle, middle + few), (layers - few, layers))
    shards: dict[str, list[Runtime]] = {}
    for runtime in _PACKAGES:
        try:
            shards[runtime] = [_load(store, model, cut, runtime, threads) for cut in cuts]
        except (ShardError, ConfigError, RuntimeError) as error:
            log.warning("%s is no choice here: %s", runtime, error)
    best = {runtime: [float("inf")] * len(cuts) for runtime in shards}
    for _ in range(_ROUNDS):
        for runtime, loaded in shards.items():
            times = [_step_us(shard) for shard in loaded]
            best[runtime] = [min(a, b) for a, b in zip(best[runtime], times, strict=True)]
    for loaded in shards.values():
        for shard in loaded:
            shard.close()
    whole = {r: inner * layers / few + max(0.0, last - inner) for r, (inner, last) in best.items()}
    return {runtime: round(us, 1) for runtime, us in whole.items()}


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


def _inputs(shard: Runtime, count: int) -> NDArray[Any]:
    info = shard.info
    if info.first:
        return np.arange(count, dtype=np.int64) % info.model.vocabulary
    return np.random.default_rng(1).standard_normal((count, info.model.width), dtype=np.float32)


def main() -> int:
    """The child."""
    home, model = sys.argv[1:]
    sys.stdout.write(json.dumps(_measure(ModelStore(Path(home)), model, probe_cpu().cores)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
