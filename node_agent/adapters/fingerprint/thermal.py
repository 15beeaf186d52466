"""Thermal zones."""

from __future__ import annotations

from pathlib import Path

from mesh.capabilities import Thermal
from node_agent.adapters.fingerprint.files import number, text

_PLAUSIBLE = range(-40, 200)


def probe_thermal(root: Path = Path("/")) -> Thermal | None:
    """The hottest zone, and whether any zone is beyond a passive or hot trip point; ``root`` is for tests."""
    hottest: tuple[int, str] | None = None
    throttled = False
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        milli = number(zone / "temp")
        if milli is None or milli // 1000 not in _PLAUSIBLE:
            continue
        name = text(zone / "type") or zone.name
        hottest = max(hottest or (milli // 1000, name), (milli // 1000, name))
        for kind in zone.glob("trip_point_*_type"):
            trip = number(zone / kind.name.replace("_type", "_temp"))
            if text(kind) in ("passive", "hot") and trip is not None and 0 < trip <= milli:
                throttled = True
    return Thermal(hottest[1], hottest[0], throttled) if hottest else None
