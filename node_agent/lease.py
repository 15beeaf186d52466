"""Who holds which replica: it loads with the first lease and unloads with the last. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class ShardKey:
    """What a lease asks for."""

    model: str
    start: int
    end: int
    runtime: str
    quantization: str


@dataclass(frozen=True, slots=True)
class Promise:
    """KV memory that a lease asks for: so many sessions of so many positions."""

    sessions: int
    context: int


class LeaseBook(Generic[Key]):
    """Leases by what they hold. Ids are given by the caller."""

    def __init__(self) -> None:
        self._holders: dict[Key, dict[str, str]] = {}

    def acquire(self, key: Key, lease: str, holder: str) -> bool:
        """Note a lease; true if it is the first on ``key``, which must then be loaded."""
        holders = self._holders.setdefault(key, {})
        if lease in holders:
            raise ValueError(f"lease {lease} holds {key} already")
        holders[lease] = holder
        return len(holders) == 1

    def release(self, key: Key, lease: str) -> bool:
        """End a lease; true if it was the last on ``key``, which must then be unloaded."""
        holders = self._holders.get(key, {})
        if holders.pop(lease, None) is None:
            return False
        if not holders:
            del self._holders[key]
            return True
        return False

    def count(self, key: Key) -> int:
        """Leases on ``key``."""
        return len(self._holders.get(key, {}))
