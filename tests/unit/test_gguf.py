"""The GGUF reader: agrees with the ``gguf`` package, and survives every damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ModelFileError
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import model_card, open_gguf
from node_agent.shards.architecture import architecture_of, rope_tables
from node_agent.shards.gguf_file import dequantize, parse_gguf
from tests.builders import write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="Q8_0")


def test_it_reads_what_the_gguf_package_reads(tiny: Path) -> None:
    import gguf

    data, ours = open_gguf(tiny)
    theirs = gguf.GGUFReader(tiny)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        assert np.array_equal(dequantize(data, info), wanted)


def test_a_file_cut_anywhere_is_refused(tiny: Path) -> None:
    whole = tiny.read_bytes()
    for length in [*range(0, 200), *range(200, len(whole), len(whole) // 150), len(whole) - 1]:
        with pytest.raises(ModelFileError):
            parse_gguf(memoryview(whole[:length]))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_read_or_refused_and_never_hangs(tiny: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(20_000, len(raw) - 9)))
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    try:
        parsed = parse_gguf(memoryview(bytes(raw)))
        architecture_of(parsed.metadata, parsed.tensors)
    except ModelFileError as error:
        assert str(error)


def test_counts_that_lie_cost_nothing(tiny: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)
    with pytest.raises(ModelFileError, match="cut short"):
        parse_gguf(memoryview(head))
    array = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"k"
        + struct.pack("<IIQ", 9, 8, 2**50)
    )
    with pytest.raises(ModelFileError, match="claims"):
        parse_gguf(memoryview(array))


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "not a GGUF"), (b"PK\3\4" * 9, "not a GGUF"), (b"GGUF" + b"\1\0\0\0", "version 1")],
)
def test_other_files_are_named_for_what_they_are_not(data: bytes, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        parse_gguf(memoryview(data))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", family="mamba")
    with pytest.raises(ModelFileError, match="'mamba' is not supported; supported are llama, qwen2"):
        model_card(path, "x", "0" * 64, "test")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.expert_count": 4}, "mixture-of-experts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.attention.value_length": 99}, "different length"),
        ({"tokenizer.ggml.extra": 1, "llama.feed_forward_length": 64}, "ffn_gate.weight has the shape"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_name(
    tmp_path: Path, extra: dict[str, int], words: str
) -> None:
    if "llama.feed_forward_length" in extra:
        path = write_gguf(tmp_path / "x.gguf", feed_forward=96)
        raw = path.read_bytes().replace(struct.pack("<I", 96), struct.pack("<I", 64), 1)
        path.write_bytes(raw)
    else:
        path = write_gguf(tmp_path / "x.gguf", extra=extra)
    with pytest.raises(ModelFileError, match=words):
        model_card(path, "x", "0" * 64, "test")


def test_rope_tables_follow_their_formulas(tmp_path: Path) -> None:
    _, gguf = open_gguf(write_gguf(tmp_path / "plain.gguf"))
    spec = architecture_of(gguf.metadata, gguf.tensors)
    cos, sin = rope_tables(spec, 32, None)
    frequency = 10000.0 ** (-np.arange(8) / 8)
    assert np.allclose(cos, np.cos(np.outer(np.arange(32), frequency)), atol=1e-6)
    assert np.allclose(cos**2 + sin**2, 1.0, atol=1e-6)
    factors = np.full(8, 2.0, dtype=np.float32)
    assert np.allclose(rope_tables(spec, 32, factors)[0], cos_of(0.5), atol=1e-6)
    _, linear = open_gguf(
        write_gguf(
            tmp_path / "linear.gguf",
            extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        )
    )
    scaled = architecture_of(linear.metadata, linear.tensors)
    assert np.allclose(rope_tables(scaled, 32, None)[0], cos_of(0.5), atol=1e-6)


def cos_of(factor: float) -> Any:
    frequency = 10000.0 ** (-np.arange(8) / 8) * factor
    return np.cos(np.outer(np.arange(32), frequency))


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones(tmp_path: Path) -> None:
    _, gguf = open_gguf(
        write_gguf(
            tmp_path / "yarn.gguf",
            extra={
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
        )
    )
    spec = architecture_of(gguf.metadata, gguf.tensors)
    cos, sin = rope_tables(spec, 64, None)
    angles = np.unwrap(np.arctan2(sin, cos), axis=0)
    frequency = (angles[-1] - angles[0]) / 63
    plain = 10000.0 ** (-np.arange(8) / 8)
    assert np.isclose(frequency[0], plain[0], rtol=1e-3)
    assert np.isclose(frequency[-1], plain[-1] / 4, rtol=1e-3)
    assert np.allclose(np.hypot(cos, sin), 0.1 * np.log(4.0) + 1.0, atol=1e-5)


def test_a_store_refuses_names_that_leave_it(tmp_path: Path) -> None:
    from mesh.errors import InputError

    for name in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(InputError, match="no model name"):
            ModelStore(tmp_path).folder(name)
