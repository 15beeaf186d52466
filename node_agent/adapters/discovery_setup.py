"""Which directories an agent uses, from its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mesh.adapters.discovery.static import StaticDiscovery
from mesh.discovery import Discovery
from node_agent.config import AgentConfig

if TYPE_CHECKING:
    from mesh.adapters.consul_client import ConsulAccess


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


def consul_of(config: AgentConfig) -> ConsulAccess | None:
    """How to enter Consul, where there is one."""
    if not consul_wanted(config, os.environ):
        return None
    from node_agent.adapters.consul_setup import consul_access

    return consul_access(config, os.environ)


def consul_wanted(config: AgentConfig, environment: Mapping[str, str]) -> bool:
    """Whether settings or Consul's own variable name one."""
    return bool(config.consul or environment.get("CONSUL_HTTP_ADDR"))
