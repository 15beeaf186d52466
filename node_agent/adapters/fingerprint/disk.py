"""Room on the file system that models and logs are on."""

from __future__ import annotations

import shutil
from pathlib import Path

from mesh.capabilities import Disk


def probe_disk(folder: Path) -> Disk:
    """Of the nearest existing parent of ``folder``."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return Disk(0, 0)
    return Disk(usage.total, usage.free)
