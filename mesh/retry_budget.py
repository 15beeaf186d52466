"""How often sessions may change their routes: a bound that holds when a mesh loses nodes faster than it recovers.

A replay costs the survivors computation. Without a bound, sessions that lose their stages again and again would
replay until nobody has time for tokens, and the mesh would look lost although it is only behind (rule R8).
"""

from __future__ import annotations

MESH_PER_S = 200.0
"""Changes of route per second in the whole mesh, once the bursts of all nodes are spent."""
NODE_PER_S = 4.0
"""Per second and node at least, however large the mesh."""


class RetryBudget:
    """A bucket of ``burst`` changes that fills with this node's share of the mesh's rate. The burst is as many as the
    node owns sessions: one loss under all of them at once is no storm."""

    def __init__(self, burst: int) -> None:
        self._burst = float(burst)
        self._left, self._at_ns = self._burst, 0

    def take(self, now_ns: int, nodes: int) -> bool:
        """Whether a session may change its route now, in a mesh of ``nodes`` that are alive. Nothing is queued:
        who is refused asks again."""
        per_s = max(NODE_PER_S, MESH_PER_S / max(1, nodes))
        filled = self._left + (now_ns - self._at_ns) * per_s / 1e9
        self._left, self._at_ns = min(self._burst, filled), now_ns
        if self._left < 1:
            return False
        self._left -= 1
        return True
