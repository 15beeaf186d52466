"""A modelled Nomad: it knows its clients, an operator drains them, and the leading scheduler follows it.

It answers as ``node_agent.adapters.nomad_api`` finds the real one to answer, in Nomad's words; what follows from them is
decided by ``scheduler.nomad_view``. A server that is away answers nobody, and what it said last stays.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mesh.types import Address
from scheduler.nomad_view import NomadFacts, NomadView

if TYPE_CHECKING:
    from simulations.network import Network
    from simulations.node import SimNode

S = 1_000_000_000
SERVER = Address("nomad:4646")
_LOOK_S = 1.0


class SimNomad:
    """The server."""

    def __init__(self, network: Network) -> None:
        self._network, self._loop = network, network.loop
        self._drained: dict[str, None] = {}
        """Clients by name; a dict for its order."""
        self.index = 1
        self._away_until_ns = 0

    def lose(self, seconds: float) -> None:
        """Nobody is answered for a while."""
        self._away_until_ns = max(self._away_until_ns, self._loop.now_ns + int(seconds * S))

    def drain(self, name: str, on: bool) -> None:
        """An operator takes a client out of service, or has it back."""
        self.index += 1
        if on:
            self._drained[name] = None
        else:
            self._drained.pop(name, None)

    def answers(self, node: SimNode) -> bool:
        """Whether it can be asked by this node now."""
        cut = self._network.is_cut(node.address, SERVER) or self._network.is_cut(SERVER, node.address)
        return self._loop.now_ns >= self._away_until_ns and not cut

    def listed(self) -> list[dict[str, Any]]:
        """What ``/v1/nodes`` would say of those that are drained; of the others nothing is read."""
        return [
            {
                "ID": f"id-of-{name}",
                "Name": name,
                "Status": "ready",
                "SchedulingEligibility": "ineligible",
                "Drain": True,
            }
            for name in self._drained
        ]


class SimFollower:
    """A ``node_agent.ports.Orchestrator``."""

    def __init__(self, node: SimNode, server: SimNomad) -> None:
        self._node, self._server = node, server
        self._view = NomadView()
        self._task: asyncio.Task[None] | None = None

    def follow(self, on: bool) -> None:
        """Begin, or end and forget."""
        if on and self._task is None:
            self._task = self._node.loop.create_task(self._run())
        elif not on and self._task is not None:
            self._task.cancel()
            self._task, self._view = None, NomadView()

    def facts(self) -> NomadFacts:
        """As it said last."""
        return self._view.facts()

    async def _run(self) -> None:
        while True:
            if self._server.answers(self._node):
                self._view.replace(self._server.index, self._server.listed())
            await asyncio.sleep(_LOOK_S)
