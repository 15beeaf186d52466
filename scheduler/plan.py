"""What a placement answers: a plan with its terms, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.types import LayerRange, NodeId


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A replica of a plan. Microseconds a token: what it computes, the frame's way through the agent, the
    hop before it; ``policy`` is what risk, battery, prices and moving add to its cost, and no clock shows."""

    node: NodeId
    layers: LayerRange
    copy: int
    compute: float
    overhead: float
    hop: float
    policy: float
    memory_bytes: int
    moved: int
    """Layers that the node does not hold yet."""
    there: bool
    """This very shard is loaded already."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas by copy and order. ``cost`` is what was minimised for the first copy, no chain costs less than
    ``bound``; ``tpot_us`` what a clock should show with all of it at rest."""

    model: str
    runtime: str
    quantization: str
    sessions: int
    context: int
    stages: tuple[PlannedStage, ...]
    tpot_us: float
    home_us: float
    cost: float
    bound: float
    exact: bool
    availability: float
    idle: tuple[tuple[NodeId, str], ...]

    @property
    def gap(self) -> float:
        """By how much of the bound a plan could be cheaper at most."""
        return max(0.0, self.cost / self.bound - 1) if self.bound > 0 else 0.0

    def takes(self) -> dict[NodeId, int]:
        """Bytes by node that it will take beyond what is loaded."""
        more: dict[NodeId, int] = {}
        for s in self.stages:
            if not s.there:
                more[s.node] = more.get(s.node, 0) + s.memory_bytes
        return more

    @property
    def replicas(self) -> frozenset[tuple[NodeId, LayerRange]]:
        """What should be loaded."""
        return frozenset((s.node, s.layers) for s in self.stages)


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No plan: ``limit`` is what binds (``nodes``, ``memory``, ``replicas``, ``availability``, ``tpot``),
    ``reason`` says it with figures, ``would_do`` what would be feasible."""

    limit: str
    reason: str
    would_do: str = ""
    reasons: tuple[tuple[NodeId, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.reason}. {self.would_do}" if self.would_do else self.reason
