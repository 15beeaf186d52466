"""ONNX graphs of ``static_network``, of standard operators alone: for execution providers that lack the fused ones.

ONNX has one graph a file, so each has its own, ``{name}.onnx``; all point into one file of weights. Matrices are float32, or 8 bits
a row (``ChannelInt8``), which the graph turns back: what a provider makes of that is its own affair.

Operators: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from node_agent.shards.quantize import ChannelInt8
from node_agent.shards.static_names import HEAD_NAME, run_name
from node_agent.shards.static_network import build_head, build_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.architecture import Architecture

WEIGHTS_FILE = "weights.bin"
_ALIGNMENT = 64
_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int64": TensorProto.INT64}
_SMALL = 1024
"""Bytes up to which a constant stands in the graph itself."""


class Weights:
    """The file that graphs point into; each constant is written once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, name: str, value: NDArray[Any]) -> tuple[int, int]:
        """Offset and length."""
        if name not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[name] = (self._file.tell(), value.nbytes)
            self._file.write(np.ascontiguousarray(value).data)
        return self._places[name]


class _Graph:
    """See ``static_network.Graph``."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._known: dict[str, int] = {}
        self._names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def _tensor(self, name: str, shape: Sequence[int]) -> int:
        self._names.append(name)
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _op(
        self, kind: str, inputs: Sequence[int | str], out: str, shape: Sequence[int], **attributes: Any
    ) -> int:
        names = [i if isinstance(i, str) else self._names[i] for i in inputs]
        self._nodes.append(helper.make_node(kind, names, [out], name=out, **attributes))
        return self._tensor(out, shape)

    def given(self, name: str, shape: Sequence[int]) -> int:
        self._inputs.append(self._tensor(name, shape))
        return self._inputs[-1]

    def result(self, index: int) -> None:
        self._outputs.append(index)

    def constant(self, name: str, value: NDArray[Any]) -> int:
        if name not in self._known:
            proto = TensorProto(name=name, dims=value.shape, data_type=_TYPES[value.dtype.name])
            if value.nbytes <= _SMALL:
                proto.raw_data = np.ascontiguousarray(value).tobytes()
            else:
                offset, length = self._weights.place(name, value)
                proto.data_location = TensorProto.EXTERNAL
                for key, part in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
                    proto.external_data.add(key=key, value=str(part))
            self._constants[name] = proto
            self._known[name] = self._tensor(name, value.shape)
        return self._known[name]

    def _numbers(self, *values: int) -> int:
        return self.constant(f"numbers {values}", np.array(values, dtype=np.int64))

    def _pair(self, kind: str, a: int, b: int, out: str) -> int:
        return self._op(kind, [a, b], out, np.broadcast_shapes(self.shapes[a], self.shapes[b]))

    def add(self, a: int, b: int, out: str) -> int:
        return self._pair("Add", a, b, out)

    def mul(self, a: int, b: int, out: str) -> int:
        return self._pair("Mul", a, b, out)

    def sub(self, a: int, b: int, out: str) -> int:
        return self._pair("Sub", a, b, out)

    def clamp(self, x: int, limit: float, out: str) -> int:
        edges = (self.constant(f"limit {e}", np.array(e, dtype=np.float32)) for e in (-limit, limit))
        return self._op("Clip", [x, *edges], out, self.shapes[x])

    def logistic(self, x: int, out: str) -> int:
        return self._op("Sigmoid", [x], out, self.shapes[x])

    def softmax(self, x: int, out: str) -> int:
        return self._op("Softmax", [x], out, self.shapes[x], axis=-1)

    def summed(self, x: int, out: str) -> int:
        shape = [*self.shapes[x][:-1], 1]
        return self._op("ReduceSum", [x, self._numbers(-1)], out, shape, keepdims=1)

    def reshape(self, x: int, shape: Sequence[int], out: str) -> int:
        return self._op("Reshape", [x, self._numbers(*shape)], out, shape)

    def transpose(self, x: int, order: Sequence[int], out: str) -> int:
        return self._op("Transpose", [x], out, [self.shapes[x][i] for i in order], perm=list(order))

    def part(self, x: int, axis: int, begin: int, size: int, out: str) -> int:
        shape = list(self.shapes[x])
        shape[axis] = size
        ends = (self._numbers(begin), self._numbers(begin + size), self._numbers(axis))
        return self._op("Slice", [x, *ends], out, shape)

    def joined(self, parts: Sequence[int], axis: int, out: str) -> int:
        shape = list(self.shapes[parts[0]])
        shape[axis] = sum(self.shapes[p][axis] for p in parts)
        return self._op("Concat", parts, out, shape, axis=axis)

    def products(self, a: int, b: int, out: str, turned: bool = False) -> int:
        if turned:
            order = [*range(len(self.shapes[b]) - 2), len(self.shapes[b]) - 1, len(self.shapes[b]) - 2]
            b = self.transpose(b, order, f"{out}.turned")
        return self._op("MatMul", [a, b], out, [*self.shapes[a][:-1], self.shapes[b][-1]])

    def norm(self, x: int, weight: NDArray[np.float32], name: str, epsilon: float, out: str) -> int:
        squares = self.mul(x, x, f"{out}.squares")
        shape = [*self.shapes[x][:-1], 1]
        mean = self._op("ReduceMean", [squares, self._numbers(-1)], f"{out}.mean", shape, keepdims=1)
        safe = self.add(mean, self.constant("epsilon", np.array([epsilon], dtype=np.float32)), f"{out}.safe")
        root = self._op("Sqrt", [safe], f"{out}.root", shape)
        return self.mul(self._pair("Div", x, root, f"{out}.normed"), self.constant(name, weight), out)

    def linear(
        self, x: int, name: str, weights: Any, out: str, bias: NDArray[np.float32] | None = None
    ) -> int:
        if isinstance(weights, ChannelInt8):
            values = self.constant(f"{name}.values", weights.values.T)
            scales = self.constant(f"{name}.scales", weights.scales)
            shape = self.shapes[values]
            matrix = self._op("DequantizeLinear", [values, scales], f"{out}.w", shape, axis=1)
        else:
            matrix = self.constant(name, weights.T)
        product = self.products(x, matrix, out if bias is None else f"{out}.product")
        return product if bias is None else self.add(product, self.constant(f"{name}.bias", bias), out)

    def model(self, name: str) -> bytes:
        """Serialized."""

        def ends(indices: list[int]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(self._names[i], TensorProto.FLOAT, self.shapes[i])
                for i in indices
            ]

        graph = helper.make_graph(
            self._nodes,
            name,
            ends(self._inputs),
            ends(self._outputs),
            initializer=list(self._constants.values()),
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="inference-mesh"
        )
        made.ir_version = 10
        return bytes(made.SerializeToString(deterministic=True))


def build_graphs(
    spec: Architecture,
    start: int,
    end: int,
    weights: Mapping[str, Any],
    buckets: Sequence[int],
    chunks: Sequence[int],
    file: IO[bytes],
) -> Iterator[tuple[str, bytes]]:
    """Names and serialized graphs of the layers ``[start, end)``; what they point to is written to ``file``."""
    places = Weights(file)
    for bucket in buckets:
        for chunk in chunks:
            graph, name = _Graph(places), run_name(chunk, bucket)
            build_run(graph, spec, (start, end), weights, (chunk, bucket))
            yield name, graph.model(name)
    if end == spec.layers:
        graph = _Graph(places)
        build_head(graph, spec, weights)
        yield HEAD_NAME, graph.model(HEAD_NAME)
