"""Other projects' placements, written from their papers and sources' descriptions, over the same instances.

- ``edgeshard``: the latency program of EdgeShard (Zhang et al. 2024, arXiv:2405.14371, algorithm 1): layer by
  layer, device by device, computation and activation bytes over bandwidth, memory kept along each best
  path, the first layer on the device that asks. Latency of links and overhead of stages are not in it.
- ``petals``: servers join one after the other and take as many consecutive blocks as fit, where the sum of
  throughputs is smallest (Borzunov et al. 2023, arXiv:2312.08361, section 3.2); a client then takes the
  quickest path over what they hold, any part of a span.
- ``proportional``: layers in proportion to memory, larger machines first (exo's ring, llama.cpp's default split).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Chain = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Machines:
    """What the papers' algorithms look at. ``layer_us``, ``memory`` in layers and ``throughput`` by node;
    ``send_us[m, n]``: an activation's bytes over the bandwidth from m to n; ``asks``: who asks."""

    layer_us: Floats
    memory: NDArray[np.int64]
    throughput: Floats
    send_us: Floats
    asks: int


def edgeshard(machines: Machines, layers: int) -> Chain:
    """The chain of the latency program, empty if it finds none."""
    n = len(machines.layer_us)
    cost = np.full((layers, n), np.inf)
    came = np.full((layers, n), -1)
    left = np.zeros((layers, n, n), dtype=np.int64)
    for j in range(n):
        pinned = machines.memory[machines.asks] > 0 and j != machines.asks
        if machines.memory[j] > 0 and not pinned:
            cost[0, j] = machines.layer_us[j]
            left[0, j] = machines.memory
            left[0, j, j] -= 1
    for i in range(1, layers):
        for j in range(n):
            for k in range(n):
                if not np.isfinite(cost[i - 1, k]) or left[i - 1, k, j] < 1:
                    continue
                send = 0.0 if j == k else machines.send_us[k, j]
                total = cost[i - 1, k] + send + machines.layer_us[j]
                if total < cost[i, j]:
                    cost[i, j], came[i, j] = total, k
                    left[i, j] = left[i - 1, k]
                    left[i, j, j] -= 1
    last = int((cost[-1] + machines.send_us[:, machines.asks]).argmin())
    if not np.isfinite(cost[-1, last]):
        return ()
    path = [last]
    for i in range(layers - 1, 0, -1):
        path.append(int(came[i, path[-1]]))
    return _runs(path[::-1])


def edgeshard_cost(machines: Machines, chain: Chain) -> float:
    """What its own model says a chain takes."""
    total, before = 0.0, machines.asks
    for node, start, end in chain:
        total += (machines.send_us[before, node] if before != node else 0.0) + (
            end - start
        ) * machines.layer_us[node]
        before = node
    return float(total + (machines.send_us[before, machines.asks] if before != machines.asks else 0.0))


def _runs(path: list[int]) -> Chain:
    chain: list[tuple[int, int, int]] = []
    for layer, node in enumerate(path):
        if chain and chain[-1][0] == node:
            chain[-1] = (node, chain[-1][1], layer + 1)
        else:
            chain.append((node, layer, layer + 1))
    return tuple(chain)


def petals(machines: Machines, layers: int) -> list[tuple[int, int, int]]:
    """Spans by node, in the order in which the servers joined."""
    throughput = np.zeros(layers)
    spans = []
    for node, room in enumerate(machines.memory):
        blocks = int(min(room, layers))
        if blocks < 1:
            continue
        windows = [(sorted(throughput[i : i + blocks]), i) for i in range(layers - blocks + 1)]
        start = min(windows)[1]
        throughput[start : start + blocks] += machines.throughput[node]
        spans.append((node, start, start + blocks))
    return spans


def proportional(memory: NDArray[np.int64], layers: int) -> Chain:
    """A ring in order of memory; each takes its share of the layers, cut at rounded-down shares."""
    order = sorted(range(len(memory)), key=lambda i: (-int(memory[i]), i))
    total = int(memory.sum())
    chain: list[tuple[int, int, int]] = []
    begin, share = 0, 0.0
    for place, node in enumerate(order):
        share = round(share + int(memory[node]) / total, 5)
        end = layers if place == len(order) - 1 else int(share * layers)
        if end > begin:
            chain.append((node, begin, end))
            begin = end
    if chain and chain[-1][2] < layers:
        chain[-1] = (chain[-1][0], chain[-1][1], layers)
    return tuple(chain)


def published() -> list[tuple[str, bool]]:
    """Each baseline against one example of its own."""
    # EdgeShard, table of Llama2-7B with 1 Mbit/s to the cloud: a source that takes 140.34 ms a token keeps
    # everything (cloud-edge-opt equals edge-solo), because 16 KiB of activation alone take 131 ms.
    send = 4096 * 4 * 8 / 1e6 * 1e6
    pair = Machines(
        np.array([140_340.0, 45_000.0]) / 32,
        np.array([32, 32]),
        np.ones(2),
        np.array([[0.0, send], [send, 0.0]]),
        0,
    )
    kept = edgeshard(pair, 32)
    solo = kept == ((0, 0, 32),) and abs(edgeshard_cost(pair, kept) - 140_340.0) < 1
    # Petals' rule by hand: three equal servers of 2 of 4 blocks; the third finds all alike and takes the first.
    even = Machines(np.ones(3), np.array([2, 2, 2]), np.ones(3), np.zeros((3, 3)), 0)
    joined = petals(even, 4) == [(0, 0, 2), (1, 2, 4), (2, 0, 2)]
    # exo, its ring partitioning's own example: memories 3000, 1000 and 6000 give shares 0.6, 0.3 and 0.1.
    ring = proportional(np.array([3000, 1000, 6000]), 10) == ((2, 0, 6), (0, 6, 9), (1, 9, 10))
    return [
        ("edgeshard: 140.34 ms, all on the source, at 1 Mbit/s", solo),
        ("petals: the third of three equal servers doubles the first blocks", joined),
        ("proportional: 3000/1000/6000 MB give 0.6, 0.3, 0.1 of the layers", ring),
    ]
