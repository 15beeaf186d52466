"""LiteRT model of a shard: one file, a signature for each graph of ``static_network``, weights shared by all.

Only operators that XNNPACK takes on are used. Format: https://github.com/google-ai-edge/LiteRT, ``schema.fbs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as fb

from node_agent.shards.quantize import BLOCK, SUMS_PART, BlockedInt4, ChannelInt8, fold_offsets
from node_agent.shards.static_names import batch_name, head_name, run_name, steps_name
from node_agent.shards.static_network import build_head, build_run

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


class _RowScales(fb.QuantizationParametersT):  # type: ignore[misc]
    """Written once, however many graphs point to them: for twenty graphs they would be a third of the weights."""

    def __init__(self, scales: NDArray[np.float32]) -> None:
        super().__init__()
        self.scale, self.zeroPoint = scales, np.zeros(len(scales), dtype=np.int64)
        self.quantizedDimension = 0
        self._written: int | None = None

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 (the base class names it)
        """Where they are in the one file that is built of them."""
        if self._written is None:
            self._written = super().Pack(builder)
        return self._written


@dataclass
class _File:
    """What subgraphs share."""

    buffers: list[Any] = field(default_factory=lambda: [fb.BufferT()])
    codes: dict[int, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    """Buffer by the name of what it holds."""
    scales: dict[str, _RowScales] = field(default_factory=dict)
    """By the name of their matrix."""
    _folded: dict[str, BlockedInt4] = field(default_factory=dict)

    def buffer(self, name: str, data: NDArray[Any]) -> int:
        if name not in self.constants:
            made = fb.BufferT()
            made.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), dtype=np.uint8)
            self.buffers.append(made)
            self.constants[name] = len(self.buffers) - 1
        return self.constants[name]

    def folded(self, name: str, matrix: BlockedInt4) -> BlockedInt4:
        if name not in self._folded:
            self._folded[name] = fold_offsets(matrix)
        return self._folded[name]

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

    def sub(self, a: int, b: int, out: str) -> int:
        return self._pair(fb.BuiltinOperator.SUB, fb.BuiltinOptions.SubOptions, fb.SubOptionsT(), a, b, out)

    def div(self, a: int, b: int, out: str) -> int:
        return self._pair(fb.BuiltinOperator.DIV, fb.BuiltinOptions.DivOptions, fb.DivOptionsT(), a, b, out)

    def clamp(self, x: int, limit: float, out: str) -> int:
        """Kept from ``-limit`` to ``limit``."""
        top, low = (
            self.constant(f"limit {edge}", np.array([edge], dtype=np.float32)) for edge in (limit, -limit)
        )
        kind, options = fb.BuiltinOptions.MaximumMinimumOptions, fb.MaximumMinimumOptionsT()
        below = self._pair(fb.BuiltinOperator.MINIMUM, kind, options, x, top, f"{out}.below")
        return self._pair(fb.BuiltinOperator.MAXIMUM, kind, options, below, low, out)

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

    def _reduced(self, code: int, x: int, out: str) -> int:
        shape = [*self.shapes[x][:-1], 1]
        axis = len(shape) - 1
        options = fb.ReducerOptionsT()
        options.keepDims = True
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

    def logistic(self, x: int, out: str) -> int:
        return self.op(fb.BuiltinOperator.LOGISTIC, [x], out, self.shapes[x])

    def summed(self, x: int, out: str) -> int:
        return self._reduced(fb.BuiltinOperator.SUM, x, out)

    def softmax(self, x: int, out: str) -> int:
        options = fb.SoftmaxOptionsT()
        options.beta = 1.0
        return self.op(
            fb.BuiltinOperator.SOFTMAX, [x], out, self.shapes[x], fb.BuiltinOptions.SoftmaxOptions, options
        )

    def norm(self, x: int, weight: NDArray[np.float32], name: str, epsilon: float, out: str) -> int:
        """``x / rms(x) * weight``."""
        squares = self.mul(x, x, f"{out}.squares")
        mean = self._reduced(fb.BuiltinOperator.MEAN, squares, f"{out}.mean")
        safe = self.add(mean, self.constant("epsilon", np.array([epsilon], dtype=np.float32)), f"{out}.safe")
        root = self.op(fb.BuiltinOperator.SQRT, [safe], f"{out}.root", self.shapes[safe])
        normed = self.div(x, root, f"{out}.normed")
        return self.mul(normed, self.constant(name, weight), out)

    def linear(
        self, x: int, name: str, weights: Any, out: str, bias: NDArray[np.float32] | None = None
    ) -> int:
        """``x @ weights.T + bias``; ``x`` is ``[rows, columns]``."""
        if isinstance(weights, BlockedInt4):
            x = self._with_sums(x)
        inputs = [x, self._matrix(name, weights)]
        inputs.append(-1 if bias is None else self.constant(f"{name}.bias", bias))
        options = fb.FullyConnectedOptionsT()
        options.keepNumDims = True
        rows, columns = self.shapes[x][0], self.shapes[inputs[1]][0]
        return self.op(
            fb.BuiltinOperator.FULLY_CONNECTED,
            inputs,
            out,
            [rows, columns],
            fb.BuiltinOptions.FullyConnectedOptions,
            options,
        )

    def _with_sums(self, x: int) -> int:
        """``x`` as a matrix wants it that has its offsets folded into it: a matrix of their own takes a seventh of a step."""
        key = f"{x}.with_sums"
        if key not in self._known:
            rows, columns = self.shapes[x]
            count = columns // BLOCK
            blocks = self.reshape(x, [rows * count, BLOCK], f"{key}.blocks")
            part = np.full((1, BLOCK), SUMS_PART, dtype=np.float32)
            each = self.linear(blocks, "sums_part", part, f"{key}.each")
            sums = [self.reshape(each, [rows, count], f"{key}.sums")]
            if rest := -count % BLOCK:
                sums.append(self.constant(f"zeros {rows} {rest}", np.zeros((rows, rest), dtype=np.float32)))
            self._known[key] = self.joined([x, *sums, *sums], 1, key)
        return self._known[key]

    def _matrix(self, name: str, weights: Any) -> int:
        if name in self._known:
            return self._known[name]
        if isinstance(weights, ChannelInt8):
            scale = self._file.scales.setdefault(name, _RowScales(weights.scales))
            buffer = self._file.buffer(name, weights.values)
            index = self.tensor(name, weights.values.shape, fb.TensorType.INT8, buffer, scale)
        elif isinstance(weights, BlockedInt4):
            weights = self._file.folded(name, weights)
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
    steps: Sequence[int] = (),
    heads: Sequence[int] = (1,),
) -> bytes:
    """Serialized model of layers ``[start, end)``; ``weights`` as ``static_network`` wants them."""
    file, model = _File(), fb.ModelT()
    graphs: list[tuple[str, _Subgraph]] = []
    for bucket in buckets:
        for chunk in chunks:
            name = run_name(chunk, bucket)
            graphs.append((name, _Subgraph(file, name)))
            build_run(graphs[-1][1], spec, (start, end), weights, (chunk, bucket))
        for chunk in steps:
            name = steps_name(chunk, bucket)
            graphs.append((name, _Subgraph(file, name)))
            build_run(graphs[-1][1], spec, (start, end), weights, (chunk, bucket), steps=True)
        for rows in batches:
            name = batch_name(rows, bucket)
            graphs.append((name, _Subgraph(file, name)))
            build_run(graphs[-1][1], spec, (start, end), weights, (rows, bucket), rows)
    for rows in heads if end == spec.layers else ():
        name = head_name(rows)
        graphs.append((name, _Subgraph(file, name)))
        build_head(graphs[-1][1], spec, weights, rows)
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
