"""Loads of a shard: what is wrong is refused, and what was held to its test vector here is known again by a few steps' bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import node_agent.adapters.shard_loader as module
from mesh.errors import ShardError
from mesh.forms import parse_form
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_loader import hold_to_vector, load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import RuntimeOptions
from tests.conftest import MODEL
from tests.integration.test_tiny_models import pulled

FORMS = ["onnx-int8", "litert-int8", "litert-int4"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrong", ["nothing added", "memory"])
def test_chunks_that_compute_something_else_are_refused_in_the_middle_of_a_model(
    store: ModelStore, form: str, wrong: str
) -> None:
    """There the first position's activations are a hundred times all others', and hide what those are."""
    runtime, quantization = parse_form(form)
    folder = make_shard(store, MODEL, 10, 12, quantization, runtime=runtime)
    manifest = store.manifest(folder)
    shard: Any = load_shard(folder, manifest, slots=1, capacity=64, options=RuntimeOptions(threads=1))
    hold_to_vector(shard, folder, manifest)
    prefill = shard.prefill

    def otherwise(slot: int, position: int, inputs: Any, logits: int = 1) -> Any:
        right = prefill(slot, position, inputs, logits).copy()
        if wrong == "nothing added":
            return inputs
        prefill(slot, position, np.random.default_rng(1).standard_normal(inputs.shape, dtype=np.float32))
        return right

    shard.prefill = otherwise
    with pytest.raises(ShardError, match="computes wrong results on"):
        hold_to_vector(shard, folder, manifest)
    shard.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of shards that were held to their whole test vector."""
    found: list[Path] = []

    def noted(shard: Any, folder: Path, manifest: Any) -> None:
        found.append(folder)
        hold_to_vector(shard, folder, manifest)

    monkeypatch.setattr(module, "hold_to_vector", noted)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [2, 3], ids=["first", "whole"])
def test_what_was_held_to_its_test_vector_here_is_known_again(
    tmp_path: Path, form: str, end: int, held: list[Path]
) -> None:
    runtime, quantization = parse_form(form)
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, end, quantization, runtime=runtime)
    manifest, kept = store.manifest(folder), tmp_path / "kept"

    def load(threads: int = 1) -> None:
        options = RuntimeOptions(threads=threads, cache=str(kept))
        load_shard(folder, manifest, slots=1, capacity=64, options=options).close()

    load()
    assert held == [folder]
    load()
    assert held == [folder]
    load(threads=2)  # bits may be others
    assert held == [folder] * 2
    load(threads=2)
    assert held == [folder] * 2


def test_a_shard_that_has_other_bits_than_before_is_held_to_its_test_vector(
    tmp_path: Path, held: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 2)
    options, manifest = RuntimeOptions(threads=1, cache=str(tmp_path / "kept")), store.manifest(folder)

    def load() -> None:
        load_shard(folder, manifest, slots=1, capacity=64, options=options).close()

    load()
    decode = module._bits

    def flipped(shard: Any, inputs: Any) -> str:
        found = decode(shard, inputs)
        return f"{int(found[0], 16) ^ 1:x}{found[1:]}"

    with monkeypatch.context() as patch:
        patch.setattr(module, "_bits", flipped)
        load()
        assert held == [folder] * 2
    load()
    assert held == [folder] * 3


def test_a_refused_shard_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 2)
    opened: list[Any] = []
    open_ = module._open

    def noted(*given: Any) -> Any:
        opened.append(open_(*given))
        return opened[-1]

    def refuse(*_: Any) -> None:
        raise ShardError("computes wrong results")

    monkeypatch.setattr(module, "_open", noted)
    monkeypatch.setattr(module, "hold_to_vector", refuse)
    with pytest.raises(ShardError):
        load_shard(folder, store.manifest(folder), slots=1, capacity=64, options=RuntimeOptions(threads=1))
    assert not hasattr(opened[0], "session")
