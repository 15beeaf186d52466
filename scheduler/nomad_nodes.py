"""What Nomad says of its clients, kept from lists and events; and which of them get no new shards. Pure.

A client that Nomad drains, or calls ineligible, gets nothing new, and what it hosts is placed elsewhere first. One that Nomad
calls down is no reason to do anything: if the mesh sees it alive it goes on serving, and if not, the mesh knows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Client:
    """A Nomad client. ``until``: when its drain is forced, as Nomad writes times; empty: not told."""

    id: str
    name: str
    status: str
    eligible: bool
    draining: bool
    until: str = ""


class NomadNodes:
    """Clients by id, as of ``index``."""

    def __init__(self) -> None:
        self.index = 0
        self._clients: dict[str, Client] = {}

    def replace(self, listed: Iterable[Mapping[str, Any]], index: int) -> None:
        """All clients; an index that went backwards is as good as any: servers were restored."""
        self._clients = {c.id: c for c in map(_client, listed)}
        self.index = index

    def apply(self, index: int, events: Iterable[Mapping[str, Any]]) -> bool:
        """What happened at ``index``. False where that lies before what is known: list all anew."""
        if 0 < index < self.index:
            return False
        for event in events:
            node = (event.get("Payload") or {}).get("Node")
            if event.get("Topic") != "Node" or not isinstance(node, Mapping):
                continue
            if event.get("Type") == "NodeDeregistration":
                self._clients.pop(str(node.get("ID")), None)
            else:
                client = _client(node)
                self._clients[client.id] = client
        self.index = max(self.index, index)
        return True

    def avoid(self) -> dict[str, str]:
        """Clients by name that are to get nothing new, and why."""
        found = {}
        for client in self._clients.values():
            if client.draining:
                found[client.name] = "Nomad drains it" + (f", until {client.until}" if client.until else "")
            elif not client.eligible:
                found[client.name] = "Nomad calls it ineligible"
        return found


def _client(node: Mapping[str, Any]) -> Client:
    strategy = node.get("DrainStrategy") or {}
    return Client(
        str(node.get("ID", "")),
        str(node.get("Name", "")),
        str(node.get("Status", "")),
        node.get("SchedulingEligibility") != "ineligible",
        bool(node.get("Drain")),
        str(strategy.get("ForceDeadline") or "").partition(".")[0],
    )
