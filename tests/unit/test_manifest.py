"""Manifests: strict, bound to their files, honest about covers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ShardError
from node_agent.shards.manifest import ShardManifest, read_document, write_document

GOOD: dict[str, Any] = {
    "format": 1,
    "model": "tiny",
    "model_digest": "0" * 64,
    "layers": [0, 3],
    "model_layers": 6,
    "vocabulary": 100,
    "context_max": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "boundary": {"dtype": "float32", "width": 8},
    "runtime": "onnx",
    "quantization": "int8",
    "weight_bytes": 1000,
    "kv_bytes_per_token": 768,
    "files": {
        "graph.onnx": {"sha256": "a" * 64, "size": 1},
        "check.npz": {"sha256": "b" * 64, "size": 1},
    },
    "test_vector": {"file": "check.npz", "tolerance": 0.1},
}


def read(document: Any) -> ShardManifest:
    return read_document(json.dumps(document).encode(), ShardManifest, "shard.json")


def test_it_comes_back_as_it_was_written() -> None:
    manifest = read(GOOD)
    assert read_document(write_document(manifest), ShardManifest, "x") == manifest


def test_the_digest_is_of_what_is_computed() -> None:
    vector = GOOD | {"files": GOOD["files"] | {"check.npz": {"sha256": "c" * 64, "size": 2}}}
    graph = GOOD | {"files": GOOD["files"] | {"graph.onnx": {"sha256": "c" * 64, "size": 1}}}
    assert read(vector).digest == read(GOOD).digest != read(graph).digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 9}, "format 9"),
        ({"layers": [3, 3]}, r"layers \[3, 3\)"),
        ({"layers": [0, 7]}, "of a model of 6"),
        ({"weight_bytes": -1}, "weight_bytes is -1"),
        ({"weight_bytes": "x"}, r"\$.weight_bytes"),
        ({"files": {}}, "does not list graph.onnx"),
        ({"files": GOOD["files"] | {"../x": {"sha256": "", "size": 1}}}, "outside its own folder"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardError, match=words):
        read(GOOD | changes)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_shard_error(data: bytes) -> None:
    with pytest.raises(ShardError):
        read_document(data, ShardManifest, "x")
