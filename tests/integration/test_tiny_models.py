"""Random tiny models of every supported kind: the runtime agrees with the numpy reference, at any cut."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.errors import ConfigError, InputError, ModelFileError, ShardError
from mesh.forms import QUANTIZATIONS, parse_form
from node_agent.adapters.model_pull import pull_model
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import CHECK_POSITIONS, make_shard, reference
from node_agent.ports import Runtime, RuntimeOptions
from node_agent.shards.deviation import relative_error
from tests.builders import VOCABULARY, write_gguf

OPTIONS = RuntimeOptions(threads=1)


def pulled(folder: Path, **shape: Any) -> ModelStore:
    store = ModelStore(folder)
    pull_model(store, "tiny", source=str(write_gguf(folder / "tiny.gguf", **shape)))
    return store


def load(
    store: ModelStore, start: int, end: int, form: str = "fp32", slots: int = 2, threads: int = 1
) -> Runtime:
    runtime, quantization = parse_form(form)
    folder = make_shard(store, "tiny", start, end, quantization, runtime=runtime)
    options = RuntimeOptions(threads=threads)
    return load_shard(folder, store.manifest(folder), slots=slots, capacity=64, options=options)


def expected(store: ModelStore, name: str) -> Any:
    with np.load(reference(store, "tiny")) as made:
        return made[name]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"family": "qwen2"},
        {"tied": False},
        {"heads": 8, "kv_heads": 8, "head_dim": 16},
        {"heads": 6, "kv_heads": 1, "head_dim": 16},
        {"extra": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}},
        {"kind": "F16"},
        {"kind": "BF16"},
        {"kind": "Q8_0"},
        {"kind": "Q4_0"},
        {"kind": "Q4_1"},
    ],
    ids=lambda s: "-".join(map(str, s.values())) or "plain",
)
@pytest.mark.parametrize("runtime", QUANTIZATIONS)
def test_every_kind_of_model_matches_the_reference(
    tmp_path: Path, shape: dict[str, Any], runtime: str
) -> None:
    store = pulled(tmp_path, **shape)
    shard = load(store, 0, 3, f"{runtime}-fp32")
    logits = shard.prefill(0, 0, expected(store, "tokens")[:CHECK_POSITIONS])
    assert relative_error(logits, expected(store, "logits")[-1:]) < 1e-4
    # Fewer bits compute something close to it; the shard's own test vector has the bound.
    for quantization in QUANTIZATIONS[runtime]:
        load(store, 0, 3, f"{runtime}-{quantization}")


@pytest.mark.parametrize(
    "form", ["fp32", "int8", "litert-fp32", "litert-int8", "litert-int4", "onnxstd-fp32", "onnxstd-int8"]
)
def test_a_cut_changes_no_bit(tmp_path: Path, form: str) -> None:
    store = pulled(tmp_path)
    tokens = np.arange(9, dtype=np.int64)
    whole = load(store, 0, 3, form).prefill(0, 0, tokens)
    for cut in (1, 2):
        hidden = load(store, 0, cut, form).prefill(0, 0, tokens)
        assert np.array_equal(load(store, cut, 3, form).prefill(0, 0, hidden), whole)


def test_a_route_may_mix_runtimes(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    forms = ("fp32", "litert-fp32", "onnxstd-fp32")
    state = expected(store, "tokens")[:CHECK_POSITIONS]
    for layer, form in enumerate(forms):
        state = load(store, layer, layer + 1, form).prefill(0, 0, state)
    assert relative_error(state, expected(store, "logits")[-1:]) < 1e-4


def test_chunks_batches_and_truncation_change_no_bit(tmp_path: Path) -> None:
    shard = load(pulled(tmp_path), 0, 3, "int8", slots=4)
    tokens = np.arange(12, dtype=np.int64)
    one_shot = shard.prefill(0, 0, tokens).copy()
    shard.prefill(1, 0, tokens[:5])
    assert np.array_equal(shard.prefill(1, 5, tokens[5:]), one_shot)
    alone = [shard.decode(0, [12], np.array([7]))[0].copy()]
    alone.append(shard.decode(0, [13], np.array([8]))[0].copy())
    # The same session again in slot 1, with strangers at other positions beside it.
    shard.prefill(2, 0, tokens[:3])
    beside = shard.decode(0, [14, 12, 3], np.array([1, 7, 9]))
    assert np.array_equal(beside[1], alone[0])
    # Truncate slot 0 to 12 and go another way, then the first way again.
    shard.decode(0, [12], np.array([99]))
    shard.decode(0, [12], np.array([7]))
    assert np.array_equal(shard.decode(0, [13], np.array([8]))[0], alone[1])


@pytest.mark.parametrize("form", ["fp32", "litert-fp32", "onnxstd-fp32"])
def test_a_released_slot_starts_anew(tmp_path: Path, form: str) -> None:
    shard = load(pulled(tmp_path), 0, 3, form)
    tokens = np.arange(6, dtype=np.int64)
    first = shard.prefill(0, 0, tokens).copy()
    shard.release(0)
    assert np.array_equal(shard.prefill(0, 0, tokens), first)
    shard.close()


@pytest.mark.parametrize("runtime", QUANTIZATIONS)
def test_a_flipped_bit_in_any_file_is_refused(tmp_path: Path, runtime: str) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 2, runtime=runtime)
    manifest = store.manifest(folder)
    for name in manifest.files:
        path = folder / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 4
        path.unlink()  # the weights are shared by hard link
        path.write_bytes(bytes(bad))
        with pytest.raises(ShardError, match=name):
            load_shard(folder, manifest, slots=1, capacity=64, options=OPTIONS)
        path.write_bytes(good)
    load_shard(folder, manifest, slots=1, capacity=64, options=OPTIONS)


def test_weights_that_compute_something_else_fail_their_test_vector(tmp_path: Path) -> None:
    import msgspec

    from node_agent.adapters.model_store import sha256_of
    from node_agent.shards.manifest import StoredFile

    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 2)
    manifest = store.manifest(folder)
    path = folder / "layer-001.bin"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[::-1])
    files = manifest.files | {path.name: StoredFile(sha256_of(path), len(content))}
    with pytest.raises(ShardError, match="computes wrong results"):
        load_shard(
            folder, msgspec.structs.replace(manifest, files=files), slots=1, capacity=64, options=OPTIONS
        )


def test_the_first_provider_that_is_there_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3)
    options = RuntimeOptions(("CUDAExecutionProvider", "CPUExecutionProvider"), threads=1)
    shard = load_shard(folder, store.manifest(folder), slots=1, capacity=64, options=options)
    assert shard.provider.startswith("CPUExecutionProvider (not CUDAExecutionProvider is not in this build")
    with pytest.raises(ConfigError, match="installed are"):
        load_shard(
            folder,
            store.manifest(folder),
            slots=1,
            capacity=64,
            options=RuntimeOptions(("NoSuchProvider",)),
        )


def test_pulling_again_is_free_and_another_file_is_refused(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    assert pull_model(store, "tiny") == store.folder("tiny")
    with pytest.raises(InputError, match="not the wanted"):
        pull_model(store, "tiny", sha256="1" * 64)
    with pytest.raises(ModelFileError, match="wanted was"):
        pull_model(store, "other", source=str(tmp_path / "tiny.gguf"), sha256="1" * 64)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelFileError, match="not a GGUF"):
        pull_model(store, "other", source=str(tmp_path / "text"))
    assert store.names() == ["tiny"]
    assert not list(store.root.glob(".tmp-*"))


def test_pulling_mends_a_damaged_card(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    (store.folder("tiny") / "model.json").write_text("{}")
    with pytest.raises(ShardError, match="pull the model"):
        store.card("tiny")
    pull_model(store, "tiny", source=str(tmp_path / "tiny.gguf"))
    assert store.card("tiny").name == "tiny"


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_gguf(tmp_path / "tiny.gguf")
    store = ModelStore(tmp_path / "home")
    monkeypatch.setattr("node_agent.adapters.model_store.os.fsync", full)
    with pytest.raises(InputError, match="no space left while writing"):
        pull_model(store, "tiny", source=str(path))
    assert list(store.root.iterdir()) == []


def test_cuts_outside_the_model_are_refused(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    for start, end in ((0, 4), (2, 2), (3, 1), (-1, 2)):
        with pytest.raises(InputError, match="not within the 3 layers"):
            make_shard(store, "tiny", start, end)
    with pytest.raises(InputError, match="quantization 'int3'"):
        make_shard(store, "tiny", 0, 3, "int3")


def test_the_tokenizer_goes_both_ways(tmp_path: Path) -> None:
    from node_agent.ingress.chat import TextModel

    store = pulled(tmp_path)
    text = TextModel(store.card("tiny"), store.tokenizer_json("tiny"))
    for sample in ("hello (world)", "züge 中文 🚀", "a\n\tb  c 123"):
        ids = text.encode(sample)
        assert all(0 <= i < VOCABULARY for i in ids)
        assert b"".join(text.bytes_of(i) for i in ids).decode() == sample
    assert text.bytes_of(VOCABULARY - 1) == b""
    assert text.render([{"role": "user", "content": "hi"}]) == "user: hi\n"


@pytest.mark.parametrize("steps", [2, 7, 12])
@pytest.mark.parametrize("form", ["fp32", "litert-fp32", "onnxstd-fp32"])
def test_a_chunk_tells_the_logits_after_as_many_of_its_last_steps_as_asked_for(
    tmp_path: Path, form: str, steps: int
) -> None:
    shard = load(pulled(tmp_path), 0, 3, form)
    tokens = np.arange(9 + steps, dtype=np.int64)
    for slot in (0, 1):
        shard.prefill(slot, 0, tokens[:9], 0)
    alone = [shard.decode(0, [9 + i], tokens[9 + i : 10 + i])[0].copy() for i in range(steps)]
    for wanted in (1, steps - 1, steps):
        found = shard.prefill(1, 9, tokens[9:], wanted)
        assert found.shape[0] == wanted
        assert np.allclose(found, alone[steps - wanted :], atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "litert-int8", "onnxstd-fp32"])
def test_a_shard_with_nothing_to_do_leaves_the_processor_alone(tmp_path: Path, form: str) -> None:
    """Threads that spin for their next run would take it from the other shards of a machine."""
    store = pulled(tmp_path)
    runtime, quantization = parse_form(form)
    folder = make_shard(store, "tiny", 0, 3, quantization, runtime=runtime)
    options = RuntimeOptions(threads=2)
    shard = load_shard(folder, store.manifest(folder), slots=1, capacity=64, options=options)
    for position in range(8):
        shard.decode(0, [position], np.array([position]))
    begin = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begin < 0.05


@pytest.mark.parametrize("form", ["int8", "litert-int8"])
def test_the_threads_beside_a_caller_keep_off_its_processor(tmp_path: Path, form: str) -> None:
    """However the engine starts them."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one processor")
    before = _threads()
    shard = load(pulled(tmp_path), 0, 3, form, threads=2)
    for position in range(8):
        shard.decode(0, [position], np.array([position]))
    # Graphs that come in the background have threads as well, which nothing has called yet.
    assert 1 in {len(allowed - mask) for mask in _masks_of_workers(before)}


def _masks_of_workers(before: set[Path]) -> Iterator[set[int]]:
    for thread in _threads() - before:
        with suppress(OSError):  # it has ended
            if (thread / "comm").read_text().startswith("compute-"):
                yield os.sched_getaffinity(int(thread.name))


def _threads() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())
