"""Discovery by a list of addresses in the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.discovery import Advert, Sighting
from mesh.types import Address, NodeId


class StaticDiscovery:
    """The addresses are told once; membership keeps knocking at those that do not answer."""

    name = "static"

    def __init__(self, peers: tuple[str, ...]) -> None:
        self._peers = tuple(Address(p) for p in peers)

    async def run(
        self,
        advert: Advert,
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
    ) -> None:
        """Tell, then idle: a list neither grows nor shrinks."""
        for peer in self._peers:
            found(self.name, Sighting(NodeId(""), (peer,)))
        await asyncio.Event().wait()

    def update(self, advert: Advert) -> None:
        """Nobody reads adverts here."""

    def status(self) -> str:
        return f"{len(self._peers)} addresses in the settings"
