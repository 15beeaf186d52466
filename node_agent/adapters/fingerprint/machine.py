"""All probes together."""

from __future__ import annotations

from pathlib import Path

from mesh.capabilities import Capabilities, Speed
from node_agent.adapters.fingerprint.accelerator import probe_accelerators
from node_agent.adapters.fingerprint.battery import probe_battery
from node_agent.adapters.fingerprint.cpu import probe_cpu
from node_agent.adapters.fingerprint.disk import probe_disk
from node_agent.adapters.fingerprint.network import probe_interfaces
from node_agent.adapters.fingerprint.thermal import probe_thermal


def probe_machine(
    data_dir: Path,
    labels: tuple[tuple[str, str], ...] = (),
    speeds: tuple[Speed, ...] = (),
    root: Path = Path("/"),
) -> Capabilities:
    """Everything but memory, which changes all the time and is told apart; takes about a millisecond."""
    return Capabilities(
        cpu=probe_cpu(root),
        disk=probe_disk(data_dir),
        accelerators=probe_accelerators(root),
        battery=probe_battery(root),
        thermal=probe_thermal(root),
        interfaces=probe_interfaces(root),
        speeds=speeds,
        labels=labels,
    )
