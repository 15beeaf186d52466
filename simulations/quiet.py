"""Lets quiet hours pass quickly: while nothing could come of a region's probes, its membership stands still.

Most of what an idle mesh does is to ask whether everybody lives, and to be answered. While every node of a region is up, known
to all the others, suspected by nobody and reachable without loss, an answered probe changes nothing but the samples of a
link's estimate, which have long settled. So probes, gossip timers and the looks for news of idle nodes pause, and go on
in the same phase at the first thing that happens to a node, a cable or a directory.

What a run shows stays what it is: a node that dies is found out by the probe that would have been next (a test holds runs with
and without against each other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.gossip import MemberState
from simulations.virtual_time import Power

if TYPE_CHECKING:
    from simulations.node import SimNode
    from simulations.world import World

SETTLE_PROBES = 10
"""Probe intervals since the last disturbance: links have been measured and told by then, whatever the profile."""


@dataclass(slots=True)
class _Region:
    disturbed_ns: int = 0
    still: bool = False


class Quiet:
    """Who stands still. ``able``: the scenario's paths lose nothing and do not change by themselves."""

    def __init__(self, world: World, able: bool) -> None:
        self._world, self._able = world, able
        self._regions: dict[str, _Region] = {}
        self.awake: dict[SimNode, None] = {}
        """Those of which something may have changed since the last look; a dict for its order."""
        self._resting: dict[SimNode, int] = {}
        """The others, and how many replicas each has."""
        self.resting_replicas = 0
        self.saved_ns = 0
        """Node time that passed without a look."""

    def started(self, node: SimNode) -> None:
        """A node boots."""
        self.awake[node] = None
        self._regions.setdefault(node.config.region, _Region())
        self.disturb(node.config.region)

    def stirred(self, node: SimNode) -> None:
        """Something reaches a node."""
        if node in self._resting:
            self.resting_replicas -= self._resting.pop(node)
            self.awake[node] = None

    def ended(self, node: SimNode) -> None:
        """A node runs no more."""
        self.stirred(node)
        del self.awake[node]

    def disturb(self, region: str | None = None) -> None:
        """Something happens to one region, or to all."""
        now = self._world.loop.now_ns
        for name, known in self._regions.items():
            if region in (None, name):
                known.disturbed_ns = now
                if known.still:
                    known.still = False
                    for node in self._world.regions[name].values():
                        self.saved_ns += node.go_on()

    def look(self) -> None:
        """Let those stand still that may."""
        self._rest()
        world = self._world
        if not self._able or world.network.cuts:
            return
        for name, region in self._regions.items():
            if region.still:
                continue
            up = list(world.regions[name].values())
            if not up:
                continue
            settles_ns = SETTLE_PROBES * up[0].membership.machine.profile.probe_interval
            if world.loop.now_ns >= region.disturbed_ns + settles_ns and _calm(up):
                region.still = True
                for node in up:
                    node.stand_still()

    def _rest(self) -> None:
        for node in [n for n in self.awake if n.at_rest]:
            del self.awake[node]
            self._resting[node] = len(node.host.replicas)
            self.resting_replicas += self._resting[node]


def _calm(up: list[SimNode]) -> bool:
    names = {n.id for n in up}
    for node in up:
        machine = node.membership.machine
        if node.machine.power is not Power.ON or node.spec.disk_s or not machine.settled:
            return False
        present = {i for i, m in machine.members.items() if m.fact.state is MemberState.ALIVE}
        if present != names - {node.id}:
            return False
    return True
