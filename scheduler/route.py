"""What a route is asked for with, and the route with what it is predicted to take, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.types import Digest, LayeredRoute, NodeId, ShardInfo, Standbys
from scheduler.cost import Percentile, Terms
from scheduler.learning import NOTHING_LEARNED, Learned
from scheduler.policy import ClassPolicy

Group = tuple[Digest, str, str]
"""Digest, runtime and quantization of a model: a route stays within one, where it can. Without runtime and quantization it is of
any (``mixed``)."""


def group_of(shard: ShardInfo) -> Group:
    """What a route must have in common."""
    return (shard.model.ref.digest, shard.runtime, shard.quantization)


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
    standbys: Standbys = ()
    """By place, for a session that begins on it and is to be brought back at once."""

    @property
    def tpot_us(self) -> float:
        """Predicted time per output token."""
        return sum(t.time for t in self.terms) + self.home_us

    @property
    def ways_us(self) -> float:
        """Of that, what links take."""
        return sum(t.hop + t.transfer for t in self.terms) + self.home_us
