"""When a node spares its battery."""

from __future__ import annotations

from mesh.capabilities import Battery
from node_agent.hysteresis import BATTERY_PERCENT, below_floor


def battery(percent: int, charging: bool = False) -> Battery:
    return Battery(percent, charging, 40.0, 10.0)


def test_a_discharging_battery_below_the_floor_drains_the_node() -> None:
    assert below_floor(False, battery(19), 20)
    assert not below_floor(False, battery(20), 20)
    assert not below_floor(False, battery(19, charging=True), 20)
    assert not below_floor(False, None, 20)
    assert not below_floor(False, battery(0), 0)


def test_it_serves_again_when_it_charges_or_is_well_above() -> None:
    assert below_floor(True, battery(20 + BATTERY_PERCENT - 1), 20)
    assert not below_floor(True, battery(20 + BATTERY_PERCENT), 20)
    assert not below_floor(True, battery(5, charging=True), 20)
