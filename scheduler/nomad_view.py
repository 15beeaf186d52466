"""What Nomad says of its clients, of the allocations that hold leases and of their deployments, kept from lists and events. Pure.

A client that Nomad drains, or calls ineligible, gets nothing new, and what it hosts is placed elsewhere first. One that Nomad
calls down is no reason to do anything: if the mesh sees it alive it goes on serving, and if not, the mesh knows by itself.
Allocations and deployments change no decision either: what is loaded, the agents say. They are there to be shown beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from mesh.types import LayerRange
from scheduler.nomad_job import layers_of


@dataclass(frozen=True, slots=True)
class Client:
    """A Nomad client. ``until``: when its drain is forced, as Nomad writes times; empty: not told. ``modified``: index of
    its last change, of the others below as well."""

    id: str
    name: str
    status: str
    eligible: bool
    draining: bool
    until: str
    modified: int


@dataclass(frozen=True, slots=True)
class LeaseAllocation:
    """A task that holds a replica, or is to. ``status`` and ``said`` in Nomad's words."""

    id: str
    job: str
    layers: LayerRange
    client: str
    wanted: bool
    """Nomad means it to run."""
    status: str
    said: str
    modified: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """A deployment of a model's job: ``healthy`` of ``total`` allocations; ``canaries`` placed and not promoted yet."""

    id: str
    job: str
    version: int
    status: str
    said: str
    healthy: int
    total: int
    canaries: int
    created: int
    modified: int


@dataclass(frozen=True, slots=True)
class NomadFacts:
    """All of it at one moment. ``avoid``: clients by name that are to get nothing new, and why; ``down``: names."""

    index: int = 0
    avoid: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    down: frozenset[str] = frozenset()
    allocations: tuple[LeaseAllocation, ...] = ()
    rollouts: tuple[Rollout, ...] = ()
    """The latest of each job, by its name."""


_Kept = TypeVar("_Kept", Client, LeaseAllocation, Rollout)


class NomadView:
    """Kept by id, as of ``index``. Lists and events may overlap: of two states of a thing the later stays."""

    def __init__(self) -> None:
        self.index = 0
        self._clients: dict[str, Client] = {}
        self._allocations: dict[str, LeaseAllocation] = {}
        self._rollouts: dict[str, Rollout] = {}

    def replace(
        self,
        index: int,
        clients: Iterable[Mapping[str, Any]],
        allocations: Iterable[Mapping[str, Any]] = (),
        deployments: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Everything anew; an index that went backwards is as good as any: servers were restored."""
        self.index = index
        self._clients = {c.id: c for c in map(_client, clients)}
        self._allocations = {a.id: a for a in map(_allocation, allocations) if a}
        self._rollouts = {r.id: r for r in map(_rollout, deployments) if r}

    def apply(self, index: int, events: Iterable[Mapping[str, Any]]) -> bool:
        """What happened at ``index``. False where that lies before what is known: list all anew."""
        if 0 < index < self.index:
            return False
        for event in events:
            about = (event.get("Payload") or {}).get(event.get("Topic"))
            if not isinstance(about, Mapping):
                continue
            if event.get("Type") == "NodeDeregistration":
                self._deregistered(str(about.get("ID")))
            elif event["Topic"] == "Node":
                _keep(self._clients, _client(about))
            elif event["Topic"] == "Allocation":
                _keep(self._allocations, _allocation(about))
            elif event["Topic"] == "Deployment":
                _keep(self._rollouts, _rollout(about))
        self.index = max(self.index, index)
        self._forget()
        return True

    def facts(self) -> NomadFacts:
        """As of now."""
        avoid = {}
        for client in self._clients.values():
            if client.draining:
                avoid[client.name] = "Nomad drains it" + (f", until {client.until}" if client.until else "")
            elif not client.eligible:
                avoid[client.name] = "Nomad calls it ineligible"
        down = frozenset(c.name for c in self._clients.values() if c.status == "down")
        return NomadFacts(
            self.index,
            avoid,
            down,
            tuple(sorted(self._allocations.values(), key=lambda a: (a.job, a.layers.start, a.client, a.id))),
            tuple(r for _, r in sorted(_latest(self._rollouts.values()).items())),
        )

    def _deregistered(self, client: str) -> None:
        gone = self._clients.pop(client, None)
        if gone is not None:
            self._allocations = {i: a for i, a in self._allocations.items() if a.client != gone.name}

    def _forget(self) -> None:
        """Nomad tells of no end of an allocation or a deployment, so what is over goes by itself."""
        over = [a.id for a in self._allocations.values() if not a.wanted and a.status in _OVER]
        for allocation in over:
            del self._allocations[allocation]
        latest = {r.id for r in _latest(self._rollouts.values()).values()}
        self._rollouts = {i: r for i, r in self._rollouts.items() if i in latest}


_OVER = ("complete", "failed")
"""Not ``lost``: the client of such a one is away, and its task may well be running."""


def _keep(known: dict[str, _Kept], said: _Kept | None) -> None:
    if said is not None and (said.id not in known or known[said.id].modified <= said.modified):
        known[said.id] = said


def _latest(rollouts: Iterable[Rollout]) -> dict[str, Rollout]:
    # Not by version: that of a job which was purged and comes again starts at 0.
    return {r.job: r for r in sorted(rollouts, key=lambda r: r.created)}


def _client(node: Mapping[str, Any]) -> Client:
    strategy = node.get("DrainStrategy") or {}
    return Client(
        str(node.get("ID", "")),
        str(node.get("Name", "")),
        str(node.get("Status", "")),
        node.get("SchedulingEligibility") != "ineligible",
        bool(node.get("Drain")),
        str(strategy.get("ForceDeadline") or "").partition(".")[0],
        int(node.get("ModifyIndex") or 0),
    )


def _allocation(allocation: Mapping[str, Any]) -> LeaseAllocation | None:
    layers = layers_of(str(allocation.get("TaskGroup")))
    if layers is None:
        return None
    return LeaseAllocation(
        str(allocation.get("ID", "")),
        str(allocation.get("JobID", "")),
        layers,
        str(allocation.get("NodeName", "")),
        allocation.get("DesiredStatus") == "run",
        str(allocation.get("ClientStatus", "")),
        str(allocation.get("DesiredDescription") or allocation.get("ClientDescription") or ""),
        int(allocation.get("ModifyIndex") or 0),
    )


def _rollout(deployment: Mapping[str, Any]) -> Rollout | None:
    groups = deployment.get("TaskGroups") or {}
    if not groups or not all(map(layers_of, groups)):
        return None
    states = list(groups.values())
    return Rollout(
        str(deployment.get("ID", "")),
        str(deployment.get("JobID", "")),
        int(deployment.get("JobVersion") or 0),
        str(deployment.get("Status", "")),
        str(deployment.get("StatusDescription", "")),
        sum(int(s.get("HealthyAllocs") or 0) for s in states),
        sum(int(s.get("DesiredTotal") or 0) for s in states),
        sum(len(s.get("PlacedCanaries") or ()) for s in states if not s.get("Promoted")),
        int(deployment.get("CreateIndex") or 0),
        int(deployment.get("ModifyIndex") or 0),
    )
