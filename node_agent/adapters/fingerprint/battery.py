"""Batteries of sysfs' power_supply class."""

from __future__ import annotations

from pathlib import Path

from mesh.capabilities import Battery
from node_agent.adapters.fingerprint.files import number, text


def probe_battery(root: Path = Path("/")) -> Battery | None:
    """All system batteries as one, weighted by size; ``None`` on machines without. ``root`` is for tests.

    Batteries of a mouse or a stylus (``scope`` Device) do not count.
    """
    folder = root / "sys/class/power_supply"
    percents: list[tuple[int, float]] = []
    energy = power = 0.0
    charging = False
    for supply in sorted(folder.iterdir()) if folder.is_dir() else ():
        if text(supply / "type") != "Battery" or text(supply / "scope") == "Device":
            continue
        if text(supply / "present") == "0":
            continue
        percent, left, full = _charge(supply)
        if percent is None:
            continue
        status = text(supply / "status") or ""
        charging = charging or status in ("Charging", "Full")
        percents.append((percent, full or 1.0))
        energy += left
        watts = _watts(supply)
        power += -watts if status == "Charging" else watts
    if not percents:
        return None
    weight = sum(w for _, w in percents)
    percent = round(sum(p * w for p, w in percents) / weight)
    return Battery(max(0, min(100, percent)), charging, round(energy, 1), round(power, 1))


def _charge(supply: Path) -> tuple[int | None, float, float]:
    """Percent, watt hours left and when full; boards give energy (µWh), charge (µAh) or capacity alone."""
    volts = (number(supply / "voltage_now") or number(supply / "voltage_min_design") or 0) / 1e6
    for unit, factor in (("energy", 1.0), ("charge", volts)):
        now = number(supply / f"{unit}_now")
        full = number(supply / f"{unit}_full") or number(supply / f"{unit}_full_design")
        if now is not None and full:
            percent = number(supply / "capacity")
            return (
                percent if percent is not None else 100 * now // full,
                now * factor / 1e6,
                full * factor / 1e6,
            )
    return number(supply / "capacity"), 0.0, 0.0


def _watts(supply: Path) -> float:
    power = number(supply / "power_now")
    if power is not None:
        return abs(power) / 1e6
    current, volts = number(supply / "current_now"), number(supply / "voltage_now")
    return abs(current * volts) / 1e12 if current is not None and volts is not None else 0.0
