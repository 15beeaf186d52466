"""Lets quiet hours pass quickly: while nothing could come of a region's probes, its membership stands still.

Most of what an idle mesh does is to ask whether everybody lives, and to be answered. While every node of a region is up, known
to all the others, suspected by nobody and reachable without loss, an answered probe changes nothing but the samples of a
link's estimate, which have long settled. So probes, gossip timers and the looks for news of idle nodes pause, and go on
in the same phase at the first thing that happens to a node, a cable or a directory.

What a run shows stays what it is: a node that dies is found out by the probe that would have been next (a test holds runs with
and without against each other).
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    names: list[str] = field(default_factory=list)
    disturbed_ns: int = 0
    still: bool = False


class Quiet:
    """Who stands still. ``able``: the scenario's paths lose nothing and do not change by themselves."""

    def __init__(self, world: World, able: bool) -> None:
        self._world, self._able = world, able
        self._regions: dict[str, _Region] = {}
        self.saved_ns = 0
        """Node time that passed without a look."""

    def started(self, node: SimNode) -> None:
        """A node boots."""
        name = node.spec.name
        region = self._regions.setdefault(node.config.region, _Region())
        if name not in region.names:
            region.names.append(name)
        self.disturb(node.config.region)

    def disturb(self, region: str | None = None) -> None:
        """Something happens to one region, or to all."""
        now = self._world.loop.now_ns
        for name, known in self._regions.items():
            if region in (None, name):
                known.disturbed_ns = now
                if known.still:
                    known.still = False
                    for node in self._up(known):
                        self.saved_ns += node.go_on()

    def _up(self, region: _Region) -> list[SimNode]:
        nodes = self._world.nodes
        return [nodes[n] for n in region.names if n in nodes]

    def look(self) -> None:
        """Let those stand still that may."""
        world = self._world
        if not self._able or world.network.cuts:
            return
        for region in self._regions.values():
            if region.still:
                continue
            up = self._up(region)
            if not up:
                continue
            settles_ns = SETTLE_PROBES * up[0].membership.machine.profile.probe_interval
            if world.loop.now_ns >= region.disturbed_ns + settles_ns and _calm(up):
                region.still = True
                for node in up:
                    node.stand_still()


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
