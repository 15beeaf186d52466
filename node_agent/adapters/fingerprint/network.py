"""Network interfaces that are up."""

from __future__ import annotations

from pathlib import Path

from mesh.capabilities import Interface
from node_agent.adapters.fingerprint.files import number, text

_LOOPBACK = 772
_WWAN_PREFIXES = ("wwan", "rmnet", "ppp", "usb")


def probe_interfaces(root: Path = Path("/")) -> tuple[Interface, ...]:
    """Up, without loopback, by name; ``root`` is for tests."""
    found = []
    folder = root / "sys/class/net"
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        if number(device / "type") == _LOOPBACK or text(device / "operstate") == "down":
            continue
        # A driver that does not know says -1, or refuses to be read.
        found.append(Interface(device.name, _kind(device), max(0, number(device / "speed") or 0)))
    return tuple(found)


def _kind(device: Path) -> str:
    if (device / "wireless").exists() or (device / "phy80211").exists():
        return "wifi"
    if device.name.startswith(_WWAN_PREFIXES):
        return "cellular"
    return "ethernet" if (device / "device").exists() else "virtual"
