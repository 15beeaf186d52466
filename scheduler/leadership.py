"""Who plans: the longest-lived node that may, and the terms that keep two leaders' plans apart."""

from __future__ import annotations

from mesh.types import NodeId, Term
from scheduler.cluster import ClusterSnapshot

STEADY_S = 3.0
"""Whoever should lead waits so long: news of one who has led for longer may be on its way."""


def elder(snapshot: ClusterSnapshot) -> NodeId | None:
    """The longest-lived node that is alive, answers us, stays and may plan; by its own clock."""
    able = [n for n in snapshot.alive() if n.scheduler and not n.draining and n.started_ms > 0]
    return min(able, key=lambda n: (n.started_ms, n.id)).id if able else None


def latest_term(snapshot: ClusterSnapshot) -> Term | None:
    """The latest term that any node has heard of."""
    terms = [n.term for n in snapshot.nodes.values() if n.term is not None]
    return max(terms, default=None)


class Leadership:
    """Whether this node leads, and in which term. ``lock`` is what Consul says: ``True`` and ``False`` decide,
    ``None`` means that there is no Consul and that the eldest leads."""

    def __init__(self, me: NodeId) -> None:
        self.me = me
        self.term: Term | None = None
        """While we lead."""
        self._since_s: float | None = None

    def look(self, snapshot: ClusterSnapshot, lock: bool | None, now_s: float) -> Term | None:
        """The term that we lead in now, if we do. A term that somebody else has topped is left for a later
        one of our own."""
        chosen = lock if lock is not None else elder(snapshot) == self.me
        if not chosen:
            self._since_s = self.term = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        # Consul has made sure that there is no other; an eldest may not know yet of one.
        if lock is None and now_s < self._since_s + STEADY_S:
            return None
        latest = latest_term(snapshot)
        if self.term is None or (latest is not None and latest > self.term):
            self.term = Term(latest.counter + 1 if latest else 1, self.me)
        return self.term
