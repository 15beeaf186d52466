"""Which node holds which layers: an even split, memory permitting.

Each node gets the same number of layers, give or take one, in the order given; a node that cannot
hold its share takes what fits and the others share the rest (water-filling). "It does not fit"
is an answer with the figures in it, not an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh.types import LayerRange, NodeId
from scheduler.demand import ModelDemand


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """Memory in bytes that a node has for shards and their KV cache."""

    node: NodeId
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class EvenSplit:
    """Layer ranges by node, in route order; ``idle`` says why the others hold nothing."""

    shards: tuple[tuple[NodeId, LayerRange], ...]
    idle: tuple[tuple[NodeId, str], ...] = ()


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """``reason`` has the figures."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    layer_bytes: int
    first_bytes: int
    last_bytes: int


def split_evenly(model: ModelDemand, positions: int, nodes: Sequence[NodeRoom]) -> EvenSplit | DoesNotFit:
    """Split a model over ``nodes``, with KV memory for ``positions``; memory in bytes throughout."""
    demand = _Sizes(
        model.layers,
        model.layer_bytes + positions * model.kv_layer_bytes,
        model.embedding_bytes + model.shard_bytes,
        model.head_bytes + model.shard_bytes,
    )
    if not nodes:
        return DoesNotFit("there are no nodes")
    usable = list(nodes)
    idle: list[tuple[NodeId, str]] = []
    while usable:
        caps = _capacities(demand, usable)
        empty = [n for n, cap in zip(usable, caps, strict=True) if cap == 0]
        surplus = usable[demand.layers :]
        if not empty and not surplus:
            break
        for node in empty or surplus:
            wanted = demand.layer_bytes
            idle.append(
                (
                    node.node,
                    f"{_mib(node.memory_bytes)} free, one layer needs {_mib(wanted)}"
                    if empty
                    else f"the model has only {demand.layers} layers",
                )
            )
            usable.remove(node)
    caps = _capacities(demand, usable)
    if sum(caps) < demand.layers:
        needed = demand.layers * demand.layer_bytes + demand.first_bytes + demand.last_bytes
        offered = sum(n.memory_bytes for n in nodes)
        held = f"together the nodes have room for {sum(caps)} of {demand.layers} layers"
        return DoesNotFit(f"{held}: {_mib(needed)} needed, {_mib(offered)} free on {len(nodes)} nodes")
    counts = _fill(demand.layers, caps)
    shards, start = [], 0
    for node, count in zip(usable, counts, strict=True):
        shards.append((node.node, LayerRange(start, start + count)))
        start += count
    return EvenSplit(tuple(shards), tuple(idle))


def _capacities(demand: _Sizes, nodes: Sequence[NodeRoom]) -> list[int]:
    """Most layers that each node can hold, given that the first and last carry more."""
    caps = []
    for i, node in enumerate(nodes):
        room = node.memory_bytes
        room -= demand.first_bytes if i == 0 else 0
        room -= demand.last_bytes if i == len(nodes) - 1 else 0
        caps.append(max(0, min(demand.layers, room // demand.layer_bytes)))
    return caps


def _fill(layers: int, caps: list[int]) -> list[int]:
    """Counts that sum to ``layers``, at most ``caps`` each, as equal as possible, larger ones first."""
    counts = [0] * len(caps)
    for _ in range(layers):
        open_ = [i for i, cap in enumerate(caps) if counts[i] < cap]
        counts[min(open_, key=lambda i: (counts[i], i))] += 1
    return counts


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
