"""The route of a request: a pure function of snapshot and request, run inside the ingress.

A layered shortest path: the state is (next layer, node that holds the activations), an edge is a
replica that starts there. Cost is compared in this order: hops between nodes, stages, sessions
already on the replicas; ties fall to the smaller node id, so equal snapshots give equal routes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from mesh.errors import NoRoute
from mesh.types import Digest, LayeredRoute, LayerRange, ModelShape, NodeId, Stage
from scheduler.cluster import ClusterSnapshot, Node, Replica, ReplicaState


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """``ingress`` is preferred as the first stage: its hop is free."""

    model: str
    ingress: NodeId
    quantization: str | None = None


_Group = tuple[Digest, str, str]
_Cost = tuple[int, int, int]


def serving(snapshot: ClusterSnapshot, model: str | None = None) -> list[tuple[Node, Replica]]:
    """Replicas that may be in a route now, by node."""
    return [
        (node, replica)
        for node in snapshot.alive()
        if not node.draining
        for replica in node.replicas
        if replica.state is ReplicaState.SERVING and (model is None or replica.shard.model.ref.name == model)
    ]


def models_served(snapshot: ClusterSnapshot) -> dict[str, ModelShape]:
    """Models of which any replica is known, by name, whether or not a route is complete."""
    return {
        replica.shard.model.ref.name: replica.shard.model
        for node in snapshot.alive()
        for replica in node.replicas
    }


def find_route(snapshot: ClusterSnapshot, request: RouteRequest) -> LayeredRoute:
    """The cheapest route; raises ``NoRoute`` naming the layers that nobody serves.

    A route stays within one model digest, runtime and quantization, so that its text does not
    depend on who happened to be there.
    """
    groups: dict[_Group, list[tuple[Node, Replica]]] = {}
    for node, replica in serving(snapshot, request.model):
        shard = replica.shard
        if request.quantization in (None, shard.quantization):
            key = (shard.model.ref.digest, shard.runtime, shard.quantization)
            groups.setdefault(key, []).append((node, replica))
    best: tuple[_Cost, _Group, LayeredRoute] | None = None
    for key in sorted(groups):
        found = _shortest(groups[key], request.ingress)
        if found and (best is None or found[0] < best[0]):
            best = (found[0], key, found[1])
    if best:
        return best[2]
    raise NoRoute(_explain(snapshot, request, list(groups.values())))


def _shortest(replicas: list[tuple[Node, Replica]], ingress: NodeId) -> tuple[_Cost, LayeredRoute] | None:
    starts: dict[int, list[tuple[Node, Replica]]] = {}
    for node, replica in replicas:
        starts.setdefault(replica.shard.layers.start, []).append((node, replica))
    total = replicas[0][1].shard.model.layers
    frontier: list[tuple[_Cost, int, NodeId, tuple[Stage, ...]]] = [((0, 0, 0), 0, ingress, ())]
    done: set[tuple[int, NodeId]] = set()
    while frontier:
        cost, layer, at, stages = heapq.heappop(frontier)
        if layer == total:
            return cost, LayeredRoute(stages)
        if (layer, at) in done:
            continue
        done.add((layer, at))
        for node, replica in starts.get(layer, ()):
            shard = replica.shard
            back = shard.last and node.id != ingress  # the token has to come home
            hops = cost[0] + (node.id != at) + back
            stage = Stage(node.id, node.address, shard.layers, shard.digest)
            heapq.heappush(
                frontier,
                (
                    (hops, cost[1] + 1, cost[2] + replica.sessions),
                    shard.layers.end,
                    node.id,
                    (*stages, stage),
                ),
            )
    return None


def _explain(
    snapshot: ClusterSnapshot, request: RouteRequest, groups: list[list[tuple[Node, Replica]]]
) -> str:
    name = request.model
    if not groups:
        known = models_served(snapshot).get(name)
        if known is None:
            return f"no node serves {name}"
        return f"no replica of {name} is ready: they are loading, draining or their nodes are silent"
    fullest = max(groups, key=lambda g: sum(len(r.shard.layers) for _, r in g))
    total = fullest[0][1].shard.model.layers
    missing = missing_layers([r.shard.layers for _, r in fullest], total)
    if missing:
        layers = ", ".join(map(str, missing))
        return f"no node serves the layers {layers} of {name} ({total} layers)"
    return f"the replicas of {name} do not join: no sequence of them covers every layer exactly once"


def missing_layers(held: list[LayerRange], total: int) -> list[LayerRange]:
    """Layers of ``[0, total)`` that none of ``held`` contains, as ranges."""
    absent = [i for i in range(total) if not any(r.start <= i < r.end for r in held)]
    ranges: list[LayerRange] = []
    for layer in absent:
        if ranges and ranges[-1].end == layer:
            ranges[-1] = LayerRange(ranges[-1].start, layer + 1)
        else:
            ranges.append(LayerRange(layer, layer + 1))
    return ranges
