"""Access to Consul from an agent's settings and Consul's own environment variables."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.adapters.consul_client import ConsulAccess
from node_agent.config import AgentConfig


def consul_access(config: AgentConfig, environment: Mapping[str, str]) -> ConsulAccess:
    """Settings win over ``CONSUL_*``."""
    url = config.consul or environment.get("CONSUL_HTTP_ADDR", "")
    if "//" not in url:
        secure = environment.get("CONSUL_HTTP_SSL", "").lower() in ("true", "1")
        url = f"{'https' if secure else 'http'}://{url}"
    return ConsulAccess(
        url=url.rstrip("/"),
        token=config.consul_token or environment.get("CONSUL_HTTP_TOKEN", ""),
        ca=config.consul_ca or environment.get("CONSUL_CACERT", ""),
        cert=config.consul_cert or environment.get("CONSUL_CLIENT_CERT", ""),
        key=config.consul_key or environment.get("CONSUL_CLIENT_KEY", ""),
        datacenter=config.consul_datacenter,
        namespace=config.consul_namespace or environment.get("CONSUL_NAMESPACE", ""),
    )
