"""Memory that this process may use, within its cgroup."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node_agent.adapters.fingerprint.files import cgroups, number

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in all and bytes that are free."""

    total: int
    free: int


def probe_memory(root: Path = Path("/")) -> Memory:
    """Read ``/proc/meminfo`` and the limits of its cgroups (v2 and v1); ``root`` is for tests."""
    fields: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total, free = fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    for version, folder in cgroups(root, "memory"):
        names = (
            ("memory.max", "memory.current")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        limit = number(folder / names[0])
        if limit is not None and limit < min(total, _UNLIMITED):
            used = number(folder / names[1]) or 0
            total, free = limit, max(0, min(free, limit - used))
    return Memory(total, free)
