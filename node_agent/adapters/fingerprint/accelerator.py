"""Execution providers, delegates and device files of accelerators."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mesh.capabilities import Accelerator
from node_agent.adapters.fingerprint.files import text

_DEVICES = (
    ("dev/nvidia0", "nvidia"),
    ("dev/nvhost-gpu", "jetson"),
    ("dev/nvgpu/igpu0", "jetson"),
    ("dev/apex_0", "coral"),
    ("dev/dri/renderD128", "gpu"),
    ("dev/rknpu", "rknn"),
    ("sys/kernel/debug/rknpu/version", "rknn"),
    ("sys/class/misc/rknpu", "rknn"),
    ("dev/accel/accel0", "npu"),
    ("dev/hailo0", "hailo"),
    ("dev/kfd", "rocm"),
)
_CORAL_USB = {("1a6e", "089a"), ("18d1", "9302")}
_DELEGATES = ("libedgetpu.so.1", "libvx_delegate.so", "libethosu_delegate.so", "libQnnTFLiteDelegate.so")
_LIBRARIES = ("usr/lib", "usr/local/lib", "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu")


def probe_accelerators(root: Path = Path("/")) -> tuple[Accelerator, ...]:
    """What is there, whether used or not; ``root`` is for tests. Loads no runtime that is not loaded."""
    found = [*_providers(), *_delegates(root), *_devices(root)]
    return tuple(sorted(set(found), key=lambda a: (a.kind, a.name, a.detail)))


def _providers() -> list[Accelerator]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return [Accelerator("provider", name) for name in onnxruntime.get_available_providers()]


def _delegates(root: Path) -> list[Accelerator]:
    return [
        Accelerator("delegate", name, f"/{folder}/{name}")
        for name in _DELEGATES
        for folder in _LIBRARIES
        if (root / folder / name).exists()
    ]


def _devices(root: Path) -> list[Accelerator]:
    found: dict[str, Accelerator] = {}
    for path, name in _DEVICES:
        if name not in found and (root / path).exists():
            detail = _nvidia(root) if name == "nvidia" else ""
            found[name] = Accelerator("device", name, detail or f"/{path}")
    usb = root / "sys/bus/usb/devices"
    for device in usb.iterdir() if usb.is_dir() else ():
        if (text(device / "idVendor"), text(device / "idProduct")) in _CORAL_USB:
            found["coral"] = Accelerator("device", "coral", "usb")
    return list(found.values())


def _nvidia(root: Path) -> str:
    for gpu in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in (text(gpu) or "").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return ""
