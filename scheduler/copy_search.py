"""The search for copies of a model: each the cheapest chain of nodes (``scheduler.chain``) beside those that were chosen before.

Of a large mesh a few neighbourhoods are searched, and the answer carries a bound that holds for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mesh.types import LayerRange, NodeId
from scheduler.chain import Chain, ChainProblem, Solution, solve
from scheduler.cluster import ClusterSnapshot, Node
from scheduler.cost import FRAME_HEAD_BYTES, TOKEN_BYTES, TYPICAL_POSITION, Percentile, ways_us
from scheduler.demand import ModelDemand
from scheduler.feasibility import Host, mib, positions_of
from scheduler.layer_speed import LEAST_SHARE, LayerSpeed
from scheduler.plan import Infeasible, Plan, PlannedStage
from scheduler.policy import ModelPolicy, matches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SHORTLIST = 32
"""Nodes that one chain is sought among, where there are more."""
_SEEDS = 6
_INGRESSES = 24
"""Nodes that stand for all where requests come in anywhere."""
_SAME_CUTS = 1.25
"""How much dearer a copy with the first one's cuts may be than one with its own."""
_FLOAT_BYTES = 4


def _at_work(speed: LayerSpeed) -> LayerSpeed:
    """In the middle of a typical session."""
    return replace(speed, layer=speed.layer + speed.context * TYPICAL_POSITION)


@dataclass(frozen=True, slots=True)
class _Search:
    """A chain problem over some of the hosts: ``of`` gives their places among all."""

    problem: ChainProblem
    of: tuple[int, ...]


@dataclass
class CopySearch:
    """Everything that the search for copies looks at, as arrays over the hosts."""

    snapshot: ClusterSnapshot
    hosts: list[Host]
    demand: ModelDemand
    policy: ModelPolicy
    _ways: dict[tuple[int, ...], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hosts, demand = self.hosts, self.demand
        tail = self.policy.percentile == "p99"
        self.percentile = Percentile.P99 if tail else Percentile.P50
        slow = [h.weight * (h.speed.tail if tail else 1.0) for h in hosts]
        self.layer_us = np.array([_at_work(h.speed).layer * w for h, w in zip(hosts, slow, strict=True)])
        self.head_us = np.array([h.speed.head * w for h, w in zip(hosts, slow, strict=True)])
        self.run_us = np.array([h.speed.run * w for h, w in zip(hosts, slow, strict=True)])
        self.fixed_us = np.array([h.overhead + h.price for h in hosts])
        layers = demand.layers
        starts, ends = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
        self.lengths = ends - starts
        positions = positions_of(demand, self.policy)
        bytes_ = (
            demand.shard_bytes
            + self.lengths * (demand.layer_bytes + positions * demand.kv_layer_bytes)
            + np.where(starts == 0, demand.embedding_bytes, 0)
            + np.where(ends == layers, demand.head_bytes, 0)
            - np.where((starts == 0) & (ends == layers), demand.tied_bytes, 0)
        )
        self.bytes = np.where(self.lengths > 0, bytes_, np.iinfo(np.int64).max)
        self.room = np.array([h.room for h in hosts], dtype=np.int64)
        self.spread = [dict(h.node.capabilities.labels).get(self.policy.spread, "") for h in hosts]
        nodes = [h.node for h in hosts]
        self.enter, self.home = self._ends(nodes)

    def _ends(self, nodes: list[Node]) -> tuple[Floats, Floats]:
        """From where requests come in to each node, and back: the mean over ingresses."""
        alive = self.snapshot.alive()
        wanted = [n for n in alive if any(matches(n, label) for label in self.policy.ingress)]
        ingresses = wanted or alive or nodes
        if len(ingresses) > _INGRESSES:
            ingresses = ingresses[:: -(-len(ingresses) // _INGRESSES)]
        out = sum(ways_us(ingresses, nodes, TOKEN_BYTES, self.percentile))
        back = sum(ways_us(nodes, ingresses, TOKEN_BYTES, self.percentile))
        return np.asarray(out).mean(axis=0), np.asarray(back).mean(axis=1)

    # -- the search ----------------------------------------------------------------------------

    def next_copy(self, earlier: list[Chain]) -> Solution | None:
        """The cheapest further copy: on nodes that hold nothing yet, else on any with room left."""
        used = {n for chain in earlier for n, _, _ in chain}
        fresh = [n for n in range(len(self.hosts)) if n not in used]
        best = self._best(fresh, earlier)
        if best is None and used:
            best = self._best(list(range(len(self.hosts))), earlier)
        return best

    def _best(self, allowed: list[int], earlier: list[Chain]) -> Solution | None:
        answers = []
        for chosen in self._shortlists(allowed):
            search = self.over(chosen, earlier)
            free = solve(search.problem)
            if not free.chain:
                continue
            answers.append((free.cost, free, search))
            if earlier:
                kept = self._same_cuts(search, earlier)
                if kept.chain and kept.cost <= _SAME_CUTS * free.cost:
                    answers[-1] = (free.cost, kept, search)
        if not answers:
            return None
        _, solution, search = min(answers, key=lambda a: a[0])
        bound = solution.bound if len(allowed) <= SHORTLIST else min(solution.cost, self._bound(allowed))
        chain = tuple((search.of[n], a, b) for n, a, b in solution.chain)
        return Solution(chain, solution.cost, bound, solution.exact and len(allowed) <= SHORTLIST)

    @staticmethod
    def _same_cuts(search: _Search, earlier: list[Chain]) -> Solution:
        cuts = {0, *(b for chain in earlier for _, _, b in chain)}
        block = search.problem.block.copy()
        apart = [i for i in range(block.shape[1]) if i not in cuts]
        block[:, apart, :] = np.inf
        block[:, :, apart] = np.inf
        return solve(replace(search.problem, block=block))

    def over(self, chosen: Sequence[int], earlier: list[Chain]) -> _Search:
        """The chain problem over some of the hosts, with what earlier copies took."""
        rows = list(chosen)
        linear = (
            self.layer_us[rows, None, None] * self.lengths
            + np.where(np.arange(self.demand.layers + 1) == self.demand.layers, 1.0, 0.0)
            * self.head_us[rows, None, None]
        )
        step = np.maximum(linear + self.run_us[rows, None, None], LEAST_SHARE * linear)
        block = self.fixed_us[rows, None, None] + step
        room = self.room[rows].copy()
        place = {n: i for i, n in enumerate(rows)}
        used = set()
        for chain in earlier:
            for n, a, b in chain:
                if n in place:
                    room[place[n]] -= int(self.bytes[a, b])
                    used.add(n)
        fits = self.bytes[None] <= room[:, None, None]
        for i, n in enumerate(rows):
            self._present(n, block[i], fits[i], n in used)
        block = np.where(fits & (self.lengths > 0), block, np.inf)
        self._apart(rows, block, earlier)
        return _Search(
            ChainProblem(block, self._hops(tuple(rows)), self.enter[rows], self.home[rows]), tuple(rows)
        )

    def _present(self, n: int, block: Floats, fits: NDArray[np.bool_], used: bool) -> None:
        """What is there already is cheaper by what moving it would be worth, and needs no room, unless an earlier
        copy used the node's: what is ours there may have to go for that. A changed shard of known layers is loaded
        anew, which counts as one layer's move."""
        present = self.hosts[n].present
        if not present:
            return
        known = np.zeros(self.demand.layers + 1)
        for layers in present:
            known[layers.start + 1 : layers.end + 1] = 1
        before = known.cumsum()
        there = np.maximum(before[None, :] - before[:, None], 0)
        block -= self.policy.move * np.minimum(there, np.maximum(self.lengths - 1, 0))
        for layers in present:
            if there[layers.start, layers.end] == len(layers):
                block[layers.start, layers.end] -= self.policy.move
                if not used or layers in self.hosts[n].staying:
                    fits[layers.start, layers.end] = True

    def _apart(self, rows: list[int], block: Floats, earlier: list[Chain]) -> None:
        """No layer twice on a node, nor within one value of the label that copies are spread over."""
        starts, ends = np.meshgrid(
            np.arange(self.demand.layers + 1), np.arange(self.demand.layers + 1), indexing="ij"
        )
        for chain in earlier:
            for m, a, b in chain:
                overlap = (starts < b) & (ends > a)
                for i, n in enumerate(rows):
                    alike = self.policy.spread and self.spread[n] == self.spread[m]
                    if n == m or alike:
                        block[i][overlap] = np.inf

    def _hops(self, rows: tuple[int, ...]) -> Floats:
        known = self._ways.get(rows)
        if known is None:
            nodes = [self.hosts[n].node for n in rows]
            latency, transfer = ways_us(nodes, nodes, self._frame_bytes, self.percentile)
            known = latency + transfer
            np.fill_diagonal(known, np.inf)
            self._ways[rows] = known
        return known

    @property
    def _frame_bytes(self) -> int:
        return self.demand.shape.width * _FLOAT_BYTES + FRAME_HEAD_BYTES

    # -- large meshes --------------------------------------------------------------------------

    def _most(self) -> NDArray[np.int64]:
        """Layers that each host can take at most, in the middle of a route."""
        fit = self.bytes[0, 1:] - self.demand.embedding_bytes
        return np.searchsorted(fit, self.room, side="right").astype(np.int64)

    def _shortlists(self, allowed: list[int]) -> list[list[int]]:
        """Everybody, or the neighbourhoods of those that are best by themselves: hosts whose layers are
        cheap, the way from and to the seed included."""
        if len(allowed) <= SHORTLIST:
            return [allowed] if allowed else []
        rows = np.array(allowed)
        most = np.maximum(1, self._most()[rows])
        alone = self._rate(rows, self.fixed_us[rows], most)
        ends = (self.enter[rows] + self.home[rows]) / self.demand.layers
        seeds = np.argsort(alone + ends, kind="stable")[:_SEEDS]
        nodes = [self.hosts[n].node for n in allowed]
        lists = []
        for seed in seeds:
            origin = [nodes[int(seed)]]
            there = sum(ways_us(origin, nodes, self._frame_bytes, self.percentile))
            back = sum(ways_us(nodes, origin, self._frame_bytes, self.percentile))
            near = (np.asarray(there)[0] + np.asarray(back)[:, 0]) / 2
            score = self._rate(rows, self.fixed_us[rows] + near, most) + ends
            lists.append(sorted(int(n) for n in rows[np.argsort(score, kind="stable")[:SHORTLIST]]))
        return [list(k) for k in dict.fromkeys(tuple(k) for k in lists)]

    def _bound(self, allowed: list[int]) -> float:
        """No chain of any of the hosts costs less: the cheapest layers, each host's stage and least way in
        spread over all that it can take (the relaxation of a fixed-charge knapsack)."""
        rows = np.array(allowed)
        most = self._most()[rows]
        able = most > 0
        fixed = self.fixed_us[rows] + np.minimum(self._least_way(rows), self.enter[rows])
        rate = np.where(able, self._rate(rows, fixed, np.maximum(1, most)), np.inf)
        left, total = self.demand.layers, 0.0
        for i in np.argsort(rate, kind="stable"):
            take = min(left, int(most[i]))
            total += take * float(rate[i])
            left -= take
            if not left:
                break
        held = max((sum(map(len, self.hosts[int(n)].present)) for n in rows), default=0) > 0
        stay = self.policy.move * self.demand.layers if held else 0.0
        heads = self.head_us[rows] * np.where(self.run_us[rows] < 0, LEAST_SHARE, 1.0)
        return total + float((self.home[rows] + heads).min()) - stay

    def _rate(self, rows: NDArray[np.int64], fixed: Floats, most: NDArray[np.int64]) -> Floats:
        """No layer on a host takes less, however many it has: what is paid once is spread over as many as it can take, what
        is saved once over one."""
        layer, once = self.layer_us[rows], self.run_us[rows] + fixed
        rate: Floats = np.maximum(layer + np.minimum(once, once / most), LEAST_SHARE * layer + fixed / most)
        return rate

    def _least_way(self, rows: NDArray[np.int64]) -> Floats:
        """No hop to a host takes less: half of both heights in the latency space, or the best link that
        anybody measured."""
        least = np.zeros(len(rows))
        places = [self.hosts[int(n)].node.coordinate for n in rows]
        if all(p is not None for p in places):
            heights = np.array([p.height + min(0.0, p.adjustment) for p in places if p is not None])
            least = np.maximum(0.0, heights + heights.min()) / 2 * 1e6
        index = {self.hosts[int(n)].node.id: i for i, n in enumerate(rows)}
        for n in rows:
            node = self.hosts[int(n)].node
            for peer, link in node.links.items():
                half = link.rtt_p50 / 2000
                for target in (index.get(peer), index.get(node.id)):
                    if target is not None:
                        least[target] = min(least[target], half)
        return least

    # -- answers -------------------------------------------------------------------------------

    def plan(self, copies: list[Solution], up: float, reasons: dict[NodeId, str]) -> Plan:
        """The copies with their terms, and the reason of everybody who hosts nothing."""
        stages: list[PlannedStage] = []
        for copy, solution in enumerate(copies):
            before: int | None = None
            for n, a, b in solution.chain:
                stages.append(self._stage(copy, before, n, LayerRange(a, b)))
                before = n
        first = copies[0]
        cost, bound = first.cost, first.bound
        home = float(self.home[first.chain[-1][0]])
        tpot = home + sum(s.compute + s.overhead + s.hop for s in stages if s.copy == 0)
        idle = dict(reasons)
        idle.update(self._not_needed(stages))
        return Plan(
            self.demand.shape.ref.name,
            self.demand.runtime,
            self.demand.quantization,
            self.policy.sessions,
            min(self.policy.context, self.demand.shape.context_max),
            tuple(stages),
            tpot,
            home,
            cost,
            bound,
            first.exact,
            up,
            tuple(sorted(idle.items())),
        )

    def _stage(self, copy: int, before: int | None, n: int, layers: LayerRange) -> PlannedStage:
        host = self.hosts[n]
        if before is None:
            hop = float(self.enter[n])
        else:
            pair = [self.hosts[before].node], [host.node]
            hop = float(np.asarray(sum(ways_us(*pair, self._frame_bytes, self.percentile)))[0, 0])
        tail = host.speed.tail if self.policy.percentile == "p99" else 1.0
        compute = _at_work(host.speed).stage(layers, self.demand.layers) * tail
        held = {i for r in host.present for i in range(r.start, r.end)}
        moved = 0 if layers in host.present else sum(i not in held for i in range(layers.start, layers.end))
        return PlannedStage(
            host.node.id,
            layers,
            copy,
            compute,
            host.overhead,
            hop,
            compute * (host.weight - 1) + host.price,
            self.demand.memory(layers, positions_of(self.demand, self.policy)),
            moved,
            layers in host.present,
        )

    def _not_needed(self, stages: list[PlannedStage]) -> dict[NodeId, str]:
        """What using each of the others would take, beside what the chosen ones take."""
        used = {s.node for s in stages}
        spare = [h for h in self.hosts if h.node.id not in used]
        if not spare:
            return {}
        chosen = [h for h in self.hosts if h.node.id in used]
        way = ways_us([h.node for h in chosen], [h.node for h in spare], self._frame_bytes, self.percentile)
        hops = (way[0] + way[1]).min(axis=0)
        rates = sorted(h.speed.layer / 1000 for h in chosen)
        return {
            h.node.id: f"not needed: {h.speed.layer / 1000:.2f} ms a layer and {(h.overhead + h.price + hop) / 1000:.2f} ms for one "
            f"stage more; those chosen take {rates[0]:.2f} to {rates[-1]:.2f} ms a layer"
            for h, hop in zip(spare, hops, strict=True)
        }

    def why_not(self, copies: int, up: float, reasons: dict[NodeId, str]) -> Infeasible:
        """Why there is no further copy."""
        demand, listed = self.demand, tuple(sorted(reasons.items()))
        name, hosts = demand.shape.ref.name, self.hosts
        if copies >= self.policy.replicas:
            return Infeasible(
                "availability",
                f"{copies} copies of {name} on {len(hosts)} nodes are up {up:.6f} of the time, wanted is "
                f"{self.policy.availability}",
                "More nodes, or a lower availability",
                listed,
            )
        most = self._most()
        offered = int(self.room.sum())
        needed = int(self.bytes[0, demand.layers]) * (copies + 1)
        if copies:
            apart = f", copies on different values of {self.policy.spread!r}" if self.policy.spread else ""
            return Infeasible(
                "replicas",
                f"{copies} of {self.policy.replicas} replicas of {name} fit on {len(hosts)} nodes{apart}: "
                f"{mib(needed)} needed for one more, {mib(offered)} free in all",
                "Another node would do",
                listed,
            )
        total = int(np.minimum(most, demand.layers).sum())
        if total < demand.layers:
            return Infeasible(
                "memory",
                f"{len(hosts)} nodes have room for {total} of {demand.layers} layers of {name}: {mib(needed)} "
                f"needed, {mib(offered)} free",
                f"{mib(needed - offered)} more memory would do" if needed > offered else "",
                listed,
            )
        return Infeasible(
            "memory",
            f"{len(hosts)} nodes have room for the layers of {name}, but not for its embedding "
            f"({mib(demand.embedding_bytes)}) or head ({mib(demand.head_bytes)}) beside them",
            reasons=listed,
        )
