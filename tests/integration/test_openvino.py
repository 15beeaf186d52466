"""Static ONNX graphs on a second execution provider: OpenVINO, in an environment of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import RuntimeOptions
from node_agent.shards.deviation import relative_error
from node_agent.shards.manifest import GRAPH_FILE
from tests.integration.test_litert_shards import text
from tests.integration.test_tiny_models import pulled
from tests.other_python import answer, install, run

PROVIDER = "OpenVINOExecutionProvider"
WHOLE = """
import json, sys
import onnxruntime as ort
settings = ort.SessionOptions()
settings.log_severity_level = 4
settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
try:
    ort.InferenceSession(sys.argv[1], settings, providers=["OpenVINOExecutionProvider"])
    print(json.dumps(""))
except Exception as error:
    print(json.dumps(str(error)))
"""
"""Whether a provider takes on the whole of a graph: empty, or why not."""


@pytest.fixture(scope="module")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info[:2] > (3, 13):
        pytest.skip("onnxruntime-openvino has no wheel for this Python")
    return install(tmp_path_factory.mktemp("openvino"), "onnxruntime-openvino==1.24.1", "msgspec")


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
def test_openvino_computes_the_whole_of_a_standard_graph(
    tmp_path: Path, openvino: Path, quantization: str
) -> None:
    store = pulled(tmp_path, context=1024)
    folder = make_shard(store, "tiny", 0, 3, quantization, runtime="onnxstd")
    for graph in ("run_1_256.onnx", "run_64_256.onnx", "head.onnx"):
        assert run(openvino, WHOLE, str(folder / graph)) == ""
    tokens = text(270)  # into the second bucket
    told = answer(openvino, folder, tokens.tolist(), PROVIDER, capacity=300)
    assert told["provider"] == PROVIDER
    options = RuntimeOptions(threads=1)
    manifest = store.manifest(folder)
    shard = load_shard(folder, manifest, slots=2, capacity=300, options=options)
    shard.prefill(1, 0, tokens[:-1])
    wanted = shard.decode(1, [len(tokens) - 1], tokens[-1:])
    # OpenVINO rounds activations to 8 bits where weights have 8.
    allowed = manifest.test_vector.tolerance
    assert relative_error(np.array(told["logits"]), wanted) < allowed


def test_openvino_lacks_the_fused_operators(tmp_path: Path, openvino: Path) -> None:
    """Which is what standard graphs are for."""
    folder = make_shard(pulled(tmp_path), "tiny", 0, 3, "int8")
    assert "CPU" in run(openvino, WHOLE, str(folder / GRAPH_FILE))


def test_without_the_provider_the_next_one_computes(tmp_path: Path) -> None:
    folder = make_shard(pulled(tmp_path), "tiny", 0, 3, "fp32", runtime="onnxstd")
    told = answer(Path(sys.executable), folder, text(20).tolist(), f"{PROVIDER},CPUExecutionProvider")
    assert told["provider"].startswith(
        "CPUExecutionProvider (not OpenVINOExecutionProvider is not in this build"
    )
