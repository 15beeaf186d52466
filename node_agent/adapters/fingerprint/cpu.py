"""Cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def probe_cores(root: Path = Path("/")) -> int:
    """Cores by affinity and by the cgroup's quota (v2, then v1), at least 1; ``root`` is for tests."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    try:
        folder = root / "sys/fs/cgroup/cpu"
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        if quota_us > 0:
            return max(1, min(cores, math.ceil(quota_us / period_us)))
    except (OSError, ValueError):
        pass
    return cores
