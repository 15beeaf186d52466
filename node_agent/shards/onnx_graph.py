"""ONNX graph of a shard, over ONNX Runtime's fused decoder operators.

Inputs: ``tokens`` int64 ``[batch, steps]`` (first shard) or ``hidden`` float32 ``[batch, steps,
width]``; ``seqlens_k`` int32 ``[batch]`` (positions after this run, less one); ``total_len`` int32
scalar (their maximum plus one); ``logit_rows`` int64 ``[rows]`` (last shard: which steps get
logits); ``past_k.i`` / ``past_v.i`` float32 ``[batch, kv_heads, capacity, head_dim]``.
Outputs: ``hidden_out`` like ``hidden``, or ``logits`` float32 ``[batch, rows, vocabulary]``; and
``present_k.i`` / ``present_v.i``, which share the past's buffers.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

A layer always ends in its own addition and the next begins with its own norm, although one fused
operator could do both: so every cut runs the same operators in the same order, and the text does
not depend on where the model was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from node_agent.shards.packing import EMBEDDING, HEAD, ROPE, layer_unit
from node_agent.shards.quantize import BLOCK

if TYPE_CHECKING:
    from node_agent.shards.architecture import Architecture

_CONTRIB = "com.microsoft"
_TYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
}
_INT8_ACTIVATIONS = 4
"""accuracy_level of MatMulNBits: any other takes 8-bit weights off the fast path (15 times slower)."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a packed tensor lies: file (relative to the graph), offset and length in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Builder:
    def __init__(
        self,
        spec: Architecture,
        stored: Mapping[str, Mapping[str, StoredTensor]],
        quantization: str,
    ) -> None:
        self.spec, self.stored, self.quantization = spec, stored, quantization
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def weight(self, unit: str, name: str, shape: tuple[int, ...] | None = None) -> str:
        """Name of an initializer that points at a stored tensor, seen in ``shape``."""
        tensor = self.stored[unit][name]
        shape = shape or tensor.shape
        label = f"{unit}.{name}" + ("" if shape == tensor.shape else "." + "x".join(map(str, shape)))
        if label not in self.initializers:
            proto = TensorProto(name=label, dims=shape, data_type=_TYPES[tensor.dtype])
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", tensor.file),
                ("offset", tensor.offset),
                ("length", tensor.nbytes),
            ):
                proto.external_data.add(key=key, value=str(value))
            self.initializers[label] = proto
        return label

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def norm(self, x: str, unit: str, name: str, out: str) -> str:
        return self.add(
            "SimplifiedLayerNormalization",
            [x, self.weight(unit, name)],
            [out],
            axis=-1,
            epsilon=self.spec.norm_epsilon,
        )

    def matmul(self, x: str, unit: str, name: str, out: str, bias: str | None = None) -> str:
        if self.quantization == "fp32":
            if name == "embedding":  # the tied head: stored by rows
                transposed = self.add("Transpose", [self.weight(unit, name)], [f"{out}.w"], perm=[1, 0])
                return self.add("MatMul", [x, transposed], [out])
            product = f"{out}.product" if bias else out
            self.add("MatMul", [x, self.weight(unit, name)], [product])
            return self.add("Add", [product, self.weight(unit, bias)], [out]) if bias else product
        rows, columns = self.stored[unit][f"{name}.values"].shape
        inputs = [
            x,
            self.weight(unit, f"{name}.values", (rows, columns // BLOCK, BLOCK)),
            self.weight(unit, f"{name}.scales"),
            self.weight(unit, f"{name}.zeros"),
        ]
        if bias:
            inputs += ["", self.weight(unit, bias)]
        return self.add(
            "MatMulNBits",
            inputs,
            [out],
            _CONTRIB,
            K=columns,
            N=rows,
            bits=8,
            block_size=BLOCK,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def embed(self) -> str:
        if self.quantization == "fp32":
            table = self.weight(EMBEDDING, "embedding")
            return self.add("Gather", [table, "tokens"], ["embedded"], axis=0)
        return self.add(
            "GatherBlockQuantized",
            [
                self.weight(EMBEDDING, "embedding.values"),
                "tokens",
                self.weight(EMBEDDING, "embedding.scales"),
                self.weight(EMBEDDING, "embedding.zeros"),
            ],
            ["embedded"],
            _CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            block_size=BLOCK,
            bits=8,
        )

    def layer(self, x: str, layer: int, out: str) -> str:
        spec, unit, p = self.spec, layer_unit(layer), f"l{layer}."
        h = self.norm(x, unit, "attn_norm", f"{p}attn_norm")
        qkv = self.matmul(h, unit, "qkv", f"{p}qkv", "qkv.bias" if spec.qkv_bias else None)
        self.add(
            "GroupQueryAttention",
            [
                qkv,
                "",
                "",
                f"past_k.{layer}",
                f"past_v.{layer}",
                "seqlens_k",
                "total_len",
                self.weight(ROPE, "cos"),
                self.weight(ROPE, "sin"),
            ],
            [f"{p}attended", f"present_k.{layer}", f"present_v.{layer}"],
            _CONTRIB,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=1,
            rotary_interleaved=int(spec.rope_interleaved),
        )
        attended = self.matmul(f"{p}attended", unit, "o", f"{p}o")
        middle = self.add("Add", [x, attended], [f"{p}middle"])
        h = self.norm(middle, unit, "ffn_norm", f"{p}ffn_norm")
        self.matmul(h, unit, "gate_up", f"{p}gate_up")
        self.add("Split", [f"{p}gate_up"], [f"{p}gate", f"{p}up"], axis=-1, num_outputs=2)
        self.add("QuickGelu", [f"{p}gate"], [f"{p}silu"], _CONTRIB, alpha=1.0)
        self.add("Mul", [f"{p}silu", f"{p}up"], [f"{p}inner"])
        down = self.matmul(f"{p}inner", unit, "down", f"{p}down")
        return self.add("Add", [middle, down], [out])

    def head(self, x: str) -> None:
        rows = self.add("Gather", [x, "logit_rows"], ["last"], axis=1)
        h = self.norm(rows, HEAD, "output_norm", "output_norm")
        unit, name = (EMBEDDING, "embedding") if self.spec.head_tied else (HEAD, "output")
        self.matmul(h, unit, name, "logits")


def build_graph(
    spec: Architecture,
    start: int,
    end: int,
    quantization: str,
    stored: Mapping[str, Mapping[str, StoredTensor]],
) -> bytes:
    """Serialized ONNX model of layers ``[start, end)``; ``stored`` is unit -> tensor name -> place."""
    builder = _Builder(spec, stored, quantization)
    first, last = start == 0, end == spec.layers
    x = builder.embed() if first else "hidden"
    for layer in range(start, end):
        x = builder.layer(x, layer, "hidden_out" if layer == end - 1 and not last else f"x{layer}")
    if last:
        builder.head(x)
    value = helper.make_tensor_value_info
    hidden: list[str | int | None] = ["batch", "steps", spec.width]
    cache: list[str | int | None] = ["batch", spec.kv_heads, "capacity", spec.head_dim]
    inputs = [
        value("tokens", TensorProto.INT64, ["batch", "steps"])
        if first
        else value("hidden", TensorProto.FLOAT, hidden),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_len", TensorProto.INT32, []),
    ]
    if last:
        inputs.append(value("logit_rows", TensorProto.INT64, ["rows"]))
        outputs = [value("logits", TensorProto.FLOAT, ["batch", "rows", spec.vocabulary])]
    else:
        outputs = [value("hidden_out", TensorProto.FLOAT, hidden)]
    for layer in range(start, end):
        for side in "kv":
            inputs.append(value(f"past_{side}.{layer}", TensorProto.FLOAT, cache))
            outputs.append(value(f"present_{side}.{layer}", TensorProto.FLOAT, cache))
    graph = helper.make_graph(
        builder.nodes,
        f"layers {start}-{end}",
        inputs,
        outputs,
        initializer=list(builder.initializers.values()),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="inference-mesh")
    model.ir_version = 10
    return bytes(model.SerializeToString(deterministic=True))
