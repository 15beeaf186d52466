"""What this node says of itself: its record for peers, its advert for directories, kept up to date."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from mesh.capabilities import Capabilities, Speed
from mesh.coordinates import Coordinate
from mesh.discovery import Advert
from mesh.errors import MeshError
from mesh.gossip import Fact
from mesh.links import LinkEstimate
from mesh.membership import Membership
from mesh.types import Address, NodeId, PolicyVersion, Term
from node_agent import __version__
from node_agent.adapters.fingerprint.machine import probe_machine
from node_agent.adapters.fingerprint.speed import probe_speeds
from node_agent.adapters.identity import NodeIdentity
from node_agent.adapters.replicas import ReplicaManager
from node_agent.config import AgentConfig
from node_agent.hysteresis import (
    links_worth_telling,
    memory_worth_telling,
    place_worth_telling,
    worth_telling,
)
from scheduler.cluster import Node
from scheduler.learning import NOTHING_LEARNED, Learned

log = logging.getLogger(__name__)

_MIB = 1 << 20


class OwnRecord:
    """Measures and remembers what was told; small changes are not worth telling (``hysteresis``)."""

    def __init__(self, config: AgentConfig, identity: NodeIdentity, name: str, data_dir: Path) -> None:
        self.started_ns = time.time_ns()
        self.address = self.api_address = Address("")
        self._config, self._identity, self._name, self._data_dir = config, identity, name, data_dir
        self._region = config.region or config.consul_datacenter
        self._labels = tuple(sorted(_pair(label) for label in config.labels))
        self._speeds: tuple[Speed, ...] = ()
        self._memory_told = 0
        self._links_told: dict[NodeId, LinkEstimate] = {}
        self._place_told: Coordinate | None = None
        self.capabilities: Capabilities = probe_machine(data_dir, self._labels)

    def fact(self) -> Fact:
        """Our entry in membership: this process of this node."""
        return Fact(self._identity.node, self.address, self.started_ns // 1_000_000, region=self._region)

    def advert(self) -> Advert:
        """What discovery tells of us."""
        return Advert(
            self._config.cluster,
            self._identity.node,
            self._name,
            self.address,
            self.started_ns // 1_000_000,
            self.capabilities.digest(),
            self._region,
            __version__,
        )

    def record(
        self,
        replicas: ReplicaManager,
        models: tuple[str, ...],
        draining: bool,
        term: Term | None,
        policy: PolicyVersion,
        learned: Learned,
    ) -> Node:
        """This node as peers see it."""
        total = self._config.memory * _MIB or replicas.memory().total
        self._memory_told = memory_worth_telling(self._memory_told, replicas.memory_free(), total)
        return Node(
            id=self._identity.node,
            name=self._name,
            address=self.address,
            api_address=self.api_address,
            capabilities=self.capabilities,
            memory_total_bytes=total,
            memory_free_bytes=self._memory_told,
            replicas=replicas.status(),
            models=models,
            version=__version__,
            draining=draining,
            region=self._region,
            public_key=self._identity.public_key,
            links=self._links_told,
            coordinate=self._place_told,
            layer_speeds=replicas.layer_speeds(),
            scheduler=self._config.scheduler == "on",
            started_ms=self.started_ns // 1_000_000,
            term=term,
            policy=policy,
            stage_us=float(f"{learned.stage_us:.2g}") if learned is not NOTHING_LEARNED else 0.0,
        )

    def look_at_machine(self) -> bool:
        """Probe again; whether something is worth telling."""
        told = worth_telling(self.capabilities, probe_machine(self._data_dir, self._labels, self._speeds))
        changed = told != self.capabilities
        self.capabilities = told
        return changed

    def look_at_links(self, machine: Membership) -> None:
        """Take over what membership measured, as far as it moved."""
        measured = {n: m.meter.estimate() for n, m in machine.members.items() if m.reachable}
        self._links_told = links_worth_telling(self._links_told, measured)
        self._place_told = place_worth_telling(self._place_told, machine.vivaldi.here)

    def measure_speeds(self) -> None:
        """Some 100 ms of all cores the first time, nothing later. Blocks. Without a result the node goes on
        with guesses: a full disk or an odd runtime must not end it."""
        cpu = self.capabilities.cpu
        try:
            self._speeds = probe_speeds(self._data_dir, cpu, self._config.threads or cpu.cores)
        except (MeshError, OSError, RuntimeError, ValueError) as error:
            log.warning("the speed of the runtime was not measured: %s", error)


def _pair(label: str) -> tuple[str, str]:
    key, _, value = label.partition("=")
    return key, value
