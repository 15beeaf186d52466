"""Memory that this process may use, within its cgroup."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in all and bytes that are free."""

    total: int
    free: int


def probe_memory(root: Path = Path("/")) -> Memory:
    """Read ``/proc/meminfo`` and the cgroup's limits (v2, then v1); ``root`` is for tests."""
    fields: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total, free = fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    for limit_file, usage_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit = _number(root / limit_file)
        if limit is not None and limit < min(total, _UNLIMITED):
            used = _number(root / usage_file) or 0
            return Memory(limit, max(0, min(free, limit - used)))
    return Memory(total, free)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max", or not there
        return None
