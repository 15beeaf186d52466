"""What a machine can do, as peers, scheduler and simulator know it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Cpu:
    """``cores``: logical ones that this process may use; ``quota`` the share of them that its
    cgroup grants (in cores). ``mhz`` is the highest frequency, ``mhz_now`` the one allowed now
    (lower when throttled), 0 where unknown. ``instructions``: the sets that runtimes care about."""

    cores: int
    quota: float
    architecture: str = ""
    model: str = ""
    mhz: int = 0
    mhz_now: int = 0
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """Of the file system that models and logs are on, bytes."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Accelerator:
    """``kind``: ``provider`` (ONNX Runtime), ``delegate`` (LiteRT) or ``device`` (a device file: the
    hardware is there, whether a runtime drives it is another matter)."""

    kind: str
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Battery:
    """All batteries together. ``energy_wh`` left and ``power_w`` drawn (negative: charging) are 0
    where the board does not say."""

    percent: int
    charging: bool
    energy_wh: float = 0.0
    power_w: float = 0.0


@dataclass(frozen=True, slots=True)
class Thermal:
    """Hottest zone, degrees Celsius; ``throttled`` when a zone is beyond its passive trip point."""

    zone: str
    celsius: int
    throttled: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """``kind``: ethernet, wifi, cellular, virtual; ``mbps`` 0 where the driver does not say."""

    name: str
    kind: str
    mbps: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured: ``gb_s`` weights read per second by a matrix-vector product (what decode is made
    of), ``gflop_s`` of a matrix product (prefill)."""

    runtime: str
    gb_s: float
    gflop_s: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Everything together; ``None`` where the machine has no such thing."""

    cpu: Cpu
    disk: Disk
    accelerators: tuple[Accelerator, ...] = ()
    battery: Battery | None = None
    thermal: Thermal | None = None
    interfaces: tuple[Interface, ...] = ()
    speeds: tuple[Speed, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """16 hex digits that change when anything here does: what adverts carry."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
