"""What of a new measurement is worth telling: peers must not hear of every degree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mesh.capabilities import Battery, Capabilities, Cpu, Disk, Thermal
from mesh.coordinates import Coordinate
from mesh.links import LinkEstimate
from mesh.types import NodeId

BATTERY_PERCENT = 2
CELSIUS = 5
MHZ_SHARE = 0.1
DISK_SHARE = 0.02
POWER_W = 2.0
MEMORY_SHARE = 0.03
LINK_SHARE = 0.25
LOSS = 0.05
PLACE_S = 0.0005


def worth_telling(told: Capabilities, measured: Capabilities) -> Capabilities:
    """``measured``, with what barely moved since it was told left as it was told.

    Equal to ``told`` when nothing is worth it. A flag (charging, throttled) always is.
    """
    return replace(
        measured,
        cpu=_cpu(told.cpu, measured.cpu),
        disk=_disk(told.disk, measured.disk),
        battery=_battery(told.battery, measured.battery),
        thermal=_thermal(told.thermal, measured.thermal),
    )


def memory_worth_telling(told: int, measured: int, total: int) -> int:
    """Free bytes to tell: the old figure unless it moved by a few percent of all memory."""
    return measured if abs(measured - told) > total * MEMORY_SHARE else told


def links_worth_telling(
    told: Mapping[NodeId, LinkEstimate], measured: Mapping[NodeId, LinkEstimate]
) -> dict[NodeId, LinkEstimate]:
    """Estimates of the links that were measured; those that moved by less than a quarter as they were told."""
    links = {}
    for peer, now in measured.items():
        old = told.get(peer)
        if not now.samples:
            continue
        still = old is not None and (
            _near(old.rtt_p50, now.rtt_p50)
            and _near(old.rtt_p99, now.rtt_p99)
            and _near(old.bandwidth_out_p50, now.bandwidth_out_p50)
            and _near(old.bandwidth_in_p50, now.bandwidth_in_p50)
            and abs(old.loss_out - now.loss_out) < LOSS
            and abs(old.loss_in - now.loss_in) < LOSS
        )
        links[peer] = old if old is not None and still else now
    return links


def place_worth_telling(told: Coordinate | None, now: Coordinate) -> Coordinate:
    """The network coordinate to tell: the old one while the new is close to it."""
    if told is not None:
        moved = abs(told.rtt_to(now) - told.height - now.height)
        if moved < max(PLACE_S, LINK_SHARE * now.height) and abs(told.error - now.error) < LINK_SHARE:
            return told
    return now


def _near(old: int, now: int) -> bool:
    return abs(now - old) <= LINK_SHARE * max(old, now)


def _cpu(told: Cpu, now: Cpu) -> Cpu:
    moved = abs(now.mhz_now - told.mhz_now) > MHZ_SHARE * max(told.mhz_now, 1)
    return now if moved else replace(now, mhz_now=told.mhz_now)


def _disk(told: Disk, now: Disk) -> Disk:
    same = told.total == now.total and abs(told.free - now.free) <= DISK_SHARE * now.total
    return told if same else now


def _battery(told: Battery | None, now: Battery | None) -> Battery | None:
    if told is None or now is None or told.charging != now.charging:
        return now
    small = abs(told.percent - now.percent) < BATTERY_PERCENT and abs(told.power_w - now.power_w) < POWER_W
    return told if small else now


def below_floor(before: bool, now: Battery | None, floor: int) -> bool:
    """Whether a node hands its sessions over to spare its battery: from ``floor`` percent down while it discharges,
    until it charges or is well above again."""
    if now is None or now.charging or not floor:
        return False
    return now.percent < floor + (BATTERY_PERCENT if before else 0)


def _thermal(told: Thermal | None, now: Thermal | None) -> Thermal | None:
    if told is None or now is None or told.throttled != now.throttled:
        return now
    return told if abs(told.celsius - now.celsius) < CELSIUS else now
