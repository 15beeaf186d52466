"""The route of a request: a pure function of snapshot and request, run inside the ingress.

A layered shortest path over replicas: a replica follows another that ends where it starts, or the
ingress when it starts at 0. What an edge and a replica cost is ``scheduler.cost``'s. Boundaries
between layers are walked in order, all replicas of one at a time, so a mesh of a thousand takes
less than a millisecond. Equal costs fall to the smaller node id, so equal snapshots give equal
routes.

Herding: every ingress sees load half a second late, and the cheapest replica of that moment would
get everybody's next request. Each request therefore sees all stage costs scaled by a draw of its
own within ``DITHER``: replicas of about equal cost share, one that is clearly better gets nearly
all. (Two random choices would spread over all replicas, however unequal the machines.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mesh.errors import NoRoute
from mesh.gossip import MemberState
from mesh.messages import Cause
from mesh.types import Digest, LayeredRoute, LayerRange, ModelShape, NodeId, ShardInfo, Stage
from scheduler.cluster import ClusterSnapshot, Node, Replica, ReplicaState
from scheduler.cost import (
    BUSY_WAIT,
    FRAME_HEAD_BYTES,
    TOKEN_BYTES,
    Percentile,
    Terms,
    compute_us,
    hazard_per_s,
    hop_us,
    queue_us,
    speed_of,
    transfer_us,
    way_us,
    ways_us,
)
from scheduler.learning import NOTHING_LEARNED, Learned
from scheduler.policy import ClassPolicy, forbidden, price_us
from scheduler.speed import StageSpeed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DITHER = 0.3
"""More than what equal machines are measured apart, about a batch's worth of a step: load differs by as much
before it outweighs the draw."""
_FLOAT_BYTES = 4


Group = tuple[Digest, str, str]
"""Digest, runtime and quantization of a model: a route stays within one, where it can. Without runtime and quantization it is of
any (``mixed``)."""


_ANY: Group = (Digest(""), "", "")
"""Mixed, of whichever digest."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A route whose replicas hold the KV cache of the first ``positions`` of a prompt."""

    route: LayeredRoute
    positions: int


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """``ingress`` is preferred as the first stage: its hop is free. ``tokens`` to be generated and
    ``prompt`` positions weigh decode against prefill. ``own``: sessions that the ingress runs on
    replicas now; ``ours_told``: how many of those in the records were its own when they were told. ``positions``: room that each replica must have for the
    session. ``draw`` seeds the dither; 0 is none."""

    model: str
    ingress: NodeId
    quantization: str | None = None
    percentile: Percentile = Percentile.P50
    tokens: int = 1
    prompt: int = 0
    begin: int = 0
    """Positions before those of ``prompt``, whose KV cache the route has."""
    chunk: int = 64
    own: Mapping[tuple[NodeId, Digest], int] = field(default_factory=dict)
    ours_told: Mapping[tuple[NodeId, Digest], int] = field(default_factory=dict)
    positions: int = 0
    draw: int = 0
    alternatives: int = 0
    rules: tuple[ClassPolicy, ...] = ()
    """All of them hold for every node of the route."""
    avoid: frozenset[NodeId] = frozenset()
    kept: Kept | None = None
    pin: Group | None = None
    """Of a session that runs: nothing but this digest, runtime and quantization (rule R7)."""
    mix: bool = True
    """Where nothing else is there, stages may be of different runtimes and quantizations: bits that must come again as they
    were would not."""
    learned: Learned = NOTHING_LEARNED
    holding: frozenset[tuple[NodeId, Digest]] = frozenset()
    """Replicas that have the KV cache of all of ``prompt``: the route of a session that runs, and who stood by."""
    standing_by: frozenset[tuple[NodeId, Digest]] = frozenset()
    """Those of them that stood by. They may be behind, so nobody who serves the session is left for one that is about as cheap."""
    steps: int = 0
    """Of the positions in ``prompt``, those that a replica without them is given one at a time."""

    @property
    def position(self) -> float:
        """Of a decode step in the middle of the answer."""
        return self.begin + self.prompt + self.tokens / 2


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """A route, what it is predicted to take, and others that share no machine with it but the ingress.

    ``terms`` are of its stages in order; ``home_us`` is the token's way back.
    """

    route: LayeredRoute
    terms: tuple[Terms, ...]
    home_us: float
    ttft_us: float
    alternatives: tuple[LayeredRoute, ...] = ()
    group: Group | None = None
    resumed: int = 0
    """Positions of the prompt that need no prefill on this route."""

    @property
    def tpot_us(self) -> float:
        """Predicted time per output token."""
        return sum(t.time for t in self.terms) + self.home_us


_Held = tuple[Node, Replica]


def serving(snapshot: ClusterSnapshot, model: str | None = None) -> list[_Held]:
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
        self._graphs: dict[object, list[_Graph]] = {}

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

    def _of(self, snapshot: ClusterSnapshot, request: RouteRequest) -> list[_Graph]:
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


def _cheapest(graphs: list[_Graph], request: RouteRequest) -> tuple[_Graph, _Search] | None:
    best: tuple[_Graph, _Search] | None = None
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
    graphs: list[_Graph], request: RouteRequest, cost: float
) -> tuple[_Graph, _Search, RouteRequest] | None:
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


def _graphs(snapshot: ClusterSnapshot, request: RouteRequest) -> list[_Graph]:
    groups: dict[Group, list[_Held]] = {}
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
    return [_Graph(groups[key], ingress, request, snapshot.at_s) for key in sorted(groups)]


def standbys_for(snapshot: ClusterSnapshot, route: LayeredRoute) -> tuple[Stage | None, ...]:
    """For each stage another replica of its shard, on a node that is not in the route: the least busy, then the
    fastest. ``None`` where there is none."""
    taken = {stage.node for stage in route.stages}
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


def group_of(shard: ShardInfo) -> Group:
    """What a route must have in common."""
    return (shard.model.ref.digest, shard.runtime, shard.quantization)


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


@dataclass(frozen=True, slots=True)
class _Prices:
    """What a request pays, all its positions together, microseconds: at each replica, on each edge of
    each boundary, from the ingress and home."""

    replicas: Floats
    edges: list[NDArray[np.float32]]
    outward: Floats
    home: Floats


@dataclass(frozen=True, slots=True)
class _Search:
    """The cheapest path at some prices, as replicas' numbers, and what getting to each replica costs, by way of which."""

    prices: _Prices
    path: list[int]
    total: float
    cost: Floats
    parent: NDArray[np.int64]


class _Graph:
    """Replicas of one digest, and but for mixed routes of one runtime and quantization, with the costs that no request
    changes."""

    def __init__(self, held: list[_Held], ingress: Node | None, request: RouteRequest, now_s: float) -> None:
        self.held = held
        self._percentile = percentile = request.percentile
        shape = held[0][1].shard.model
        self._layers = shape.layers
        self._frame_bytes = shape.width * _FLOAT_BYTES + FRAME_HEAD_BYTES
        self._speeds = _hopeful(held, [speed_of(n, r) for n, r in held])
        places: dict[NodeId, int] = {}
        self._places = np.array([places.setdefault(n.id, len(places)) for n, _ in held])
        self._machines = len(places)
        self._keys = [(n.id, r.shard.digest) for n, r in held]
        self._sessions = np.array([r.sessions for _, r in held], dtype=np.float64)
        self._decode = np.array([s.weighed for s in self._speeds])
        self._measured = np.array([s.decode for s in self._speeds])
        self._row = np.array([s.row for s in self._speeds])
        self._context = np.array([s.context for s in self._speeds])
        self._prefill = np.array([s.prefill for s in self._speeds])
        self._prefill_context = np.array([s.prefill_context for s in self._speeds])
        tail = percentile is Percentile.P99
        self._tail = np.array([max(0.0, s.decode_p99 - s.decode) if tail else 0.0 for s in self._speeds])
        self._room = np.array([r.context_max or np.inf for _, r in held])
        self._hazard = np.array([hazard_per_s(n, now_s) for n, _ in held])
        self._price = np.array([sum(price_us(n, rules) for rules in request.rules) for n, _ in held])
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        for i, (_, replica) in enumerate(held):
            self._starts.setdefault(replica.shard.layers.start, []).append(i)
            self._ends.setdefault(replica.shard.layers.end, []).append(i)
        self._boundaries = [
            (np.array(self._ends[layer]), np.array(self._starts[layer]))
            for layer in sorted(self._starts)
            if layer in self._ends
        ]
        ways = [self._ways(layer) for layer in sorted(self._starts) if layer in self._ends]
        # Latencies and transfers of all boundaries in two rows, so that a request's weights are one product.
        self._edges = np.concatenate(ways, axis=1) if ways else np.empty((2, 0), dtype=np.float32)
        self._outward = self._ingress_ways(ingress, outward=True)
        self._home = self._ingress_ways(ingress, outward=False)
        self._first = np.array(self._starts[0]) if 0 in self._starts else None
        self._last = np.array(self._ends[self._layers]) if self._layers in self._ends else None

    def _ways(self, layer: int) -> NDArray[np.float32]:
        """Latency and transfer, a row of each, from those that end at a layer to those that start there."""
        before = [self.held[i][0] for i in self._ends[layer]]
        after = [self.held[i][0] for i in self._starts[layer]]
        latency, transfer = ways_us(before, after, self._frame_bytes, self._percentile)
        # By those that start: the search runs along what lies together.
        # Single precision halves what goes through the caches; a microsecond in ten seconds is not seen.
        return np.stack([latency.T.ravel(), transfer.T.ravel()]).astype(np.float32)

    def _priced_edges(self, frames: float, positions: float) -> list[NDArray[np.float32]]:
        """What an edge costs, a matrix for each boundary: a row for each that starts, a column for each that ends."""
        priced = np.array([frames, positions], dtype=np.float32) @ self._edges
        edges, at = [], 0
        for before, after in self._boundaries:
            size = len(before) * len(after)
            edges.append(priced[at : at + size].reshape(len(after), len(before)))
            at += size
        return edges

    def _ingress_ways(self, ingress: Node | None, outward: bool) -> Floats:
        """Tokens to the first stages or home from the last ones: few bytes."""
        ways = np.zeros(len(self.held))
        for i, (node, replica) in enumerate(self.held):
            edge = replica.shard.first if outward else replica.shard.last
            if not edge:
                continue
            if ingress is None:  # in no snapshot: nothing is known of its links
                way = hop_us(None, None, self._percentile), transfer_us(None, TOKEN_BYTES)
            else:
                ends = (ingress, node) if outward else (node, ingress)
                way = way_us(*ends, TOKEN_BYTES, self._percentile)
            ways[i] = way[0] + way[1]
        return ways

    def _load(self, request: RouteRequest) -> Floats:
        if not request.own and not request.ours_told:
            return self._sessions
        own = np.array([request.own.get(key, 0) for key in self._keys], dtype=np.float64)
        told = np.array([request.ours_told.get(key, 0) for key in self._keys], dtype=np.float64)
        load: Floats = np.maximum(0, self._sessions - told) + own
        return load

    def prices(self, request: RouteRequest) -> _Prices:
        """The request's costs."""
        load, learned = self._load(request), request.learned
        # A session that lost a stage tries nobody out: each stage that it leaves without need is replayed, too.
        decode = self._measured if request.holding else self._decode
        step = learned.stage_us + decode + self._context * request.position + self._row * load + self._tail
        queue = BUSY_WAIT * (decode + self._row * (load - 1)) * (load > 0)
        risk = self._hazard * (learned.recovery_us / 1e6) * step
        chunked = request.prompt - request.steps
        before = request.begin + chunked / 2
        filling = chunked * (self._prefill + self._prefill_context * before) + request.steps * step
        if request.holding:
            held = np.array([key in request.holding for key in self._keys])
            filling = np.where(held, 0.0, filling)
        total = request.tokens * (step + queue + risk + self._price) + filling
        drawn = total
        if request.draw:
            drawn = total * (1 + DITHER * np.random.default_rng(request.draw).random(len(total)))
        if request.holding:
            # Who has the cache is left for good reason only, not by a draw; who serves, not for one that is about as cheap.
            standing_by = np.array([key in request.standing_by for key in self._keys])
            kept = total / np.where(standing_by, 1 + DITHER, (1 + DITHER) ** 2)
            drawn = np.where(held, kept, drawn)
        chunks = -(-request.prompt // request.chunk)
        frames, positions = request.tokens + chunks, request.tokens + request.prompt
        return _Prices(
            np.where(self._room < request.positions, np.inf, drawn),
            self._priced_edges(frames, positions),
            frames * self._outward,
            request.tokens * self._home,
        )

    def without(self, search: _Search, ingress: NodeId) -> _Prices:
        """The prices when the machines of a path, but not the ingress, are gone."""
        used = [self._places[i] for i in search.path if self.held[i][0].id != ingress]
        lost = np.zeros(self._machines, dtype=bool)
        lost[used] = True
        return replace(search.prices, replicas=np.where(lost[self._places], np.inf, search.prices.replicas))

    def shortest(self, prices: _Prices, known: _Search | None = None) -> _Search | None:
        """The cheapest path; ``None`` if there is none.

        ``known``: a search of the same request at prices that were nowhere higher. Where the way to a replica led through
        none that is dearer now, it is the cheapest still: the others only rose.
        """
        if self._first is None or self._last is None:
            return None
        size = len(self.held)
        cost = np.full(size, np.inf) if known is None else known.cost.copy()
        parent = np.full(size, -1) if known is None else known.parent.copy()
        cost[self._first] = prices.outward[self._first] + prices.replicas[self._first]
        for (before, after), edges in zip(self._boundaries, prices.edges, strict=True):
            if known is not None:
                by = parent[after]
                rose = cost[by] != known.cost[by]
                rose |= prices.replicas[after] != known.prices.replicas[after]
                after, edges = after[rose], edges[rose]
            reached = edges + cost[before].astype(np.float32)
            which = reached.argmin(axis=1)
            cost[after] = reached[np.arange(len(after)), which] + prices.replicas[after]
            parent[after] = before[which]
        ends = cost[self._last] + prices.home[self._last]
        best = int(ends.argmin())
        if not np.isfinite(ends[best]):
            return None
        path = [int(self._last[best])]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
        return _Search(prices, path[::-1], float(ends[best]), cost, parent)

    def path_of(self, route: LayeredRoute) -> list[int] | None:
        """The path of a route, if all of its replicas are here."""
        places = {key: i for i, key in enumerate(self._keys)}
        path = [places.get((s.node, s.shard)) for s in route.stages]
        return [i for i in path if i is not None] if None not in path else None

    def cost_of(self, prices: _Prices, path: list[int]) -> float:
        """What ``shortest`` would find for a path."""
        total = float(prices.outward[path[0]] + prices.home[path[-1]] + prices.replicas[path].sum())
        for before, after in pairwise(path):
            for (ends, starts), edges in zip(self._boundaries, prices.edges, strict=True):
                row, column = np.flatnonzero(starts == after), np.flatnonzero(ends == before)
                if row.size and column.size:
                    total += float(edges[row[0], column[0]])
        return total

    def route(self, path: list[int]) -> LayeredRoute:
        """The route of a path."""
        return LayeredRoute(
            tuple(
                Stage(node.id, node.address, replica.shard.layers, replica.shard.digest)
                for node, replica in (self.held[i] for i in path)
            )
        )

    def told(self, request: RouteRequest, path: list[int], others: tuple[LayeredRoute, ...]) -> RoutePlan:
        """A path with its terms, by ``scheduler.cost``'s formulas one by one."""
        load, learned = self._load(request), request.learned
        terms: list[Terms] = []
        starts = range(0, max(1, request.prompt), request.chunk)
        chunks = [(min(request.chunk, request.prompt - at), request.begin + at) for at in starts]
        ends = [learned.start_us] * len(chunks)
        for place, i in enumerate(path):
            node, speed, sessions = self.held[i][0], self._speeds[i], int(load[i])
            if place == 0:
                latency, transfer = float(self._outward[i]), 0.0
            else:
                before = self.held[path[place - 1]][0]
                latency, transfer = way_us(before, node, self._frame_bytes, self._percentile)
            compute = compute_us(speed, sessions, self._percentile, learned.stage_us, request.position)
            risk = float(self._hazard[i]) * learned.recovery_us / 1e6 * compute
            queue, price = queue_us(speed, sessions), float(self._price[i])
            terms.append(Terms(compute, queue, latency, transfer, risk, price))
            done = 0.0
            for k, (positions, begin) in enumerate(chunks):
                came = ends[k] + latency + transfer * positions
                ends[k] = done = max(done, came) + learned.stage_us + speed.chunk(positions, begin)
        home = float(self._home[path[-1]])
        ttft = ends[-1] + home
        groups = {group_of(self.held[i][1].shard) for i in path}
        group = groups.pop() if len(groups) == 1 else (self.held[0][1].shard.model.ref.digest, "", "")
        return RoutePlan(self.route(path), tuple(terms), home, ttft, others, group)


def _hopeful(held: list[_Held], speeds: list[StageSpeed]) -> list[StageSpeed]:
    """A replica that never ran is given the best rate that was measured of its kind: a guess that is
    too low would keep it from ever being tried."""
    known = [
        (s.decode / r.shard.weight_bytes, s.prefill / r.shard.weight_bytes)
        for (_, r), s in zip(held, speeds, strict=True)
        if s.measured and r.shard.weight_bytes
    ]
    if not known or len(known) == len(held):
        return speeds
    decode, prefill = min(d for d, _ in known), min(p for _, p in known)
    return [
        s
        if s.measured
        else replace(
            s,
            decode=min(s.decode, decode * r.shard.weight_bytes),
            hope=0.0,
            prefill=min(s.prefill, prefill * r.shard.weight_bytes),
        )
        for (_, r), s in zip(held, speeds, strict=True)
    ]


def _explain(snapshot: ClusterSnapshot, request: RouteRequest, groups: list[list[_Held]]) -> str:
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


def _whole(groups: list[list[_Held]]) -> bool:
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
