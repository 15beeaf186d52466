"""Which directories an agent uses, and whose lock decides who leads, from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from mesh.adapters.discovery.static import StaticDiscovery
from mesh.discovery import Discovery
from mesh.types import NodeId
from node_agent.adapters.control_loop import Lock
from node_agent.config import AgentConfig


def discovery_of(config: AgentConfig) -> list[Discovery]:
    """The adapters, not yet running. Heavy packages are imported only for those that are on."""
    found: list[Discovery] = []
    if config.peers:
        found.append(StaticDiscovery(config.peers))
    if config.mdns == "on":
        from mesh.adapters.discovery.mdns import MdnsDiscovery

        found.append(MdnsDiscovery(config.cluster, config.host))
    if consul_wanted(config, os.environ):
        from mesh.adapters.discovery.consul import ConsulDiscovery
        from node_agent.adapters.consul_setup import consul_access

        found.append(
            ConsulDiscovery(consul_access(config, os.environ), config.consul_service, config.cluster)
        )
    return found


def leader_lock(config: AgentConfig, me: NodeId) -> Lock | None:
    """Consul's, where there is one."""
    if not consul_wanted(config, os.environ):
        return None

    async def compete(told: Callable[[bool], None]) -> None:
        from mesh.adapters.consul_client import ConsulClient, ConsulStore, LeaderLock
        from node_agent.adapters.consul_setup import consul_access

        async with ConsulClient(consul_access(config, os.environ)) as client:
            store = ConsulStore(client, f"{config.consul_prefix}/{config.cluster}")
            await LeaderLock(
                client, store, "leader", me, lambda term: told(True), lambda reason: told(False)
            ).run()

    return compete


def consul_wanted(config: AgentConfig, environment: Mapping[str, str]) -> bool:
    """Whether settings or Consul's own variable name one."""
    return bool(config.consul or environment.get("CONSUL_HTTP_ADDR"))
