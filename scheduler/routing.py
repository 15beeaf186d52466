"""The route of a request: a pure function of snapshot and request, run inside the ingress.

A layered shortest path over replicas: a replica follows another that ends where it starts, or the
ingress when it starts at 0 (``scheduler.route_graph``). What an edge and a replica cost is ``scheduler.cost``'s. Equal costs fall to the smaller node id, so equal snapshots give equal
routes.

Herding: every ingress sees load half a second late, and the cheapest replica of that moment would
get everybody's next request. Each request therefore sees all stage costs scaled by a draw of its
own within ``DITHER``: replicas of about equal cost share, one that is clearly better gets nearly
all. (Two random choices would spread over all replicas, however unequal the machines.)
"""

from __future__ import annotations

from dataclasses import replace

from mesh.errors import NoRoute
from mesh.gossip import MemberState
from mesh.messages import Cause
from mesh.types import Digest, LayeredRoute, LayerRange, ModelShape, NodeId, Stage, Standbys
from scheduler.cluster import ClusterSnapshot, ReplicaState
from scheduler.cost import speed_of
from scheduler.policy import forbidden
from scheduler.route import Group, RoutePlan, RouteRequest, group_of
from scheduler.route_graph import Graph, Held, Search

_ANY: Group = (Digest(""), "", "")
"""Mixed, of whichever digest."""


def serving(snapshot: ClusterSnapshot, model: str | None = None) -> list[Held]:
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


class Router:
    """Routes over snapshots. What depends on the snapshot alone is kept until another one comes."""

    def __init__(self) -> None:
        self._snapshot: ClusterSnapshot | None = None
        self._graphs: dict[object, list[Graph]] = {}

    def plan(self, snapshot: ClusterSnapshot, request: RouteRequest) -> RoutePlan:
        """The cheapest route; raises ``NoRoute`` naming the layers that nobody serves.

        A route stays within one model digest, runtime and quantization, so that its text does not
        depend on who happened to be there. Only where there is no such route is one mixed, if the request
        may be.
        """
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._graphs.clear()
        graphs = self._of(snapshot, request)
        best = _cheapest(graphs, request)
        if best is None and (mixed := replace(request, pin=mixed_pin(request))).pin != request.pin:
            graphs = self._of(snapshot, mixed)
            best = _cheapest(graphs, request)
        if best is None:
            raise NoRoute(_explain(snapshot, request, [g.held for g in self._of(snapshot, request)]))
        graph, search = best
        resumed = _resumed(graphs, request, search.total)
        if resumed is not None:
            graph, search, request = resumed
        chosen = search.path
        others = []
        for _ in range(request.alternatives):
            found = graph.shortest(graph.without(search, request.ingress), search)
            if found is None:
                break
            search = found
            others.append(graph.route(search.path))
        positions = request.kept.positions if resumed is not None and request.kept else 0
        return replace(graph.told(request, chosen, tuple(others)), resumed=positions)

    def _of(self, snapshot: ClusterSnapshot, request: RouteRequest) -> list[Graph]:
        key = (
            request.model,
            request.quantization,
            request.ingress,
            request.percentile,
            request.rules,
            request.avoid,
            request.pin,
        )
        graphs = self._graphs.get(key)
        if graphs is None:
            graphs = self._graphs[key] = _graphs(snapshot, request)
        return graphs


def _cheapest(graphs: list[Graph], request: RouteRequest) -> tuple[Graph, Search] | None:
    best: tuple[Graph, Search] | None = None
    for graph in graphs:
        found = graph.shortest(graph.prices(request))
        if found is not None and (best is None or found.total < best[1].total):
            best = (graph, found)
    return best


def mixed(group: Group | None) -> bool:
    """Whether a route's stages may be of different runtimes and quantizations."""
    return group is not None and not group[1]


def mixed_pin(request: RouteRequest) -> Group | None:
    """What a request that found no route of one form may ask for instead: what it asked for, if nothing."""
    if not request.mix or request.quantization is not None:
        return request.pin
    return (request.pin[0], "", "") if request.pin else _ANY


def _resumed(
    graphs: list[Graph], request: RouteRequest, cost: float
) -> tuple[Graph, Search, RouteRequest] | None:
    """The route that keeps the prompt's beginning, if that is cheaper: all of its stages or none, for a cache
    in parts saves nothing."""
    kept = request.kept
    if kept is None:
        return None
    shorter = replace(request, prompt=request.prompt - kept.positions, begin=kept.positions)
    for graph in graphs:
        path, prices = graph.path_of(kept.route), graph.prices(shorter)
        if path and graph.cost_of(prices, path) < cost:
            found = graph.shortest(prices)
            assert found is not None
            return graph, replace(found, path=path), shorter
    return None


def find_route(snapshot: ClusterSnapshot, request: RouteRequest) -> LayeredRoute:
    """The cheapest route of one snapshot; see ``Router.plan``."""
    return Router().plan(snapshot, request).route


def _graphs(snapshot: ClusterSnapshot, request: RouteRequest) -> list[Graph]:
    groups: dict[Group, list[Held]] = {}
    out: dict[NodeId, bool] = {}
    for node, replica in serving(snapshot, request.model):
        if node.id not in out:
            out[node.id] = node.id in request.avoid or any(forbidden(node, r) for r in request.rules)
        key = group_of(replica.shard)
        if mixed(request.pin):
            key = (key[0], "", "")
        wanted = request.quantization in (None, replica.shard.quantization)
        pinned = request.pin in (None, key) or request.pin == _ANY
        if wanted and not out[node.id] and pinned:
            groups.setdefault(key, []).append((node, replica))
    ingress = snapshot.nodes.get(request.ingress)
    return [Graph(groups[key], ingress, request, snapshot.at_s) for key in sorted(groups)]


def standbys_for(
    snapshot: ClusterSnapshot, route: LayeredRoute, avoid: frozenset[NodeId] = frozenset()
) -> Standbys:
    """For each stage another replica of its shard, on a node that is not in the route, nor one to ``avoid``: the least busy, then
    the fastest. ``None`` where there is none."""
    taken = {stage.node for stage in route.stages} | avoid
    found: list[Stage | None] = []
    for stage in route.stages:
        spare = [
            (replica.sessions, speed_of(node, replica).weighed, node.id, node.address)
            for node, replica in serving(snapshot)
            if replica.shard.digest == stage.shard and node.id not in taken
        ]
        best = min(spare, default=None)
        if best is not None:
            taken.add(best[2])
        found.append(Stage(best[2], best[3], stage.layers, stage.shard) if best else None)
    return tuple(found)


def troubled(snapshot: ClusterSnapshot, route: LayeredRoute) -> tuple[int, Cause, str] | None:
    """The first stage that a running session should leave: its node is lost, or it or the replica drains."""
    for i, stage in enumerate(route.stages):
        node = snapshot.nodes.get(stage.node)
        if node is None or node.state is not MemberState.ALIVE or not node.reachable:
            if node is not None and node.broken:
                return i, Cause.STREAM_BROKEN, "our stream from its node broke"
            state = node.state.name.lower() if node else "gone"
            return i, Cause.SILENT, f"its node is {state if state != 'alive' else 'silent to us'}"
        serves = any(r.shard.digest == stage.shard and r.state is ReplicaState.SERVING for r in node.replicas)
        if node.draining or not serves:
            return i, Cause.DRAINING, "its node drains" if node.draining else "its replica goes"
    return None


def _explain(snapshot: ClusterSnapshot, request: RouteRequest, groups: list[list[Held]]) -> str:
    name = request.model
    free = replace(request, rules=(), avoid=frozenset(), pin=None)
    if request.rules and _graphs(snapshot, free) and not _whole(groups):
        reasons = {
            why
            for node, _ in serving(snapshot, name)
            if (why := next((w for r in request.rules if (w := forbidden(node, r))), None))
        }
        if reasons:
            return f"no route of {name} that the rules allow: {'; '.join(sorted(reasons))}"
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


def _whole(groups: list[list[Held]]) -> bool:
    return any(not missing_layers([r.shard.layers for _, r in g], g[0][1].shard.model.layers) for g in groups)


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
