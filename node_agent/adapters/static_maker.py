"""Makes shards of static graphs, straight from the GGUF, without TensorFlow or torch: for LiteRT (``shards.tflite_graph``) and of
standard ONNX operators (``shards.onnx_static``). See ``shards.static_network`` for what they compute.

``int4``: blocks of 32 with an offset each, which is what Q4_1 files hold: their numbers stay as they are, other files' are fitted.
``int8``: one scale a row. ``fp32``: as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import ModelFileError
from mesh.messages import STEPS_MAX
from node_agent.shards.architecture import Architecture, layer_tensors, rope_tables
from node_agent.shards.gguf_file import GgufFile, dequantize
from node_agent.shards.manifest import LITERT_GRAPH_FILE, ModelCard
from node_agent.shards.quantize import (
    BLOCK,
    BlockedInt4,
    ChannelInt8,
    QuantizedMatrix,
    SplitInt8,
    folded_blocks,
    quantize_channels,
    quantize_int4,
    quantize_int8,
    repack_q4_1,
    repack_q8_0,
    split_columns,
    times_blocks,
)
from node_agent.shards.reference import rms_norm
from node_agent.shards.static_tables import table_files
from scheduler.demand import ModelDemand

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32] | ChannelInt8 | BlockedInt4

CONTEXT = 2048
"""Positions that a shard is made for, unless more are asked for."""
_BUCKETS = (256, 384, 512, 640, 768, 1024, 2048)
_CHUNKS, _BATCHES, _HEADS = (1, 16, 64), (4, 8), (1, 8)
STEPS = {"litert": STEPS_MAX}
"""By runtime: steps that a graph replays at once. (An execution provider may compute anything in its own order.)"""
_ONNX_CHUNKS = (1, 64)
"""Providers compile each graph by itself, weights and all: fewer, then."""
_OUTLIERS = 16
"""Columns of the head that stay in float32: a few channels before it are twenty times the others, and rounding to their
range cost a third of what perplexity lost."""
_OPERATORS_BYTES = {"litert": 69_000, "onnxstd": 9_500}
"""By runtime: what a layer's operators and tensors take of a file, all graphs of a bucket together. It is the same whatever the
model's width; measured on SmolLM2-135M (66 kB at ``int4``, 53 at ``int8``), and rather a little more, as a node that is asked for more than it has refuses."""
_SHARD_BYTES = 200_000
"""Names, shapes and lists that a shard has whatever its layers, measured as well."""
_CHANNEL_BYTES = 12
"""Of a matrix whose rows have their own scale, a row: scale and zero point."""


def buckets_for(context: int) -> tuple[int, ...]:
    """Context buckets that hold ``context`` positions: close steps to 1k, wider ones beyond, as most sessions are short and a
    static context is paid for in full."""
    buckets = [b for i, b in enumerate(_BUCKETS) if i == 0 or _BUCKETS[i - 1] < context]
    while buckets[-1] < context:
        buckets.append(buckets[-1] * 2)
    return tuple(buckets)


def static_demand(card: ModelCard, runtime: str, quantization: str, context: int) -> ModelDemand:
    """What a model's parts weigh, from its shape alone."""
    spec = card.architecture
    heads = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    shapes = (
        (heads, spec.width),
        (spec.width, spec.heads * spec.head_dim),
        (2 * spec.feed_forward, spec.width),
        (spec.width, spec.feed_forward),
    )
    whole = quantization == "fp32"
    vocabulary = spec.vocabulary * spec.width
    buckets = buckets_for(context)
    layer_bytes = sum(_matrix_bytes(r, c, quantization) for r, c in shapes) + 8 * spec.width
    return ModelDemand(
        shape=card.shape,
        runtime=runtime,
        quantization=quantization,
        layer_bytes=layer_bytes + len(buckets) * _OPERATORS_BYTES[runtime],
        embedding_bytes=4 * vocabulary if whole else vocabulary + vocabulary // BLOCK * 5,
        head_bytes=_matrix_bytes(spec.vocabulary, spec.width, "fp32" if whole else "int8")
        + (0 if whole else 4 * _OUTLIERS * spec.vocabulary),
        kv_layer_bytes=spec.kv_bytes_per_token_layer,
        shard_bytes=8 * max(buckets) * spec.head_dim + _SHARD_BYTES,
        tied_bytes=0,
    )


def _matrix_bytes(rows: int, columns: int, quantization: str) -> int:
    match quantization:
        case "int4":
            blocks = columns // BLOCK
            return rows * (blocks + folded_blocks(blocks)) * (BLOCK // 2 + 2)
        case "int8":
            return rows * (columns + _CHANNEL_BYTES)
        case _:
            return rows * columns * 4


class StaticMaker:
    """Of one GGUF file. ``reference``: of the model, as ``shard_maker.reference`` has it."""

    def __init__(
        self,
        data: memoryview,
        gguf: GgufFile,
        spec: Architecture,
        form: tuple[str, str],
        reference: Mapping[str, NDArray[Any]],
    ) -> None:
        self._data, self._gguf, self._spec = data, gguf, spec
        self._runtime, self._quantization = form
        self._reference = reference

    def write(self, folder: Path, start: int, end: int, buckets: tuple[int, ...]) -> list[str]:
        """Graph and tables of the layers ``[start, end)``; names of the files."""
        spec, positions = self._spec, max(buckets)
        factors = self._values("rope_freqs.weight") if "rope_freqs.weight" in self._gguf.tensors else None
        tables = table_files(
            *rope_tables(spec, positions, factors), self._embedding() if start == 0 else None
        )
        names = []
        for name, array in tables:
            np.save(folder / name, np.ascontiguousarray(array))
            names.append(name)
        weights: dict[str, Any] = {}
        for layer in range(start, end):
            weights |= {f"{layer}.{k}": v for k, v in self._layer(layer).items()}
        if end == spec.layers:
            weights["output_norm"] = self._values("output_norm.weight")
            weights["output"] = self._head()
        return names + self._graphs(folder, start, end, weights, buckets)

    def _graphs(
        self, folder: Path, start: int, end: int, weights: dict[str, Any], buckets: tuple[int, ...]
    ) -> list[str]:
        if self._runtime == "litert":
            from node_agent.shards.tflite_graph import build_model

            model = build_model(
                self._spec, start, end, weights, buckets, _CHUNKS, _BATCHES, (STEPS["litert"],), _HEADS
            )
            (folder / LITERT_GRAPH_FILE).write_bytes(model)
            return [LITERT_GRAPH_FILE]
        from node_agent.shards.onnx_static import WEIGHTS_FILE, build_graphs

        names = [WEIGHTS_FILE]
        with (folder / WEIGHTS_FILE).open("xb") as file:
            for name, graph in build_graphs(self._spec, start, end, weights, buckets, _ONNX_CHUNKS, file):
                (folder / f"{name}.onnx").write_bytes(graph)
                names.append(f"{name}.onnx")
        return names

    def _values(self, name: str) -> NDArray[np.float32]:
        return dequantize(self._data, self._gguf.tensors[name])

    def _raw(self, name: str) -> NDArray[np.uint8]:
        tensor = self._gguf.tensors[name]
        return np.frombuffer(self._data[tensor.offset : tensor.offset + tensor.nbytes], dtype=np.uint8)

    def _matrix(self, name: str) -> Matrix:
        tensor = self._gguf.tensors[name]
        if self._quantization == "fp32":
            return self._values(name)
        if self._quantization == "int8":
            return quantize_channels(self._values(name))
        if tensor.kind_name == "Q4_1":
            return repack_q4_1(self._raw(name), *tensor.shape)
        if tensor.shape[1] % BLOCK:
            raise ModelFileError(
                f"{name} has {tensor.shape[1]} columns, int4 needs a multiple of {BLOCK}; use --quantization int8"
            )
        return quantize_int4(self._values(name))

    def _layer(self, layer: int) -> dict[str, Any]:
        spec, names = self._spec, layer_tensors(self._spec, layer)
        order = _by_key(spec)
        made: dict[str, Any] = {
            "attn_norm": self._values(names["attn_norm"]),
            "ffn_norm": self._values(names["ffn_norm"]),
            "qkv": _ordered(_stacked([self._matrix(names[role]) for role in "qkv"]), order),
            "gate_up": _stacked([self._matrix(names["gate"]), self._matrix(names["up"])]),
            "o": self._matrix(names["o"]),
            "down": self._matrix(names["down"]),
        }
        if self._quantization != "fp32" and np.isfinite(limit := float(self._reference["limits"][layer])):
            made["down.limit"] = limit
        if self._quantization == "int4":
            halves = (("attn_norm", "qkv"), ("ffn_norm", "gate_up"))
            for (norm, matrix), factors in zip(halves, self._reference["evened"][layer], strict=True):
                made[norm] = made[norm] / np.repeat(factors, BLOCK)
                made[matrix] = times_blocks(made[matrix], factors)
        if spec.qkv_bias:
            made["qkv.bias"] = np.concatenate([self._values(names[f"{role}_bias"]) for role in "qkv"])[order]
        return made

    def _head(self) -> Matrix | SplitInt8:
        # A 4-bit head alone would cost a quarter of the tokens.
        values = self._values("token_embd.weight" if self._spec.head_tied else "output.weight")
        if self._quantization == "fp32":
            return values
        normed = rms_norm(
            self._reference["states"][-1], self._values("output_norm.weight"), self._spec.norm_epsilon
        )
        return split_columns(values, np.abs(normed).max(axis=0), _OUTLIERS)

    def _embedding(self) -> NDArray[np.float32] | QuantizedMatrix:
        tensor = self._gguf.tensors["token_embd.weight"]
        if self._quantization == "fp32" or tensor.shape[1] % BLOCK:
            return self._values("token_embd.weight")
        if tensor.kind_name == "Q8_0":
            return repack_q8_0(self._raw("token_embd.weight"), *tensor.shape)
        return quantize_int8(self._values("token_embd.weight"))


def _by_key(spec: Architecture) -> NDArray[np.int64]:
    """Rows of Q, K and V, one after the other, in the order in which ``static_network`` wants them."""
    kv, dim = spec.kv_heads, spec.head_dim
    keys = spec.heads * dim
    values = keys + kv * dim
    parts = (_halves(spec.heads, spec), keys + _halves(kv, spec), values + np.arange(kv * dim))
    return np.concatenate([part.reshape(kv, -1, dim) for part in parts], axis=1).reshape(-1)


def _halves(heads: int, spec: Architecture) -> NDArray[np.int64]:
    """Rows of Q or K in the order in which a head's halves rotate against each other."""
    rows = np.arange(heads * spec.head_dim)
    if not spec.rope_interleaved:
        return rows
    return rows.reshape(heads, spec.head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)


def _ordered(matrix: Matrix, rows: NDArray[np.int64]) -> Matrix:
    match matrix:
        case BlockedInt4():
            return BlockedInt4(matrix.packed[rows], matrix.scales[rows], matrix.offsets[rows])
        case ChannelInt8():
            return ChannelInt8(matrix.values[rows], matrix.scales[rows])
        case _:
            return matrix[rows]


def _stacked(parts: list[Any]) -> Matrix:
    """One matrix of several with the same columns."""
    match parts[0]:
        case BlockedInt4():
            return BlockedInt4(
                np.concatenate([p.packed for p in parts]),
                np.concatenate([p.scales for p in parts]),
                np.concatenate([p.offsets for p in parts]),
            )
        case ChannelInt8():
            return ChannelInt8(
                np.concatenate([p.values for p in parts]), np.concatenate([p.scales for p in parts])
            )
        case _:
            return np.concatenate(parts)
