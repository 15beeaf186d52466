"""Probes on file trees as boards have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from mesh.capabilities import Accelerator, Battery, Capabilities, Interface, Speed, Thermal
from node_agent.adapters.fingerprint.accelerator import probe_accelerators
from node_agent.adapters.fingerprint.battery import probe_battery
from node_agent.adapters.fingerprint.cpu import probe_cpu
from node_agent.adapters.fingerprint.disk import probe_disk
from node_agent.adapters.fingerprint.machine import probe_machine
from node_agent.adapters.fingerprint.network import probe_interfaces
from node_agent.adapters.fingerprint.speed import FILE, MATMUL, probe_speeds
from node_agent.adapters.fingerprint.thermal import probe_thermal
from node_agent.adapters.records import capabilities_record, read_capabilities
from node_agent.hysteresis import memory_worth_telling, worth_telling
from tests.builders import CAPABILITIES


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_cpu_by_cgroup_v1_v2_and_frequency(tmp_path: Path) -> None:
    everything = probe_cpu(tmp_path)
    assert everything.quota == everything.cores
    root = plant(
        tmp_path,
        {
            "proc/cpuinfo": "model name : Cortex\nFeatures : fp asimd asimddp i8mm\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "900000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    cpu = probe_cpu(root)
    assert (cpu.cores, cpu.quota, cpu.mhz, cpu.mhz_now, cpu.model) == (1, 0.5, 1800, 900, "Cortex")
    assert cpu.instructions == ("asimd", "asimddp", "i8mm")
    plant(root, {"sys/fs/cgroup/cpu.max": "150000 100000", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"})
    assert probe_cpu(root).quota == min(1.5, everything.quota)
    for nonsense in ("max 100000", "x y", "1 0"):
        plant(root, {"sys/fs/cgroup/cpu.max": nonsense})
        assert probe_cpu(root).quota == everything.quota


def test_the_tightest_cgroup_on_the_way_up_counts(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/outer/inner\n3:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu/outer/cpu.cfs_quota_us": "30000",
            "sys/fs/cgroup/cpu/outer/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/outer/inner/cpu.cfs_quota_us": "60000",
            "sys/fs/cgroup/cpu/outer/inner/cpu.cfs_period_us": "100000",
        },
    )
    assert probe_cpu(tmp_path).quota == 0.3


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    disk = probe_disk(tmp_path / "not" / "yet")
    assert disk.total >= disk.free > 0


BATTERY = {
    "type": "Battery",
    "status": "Discharging",
    "capacity": "80",
    "energy_now": "40000000",
    "energy_full": "50000000",
    "power_now": "12500000",
}


def battery(root: Path, name: str, **changes: str | None) -> Path:
    files = {k: v for k, v in {**BATTERY, **changes}.items() if v is not None}
    return plant(root, {f"sys/class/power_supply/{name}/{k}": v for k, v in files.items()})


def test_batteries(tmp_path: Path) -> None:
    assert probe_battery(tmp_path) is None
    battery(tmp_path, "BAT0")
    assert probe_battery(tmp_path) == Battery(80, False, 40.0, 12.5)
    battery(tmp_path, "mouse", scope="Device", capacity="3")
    battery(tmp_path, "gone", present="0")
    plant(tmp_path, {"sys/class/power_supply/AC/type": "Mains", "sys/class/power_supply/AC/online": "1"})
    assert probe_battery(tmp_path) == Battery(80, False, 40.0, 12.5)
    battery(tmp_path, "BAT1", capacity="20", status="Charging", energy_now="10000000", power_now="2500000")
    assert probe_battery(tmp_path) == Battery(50, True, 50.0, 10.0)


def test_a_battery_that_counts_charge_or_only_percent(tmp_path: Path) -> None:
    battery(
        tmp_path,
        "bq27",
        energy_now=None,
        energy_full=None,
        power_now=None,
        capacity=None,
        charge_now="1000000",
        charge_full="2000000",
        voltage_now="11000000",
        current_now="-500000",
    )
    assert probe_battery(tmp_path) == Battery(50, False, 11.0, 5.5)
    plain = {"type": "Battery", "capacity": "7", "status": "Unknown"}
    other = plant(tmp_path / "other", {f"sys/class/power_supply/b/{k}": v for k, v in plain.items()})
    assert probe_battery(other) == Battery(7, False)


def test_thermal_zones(tmp_path: Path) -> None:
    assert probe_thermal(tmp_path) is None
    zone = "sys/class/thermal/thermal_zone"
    root = plant(
        tmp_path,
        {
            f"{zone}0/type": "cpu-thermal",
            f"{zone}0/temp": "64000",
            f"{zone}0/trip_point_0_type": "passive",
            f"{zone}0/trip_point_0_temp": "80000",
            f"{zone}1/type": "broken",
            f"{zone}1/temp": "-2147483648",
        },
    )
    assert probe_thermal(root) == Thermal("cpu-thermal", 64, False)
    plant(root, {f"{zone}0/temp": "81000"})
    assert probe_thermal(root) == Thermal("cpu-thermal", 81, True)


def test_interfaces(tmp_path: Path) -> None:
    net = "sys/class/net"
    root = plant(
        tmp_path,
        {
            f"{net}/lo/type": "772",
            f"{net}/eth0/type": "1",
            f"{net}/eth0/operstate": "up",
            f"{net}/eth0/speed": "1000",
            f"{net}/eth0/device/x": "",
            f"{net}/wlan0/type": "1",
            f"{net}/wlan0/operstate": "up",
            f"{net}/wlan0/wireless/x": "",
            f"{net}/wlan1/operstate": "down",
            f"{net}/wwan0/operstate": "unknown",
            f"{net}/wwan0/speed": "-1",
            f"{net}/br0/operstate": "up",
        },
    )
    assert probe_interfaces(root) == (
        Interface("br0", "virtual"),
        Interface("eth0", "ethernet", 1000),
        Interface("wlan0", "wifi"),
        Interface("wwan0", "cellular"),
    )


def test_accelerators_by_device_file_library_and_provider(tmp_path: Path) -> None:
    usb = "sys/bus/usb/devices/1-1"
    root = plant(
        tmp_path,
        {
            "dev/nvidia0": "",
            "proc/driver/nvidia/gpus/0000/information": "Model: \t NVIDIA T4\nIRQ: 5\n",
            "dev/rknpu": "",
            f"{usb}/idVendor": "18d1\n",
            f"{usb}/idProduct": "9302\n",
            "usr/lib/aarch64-linux-gnu/libedgetpu.so.1": "",
        },
    )
    found = probe_accelerators(root)
    assert Accelerator("provider", "CPUExecutionProvider") in found
    assert [a for a in found if a.kind != "provider"] == [
        Accelerator("delegate", "libedgetpu.so.1", "/usr/lib/aarch64-linux-gnu/libedgetpu.so.1"),
        Accelerator("device", "coral", "usb"),
        Accelerator("device", "nvidia", "NVIDIA T4"),
        Accelerator("device", "rknn", "/dev/rknpu"),
    ]


def test_speed_is_measured_once_and_again_when_the_runtime_changes(tmp_path: Path) -> None:
    model = onnx.load_from_string(MATMUL)
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node] == ["MatMul"]
    cpu = CAPABILITIES.cpu
    (first,) = probe_speeds(tmp_path, cpu, 1)
    assert first.gb_s > 0.1
    assert first.gflop_s > 0.5
    assert probe_speeds(tmp_path, cpu, 1) == (first,)
    kept = (tmp_path / FILE).read_text()
    for damaged in ("", "{", kept.replace("onnx ", "onnx 0"), '{"key": 1}', "[]"):
        (tmp_path / FILE).write_text(damaged)
        (again,) = probe_speeds(tmp_path, cpu, 1)
        assert again.gb_s > 0.1
        assert (tmp_path / FILE).read_text() != damaged


FULL = replace(
    CAPABILITIES,
    accelerators=(Accelerator("device", "coral", "usb"),),
    battery=Battery(80, False, 40.0, 12.5),
    thermal=Thermal("cpu", -3, False),
    interfaces=(Interface("eth0", "ethernet", 1000),),
    speeds=(Speed("onnx", 10.5, 80.0),),
    labels=(("rack", "a"), ("site", "b")),
)


@pytest.mark.parametrize("have", [CAPABILITIES, FULL])
def test_records_carry_everything(have: Capabilities) -> None:
    back = read_capabilities(capabilities_record(have))
    assert back == have
    assert back.digest() == have.digest()
    assert replace(have, labels=(("x", "y"),)).digest() != have.digest()


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (replace(FULL, battery=Battery(79, False, 39.0, 12.0)), False),
        (replace(FULL, battery=Battery(78, False, 38.0, 12.0)), True),
        (replace(FULL, battery=Battery(80, True, 40.0, -9.0)), True),
        (replace(FULL, battery=None), True),
        (replace(FULL, thermal=Thermal("cpu", 1, False)), False),
        (replace(FULL, thermal=Thermal("cpu", 2, False)), True),
        (replace(FULL, thermal=Thermal("cpu", -3, True)), True),
        (replace(FULL, cpu=replace(FULL.cpu, quota=1.0, cores=1)), True),
        (replace(FULL, disk=replace(FULL.disk, free=FULL.disk.free - (1 << 29))), False),
        (replace(FULL, disk=replace(FULL.disk, free=FULL.disk.free // 2)), True),
        (replace(FULL, labels=()), True),
    ],
)
def test_only_what_matters_is_told(measured: Capabilities, told: bool) -> None:
    assert (worth_telling(FULL, measured) != FULL) is told


def test_a_slow_drain_is_told_in_steps() -> None:
    told, tellings = FULL, 0
    for percent in range(80, 20, -1):
        now = worth_telling(told, replace(FULL, battery=Battery(percent, False, percent / 2, 12.5)))
        tellings += now != told
        told = now
    assert tellings == 30 - 1
    assert memory_worth_telling(1000, 1020, 1000) == 1000
    assert memory_worth_telling(1000, 1040, 1000) == 1040


def test_the_whole_machine(tmp_path: Path) -> None:
    have = probe_machine(tmp_path, (("a", "b"),))
    assert have.cpu.cores >= 1
    assert have.labels == (("a", "b"),)
    assert len(have.digest()) == 16
