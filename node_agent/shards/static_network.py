"""A shard's network in static shapes, over whatever builds a graph of it. Pure.

A static context is paid for in full, so there is a graph for each *bucket* (positions of KV memory that it reads) and
each *chunk* (positions that it computes). Inputs of ``run_{chunk}_{bucket}``: ``hidden`` float32 ``[chunk, width]``; ``cos``
and ``sin`` float32 ``[chunk, 1, group + 2, head_dim]`` (of the two halves of a head; the sine of the first one negated), by what
they turn: the queries that share a key, with their scale, the key, and the value, which one and zero leave as it is; ``mask``
float32 ``[1, 1, rows, bucket + chunk]``, added to scores, ``rows`` being 1 or ``heads / kv_heads * chunk``; ``k.i`` and
``v.i`` float32 ``[1, kv_heads, bucket, head_dim]``. Outputs: ``hidden_out`` like ``hidden``, and of each layer the new
rows ``new_k.i`` and ``new_v.i``, ``[1, kv_heads, chunk, head_dim]``: whoever runs it writes them where they belong.
``steps_{chunk}_{bucket}`` gives a chunk the bits that its positions have one step at a time, for replays: ``mask`` is
``[1, 1, rows, bucket + 1]``, for each row what is before it and itself, and ``places`` float32 ``[1, kv_heads, chunk, bucket]`` has a one
where a row's position is; there the caches hold zeros.
``batch_{rows}_{bucket}`` is a step of several sessions: ``mask.r``, ``k.i.r`` and ``v.i.r`` of each, and new rows
``[rows, kv_heads, 1, head_dim]``. A last shard has ``head`` as well, and ``head_{rows}`` for several rows: ``last`` ``[rows, width]`` to
``logits`` ``[rows, vocabulary]``.

``weights``: ``{layer}.attn_norm``, ``.qkv``, ``.o``, ``.ffn_norm``, ``.gate_up``, ``.down`` (matrices ``[out, in]``; ``.qkv`` by key: the rows
of the queries that share it, its own and its value's, rows of Q and K in halves; ``.qkv.bias`` where the family has it; ``.down.limit`` where its
input peaks: what is within and what is beyond are multiplied apart), and of a last shard ``output_norm`` and ``output``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from node_agent.shards.quantize import SplitInt8

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.architecture import Architecture


REVISION = 5
"""Of static graphs and their weights: counts up where they compute something else than before, or there are more of them."""


class Graph(Protocol):
    """A graph that grows. Tensors are numbers; ``shapes`` has theirs; ``out`` is the name of what an operator gives."""

    shapes: list[tuple[int, ...]]

    def given(self, name: str, shape: Sequence[int]) -> int: ...

    def result(self, index: int) -> None: ...

    def constant(self, name: str, value: NDArray[Any]) -> int: ...

    def add(self, a: int, b: int, out: str) -> int: ...

    def sub(self, a: int, b: int, out: str) -> int: ...

    def mul(self, a: int, b: int, out: str) -> int: ...

    def clamp(self, x: int, limit: float, out: str) -> int:
        """Kept from ``-limit`` to ``limit``."""
        ...

    def logistic(self, x: int, out: str) -> int: ...

    def softmax(self, x: int, out: str) -> int:
        """Over the last axis."""
        ...

    def summed(self, x: int, out: str) -> int:
        """Over the last axis, which stays."""
        ...

    def reshape(self, x: int, shape: Sequence[int], out: str) -> int: ...

    def transpose(self, x: int, order: Sequence[int], out: str) -> int: ...

    def part(self, x: int, axis: int, begin: int, size: int, out: str) -> int: ...

    def joined(self, parts: Sequence[int], axis: int, out: str) -> int: ...

    def products(self, a: int, b: int, out: str, turned: bool = False) -> int:
        """Batched ``a @ b``, or ``a @ b.T``."""
        ...

    def norm(self, x: int, weight: NDArray[np.float32], name: str, epsilon: float, out: str) -> int:
        """``x / rms(x) * weight``."""
        ...

    def linear(
        self, x: int, name: str, weights: Any, out: str, bias: NDArray[np.float32] | None = None
    ) -> int:
        """``x @ weights.T + bias``; ``x`` is ``[rows, columns]``, ``weights`` in a form of ``quantize``."""
        ...


def build_head(graph: Graph, spec: Architecture, weights: Mapping[str, Any], rows: int = 1) -> None:
    """Of a last shard."""
    x = graph.given("last", [rows, spec.width])
    norm, output = weights["output_norm"], weights["output"]
    if not isinstance(output, SplitInt8):
        normed = graph.norm(x, norm, "output_norm", spec.norm_epsilon, "output_normed")
        graph.result(graph.linear(normed, "output", output, "logits"))
        return
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


def build_run(
    graph: Graph,
    spec: Architecture,
    layers: tuple[int, int],
    weights: Mapping[str, Any],
    size: tuple[int, int],
    sessions: int = 1,
    steps: bool = False,
) -> None:
    """A chunk of one session, with the bits of single steps if it stands for ``steps``; or a step of several, whose masks and
    caches carry their numbers. ``size``: rows, bucket."""
    rows, bucket = size
    chunk = rows // sessions
    mask_rows = 1 if chunk == 1 else spec.heads // spec.kv_heads * chunk
    whose = [f".{row}" for row in range(sessions)] if sessions > 1 else [""]
    x = graph.given("hidden", [rows, spec.width])
    beside = spec.heads // spec.kv_heads + 2
    turns = [graph.given(side, [rows, 1, beside, spec.head_dim]) for side in ("cos", "sin")]
    seen = bucket + (1 if steps else chunk)
    masks = [graph.given(f"mask{who}", [1, 1, mask_rows, seen]) for who in whose]
    places = None
    if steps:
        given = graph.given("places", [1, spec.kv_heads, chunk, bucket])
        places = given, graph.transpose(given, [0, 1, 3, 2], "places_turned")
    shape = [1, spec.kv_heads, bucket, spec.head_dim]
    caches = [
        [[graph.given(f"{side}.{layer}{who}", shape) for side in "kv"] for who in whose]
        for layer in range(*layers)
    ]
    _layers(graph, spec, layers, weights, x, turns, masks, caches, places)


def _layers(
    graph: Graph,
    spec: Architecture,
    layers: tuple[int, int],
    weights: Mapping[str, Any],
    x: int,
    turns: list[int],
    masks: list[int],
    caches: list[list[list[int]]],
    places: tuple[int, int] | None,
) -> None:
    """``caches``: by layer and session, keys and values. ``places``, as they are and turned: a chunk is to have the bits of single
    steps."""
    new: list[int] = []
    for layer, pasts in zip(range(*layers), caches, strict=True):
        out = "hidden_out" if layer == layers[1] - 1 else f"x{layer}"
        p = f"{layer}."
        h = graph.norm(x, weights[f"{p}attn_norm"], f"{p}attn_norm", spec.norm_epsilon, f"{p}h")
        qkv = graph.linear(h, f"{p}qkv", weights[f"{p}qkv"], f"{p}qkv_out", weights.get(f"{p}qkv.bias"))
        attended, rows = _attention(graph, spec, layer, qkv, turns, masks, pasts, places)
        new += rows
        middle = graph.add(x, graph.linear(attended, f"{p}o", weights[f"{p}o"], f"{p}o_out"), f"{p}middle")
        x = _feed_forward(graph, spec, p, weights, middle, out)
    graph.result(x)
    for index in new:
        graph.result(index)


def _feed_forward(
    graph: Graph, spec: Architecture, p: str, weights: Mapping[str, Any], middle: int, out: str
) -> int:
    h = graph.norm(middle, weights[f"{p}ffn_norm"], f"{p}ffn_norm", spec.norm_epsilon, f"{p}h2")
    both = graph.linear(h, f"{p}gate_up", weights[f"{p}gate_up"], f"{p}gate_up_out")
    gate = graph.part(both, 1, 0, spec.feed_forward, f"{p}gate")
    up = graph.part(both, 1, spec.feed_forward, spec.feed_forward, f"{p}up")
    half = graph.logistic(gate, f"{p}logistic")
    inner = graph.mul(graph.mul(gate, half, f"{p}silu"), up, f"{p}inner")
    matrix, limit = weights[f"{p}down"], weights.get(f"{p}down.limit")
    if limit is not None:
        # Rounded over one range, the few that peak would take the others' digits.
        within = graph.clamp(inner, limit, f"{p}down_within")
        beyond = graph.sub(inner, within, f"{p}down_beyond")
        middle = graph.add(middle, graph.linear(beyond, f"{p}down", matrix, f"{p}down_peaks"), f"{p}peaks")
        inner = within
    return graph.add(middle, graph.linear(inner, f"{p}down", matrix, f"{p}down_out"), out)


def _attention(
    graph: Graph,
    spec: Architecture,
    layer: int,
    qkv: int,
    turns: list[int],
    masks: list[int],
    pasts: list[list[int]],
    places: tuple[int, int] | None,
) -> tuple[int, list[int]]:
    """Of a chunk of one session, or of a step of several; and the new rows of the cache."""
    p = f"{layer}."
    chunk = graph.shapes[qkv][0] // len(pasts)
    names = (f"{p}q", *(f"new_{side}.{layer}" if chunk == 1 else f"{p}{side}_rows" for side in "kv"))
    q, k, v = _turned(graph, spec, p, qkv, turns, names)
    if chunk > 1:
        rows = [graph.transpose(x, [2, 1, 0, 3], f"new_{side}.{layer}") for side, x in (("k", k), ("v", v))]
        return _attend(graph, spec, p, q, rows, masks[0], pasts[0], places), rows
    if len(pasts) == 1:
        return _attend(graph, spec, p, q, [k, v], masks[0], pasts[0], places), [k, v]
    parts = []
    for row, past in enumerate(pasts):
        own = [graph.part(x, 0, row, 1, f"{p}{s}.{row}") for x, s in ((q, "q"), (k, "k"), (v, "v"))]
        parts.append(_attend(graph, spec, f"{p}{row}.", own[0], own[1:], masks[row], past, None))
    return graph.joined(parts, 0, f"{p}attended_rows"), [k, v]


def _turned(
    graph: Graph, spec: Architecture, p: str, qkv: int, turns: list[int], names: tuple[str, ...]
) -> list[int]:
    """Queries, scaled, keys and values, ``[rows, kv_heads, group or 1, head_dim]``, by ``names``: rotated by where each row stands."""
    rows, dim, kv = graph.shapes[qkv][0], spec.head_dim, spec.kv_heads
    group = spec.heads // kv
    qkv = graph.reshape(qkv, [rows, kv, group + 2, dim], f"{p}qkv_heads")
    # Engines take longer to come to an operator than to compute one of these: so values turn as well, by nothing.
    swapped = graph.part(graph.joined([qkv, qkv], 3, f"{p}twice"), 3, dim // 2, dim, f"{p}swapped")
    turned = graph.add(
        graph.mul(qkv, turns[0], f"{p}cos"), graph.mul(swapped, turns[1], f"{p}sin"), f"{p}turned"
    )
    sizes = ((0, group), (group, 1), (group + 1, 1))
    return [
        graph.part(turned, 2, begin, size, name) for (begin, size), name in zip(sizes, names, strict=True)
    ]


def _attend(
    graph: Graph,
    spec: Architecture,
    p: str,
    q: int,
    new: list[int],
    mask: int,
    past: list[int],
    places: tuple[int, int] | None,
) -> int:
    """Of one session: ``[chunk, heads * head_dim]``; ``q`` is ``[chunk, kv_heads, group, head_dim]``, ``new`` keys and values
    ``[1, kv_heads, chunk, head_dim]``."""
    chunk, dim, kv, group = graph.shapes[q][0], spec.head_dim, spec.kv_heads, spec.heads // spec.kv_heads
    if chunk > 1:
        q = graph.transpose(q, [1, 2, 0, 3], f"{p}q_turned")
        q = graph.reshape(q, [1, kv, group * chunk, dim], f"{p}q_grouped")
    if places is None:
        attended = _over_both(graph, p, q, new, mask, past)
    else:
        attended = _over_each(graph, p, q, new, mask, past, places)
    if chunk > 1:
        attended = graph.reshape(attended, [kv, group, chunk, dim], f"{p}attended4")
        attended = graph.transpose(attended, [2, 0, 1, 3], f"{p}attended_turned")
    return graph.reshape(attended, [chunk, spec.heads * dim], f"{p}attended_flat")


def _over_both(graph: Graph, p: str, q: int, new: list[int], mask: int, past: list[int]) -> int:
    """Attention of a chunk over what is before it, and within it."""
    bucket, chunk = graph.shapes[past[0]][2], graph.shapes[new[0]][2]
    # Over one position products are multiplications, for which no engine packs anything or wakes its threads.
    if chunk == 1:
        within = _own_scores(graph, p, q, new[0])
    else:
        within = graph.products(q, new[0], f"{p}within", turned=True)
    scores = graph.joined([graph.products(q, past[0], f"{p}before", turned=True), within], 3, f"{p}scores")
    shares = graph.softmax(graph.add(scores, mask, f"{p}masked"), f"{p}shares")
    of_within = graph.part(shares, 3, bucket, chunk, f"{p}of_within")
    from_within = (graph.mul if chunk == 1 else graph.products)(of_within, new[1], f"{p}from_within")
    of_before = graph.part(shares, 3, 0, bucket, f"{p}of_before")
    return graph.add(graph.products(of_before, past[1], f"{p}from_before"), from_within, f"{p}attended")


def _own_scores(graph: Graph, p: str, q: int, k: int) -> int:
    """Each row's for its own position: ``[1, kv_heads, rows, 1]``."""
    _, kv, rows, dim = graph.shapes[q]
    chunk = graph.shapes[k][2]
    if chunk == 1:  # as they are: of reshaped ones tflite-runtime 2.14 computes something else
        return graph.summed(graph.mul(q, k, f"{p}own_products"), f"{p}own")
    q = graph.reshape(q, [kv, rows // chunk, chunk, dim], f"{p}q_own")
    k = graph.reshape(k, [kv, 1, chunk, dim], f"{p}k_own")
    summed = graph.summed(graph.mul(q, k, f"{p}own_products"), f"{p}own_summed")
    return graph.reshape(summed, [1, kv, rows, 1], f"{p}own")


def _over_each(
    graph: Graph, p: str, q: int, new: list[int], mask: int, past: list[int], places: tuple[int, int]
) -> int:
    """Attention of each row as of a step of its own: over the cache with what the chunk adds to it, in the ``places`` where steps
    find it, and over itself last. Products with ones and zeros, and sums with zeros, move numbers and round nothing."""
    _, kv, chunk, dim = graph.shapes[new[0]]
    bucket, rows = graph.shapes[past[0]][2], graph.shapes[q][2]
    before = graph.add(
        graph.products(q, past[0], f"{p}before", turned=True),
        graph.products(graph.products(q, new[0], f"{p}within", turned=True), places[0], f"{p}placed"),
        f"{p}all_before",
    )
    scores = graph.joined([before, _own_scores(graph, p, q, new[0])], 3, f"{p}scores")
    shares = graph.softmax(graph.add(scores, mask, f"{p}masked"), f"{p}shares")
    values = graph.add(past[1], graph.products(places[1], new[1], f"{p}v_placed"), f"{p}v_all")
    mine = graph.reshape(
        graph.part(shares, 3, bucket, 1, f"{p}of_own"), [kv, rows // chunk, chunk, 1], f"{p}of_own4"
    )
    given = graph.mul(mine, graph.reshape(new[1], [kv, 1, chunk, dim], f"{p}v_new4"), f"{p}own4")
    return graph.add(
        graph.products(graph.part(shares, 3, 0, bucket, f"{p}of_before"), values, f"{p}from_before"),
        graph.reshape(given, [1, kv, rows, dim], f"{p}from_own"),
        f"{p}attended",
    )
