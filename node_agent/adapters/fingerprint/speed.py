"""Measured speed of a runtime, kept in the data directory: measured once for each version of it.

A model of one matrix product whose weights are an input. Its product with a vector reads every
weight once, which is what decode is made of; its product with a matrix computes, as prefill does.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mesh.capabilities import Cpu, Speed
from node_agent.adapters.model_store import new_file

FILE = "speed.json"
MATMUL = bytes.fromhex(
    "08083a5f0a110a01780a017712017922064d61744d756c120573706565645a150a017812100a0e0801120a0a0312016d"
    "0a0312016b5a150a017712100a0e0801120a0a0312016b0a0312016e62150a017912100a0e0801120a0a0312016d0a03"
    "12016e42040a00100d"
)
"""ONNX, opset 13: ``MatMul(x[m,k], w[k,n]) -> y[m,n]``, float32. A test reads it with the onnx package."""
_INNER, _WIDE, _ROWS = 2048, 4096, 64
_RUNS = 7


def probe_speeds(data_dir: Path, cpu: Cpu, threads: int) -> tuple[Speed, ...]:
    """Speeds of the runtimes that are installed; takes some 100 ms the first time. Blocks."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    key = f"onnx {onnxruntime.__version__} {cpu.model} {cpu.quota} {threads}"
    path = data_dir / FILE
    known = _read(path, key)
    if known is None:
        known = _measure_onnx(threads)
        with new_file(path) as file:
            file.write(
                json.dumps({"key": key, "gb_s": known.gb_s, "gflop_s": known.gflop_s}).encode() + b"\n"
            )
    return (known,)


def _read(path: Path, key: str) -> Speed | None:
    """What was measured before; ``None`` if the file is of something else or damaged."""
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return Speed("onnx", float(kept["gb_s"]), float(kept["gflop_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _measure_onnx(threads: int) -> Speed:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(MATMUL, settings, providers=["CPUExecutionProvider"])
    weights = np.full((_INNER, _WIDE), 0.01, dtype=np.float32)
    vector = np.ones((1, _INNER), dtype=np.float32)
    matrix = np.ones((_ROWS, _INNER), dtype=np.float32)
    step = _least_s(lambda: session.run(None, {"x": vector, "w": weights}))
    block = _least_s(lambda: session.run(None, {"x": matrix, "w": weights}))
    return Speed(
        "onnx", round(weights.nbytes / step / 1e9, 2), round(2 * _ROWS * weights.size / block / 1e9, 1)
    )


def _least_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
