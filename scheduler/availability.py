"""The share of time that some whole route is up, from the hazards of the nodes that hold its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mesh.types import LayerRange, NodeId

if TYPE_CHECKING:
    from numpy.typing import NDArray

REPAIR_S = 600.0
"""Until a lost node is back, or its layers stand elsewhere."""
_ALL_STATES_NODES = 14
_SAMPLES = 1 << 16


def down_share(hazard_per_s: float) -> float:
    """Share of time that a node is away: losses a second times the time that each lasts."""
    return hazard_per_s * REPAIR_S / (1 + hazard_per_s * REPAIR_S)


def availability(
    held: Iterable[tuple[NodeId, LayerRange]], layers: int, hazards: Mapping[NodeId, float]
) -> float:
    """Nodes fail independently. Exact up to 14 nodes, beyond by 65,536 samples of a fixed seed."""
    replicas = sorted(set(held), key=lambda r: (r[1], r[0]))
    nodes = sorted({n for n, _ in replicas})
    down = np.array([down_share(hazards[n]) for n in nodes])
    if len(nodes) <= _ALL_STATES_NODES:
        states = np.arange(1 << len(nodes))
        up = (states[:, None] >> np.arange(len(nodes)) & 1).astype(bool)
        weight = np.where(up, 1 - down, down).prod(axis=1)
    else:
        up = np.random.default_rng(1).random((_SAMPLES, len(nodes))) >= down
        weight = np.full(_SAMPLES, 1 / _SAMPLES)
    place = {n: i for i, n in enumerate(nodes)}
    reached: list[NDArray[np.bool_]] = [np.zeros(len(up), dtype=bool) for _ in range(layers + 1)]
    reached[0][:] = True
    for node, held_layers in replicas:
        reached[held_layers.end] |= reached[held_layers.start] & up[:, place[node]]
    return float(weight[reached[layers]].sum())
