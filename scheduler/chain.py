"""The cheapest chain of nodes for all layers of a model: exact for small meshes, bounded for large ones.

A chain visits nodes in order, none twice; each takes the next layers. It pays for the way in, for each
node's block of layers, for each hop and for the way home. ``solve`` answers with a chain, a lower bound
that no chain can beat, and the gap between them.

- *Exact* (up to ``EXACT_NODES``): dynamic programming over sets of visited nodes, as Held and Karp's for
  the travelling salesman (1962), with the layers done so far as one more coordinate.
- *Heuristic*: labels by (node, layers done) that remember whom they visited, then the exact program over
  the nodes of the best chain and those that serve best beside them.
- *Bound* of the heuristic, the larger of two: chains that may visit a node again cost no more (second visits
  are made dearer and the price given back: Lagrange multipliers, a few subgradient steps); and layers that
  are covered by nodes in any order, each at its least hop, cost no more either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

EXACT_NODES = 11
_WINDOWS, _WINDOW_STAGES, _WINDOW_NODES = 4, 6, 8
_MULTIPLIER_STEPS = 4
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """Costs in microseconds, ``inf`` where something cannot be. ``block[n, a, b]``: layers ``[a, b)`` on
    node ``n``, shape ``[nodes, layers + 1, layers + 1]``; ``hop[m, n]``; ``enter`` and ``home`` by node."""

    block: Floats
    hop: Floats
    enter: Floats
    home: Floats

    @property
    def nodes(self) -> int:
        return len(self.enter)

    @property
    def layers(self) -> int:
        return int(self.block.shape[1]) - 1

    def cost(self, chain: Chain) -> float:
        """What a chain costs, term by term."""
        total, before = 0.0, -1
        for node, start, end in chain:
            total += float(self.enter[node] if before < 0 else self.hop[before, node])
            total += float(self.block[node, start, end])
            before = node
        return total + float(self.home[before])


Chain = tuple[tuple[int, int, int], ...]
"""Node, first layer, layer after the last, in order."""


@dataclass(frozen=True, slots=True)
class Solution:
    """``chain`` is empty where there is none; ``bound`` is then no information."""

    chain: Chain = ()
    cost: float = float("inf")
    bound: float = 0.0
    exact: bool = field(default=False)

    @property
    def gap(self) -> float:
        """How much cheaper a chain could be at most, as a share of the bound."""
        return 0.0 if self.bound <= 0 else max(0.0, self.cost / self.bound - 1)


def solve(problem: ChainProblem) -> Solution:
    """The cheapest chain, or a good one where the mesh is large."""
    if problem.nodes <= EXACT_NODES:
        return solve_exact(problem)
    return solve_heuristic(problem)


def solve_exact(problem: ChainProblem) -> Solution:
    """The optimum; time and memory double with each node."""
    n, layers = problem.nodes, problem.layers
    if n == 0:
        return Solution()
    # done[s, m, l]: the nodes of set s have layers [0, l), m came last.
    done = np.full((1 << n, n, layers + 1), np.inf)
    for node in range(n):
        done[1 << node, node] = problem.enter[node] + problem.block[node, 0]
    into = np.ascontiguousarray(problem.hop.T)[:, None, :, None]
    nodes = np.arange(n)[:, None]
    for sets in _steps(n):
        arrived = (done[sets] + into).min(axis=2)
        best = np.full(arrived.shape, np.inf)
        for start in range(1, layers):
            step = problem.block[:, None, start, start + 1 :] + arrived[:, :, start, None]
            np.minimum(best[:, :, start + 1 :], step, out=best[:, :, start + 1 :])
        done[sets | 1 << nodes, nodes] = best
    ends = done[:, :, layers] + problem.home
    visited, last = np.unravel_index(int(ends.argmin()), ends.shape)
    cost = float(ends[visited, last])
    if not np.isfinite(cost):
        return Solution(exact=True)
    chain = _back(problem, done, int(visited), int(last))
    return Solution(chain, cost, cost, exact=True)


@cache
def _steps(n: int) -> list[Integers]:
    """By how many were visited: ``[node who comes next, sets without it]``."""
    return [
        np.array([[s for s in range(1 << n) if s.bit_count() == size and not s >> m & 1] for m in range(n)])
        for size in range(1, n)
    ]


def _back(problem: ChainProblem, done: Floats, visited: int, last: int) -> Chain:
    """The chain that a state came from, found by looking which step explains its cost."""
    chain: list[tuple[int, int, int]] = []
    end = problem.layers
    while True:
        cost, before = done[visited, last, end], visited & ~(1 << last)
        if before == 0:
            chain.append((last, 0, end))
            return tuple(reversed(chain))
        into = done[before] + problem.hop[:, last, None] + problem.block[last, :, end]
        previous, start = np.unravel_index(int(np.abs(into - cost).argmin()), into.shape)
        chain.append((last, int(start), end))
        visited, last, end = before, int(previous), int(start)


def solve_heuristic(problem: ChainProblem) -> Solution:
    """A good chain and how far it can be from the best."""
    bound, best, walked = _relax(problem)
    if best and problem.cost(best) <= bound * (1 + _CLOSE):
        return Solution(best, bound, bound, exact=True)
    bound = max(bound, _cover(problem))
    if not np.isfinite(bound):
        return Solution()
    for prices in (np.zeros(problem.nodes), walked):
        chain = _labels(problem, prices)
        if chain and (not best or problem.cost(chain) < problem.cost(best)):
            best = chain
    if not best:
        return Solution(bound=bound)
    cost = problem.cost(best)
    if cost > bound * (1 + _CLOSE):
        through = _through(problem, walked)
        bound = max(bound, min(cost, float(through.min())))
        promising = np.flatnonzero(through < cost * (1 - _CLOSE))
        if len(promising) <= _WINDOW_NODES:
            return _settle(problem, promising.tolist(), best, cost)
        best, cost = _polish(problem, best, cost)
    return Solution(best, cost, min(bound, cost))


def _settle(problem: ChainProblem, nodes: list[int], best: Chain, cost: float) -> Solution:
    """The optimum, when only so few nodes can be in a chain that beats the best one known."""
    found = solve_exact(_part(problem, nodes))
    if found.cost < cost:
        best, cost = tuple((nodes[n], a, b) for n, a, b in found.chain), found.cost
    return Solution(best, cost, cost, exact=True)


def _part(problem: ChainProblem, nodes: list[int]) -> ChainProblem:
    return ChainProblem(
        problem.block[nodes], problem.hop[np.ix_(nodes, nodes)], problem.enter[nodes], problem.home[nodes]
    )


def _through(problem: ChainProblem, prices: Floats) -> Floats:
    """For each node, what a walk through it costs at least; each visit at its price, which is given back.
    A chain over a node cannot cost less."""
    n, layers = problem.nodes, problem.layers
    block = problem.block + prices[:, None, None]
    ahead = np.ascontiguousarray(block.transpose(1, 2, 0))
    done = np.full((layers + 1, n), np.inf)
    done[1:] = (problem.enter[:, None] + block[:, 0, 1:]).T
    hops = np.ascontiguousarray(problem.hop.T)
    for layer in range(1, layers):
        into = (hops + done[layer]).min(axis=1)
        np.minimum(done[layer + 1 :], into + ahead[layer, layer + 1 :], out=done[layer + 1 :])
    rest = np.full((layers + 1, n), np.inf)
    rest[layers] = problem.home
    for layer in range(layers - 1, 0, -1):
        onward = (ahead[layer, layer + 1 :] + rest[layer + 1 :]).min(axis=0)
        rest[layer] = (problem.hop + onward).min(axis=1)
    least: Floats = (done + rest).min(axis=0) - prices.sum()
    return least


def _relax(problem: ChainProblem) -> tuple[float, Chain, Floats]:
    """The bound; a walk that turned out to visit nobody twice, if any; the prices of the best bound."""
    prices = np.zeros(problem.nodes)
    bound, best_prices = -np.inf, prices
    chain: Chain = ()
    step = 0.0
    for _ in range(_MULTIPLIER_STEPS):
        cost, walk = _walk(problem, prices)
        if not np.isfinite(cost):
            return np.inf, (), prices
        value = cost - prices.sum()
        if value > bound:
            bound, best_prices = value, prices
        visits = np.bincount([n for n, _, _ in walk], minlength=problem.nodes)
        excess = visits - 1.0
        if visits.max() <= 1:
            chain = walk
            if prices[visits == 0].sum() == 0:
                break  # nobody is visited twice, nothing was paid for nothing: this is the optimum
        step = step * 0.7 if step else 0.15 * cost / max(1, len(walk))
        prices = np.maximum(0.0, prices + step * excess)
    return float(bound), chain, best_prices


def _cover(problem: ChainProblem) -> float:
    """Least cost of nodes whose blocks have as many layers as there are, wherever they lie."""
    n, layers = problem.nodes, problem.layers
    into = np.minimum(problem.enter, problem.hop.min(axis=0, initial=np.inf))
    # least[n, k]: k layers on node n; the last block pays for the head, which is added once below.
    least = np.full((n, layers + 1), np.inf)
    for length in range(1, layers + 1):
        starts = np.arange(layers + 1 - length)
        inner = problem.block[:, starts, starts + length]
        least[:, length] = inner[:, : max(1, layers - length)].min(axis=1)
        least[:, length] = np.minimum(least[:, length], inner[:, -1])
    ending = problem.block[:, np.arange(layers), layers]
    lengths = layers - np.arange(layers)
    with np.errstate(invalid="ignore"):
        head = np.nanmin(np.where(np.isfinite(ending), ending - least[:, lengths], np.nan), initial=np.inf)
    covered = np.full(layers + 1, np.inf)
    covered[0] = 0.0
    back = np.arange(layers + 1)[:, None] - np.arange(layers + 1)[None, :]
    for node in range(n):
        if np.isfinite(into[node]):
            steps = np.where(back >= 0, covered[np.maximum(back, 0)] + least[node], np.inf)
            covered = np.minimum(covered, steps.min(axis=1) + into[node])
    return float(covered[layers] + problem.home.min() + (head if np.isfinite(head) else 0.0))


def _walk(problem: ChainProblem, prices: Floats) -> tuple[float, Chain]:
    """The cheapest walk, which may visit a node again, each visit at its price."""
    n, layers = problem.nodes, problem.layers
    block = problem.block + prices[:, None, None]
    cost = (problem.enter[:, None] + block[:, 0]).T.copy()  # [layer, node]
    came = np.full((layers + 1, n), -1)
    began = np.zeros((layers + 1, n), dtype=np.int64)
    hops = problem.hop.T
    everybody = np.arange(n)
    ahead = np.ascontiguousarray(block.transpose(1, 2, 0))  # [start, end, node]
    for layer in range(1, layers):
        into = hops + cost[layer]
        previous = into.argmin(axis=1)
        reached = into[everybody, previous] + ahead[layer, layer + 1 :]
        better = reached < cost[layer + 1 :]
        if better.any():
            cost[layer + 1 :] = np.where(better, reached, cost[layer + 1 :])
            came[layer + 1 :] = np.where(better, previous, came[layer + 1 :])
            began[layer + 1 :] = np.where(better, layer, began[layer + 1 :])
    ends = cost[layers] + problem.home
    last = int(ends.argmin())
    if not np.isfinite(ends[last]):
        return float("inf"), ()
    walk, node, end = [], last, layers
    while node >= 0:
        start = int(began[end, node]) if came[end, node] >= 0 else 0
        walk.append((node, start, end))
        node, end = int(came[end, node]), start
    return float(ends[last]), tuple(reversed(walk))


def _labels(problem: ChainProblem, prices: Floats) -> Chain:
    """A chain by ``_walk``'s steps, each of which remembers whom it visited and goes there no more."""
    n, layers = problem.nodes, problem.layers
    ahead = np.ascontiguousarray((problem.block + prices[:, None, None]).transpose(1, 2, 0))
    cost = (problem.enter + ahead[0]).copy()
    came = np.full((layers + 1, n), -1)
    began = np.zeros((layers + 1, n), dtype=np.int64)
    visited = np.zeros((layers + 1, n, n), dtype=bool)
    visited[:, np.arange(n), np.arange(n)] = True
    everybody = np.arange(n)
    for layer in range(1, layers):
        # Row: who comes next; column: who was last.
        into = np.where(visited[layer].T, np.inf, problem.hop.T + cost[layer])
        previous = into.argmin(axis=1)
        reached = into[everybody, previous] + ahead[layer, layer + 1 :]
        better = reached < cost[layer + 1 :]
        if not better.any():
            continue
        cost[layer + 1 :] = np.where(better, reached, cost[layer + 1 :])
        came[layer + 1 :] = np.where(better, previous, came[layer + 1 :])
        began[layer + 1 :] = np.where(better, layer, began[layer + 1 :])
        seen = visited[layer, previous]
        seen[everybody, everybody] = True
        ends, nodes = np.nonzero(better)
        visited[layer + 1 + ends, nodes] = seen[nodes]
    order = np.argsort(cost[layers] + problem.home)
    for last in order:
        if not np.isfinite(cost[layers, last]):
            break
        chain, node, end = [], int(last), layers
        while node >= 0:
            start = int(began[end, node]) if came[end, node] >= 0 else 0
            chain.append((node, start, end))
            node, end = int(came[end, node]), start
        # A label may have been replaced after another was made from it.
        if len({c[0] for c in chain}) == len(chain):
            return tuple(reversed(chain))
    return ()


def _polish(problem: ChainProblem, chain: Chain, cost: float) -> tuple[Chain, float]:
    """Exact over the chain's nodes and the most promising others; where the chain is long, over windows
    of it with others beside."""
    rates = _rates(problem)
    begin, stages = 0, len(chain) if len(chain) <= _WINDOW_NODES else _WINDOW_STAGES
    for _ in range(_WINDOWS):
        found, cheaper = _improve(problem, rates, chain, cost, begin, begin + stages)
        if begin + stages >= len(found):
            if stages >= len(chain):
                return found, cheaper
            begin = 0
        else:
            begin += stages // 2
        chain, cost = found, cheaper
    return chain, cost


def _improve(
    problem: ChainProblem, rates: Floats, chain: Chain, cost: float, begin: int, end: int
) -> tuple[Chain, float]:
    """The chain with its stages ``[begin, end)`` done over by the best of ``_WINDOW_NODES``."""
    window = chain[begin:end]
    first, last = window[0][1], window[-1][2]
    outside = {n for n, _, _ in (*chain[:begin], *chain[end:])}
    inside = [n for n, _, _ in window]
    promising = [n for n in _promising(problem, rates, inside) if n not in outside]
    core = inside + promising[: _WINDOW_NODES - len(inside)]
    part = ChainProblem(
        problem.block[core, first : last + 1, first : last + 1],
        problem.hop[np.ix_(core, core)],
        problem.hop[chain[begin - 1][0], core] if begin else problem.enter[core],
        problem.hop[core, chain[end][0]] if end < len(chain) else problem.home[core],
    )
    found = solve_exact(part).chain
    renewed = (*chain[:begin], *((core[n], first + a, first + b) for n, a, b in found), *chain[end:])
    cheaper = problem.cost(renewed)
    return (renewed, cheaper) if cheaper < cost else (chain, cost)


def _rates(problem: ChainProblem) -> Floats:
    """``[node, length]``: microseconds a layer in blocks of so many layers, the cheapest place taken."""
    layers = problem.layers
    rates = np.full((problem.nodes, layers + 1), np.inf)
    for length in range(1, layers + 1):
        starts = np.arange(layers + 1 - length)
        rates[:, length] = problem.block[:, starts, starts + length].min(axis=1) / length
    return rates


def _promising(problem: ChainProblem, rates: Floats, used: list[int]) -> list[int]:
    """Other nodes, best first: by the cost of a layer there, with its share of the way from a used node
    and back."""
    near = problem.hop[used].min(axis=0) + problem.hop[:, used].min(axis=1)
    lengths = np.maximum(1, np.arange(problem.layers + 1))
    score = (rates + near[:, None] / lengths).min(axis=1)
    return [int(n) for n in np.argsort(score) if n not in used and np.isfinite(score[n])]
