"""LiteRT shards where something else computes: delegates, good and bad, and tflite-runtime in an environment of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from node_agent.adapters.model_store import sha256_of
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import Runtime, RuntimeOptions
from node_agent.shards.manifest import LITERT_GRAPH_FILE, MANIFEST_FILE, StoredFile, write_document
from tests.integration.test_litert_shards import text
from tests.integration.test_tiny_models import pulled
from tests.other_python import answer, install


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on the PATH to build a delegate with")
    made = tmp_path_factory.mktemp("delegate") / "libprobe.so"
    source = Path(__file__).with_name("delegate.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True, timeout=60)
    return made


def load(folder: Path, *delegates: str, quantization: str = "fp32") -> Runtime:
    store = pulled(folder)
    made = make_shard(store, "tiny", 0, 3, quantization, runtime="litert")
    options = RuntimeOptions(threads=1, delegates=delegates)
    return load_shard(made, store.manifest(made), slots=2, capacity=128, options=options)


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
def test_a_delegate_that_computes_right_is_used_and_named(
    tmp_path: Path, library: Path, quantization: str
) -> None:
    shard = load(tmp_path, f"{library}:mode=fine", quantization=quantization)
    assert shard.provider == "libprobe.so"
    plain = load(tmp_path, quantization=quantization)
    assert plain.provider == "XNNPACK"
    whole, wanted = shard.prefill(0, 0, text(40)).copy(), plain.prefill(0, 0, text(40)).copy()
    assert np.allclose(whole, wanted, atol=1e-3)
    for position in range(40, 44):
        step = shard.decode(0, [position], text(position + 1)[-1:]).copy()
        assert np.allclose(step, plain.decode(0, [position], text(position + 1)[-1:]), atol=1e-3)
    shard.release(0)
    shard.close()


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("crash", "the process that tried it died (SIGABRT)"),
        ("refuse", "there is no such device"),
        ("zeros", "computes wrong results on libprobe.so"),
    ],
)
def test_a_delegate_that_fails_or_lies_is_told_and_not_used(
    tmp_path: Path, library: Path, mode: str, why: str
) -> None:
    shard = load(tmp_path, f"{library}:mode={mode}")
    assert shard.provider.startswith("XNNPACK (not ")
    assert why in shard.provider
    assert np.array_equal(shard.prefill(0, 0, text(9)), load(tmp_path).prefill(0, 0, text(9)))


def test_delegates_are_tried_in_order(tmp_path: Path, library: Path) -> None:
    shard = load(tmp_path, "/nowhere/libnone.so", f"{library}:mode=crash", f"{library}:mode=fine")
    assert shard.provider.startswith("libprobe.so (not /nowhere/libnone.so: it cannot be loaded")
    assert "SIGABRT" in shard.provider


@pytest.fixture(scope="module")
def tflite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with tflite-runtime, which needs an older numpy."""
    if sys.version_info[:2] > (3, 11):
        pytest.skip("tflite-runtime has no wheel for a Python after 3.11")
    folder = tmp_path_factory.mktemp("tflite")
    return install(folder, "tflite-runtime==2.14.0", "numpy<2", "msgspec")


def test_tflite_runtime_computes_float32_shards(tmp_path: Path, tflite: Path) -> None:
    folder = make_shard(pulled(tmp_path), "tiny", 0, 3, "fp32", runtime="litert")
    told = answer(tflite, folder, text(30).tolist())
    assert told.get("provider") == "XNNPACK in tflite-runtime", told
    assert np.allclose(told["logits"], load(tmp_path).prefill(0, 0, text(30)), atol=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tflite_runtime_is_refused_what_it_would_compute_wrong(
    tmp_path: Path, tflite: Path, quantization: str
) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3, quantization, runtime="litert")
    assert "FULLY_CONNECTED" in answer(tflite, folder, text(30).tolist())["error"], (
        "its file says what it needs"
    )
    # A file that does not say so is loaded without a word, and computes zeros, or worse.
    import flatbuffers
    from ai_edge_litert import schema_py_generated as fb

    path = folder / LITERT_GRAPH_FILE
    model = fb.ModelT.InitFromPackedBuf(path.read_bytes())
    for code in model.operatorCodes:
        code.version = min(code.version, 9)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    manifest = store.manifest(folder)
    files = manifest.files | {path.name: StoredFile(sha256_of(path), path.stat().st_size)}
    (folder / MANIFEST_FILE).write_bytes(write_document(msgspec.structs.replace(manifest, files=files)))
    wrong = r"computes wrong results on XNNPACK in tflite-runtime|the process that tried it died \(SIG"
    assert re.search(wrong, answer(tflite, folder, text(30).tolist())["error"])
