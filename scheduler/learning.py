"""What an ingress learns from its own sessions: what they take beside computation and links, and what recoveries take.

The cost model knows computation and links; what an agent adds to each stage, and an ingress to each
start, is learned here from what was left over.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from mesh.types import NodeId
from scheduler.cost import RECOVERY_US, STAGE_US

_KEPT = 64
_ENOUGH = 3
_STAGE_MAX_US = 20_000.0
_GAIN = 0.3
"""Share of what is left unexplained that the nodes of a route are blamed for, together."""
_NODES = 256
"""That something is remembered of, those that served last."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Microseconds: what a stage takes beside its computation, what a start takes beside its stages, and what
    a session stands still when it loses one. ``by_node``: what a stage takes where that is known of its node."""

    stage_us: float = STAGE_US
    start_us: float = 0.0
    recovery_us: float = RECOVERY_US
    by_node: Mapping[NodeId, float] = field(default_factory=dict)

    def stage_of(self, node: NodeId) -> float:
        """What a stage on ``node`` takes beside its computation."""
        return self.by_node.get(node, self.stage_us)


NOTHING_LEARNED = Learned()


class Learner:
    """Folds in sessions that ended; ``learned`` is for the next route."""

    def __init__(self) -> None:
        self._stage: deque[float] = deque(maxlen=_KEPT)
        self._start: deque[float] = deque(maxlen=_KEPT)
        self._recovery: deque[float] = deque(maxlen=_KEPT)
        self._off: OrderedDict[NodeId, float] = OrderedDict()
        """By how much a node's stages take longer than the usual one."""
        self.learned = NOTHING_LEARNED

    def ended(self, then: Learned, nodes: Sequence[NodeId], left_us: float, ttft_off_us: float) -> None:
        """A session over ``nodes``, one for each stage, was planned with ``then``; what its tokens took beside computation,
        queues and links, and its first one beyond the prediction (negative: less).

        Which node it was is told apart as sessions go over different ones (least mean squares, Widrow and Hoff 1960).
        """
        left_us = min(max(0.0, left_us), _STAGE_MAX_US * len(nodes))
        self._stage.append(left_us / len(nodes))
        self._start.append(then.start_us + ttft_off_us)
        self._renew()
        if len(self._stage) < _ENOUGH:
            return
        missed = left_us - sum(map(self.learned.stage_of, nodes))
        for node in dict.fromkeys(nodes):
            off = self._off.pop(node, 0.0) + _GAIN * missed / len(nodes)
            self._off[node] = min(max(-self.learned.stage_us, off), _STAGE_MAX_US)
        while len(self._off) > _NODES:
            self._off.popitem(last=False)
        self._renew()

    def recovered(self, us: float) -> None:
        """A session stood still for so long when it lost a stage."""
        self._recovery.append(us)
        self._renew()

    def _renew(self) -> None:
        enough = len(self._stage) >= _ENOUGH
        stage_us = median(self._stage) if enough else STAGE_US
        self.learned = Learned(
            stage_us,
            median(self._start) if enough else 0.0,
            median(self._recovery) if self._recovery else RECOVERY_US,
            {node: min(max(0.0, stage_us + off), _STAGE_MAX_US) for node, off in self._off.items()},
        )
