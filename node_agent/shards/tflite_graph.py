"""LiteRT model of a shard: one file, a signature for each chunk length and context bucket, weights shared by all.

A static context is paid for in full, so there is a signature for each *bucket* (positions of KV memory that it reads) and
each *chunk* (positions that it computes). Inputs of ``run_{chunk}_{bucket}``: ``hidden`` float32 ``[chunk, width]``; ``cos``
and ``sin`` float32 ``[chunk, 1, head_dim]`` (of the two halves of a head; the sine of the first one negated); ``mask``
float32 ``[1, 1, rows, bucket + chunk]``, added to scores, ``rows`` being 1 or ``heads / kv_heads * chunk``; ``k.i`` and
``v.i`` float32 ``[1, kv_heads, bucket, head_dim]``. Outputs: ``hidden_out`` like ``hidden``, and of each layer the new
rows ``new_k.i`` and ``new_v.i``, ``[1, kv_heads, chunk, head_dim]``: whoever runs it writes them where they belong.
``batch_{rows}_{bucket}`` is a step of several sessions: ``mask.r``, ``k.i.r`` and ``v.i.r`` of each, and new rows
``[rows, kv_heads, head_dim]``. A last shard has a signature ``head`` as well: ``last`` ``[1, width]`` to ``logits`` ``[1, vocabulary]``.

Only operators that XNNPACK takes on are used. Format: https://github.com/google-ai-edge/LiteRT, ``schema.fbs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as fb

from node_agent.shards.quantize import BLOCK, BlockedInt4, ChannelInt8, SplitInt8
from node_agent.shards.tflite_names import HEAD_NAME, batch_name, run_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.architecture import Architecture

Weights = "NDArray[np.float32] | ChannelInt8 | BlockedInt4"
_VERSION = 3
_QUANTIZED_VERSION = 12
"""Of FULLY_CONNECTED where its weights have scales by row or block: older interpreters refuse it rather than compute zeros."""
_TYPES = {
    "float32": fb.TensorType.FLOAT32,
    "float16": fb.TensorType.FLOAT16,
    "int32": fb.TensorType.INT32,
    "int8": fb.TensorType.INT8,
}


@dataclass
class _File:
    """What subgraphs share."""

    buffers: list[Any] = field(default_factory=lambda: [fb.BufferT()])
    codes: dict[int, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    """Buffer by the name of what it holds."""

    def buffer(self, name: str, data: NDArray[Any]) -> int:
        if name not in self.constants:
            made = fb.BufferT()
            made.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), dtype=np.uint8)
            self.buffers.append(made)
            self.constants[name] = len(self.buffers) - 1
        return self.constants[name]

    def code(self, op: int) -> int:
        return self.codes.setdefault(op, len(self.codes))


class _Subgraph:
    """Tensors are named; those of a shape and type are indices into the subgraph."""

    def __init__(self, file: _File, name: str) -> None:
        self._file = file
        self.graph = fb.SubGraphT()
        self.graph.name, self.graph.tensors, self.graph.operators = name, [], []
        self.graph.inputs, self.graph.outputs = [], []
        self._known: dict[str, int] = {}
        self.shapes: list[tuple[int, ...]] = []

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: int = fb.TensorType.FLOAT32,
        buffer: int = 0,
        scale: Any = None,
    ) -> int:
        made = fb.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), kind, buffer
        made.quantization = scale
        self.graph.tensors.append(made)
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def given(self, name: str, shape: Sequence[int]) -> int:
        index = self.tensor(name, shape)
        self.graph.inputs.append(index)
        return index

    def result(self, index: int) -> None:
        self.graph.outputs.append(index)

    def constant(self, name: str, value: NDArray[Any]) -> int:
        if name not in self._known:
            buffer = self._file.buffer(name, value)
            self._known[name] = self.tensor(name, value.shape, _TYPES[value.dtype.name], buffer)
        return self._known[name]

    def op(
        self,
        code: int,
        inputs: Sequence[int],
        out: str,
        shape: Sequence[int],
        kind: int = 0,
        options: Any = None,
    ) -> int:
        made = fb.OperatorT()
        result = self.tensor(out, shape)
        made.opcodeIndex, made.inputs, made.outputs = self._file.code(code), list(inputs), [result]
        made.builtinOptionsType, made.builtinOptions = kind, options
        self.graph.operators.append(made)
        return result

    # -- operators -----------------------------------------------------------------------------

    def _pair(self, code: int, kind: int, options: Any, a: int, b: int, out: str) -> int:
        return self.op(code, [a, b], out, np.broadcast_shapes(self.shapes[a], self.shapes[b]), kind, options)

    def add(self, a: int, b: int, out: str) -> int:
        return self._pair(fb.BuiltinOperator.ADD, fb.BuiltinOptions.AddOptions, fb.AddOptionsT(), a, b, out)

    def mul(self, a: int, b: int, out: str) -> int:
        return self._pair(fb.BuiltinOperator.MUL, fb.BuiltinOptions.MulOptions, fb.MulOptionsT(), a, b, out)

    def div(self, a: int, b: int, out: str) -> int:
        return self._pair(fb.BuiltinOperator.DIV, fb.BuiltinOptions.DivOptions, fb.DivOptionsT(), a, b, out)

    def reshape(self, x: int, shape: Sequence[int], out: str) -> int:
        options = fb.ReshapeOptionsT()
        options.newShape = list(shape)
        wanted = self.constant(f"shape {tuple(shape)}", np.array(shape, dtype=np.int32))
        return self.op(
            fb.BuiltinOperator.RESHAPE, [x, wanted], out, shape, fb.BuiltinOptions.ReshapeOptions, options
        )

    def transpose(self, x: int, order: Sequence[int], out: str) -> int:
        shape = [self.shapes[x][i] for i in order]
        wanted = self.constant(f"order {tuple(order)}", np.array(order, dtype=np.int32))
        options = fb.TransposeOptionsT()
        return self.op(
            fb.BuiltinOperator.TRANSPOSE, [x, wanted], out, shape, fb.BuiltinOptions.TransposeOptions, options
        )

    def part(self, x: int, axis: int, begin: int, size: int, out: str) -> int:
        shape, begins = list(self.shapes[x]), [0] * len(self.shapes[x])
        shape[axis], begins[axis] = size, begin
        wanted = [
            self.constant(f"begin {tuple(begins)}", np.array(begins, dtype=np.int32)),
            self.constant(f"size {tuple(shape)}", np.array(shape, dtype=np.int32)),
        ]
        options = fb.SliceOptionsT()
        return self.op(
            fb.BuiltinOperator.SLICE, [x, *wanted], out, shape, fb.BuiltinOptions.SliceOptions, options
        )

    def joined(self, parts: Sequence[int], axis: int, out: str) -> int:
        shape = list(self.shapes[parts[0]])
        shape[axis] = sum(self.shapes[p][axis] for p in parts)
        options = fb.ConcatenationOptionsT()
        options.axis = axis
        return self.op(
            fb.BuiltinOperator.CONCATENATION,
            parts,
            out,
            shape,
            fb.BuiltinOptions.ConcatenationOptions,
            options,
        )

    def reduced(self, code: int, x: int, out: str, keep: bool) -> int:
        shape = list(self.shapes[x])
        axis = len(shape) - 1
        shape = [*shape[:-1], 1] if keep else shape[:-1]
        options = fb.ReducerOptionsT()
        options.keepDims = keep
        wanted = self.constant(f"axis {axis}", np.array([axis], dtype=np.int32))
        return self.op(code, [x, wanted], out, shape, fb.BuiltinOptions.ReducerOptions, options)

    def products(self, a: int, b: int, out: str, turned: bool = False) -> int:
        """Batched ``a @ b``, or ``a @ b.T``."""
        options = fb.BatchMatMulOptionsT()
        options.adjY = turned
        columns = self.shapes[b][-2] if turned else self.shapes[b][-1]
        return self.op(
            fb.BuiltinOperator.BATCH_MATMUL,
            [a, b],
            out,
            [*self.shapes[a][:-1], columns],
            fb.BuiltinOptions.BatchMatMulOptions,
            options,
        )

    def softmax(self, x: int, out: str) -> int:
        options = fb.SoftmaxOptionsT()
        options.beta = 1.0
        return self.op(
            fb.BuiltinOperator.SOFTMAX, [x], out, self.shapes[x], fb.BuiltinOptions.SoftmaxOptions, options
        )

    def norm(self, x: int, weight: NDArray[np.float32], name: str, epsilon: float, out: str) -> int:
        """``x / rms(x) * weight``."""
        squares = self.mul(x, x, f"{out}.squares")
        mean = self.reduced(fb.BuiltinOperator.MEAN, squares, f"{out}.mean", keep=True)
        safe = self.add(mean, self.constant("epsilon", np.array([epsilon], dtype=np.float32)), f"{out}.safe")
        root = self.op(fb.BuiltinOperator.SQRT, [safe], f"{out}.root", self.shapes[safe])
        normed = self.div(x, root, f"{out}.normed")
        return self.mul(normed, self.constant(name, weight), out)

    def linear(
        self, x: int, name: str, weights: Any, out: str, bias: NDArray[np.float32] | None = None
    ) -> int:
        """``x @ weights.T + bias``; ``x`` is ``[rows, columns]``."""
        inputs = [x, self._matrix(name, weights)]
        inputs.append(-1 if bias is None else self.constant(f"{name}.bias", bias))
        options = fb.FullyConnectedOptionsT()
        options.keepNumDims = True
        rows, columns = self.shapes[x][0], self.shapes[inputs[1]][0]
        made = self.op(
            fb.BuiltinOperator.FULLY_CONNECTED,
            inputs,
            out,
            [rows, columns],
            fb.BuiltinOptions.FullyConnectedOptions,
            options,
        )
        if isinstance(weights, BlockedInt4):
            correction = self.linear(self._block_sums(x), f"{name}.offsets", weights.offsets, f"{out}.offset")
            made = self.add(made, correction, f"{out}.whole")
        return made

    def _block_sums(self, x: int) -> int:
        key = f"{x}.sums"
        if key not in self._known:
            rows, columns = self.shapes[x]
            blocks = self.reshape(x, [rows, columns // BLOCK, BLOCK], f"{key}.blocks")
            self._known[key] = self.reduced(fb.BuiltinOperator.SUM, blocks, key, keep=False)
        return self._known[key]

    def _matrix(self, name: str, weights: Any) -> int:
        if name in self._known:
            return self._known[name]
        if isinstance(weights, ChannelInt8):
            scale = fb.QuantizationParametersT()
            scale.scale, scale.zeroPoint = weights.scales, np.zeros(len(weights.scales), dtype=np.int64)
            scale.quantizedDimension = 0
            buffer = self._file.buffer(name, weights.values)
            index = self.tensor(name, weights.values.shape, fb.TensorType.INT8, buffer, scale)
        elif isinstance(weights, BlockedInt4):
            details = fb.BlockwiseQuantizationT()
            details.scales = self.constant(f"{name}.scales", weights.scales)
            details.zeroPoints, details.blockSize = -1, BLOCK
            scale = fb.QuantizationParametersT()
            scale.detailsType, scale.details = fb.QuantizationDetails.BlockwiseQuantization, details
            buffer = self._file.buffer(name, weights.packed)
            index = self.tensor(name, weights.shape, fb.TensorType.INT4, buffer, scale)
        else:
            index = self.constant(name, weights)
        self._known[name] = index
        return index


def build_model(
    spec: Architecture,
    start: int,
    end: int,
    weights: Mapping[str, Any],
    buckets: Sequence[int],
    chunks: Sequence[int],
    batches: Sequence[int] = (),
) -> bytes:
    """Serialized model of layers ``[start, end)``. ``weights``: ``{layer}.attn_norm``, ``.qkv``, ``.o``, ``.ffn_norm``,
    ``.gate_up``, ``.down`` (matrices ``[out, in]``, rows of Q and K in halves; ``.qkv.bias`` where the family has it), and of
    a last shard ``output_norm`` and ``output``."""
    file, model = _File(), fb.ModelT()
    graphs: list[tuple[str, _Subgraph]] = []
    for bucket in buckets:
        for chunk in chunks:
            name = run_name(chunk, bucket)
            graphs.append((name, _run(file, spec, (start, end), weights, (chunk, bucket), 1, name)))
        for rows in batches:
            name = batch_name(rows, bucket)
            graphs.append((name, _run(file, spec, (start, end), weights, (rows, bucket), rows, name)))
    if end == spec.layers:
        graphs.append((HEAD_NAME, _head(file, spec, weights)))
    model.version, model.description = _VERSION, f"layers {start}-{end}"
    model.subgraphs = [graph.graph for _, graph in graphs]
    model.signatureDefs = [_signature(name, i, graph.graph) for i, (name, graph) in enumerate(graphs)]
    plain = all(isinstance(w, np.ndarray) for w in weights.values())
    model.operatorCodes = [_code(code, plain) for code in file.codes]
    model.buffers = file.buffers
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _code(code: int, plain: bool) -> Any:
    made = fb.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode = code, min(code, 127)
    scaled = code == fb.BuiltinOperator.FULLY_CONNECTED and not plain
    made.version = _QUANTIZED_VERSION if scaled else 1
    return made


def _signature(name: str, index: int, graph: Any) -> Any:
    made = fb.SignatureDefT()
    made.signatureKey, made.subgraphIndex = name, index
    made.inputs, made.outputs = ([_named(graph, i) for i in ends] for ends in (graph.inputs, graph.outputs))
    return made


def _named(graph: Any, index: int) -> Any:
    made = fb.TensorMapT()
    made.name, made.tensorIndex = graph.tensors[index].name, index
    return made


def _head(file: _File, spec: Architecture, weights: Mapping[str, Any]) -> _Subgraph:
    graph = _Subgraph(file, HEAD_NAME)
    x = graph.given("last", [1, spec.width])
    norm, output = weights["output_norm"], weights["output"]
    if not isinstance(output, SplitInt8):
        normed = graph.norm(x, norm, "output_norm", spec.norm_epsilon, "output_normed")
        graph.result(graph.linear(normed, "output", output, "logits"))
        return graph
    # The columns that stay in float32 are picked by a small matrix, and are zero in what is rounded.
    others, picked = norm.copy(), np.zeros((len(output.columns), spec.width), dtype=np.float32)
    others[output.columns] = 0.0
    picked[np.arange(len(output.columns)), output.columns] = norm[output.columns]
    normed = graph.norm(x, np.ones_like(norm), "ones", spec.norm_epsilon, "output_normed")
    rest = graph.mul(normed, graph.constant("output_norm", others), "output_rest")
    few = graph.linear(normed, "output_picked", picked, "output_few")
    graph.result(
        graph.add(
            graph.linear(rest, "output", output.rest, "logits_rest"),
            graph.linear(few, "output_kept", output.kept, "logits_few"),
            "logits",
        )
    )
    return graph


def _run(
    file: _File,
    spec: Architecture,
    layers: tuple[int, int],
    weights: Mapping[str, Any],
    size: tuple[int, int],
    sessions: int,
    name: str,
) -> _Subgraph:
    """A chunk of one session, or a step of several, whose masks and caches carry their numbers. ``size``: rows, bucket."""
    graph, (rows, bucket) = _Subgraph(file, name), size
    chunk = rows // sessions
    mask_rows = 1 if chunk == 1 else spec.heads // spec.kv_heads * chunk
    whose = [f".{row}" for row in range(sessions)] if sessions > 1 else [""]
    x = graph.given("hidden", [rows, spec.width])
    turns = [graph.given(side, [rows, 1, spec.head_dim]) for side in ("cos", "sin")]
    masks = [graph.given(f"mask{who}", [1, 1, mask_rows, bucket + chunk]) for who in whose]
    shape = [1, spec.kv_heads, bucket, spec.head_dim]
    caches = [
        [[graph.given(f"{side}.{layer}{who}", shape) for side in "kv"] for who in whose]
        for layer in range(*layers)
    ]
    return _layers(graph, spec, layers, weights, x, turns, masks, caches)


def _layers(
    graph: _Subgraph,
    spec: Architecture,
    layers: tuple[int, int],
    weights: Mapping[str, Any],
    x: int,
    turns: list[int],
    masks: list[int],
    caches: list[list[list[int]]],
) -> _Subgraph:
    """``caches``: by layer and session, keys and values."""
    new: list[int] = []
    for layer, pasts in zip(range(*layers), caches, strict=True):
        out = "hidden_out" if layer == layers[1] - 1 else f"x{layer}"
        p = f"{layer}."
        h = graph.norm(x, weights[f"{p}attn_norm"], f"{p}attn_norm", spec.norm_epsilon, f"{p}h")
        qkv = graph.linear(h, f"{p}qkv", weights[f"{p}qkv"], f"{p}qkv_out", weights.get(f"{p}qkv.bias"))
        attended, rows = _attention(graph, spec, layer, qkv, turns, masks, pasts)
        new += rows
        middle = graph.add(x, graph.linear(attended, f"{p}o", weights[f"{p}o"], f"{p}o_out"), f"{p}middle")
        x = _feed_forward(graph, spec, p, weights, middle, out)
    graph.result(x)
    for index in new:
        graph.result(index)
    return graph


def _feed_forward(
    graph: _Subgraph, spec: Architecture, p: str, weights: Mapping[str, Any], middle: int, out: str
) -> int:
    h = graph.norm(middle, weights[f"{p}ffn_norm"], f"{p}ffn_norm", spec.norm_epsilon, f"{p}h2")
    both = graph.linear(h, f"{p}gate_up", weights[f"{p}gate_up"], f"{p}gate_up_out")
    gate = graph.part(both, 1, 0, spec.feed_forward, f"{p}gate")
    up = graph.part(both, 1, spec.feed_forward, spec.feed_forward, f"{p}up")
    half = graph.op(fb.BuiltinOperator.LOGISTIC, [gate], f"{p}logistic", graph.shapes[gate])
    inner = graph.mul(graph.mul(gate, half, f"{p}silu"), up, f"{p}inner")
    return graph.add(middle, graph.linear(inner, f"{p}down", weights[f"{p}down"], f"{p}down_out"), out)


def _attention(
    graph: _Subgraph,
    spec: Architecture,
    layer: int,
    qkv: int,
    turns: list[int],
    masks: list[int],
    pasts: list[list[int]],
) -> tuple[int, list[int]]:
    """Of a chunk of one session, or of a step of several; and the new rows of the cache."""
    p, rows = f"{layer}.", graph.shapes[qkv][0]
    dim, kv = spec.head_dim, spec.kv_heads
    q, k, v = _turned(graph, spec, p, qkv, turns)
    if len(pasts) == 1:
        attended, new = _attend(graph, spec, p, (q, k, v), masks[0], pasts[0])
        return attended, [
            graph.reshape(x, [1, kv, rows, dim], f"new_{s}.{layer}") for x, s in zip(new, "kv", strict=True)
        ]
    parts = []
    for row, past in enumerate(pasts):
        own = tuple(graph.part(x, 0, row, 1, f"{p}{s}.{row}") for x, s in ((q, "q"), (k, "k"), (v, "v")))
        parts.append(_attend(graph, spec, f"{p}{row}.", own, masks[row], past)[0])
    flat = [graph.reshape(x, [rows, kv, dim], f"new_{s}.{layer}") for x, s in ((k, "k"), (v, "v"))]
    return graph.joined(parts, 0, f"{p}attended_rows"), flat


def _turned(graph: _Subgraph, spec: Architecture, p: str, qkv: int, turns: list[int]) -> tuple[int, int, int]:
    """Queries, scaled, keys and values, ``[rows, heads, head_dim]``: rotated by where each row stands."""
    rows, dim, kv = graph.shapes[qkv][0], spec.head_dim, spec.kv_heads
    turned = spec.heads + kv
    qk = graph.part(qkv, 1, 0, turned * dim, f"{p}qk")
    qk = graph.reshape(qk, [rows, turned, dim], f"{p}qk_heads")
    first = graph.part(qk, 2, 0, dim // 2, f"{p}first")
    second = graph.part(qk, 2, dim // 2, dim // 2, f"{p}second")
    swapped = graph.joined([second, first], 2, f"{p}swapped")
    qk = graph.add(graph.mul(qk, turns[0], f"{p}cos"), graph.mul(swapped, turns[1], f"{p}sin"), f"{p}rotated")
    scale = graph.constant("scale", np.array([dim**-0.5], dtype=np.float32))
    q = graph.mul(graph.part(qk, 1, 0, spec.heads, f"{p}q"), scale, f"{p}q_scaled")
    k = graph.part(qk, 1, spec.heads, kv, f"{p}k_rows")
    v = graph.part(qkv, 1, turned * dim, kv * dim, f"{p}v_flat")
    return q, k, graph.reshape(v, [rows, kv, dim], f"{p}v_rows")


def _attend(
    graph: _Subgraph, spec: Architecture, p: str, qkv: tuple[int, ...], mask: int, past: list[int]
) -> tuple[int, list[int]]:
    """Of one session: ``[chunk, heads * head_dim]``, and its new keys and values ``[1, kv_heads, chunk, head_dim]``."""
    q, k, v = qkv
    chunk, dim, kv, group = graph.shapes[q][0], spec.head_dim, spec.kv_heads, spec.heads // spec.kv_heads
    bucket = graph.shapes[past[0]][2]
    if chunk > 1:
        q = graph.transpose(graph.reshape(q, [chunk, kv, group, dim], f"{p}q4"), [1, 2, 0, 3], f"{p}q_turned")
        k = graph.transpose(k, [1, 0, 2], f"{p}k_turned")
        v = graph.transpose(v, [1, 0, 2], f"{p}v_turned")
    q = graph.reshape(q, [1, kv, group * chunk, dim], f"{p}q_grouped")
    new = [graph.reshape(x, [1, kv, chunk, dim], f"{p}{side}_new") for side, x in (("k", k), ("v", v))]
    scores = graph.joined(
        [
            graph.products(q, past[0], f"{p}before", turned=True),
            graph.products(q, new[0], f"{p}within", turned=True),
        ],
        3,
        f"{p}scores",
    )
    shares = graph.softmax(graph.add(scores, mask, f"{p}masked"), f"{p}shares")
    attended = graph.add(
        graph.products(graph.part(shares, 3, 0, bucket, f"{p}of_before"), past[1], f"{p}from_before"),
        graph.products(graph.part(shares, 3, bucket, chunk, f"{p}of_within"), new[1], f"{p}from_within"),
        f"{p}attended",
    )
    if chunk > 1:
        attended = graph.reshape(attended, [kv, group, chunk, dim], f"{p}attended4")
        attended = graph.transpose(attended, [2, 0, 1, 3], f"{p}attended_turned")
    return graph.reshape(attended, [chunk, spec.heads * dim], f"{p}attended_flat"), new
