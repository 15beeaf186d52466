"""A modelled Consul: agents register, see who else passes its check, and compete for the leader's lock.

It answers as ``mesh.adapters.consul_client`` and ``discovery.consul`` find the real one to answer: a check that nobody
renews turns critical, a lock whose session expired is free after its delay, and a server that is away answers nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh.discovery import LOCK_DELAY_S, LOCK_TTL_S
from mesh.membership_events import Found, Gone
from mesh.types import Address

if TYPE_CHECKING:
    from simulations.network import Network
    from simulations.node import SimNode

S = 1_000_000_000
SERVER = Address("consul:8500")
_LOOK_S = 1.0
_CRITICAL_NS = 6 * S
"""A check that failed for so long is shown as failed."""


class SimConsul:
    """The server, and what an agent does with it."""

    def __init__(self, network: Network) -> None:
        self._network, self._loop = network, network.loop
        self._passed: dict[Address, int] = {}
        """When each agent's check passed last."""
        self._holder: SimNode | None = None
        self._expires_ns = 0
        self._away_until_ns = 0

    def lose(self, seconds: float) -> None:
        """Nobody is answered for a while."""
        self._away_until_ns = max(self._away_until_ns, self._loop.now_ns + int(seconds * S))

    def _answers(self, node: SimNode) -> bool:
        cut = self._network.is_cut(node.address, SERVER) or self._network.is_cut(SERVER, node.address)
        return self._loop.now_ns >= self._away_until_ns and not cut

    async def discover(self, node: SimNode) -> None:
        """Stay registered, and tell membership of those that come and go."""
        known: set[Address] = set()
        while True:
            if self._answers(node):
                now = self._passed[node.address] = self._loop.now_ns
                listed = {a for a, at in self._passed.items() if at > now - _CRITICAL_NS}
                for address in sorted(listed - known - {node.address}):
                    node.membership.handle(Found(address, "consul"))
                for address in sorted(known - listed):
                    node.membership.handle(Gone(address, "consul"))
                known = listed
            await asyncio.sleep(_LOOK_S)

    async def compete(self, node: SimNode, told: Callable[[bool], None]) -> None:
        """As the agent's ``LeaderLock``: lead while the session is renewed, and stop before it could expire."""
        leads, renewed_ns = False, 0
        ttl_ns, delay_ns = LOCK_TTL_S * S, LOCK_DELAY_S * S
        while True:
            now, before = self._loop.now_ns, leads
            if self._answers(node):
                if self._holder is None or now >= self._expires_ns + delay_ns:
                    self._holder = node
                leads = self._holder is node
                if leads:
                    renewed_ns, self._expires_ns = now, now + ttl_ns
            elif leads and now > renewed_ns + ttl_ns * 8 // 10:
                leads = False
            if leads != before:
                told(leads)
            await asyncio.sleep(LOCK_TTL_S / 4)
