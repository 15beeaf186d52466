"""Which directories an agent uses, from its settings."""

from __future__ import annotations

import os

from mesh.adapters.discovery.static import StaticDiscovery
from mesh.discovery import Discovery
from node_agent.config import AgentConfig


def discovery_of(config: AgentConfig) -> list[Discovery]:
    """The adapters, not yet running. Heavy packages are imported only for those that are on."""
    found: list[Discovery] = []
    if config.peers:
        found.append(StaticDiscovery(config.peers))
    if config.mdns == "on":
        from mesh.adapters.discovery.mdns import MdnsDiscovery

        found.append(MdnsDiscovery(config.cluster, config.host))
    if config.consul or os.environ.get("CONSUL_HTTP_ADDR"):
        from mesh.adapters.discovery.consul import ConsulDiscovery

        from node_agent.adapters.consul_setup import consul_access

        found.append(
            ConsulDiscovery(consul_access(config, os.environ), config.consul_service, config.cluster)
        )
    return found
