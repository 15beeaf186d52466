"""What forms of a model take on this machine: measured once by ``form_probe``, kept beside the models.

Measuring is left to a process of its own, which may die of a runtime.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import msgspec

from mesh.errors import MeshError
from mesh.forms import AUTO, DEFAULT_RUNTIME, choices, fastest
from mesh.types import Digest
from node_agent.adapters.fingerprint.cpu import probe_cpu
from node_agent.adapters.model_store import ModelStore, Progress, new_file, no_progress
from node_agent.shards.static_network import REVISION
from scheduler.layer_speed import LayerSpeed, probed_layer

log = logging.getLogger(__name__)

FILE = "forms.json"
PACKAGES = {"onnx": "onnxruntime", "litert": "ai-edge-litert"}
"""What is measured, and the package that it needs."""
_COMPUTE = (
    *PACKAGES.values(),
    "tflite-runtime",
    "onnxruntime-openvino",
    "onnxruntime-gpu",
    "openvino",
    "numpy",
)
"""Packages that rounding may depend on, where they are installed."""
_LONGEST_S = 300


class FormTime(msgspec.Struct, frozen=True):
    """Microseconds: a step over one layer, the head, a position of prefill in one layer."""

    layer: Annotated[float, msgspec.Meta(gt=0)]
    head: Annotated[float, msgspec.Meta(ge=0)]
    prefill: Annotated[float, msgspec.Meta(gt=0)]

    def token_us(self, layers: int) -> float:
        """A token of the whole model, alone on this machine."""
        return layers * self.layer + self.head


_Kept = dict[str, dict[str, FormTime]]
"""By machine and model, then by runtime."""


def chosen_form(
    store: ModelStore,
    model: str,
    runtime: str,
    quantization: str,
    progress: Progress = no_progress,
) -> tuple[str, str]:
    """Runtime and quantization, as they were asked for, or the fastest here where no runtime was. Measures when it must, some
    seconds; raises ``InputError`` for what there is not."""
    forms = choices(runtime or AUTO, quantization)
    if len(forms) > 1:
        layers = store.card(model).architecture.layers
        found = probe_forms(store, model, progress)
        chosen = fastest({r: t.token_us(layers) for r, t in found.items() if r in forms})
    else:
        chosen = next(iter(forms))
    return chosen, forms[chosen]


def probe_forms(store: ModelStore, model: str, progress: Progress = no_progress) -> dict[str, FormTime]:
    """What this machine takes, by runtime in its default quantization. Where there is the usual runtime alone nothing is measured,
    and it is empty."""
    installed = _installed()
    if installed.keys() <= {DEFAULT_RUNTIME}:
        return {}
    path, key = store.root.parent / FILE, _key(store, model, installed)
    kept = _read(path)
    if key not in kept:
        progress("measuring runtimes", 0, 1)
        found = _measured(store, model)
        progress("measuring runtimes", 1, 1)
        if not found:
            return {}
        kept[key] = found
        with new_file(path) as file:
            file.write(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    return kept[key]


def probed_speeds(store: ModelStore) -> list[LayerSpeed]:
    """What was measured of the models here before, as peers are told of it. Measures nothing; what cannot be read is left out."""
    kept, installed, quantizations = _read(store.root.parent / FILE), _installed(), choices()
    speeds = []
    for model in store.names() if kept else ():
        with contextlib.suppress(MeshError):
            digest = Digest(store.card(model).digest)
            found = kept.get(_key(store, model, installed), {})
            speeds += [
                probed_layer(digest, runtime, quantizations[runtime], t.layer, t.head, t.prefill)
                for runtime, t in sorted(found.items())
                if runtime in quantizations
            ]
    return speeds


def _installed() -> dict[str, str]:
    found = _versions(PACKAGES.values())
    return {runtime: found[package] for runtime, package in PACKAGES.items() if package in found}


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _key(store: ModelStore, model: str, installed: dict[str, str]) -> str:
    return f"{store.card(model).digest} {installed} {_processor()} graphs {REVISION}"


def _processor() -> str:
    cpu = probe_cpu()
    return f"{cpu.model} {cpu.cores} {cpu.quota}"


@cache
def this_machine() -> str:
    """What rounding depends on: the packages that compute, and the processor."""
    return f"{_versions(_COMPUTE)} {_processor()}"


def _read(path: Path) -> _Kept:
    """What was measured before; nothing where that cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return {}


def _measured(store: ModelStore, model: str) -> dict[str, FormTime]:
    """By the child; nothing where it fails."""
    words = [sys.executable, "-m", "node_agent.adapters.form_probe", str(store.root.parent), model]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_LONGEST_S, check=True)
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, FormTime])
    except (subprocess.SubprocessError, OSError, msgspec.MsgspecError, IndexError) as error:
        log.warning("the runtimes were not measured: %s", error)
        return {}
