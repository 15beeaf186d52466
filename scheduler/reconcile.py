"""From what should be loaded and what is to what to do next: few moves, no service lost on the way.

- A new plan counts once it has been the same for a while (``SETTLE_S``; less when the old one has lost
  replicas), so that figures that waver move nothing.
- A node that came and went lately is held off, longer each time.
- At most ``moves`` loads begin in a minute, whatever happens. Taking over a lease that is there already is
  none.
- Old replicas go when the new ones serve, or when they stand in the way of new ones on their node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh.gossip import MemberState
from mesh.types import LayerRange, NodeId
from scheduler.cluster import ClusterSnapshot, ReplicaState

SETTLE_S = 10.0
SETTLE_BROKEN_S = 1.5
FLAP_WINDOW_S = 600.0
FLAPS_FREE = 1
"""Losses within the window that are forgiven."""
HOLD_OFF_S = 60.0
HOLD_OFF_MAX_S = 600.0
ASK_AGAIN_S, ASK_AGAIN_MAX_S = 2.0, 60.0
REFUSED_OFTEN = 3


@dataclass(frozen=True, slots=True, order=True)
class Wanted:
    """A replica that should be: where, of what, with KV memory for so many sessions of so many positions."""

    node: NodeId
    model: str
    layers: LayerRange
    runtime: str
    quantization: str
    sessions: int
    context: int

    @property
    def place(self) -> tuple[NodeId, str, LayerRange, str, str]:
        """Without the promise: what a lease is for."""
        return (self.node, self.model, self.layers, self.runtime, self.quantization)


@dataclass(frozen=True, slots=True)
class Hold:
    """Take a lease, and keep it."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Release:
    """End a lease."""

    wanted: Wanted
    why: str


Action = Hold | Release


def planned_now(snapshot: ClusterSnapshot) -> dict[tuple[NodeId, str, LayerRange, str, str], ReplicaState]:
    """Replicas that a scheduler's lease holds, on nodes that are there."""
    found = {}
    for node in snapshot.alive():
        for replica in node.replicas:
            if replica.term is not None:
                shard = replica.shard
                place = (node.id, shard.model.ref.name, shard.layers, shard.runtime, shard.quantization)
                found[place] = replica.state
    return found


@dataclass
class FlapBook:
    """When nodes were lost or began anew, and who is held off for it."""

    _seen: dict[NodeId, tuple[bool, int]] = field(default_factory=dict)
    _losses: dict[NodeId, deque[float]] = field(default_factory=dict)

    def look(self, snapshot: ClusterSnapshot, now_s: float) -> None:
        """Note what changed since the last look."""
        for node_id, node in snapshot.nodes.items():
            alive = node.state is MemberState.ALIVE and node.reachable
            was_alive, started = self._seen.get(node_id, (alive, node.started_ms))
            if (was_alive and not alive) or (alive and was_alive and started != node.started_ms):
                self._losses.setdefault(node_id, deque(maxlen=16)).append(now_s)
            self._seen[node_id] = (alive, node.started_ms)
        for gone in [n for n in self._seen if n not in snapshot.nodes]:
            if self._seen.pop(gone)[0]:
                self._losses.setdefault(gone, deque(maxlen=16)).append(now_s)

    def held_off(self, now_s: float) -> dict[NodeId, str]:
        """Nodes that get nothing new for now, and why: a minute after the second loss within ten minutes,
        twice as long after each further one."""
        off = {}
        for node_id, losses in self._losses.items():
            recent = [t for t in losses if t > now_s - FLAP_WINDOW_S]
            beyond = len(recent) - FLAPS_FREE
            if beyond > 0 and now_s < recent[-1] + min(HOLD_OFF_MAX_S, HOLD_OFF_S * 2 ** (beyond - 1)):
                off[node_id] = f"it was lost {len(recent)} times lately: held off until it stays"
        return off


class Refusals:
    """Leases that nodes refused, and when to ask again: later each time. A node that refuses again and again
    is held off, so that the plan looks elsewhere."""

    def __init__(self) -> None:
        self._known: dict[Wanted, tuple[int, float, str]] = {}

    def add(self, wanted: Wanted, reason: str, now_s: float) -> None:
        """A node refused."""
        times = self._known[wanted][0] + 1 if wanted in self._known else 1
        wait_s = min(ASK_AGAIN_MAX_S, ASK_AGAIN_S * 2 ** (times - 1))
        self._known[wanted] = (times, now_s + wait_s, reason)

    def clear(self, wanted: Wanted) -> None:
        """It serves."""
        self._known.pop(wanted, None)

    def now(self, now_s: float) -> dict[Wanted, str]:
        """Those not to be asked yet, and what they said; what was said long ago is forgotten."""
        for old in [w for w, (_, until, _) in self._known.items() if now_s > until + ASK_AGAIN_MAX_S]:
            del self._known[old]
        return {w: why for w, (_, until, why) in self._known.items() if now_s < until}

    def held_off(self) -> dict[NodeId, str]:
        """Nodes that refused the same thing several times, and why."""
        return {
            w.node: f"it refused {times} times: {why}"
            for w, (times, _, why) in self._known.items()
            if times >= REFUSED_OFTEN
        }


class Settling:
    """Lets a plan through once it stopped changing."""

    def __init__(self) -> None:
        self.current: frozenset[Wanted] | None = None
        self._candidate: frozenset[Wanted] | None = None
        self._since_s = 0.0

    def look(self, wanted: frozenset[Wanted], urgent: bool, now_s: float) -> frozenset[Wanted] | None:
        """The plan that counts now; ``None`` before the first."""
        if self.current is None or wanted == self.current:
            self.current, self._candidate = wanted, None
        elif wanted != self._candidate:
            self._candidate, self._since_s = wanted, now_s
        elif now_s >= self._since_s + (SETTLE_BROKEN_S if urgent else SETTLE_S):
            self.current, self._candidate = wanted, None
        return self.current


class Reconciler:
    """Decides what to load and what to let go; ``moves`` loads a minute at most."""

    def __init__(self, moves: int) -> None:
        self.moves = moves
        self._begun: deque[float] = deque()

    def step(
        self,
        wanted: frozenset[Wanted],
        holding: frozenset[Wanted],
        snapshot: ClusterSnapshot,
        refused: Mapping[Wanted, str],
        now_s: float,
    ) -> list[Action]:
        """What to do now. ``holding``: leases that we have; ``refused``: wanted ones that nodes refused lately,
        and why: they are not asked for again until the caller forgets that."""
        planned = planned_now(snapshot)
        alive = {n.id for n in snapshot.alive()}
        while self._begun and self._begun[0] <= now_s - 60.0:
            self._begun.popleft()
        actions: list[Action] = []
        for each in sorted(wanted - holding):
            if each.node not in alive or each in refused:
                continue
            if each.place not in planned:
                if len(self._begun) >= self.moves:
                    continue
                self._begun.append(now_s)
            actions.append(Hold(each))
        actions += self._releases(wanted, planned, refused)
        return actions

    def _releases(
        self,
        wanted: frozenset[Wanted],
        planned: Mapping[tuple[NodeId, str, LayerRange, str, str], ReplicaState],
        refused: Mapping[Wanted, str],
    ) -> Iterable[Release]:
        places = {w.place for w in wanted}
        serving = {p for p, state in planned.items() if state is ReplicaState.SERVING}
        for place in sorted(planned.keys() - places):
            node, model, layers, runtime, quantization = place
            old = Wanted(node, model, layers, runtime, quantization, 0, 0)
            successors = {w.place for w in wanted if w.model == model}
            blocked = next((w for w in sorted(refused) if w.node == node and w in wanted), None)
            if not successors:
                yield Release(old, f"{model} is wanted no more")
            elif successors <= serving:
                yield Release(old, "its successors serve")
            elif blocked is not None:
                yield Release(old, f"it stands in the way of {blocked.layers}: {refused[blocked]}")
