"""Processor: cores that this process may use, frequency, instruction sets."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

from mesh.capabilities import Cpu
from node_agent.adapters.fingerprint.files import cgroups, number, text

INSTRUCTIONS = (
    "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8",  # x86
    "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",  # ARM
)  # fmt: skip
"""Sets that the runtimes' kernels choose by, as the kernel names them."""


def probe_cpu(root: Path = Path("/")) -> Cpu:
    """``root`` is for tests. Cores are those of the affinity mask and the cgroup's quota (v2, v1)."""
    info = text(root / "proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    for line in info.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    available = len(os.sched_getaffinity(0))
    quota = min(float(available), _quota(root) or float(available))
    speeds = root / "sys/devices/system/cpu/cpu0/cpufreq"
    khz = number(speeds / "cpuinfo_max_freq") or 0
    khz_now = number(speeds / "scaling_max_freq") or khz
    return Cpu(
        cores=max(1, min(available, math.ceil(quota))),
        quota=round(quota, 2),
        architecture=platform.machine(),
        model=(fields.get("model name") or fields.get("hardware") or text(root / _BOARD) or "")[:80],
        mhz=khz // 1000,
        mhz_now=khz_now // 1000,
        instructions=tuple(i for i in INSTRUCTIONS if i in flags),
    )


_BOARD = "proc/device-tree/model"


def _quota(root: Path) -> float | None:
    """Cores that the cgroups grant; ``None`` when they set no limit."""
    limits = []
    for version, folder in cgroups(root, "cpu"):
        if version == 1:
            quota, period = number(folder / "cpu.cfs_quota_us"), number(folder / "cpu.cfs_period_us")
        else:
            words = (text(folder / "cpu.max") or "").split()
            quota, period = (int(w) if w.isdigit() else None for w in [*words, "", ""][:2])
        if quota and period and quota > 0:
            limits.append(quota / period)
    return min(limits, default=None)
