"""The network in plain numpy: slow, float32, and written to be checked by reading.

It makes the test vectors that every shard is held to when it is loaded, and it is what the tests
compare runtimes with. Llama: Touvron et al. 2023; grouped queries: Ainslie et al. 2023; rotary
embedding: Su et al. 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from node_agent.shards.quantize import BLOCK, SUMS_PART

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.architecture import Architecture

    Array = NDArray[np.float32]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """``x / rms(x) * weight`` over the last axis."""
    scale = 1.0 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon)
    normed: Array = (x * scale * weight).astype(np.float32)
    return normed


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotary embedding of ``x`` ``[positions, heads, head_dim]`` by tables ``[positions, head_dim / 2]``."""
    out = np.empty_like(x)
    c, s = cos[:, None, :], sin[:, None, :]
    half = x.shape[-1] // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    )
    a, b = x[..., first], x[..., second]
    out[..., first] = a * c - b * s
    out[..., second] = a * s + b * c
    return out


def run_layer(spec: Architecture, weights: Mapping[str, Array], x: Array, cos: Array, sin: Array) -> Array:
    """One decoder layer over a whole sequence: float32 ``[positions, width]`` in and out."""
    middle = attend(spec, weights, x, cos, sin)
    return middle + gated(spec, weights, middle) @ weights["down"].T


def gated(spec: Architecture, weights: Mapping[str, Array], middle: Array) -> Array:
    """What goes into the last matrix of a layer, float32 ``[positions, feed_forward]``."""
    h = rms_norm(middle, weights["ffn_norm"], spec.norm_epsilon)
    gate = h @ weights["gate"].T
    inner: Array = (gate / (1.0 + np.exp(-gate)) * (h @ weights["up"].T)).astype(np.float32)
    return inner


def rounded(x: Array) -> Array:
    """Each row in 8 bits over its own range, as runtimes round activations."""
    low = np.minimum(x.min(axis=1, keepdims=True), 0.0)
    step = np.maximum((np.maximum(x.max(axis=1, keepdims=True), 0.0) - low) / 255.0, np.float32(1e-30))
    zero = np.rint(-low / step)
    made: Array = ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)
    return made


def rounding_loss(x: Array, down: Array, out: Array, limit: float | None = None) -> float:
    """The share of a layer's output ``out`` that is lost when ``x``, what its last matrix ``down`` is multiplied by, is rounded:
    at once, or what is within ``limit`` and what is beyond apart. Median over positions."""
    within = x if limit is None else np.clip(x, -limit, limit)
    lost = (rounded(within) + rounded(x - within) - x) @ down.T
    return float(np.median(np.linalg.norm(lost, axis=1) / np.linalg.norm(out, axis=1)))


def peak_limit(x: Array, down: Array, out: Array) -> float:
    """The limit, of the usual peak over powers of two, that loses least. Shapes as of ``rounding_loss``."""
    peak = float(np.median(np.abs(x).max(axis=1)))
    return min((peak * 0.5**k for k in range(1, 9)), key=lambda limit: rounding_loss(x, down, out, limit))


_EVENED = (-2, 4)
"""Powers of two that blocks are divided by: a block may have been quiet by chance, and scales are float16."""


def even_blocks(x: Array, matrix: Array) -> Array:
    """By block of columns, what ``x`` is to be divided by, and ``matrix`` multiplied by, so that rounding each row of ``x``, with
    its sums by block, over one range loses less: powers of two near the root of a block's usual peak, the middle one's being 1
    (Xiao et al. 2022, whose weights are rounded anew; here they stay). Of what "near" may mean the one that loses least."""
    blocks = x.reshape(len(x), -1, BLOCK)
    blocks = np.concatenate([blocks, SUMS_PART * blocks.sum(axis=2, keepdims=True)], axis=2)
    high, low = blocks.max(axis=2), blocks.min(axis=2)
    energy = np.square(matrix).reshape(len(matrix), -1, BLOCK).sum(axis=(0, 2))
    roots = np.log2(np.maximum(np.median(np.maximum(high, -low), axis=0), np.float32(1e-9))) / 2
    roots -= np.median(roots)

    def loss(factors: Array) -> float:
        ranges = (high / factors).max(axis=1) - (low / factors).min(axis=1)
        return float(np.median(np.square(ranges)) * (np.square(factors) * energy).sum())

    nearest = (np.clip(np.rint(roots + shift), *_EVENED) for shift in np.arange(-4, 4) / 8)
    return min((np.exp2(powers).astype(np.float32) for powers in nearest), key=loss)


def attend(spec: Architecture, weights: Mapping[str, Array], x: Array, cos: Array, sin: Array) -> Array:
    """A layer's first half: ``x`` and what attention adds."""
    positions = x.shape[0]
    h = rms_norm(x, weights["attn_norm"], spec.norm_epsilon)
    q, k, v = (h @ weights[role].T for role in "qkv")
    if spec.qkv_bias:
        q, k, v = q + weights["q_bias"], k + weights["k_bias"], v + weights["v_bias"]
    q = rotate(q.reshape(positions, spec.heads, -1), cos, sin, spec.rope_interleaved)
    k = rotate(k.reshape(positions, spec.kv_heads, -1), cos, sin, spec.rope_interleaved)
    v = v.reshape(positions, spec.kv_heads, -1)
    group = spec.heads // spec.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(spec.head_dim)
    future = np.triu(np.ones((positions, positions), dtype=bool), 1)
    scores = np.where(future[None], -np.inf, scores)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", scores, v).reshape(positions, -1)
    middle: Array = (x + attended @ weights["o"].T).astype(np.float32)
    return middle
