"""Replicas as a layered graph: what each and each edge costs a request, and the cheapest path.

Boundaries between layers are walked in order, all replicas of one at a time, so a mesh of a thousand takes less than a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mesh.types import LayeredRoute, NodeId, Stage
from scheduler.cluster import Node, Replica
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
    risk_us,
    speed_of,
    transfer_us,
    way_us,
    ways_us,
)
from scheduler.learning import Learned
from scheduler.policy import price_us
from scheduler.route import RoutePlan, RouteRequest, group_of
from scheduler.speed import StageSpeed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DITHER = 0.3
"""More than what equal machines are measured apart, about a batch's worth of a step: load differs by as much
before it outweighs the draw."""
_FLOAT_BYTES = 4

Held = tuple[Node, Replica]


@dataclass(frozen=True, slots=True)
class Prices:
    """What a request pays, all its positions together, microseconds: at each replica, on each edge of
    each boundary, from the ingress and home."""

    replicas: Floats
    edges: list[NDArray[np.float32]]
    outward: Floats
    home: Floats


@dataclass(frozen=True, slots=True)
class Search:
    """The cheapest path at some prices, as replicas' numbers, and what getting to each replica costs, by way of which."""

    prices: Prices
    path: list[int]
    total: float
    cost: Floats
    parent: NDArray[np.int64]


class Graph:
    """Replicas of one digest, and but for mixed routes of one runtime and quantization, with the costs that no request
    changes."""

    def __init__(self, held: list[Held], ingress: Node | None, request: RouteRequest, now_s: float) -> None:
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
        self._looked_up: tuple[Learned, Floats] | None = None
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

    def _beside(self, learned: Learned) -> Floats:
        """What a stage at each replica takes beside its computation; looked up once for what was learned."""
        if self._looked_up is None or self._looked_up[0] is not learned:
            self._looked_up = learned, np.array([learned.stage_of(node.id) for node, _ in self.held])
        return self._looked_up[1]

    def prices(self, request: RouteRequest) -> Prices:
        """The request's costs."""
        load, learned = self._load(request), request.learned
        # A session that lost a stage tries nobody out: each stage that it leaves without need is replayed, too.
        decode = self._measured if request.holding else self._decode
        step = (
            self._beside(learned) + decode + self._context * request.position + self._row * load + self._tail
        )
        queue = BUSY_WAIT * (decode + self._row * (load - 1)) * (load > 0)
        risk = risk_us(self._hazard, step, learned.recovery_us)
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
        return Prices(
            np.where(self._room < request.positions, np.inf, drawn),
            self._priced_edges(frames, positions),
            frames * self._outward,
            request.tokens * self._home,
        )

    def without(self, search: Search, ingress: NodeId) -> Prices:
        """The prices when the machines of a path, but not the ingress, are gone."""
        used = [self._places[i] for i in search.path if self.held[i][0].id != ingress]
        lost = np.zeros(self._machines, dtype=bool)
        lost[used] = True
        return replace(search.prices, replicas=np.where(lost[self._places], np.inf, search.prices.replicas))

    def shortest(self, prices: Prices, known: Search | None = None) -> Search | None:
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
        return Search(prices, path[::-1], float(ends[best]), cost, parent)

    def path_of(self, route: LayeredRoute) -> list[int] | None:
        """The path of a route, if all of its replicas are here."""
        places = {key: i for i, key in enumerate(self._keys)}
        path = [places.get((s.node, s.shard)) for s in route.stages]
        return [i for i in path if i is not None] if None not in path else None

    def cost_of(self, prices: Prices, path: list[int]) -> float:
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
            beside = learned.stage_of(node.id)
            if place == 0:
                latency, transfer = float(self._outward[i]), 0.0
            else:
                before = self.held[path[place - 1]][0]
                latency, transfer = way_us(before, node, self._frame_bytes, self._percentile)
            compute = compute_us(speed, sessions, self._percentile, beside, request.position)
            risk = risk_us(float(self._hazard[i]), compute, learned.recovery_us)
            queue, price = queue_us(speed, sessions), float(self._price[i])
            terms.append(Terms(compute, queue, latency, transfer, risk, price))
            done = 0.0
            for k, (positions, begin) in enumerate(chunks):
                came = ends[k] + latency + transfer * positions
                ends[k] = done = max(done, came) + beside + speed.chunk(positions, begin)
        home = float(self._home[path[-1]])
        ttft = ends[-1] + home
        groups = {group_of(self.held[i][1].shard) for i in path}
        group = groups.pop() if len(groups) == 1 else (self.held[0][1].shard.model.ref.digest, "", "")
        return RoutePlan(self.route(path), tuple(terms), home, ttft, others, group)


def _hopeful(held: list[Held], speeds: list[StageSpeed]) -> list[StageSpeed]:
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
