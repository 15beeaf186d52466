"""Which stored tensors a unit of weights (embedding, one layer, head) consists of.

Weights are stored per unit and a shard's graph points into those files: another cut of the same
model costs a new graph of some kilobytes and no new weights, on disk or on the radio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import ModelFileError
from node_agent.shards.quantize import BLOCK, QuantizedMatrix, quantize_int8

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.architecture import Architecture

    Array = NDArray[Any]

EMBEDDING, HEAD, ROPE = "embedding", "head", "rope"


def layer_unit(layer: int) -> str:
    """Name of a layer's unit."""
    return f"layer-{layer:03d}"


def units_of(spec: Architecture, start: int, end: int) -> list[str]:
    """Units that the shard ``[start, end)`` reads, in order."""
    units = [EMBEDDING] if start == 0 else []
    units += [layer_unit(layer) for layer in range(start, end)]
    if end == spec.layers:
        units.append(HEAD)
        if spec.head_tied and EMBEDDING not in units:
            units.append(EMBEDDING)
    return [*units, ROPE]


def pack_matrix(
    name: str, matrix: NDArray[np.float32] | QuantizedMatrix, quantization: str
) -> Iterator[tuple[str, Array]]:
    """Stored tensors of one ``[out, in]`` matrix under ``name``."""
    if quantization == "fp32":
        if isinstance(matrix, QuantizedMatrix):
            raise TypeError("fp32 needs the values, not blocks")
        yield name, np.ascontiguousarray(matrix.T)
        return
    if not isinstance(matrix, QuantizedMatrix):
        if matrix.shape[1] % BLOCK:
            raise ModelFileError(
                f"{name} has {matrix.shape[1]} columns, int8 needs a multiple of {BLOCK}; use --quantization fp32"
            )
        matrix = quantize_int8(matrix)
    yield f"{name}.values", matrix.values
    yield f"{name}.scales", matrix.scales
    yield f"{name}.zeros", matrix.zeros


def pack_layer(
    spec: Architecture, weights: Mapping[str, NDArray[np.float32]], quantization: str
) -> Iterator[tuple[str, Array]]:
    """Stored tensors of one layer from its weights by role.

    Q, K and V are stacked into one matrix, gate and up into another: columns stay independent, so
    the numbers are the same and a step has fewer operators to start.
    """
    yield "attn_norm", weights["attn_norm"]
    yield from pack_matrix("qkv", np.concatenate([weights[r] for r in "qkv"]), quantization)
    if spec.qkv_bias:
        yield "qkv.bias", np.concatenate([weights[f"{r}_bias"] for r in "qkv"])
    yield from pack_matrix("o", weights["o"], quantization)
    yield "ffn_norm", weights["ffn_norm"]
    yield from pack_matrix("gate_up", np.concatenate([weights["gate"], weights["up"]]), quantization)
    yield from pack_matrix("down", weights["down"], quantization)


def pack_embedding(
    matrix: NDArray[np.float32] | QuantizedMatrix, quantization: str
) -> Iterator[tuple[str, Array]]:
    """Stored tensors of the embedding ``[vocabulary, width]``; rows stay rows, to be gathered."""
    if quantization == "fp32":
        yield "embedding", np.ascontiguousarray(matrix)
    else:
        yield from pack_matrix("embedding", matrix, quantization)


def pack_head(
    norm: NDArray[np.float32],
    matrix: NDArray[np.float32] | QuantizedMatrix | None,
    quantization: str,
) -> Iterator[tuple[str, Array]]:
    """Stored tensors of the final norm and, unless tied to the embedding, the output matrix."""
    yield "output_norm", norm
    if matrix is not None:
        yield from pack_matrix("output", matrix, quantization)
