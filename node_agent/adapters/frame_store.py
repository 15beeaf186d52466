"""Frames of hop logs in RocksDB: given at once, written a moment later by a thread of their own."""

from __future__ import annotations

import logging
from collections import deque

from rocksdict import Rdict, WriteBatch, WriteOptions

from node_agent.adapters.later import Later

log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.05
_FIRST, _LAST = b"a", b"b"


class RocksFrames:
    """``node_agent.hop_log.FrameStore`` on disk, behind the write-ahead log; with ``sync`` also past the disk's
    cache, every ``WRITE_EVERY_S``."""

    def __init__(self, db: Rdict, sync: bool = False) -> None:
        self._db, self._sync = db, sync
        # Of a process that is gone: its KV caches are, too.
        db.delete_range(_FIRST, _LAST)
        self._fresh: dict[bytes, bytes] = {}
        self._orders: deque[tuple[bytes, bytes, bool]] = deque()
        """Key and value to put, or start and end to drop, in order."""
        self._put_bytes = self._written_bytes = 0
        """Each is counted by one thread alone."""
        self.failure: str | None = None
        self._later = Later("hop log", WRITE_EVERY_S, self._write)

    @property
    def behind_bytes(self) -> int:
        return self._put_bytes - self._written_bytes

    def put(self, key: bytes, value: bytes) -> None:
        self._fresh[key] = value
        self._orders.append((key, value, True))
        self._put_bytes += len(value)
        self._later.ask()

    def get(self, key: bytes) -> bytes | None:
        value = self._fresh.get(key)
        if value is not None:
            return value
        try:
            found = self._db.get(key)
        except Exception as error:  # rocksdict's own kind
            log.error("the hop log cannot be read: %s", error)
            return None
        return found if isinstance(found, bytes) else None

    def drop(self, start: bytes, end: bytes) -> None:
        for key in [k for k in list(self._fresh) if start <= k < end]:
            self._fresh.pop(key, None)
        self._orders.append((start, end, False))
        self._later.ask()

    def _write(self) -> None:
        batch, written, size = WriteBatch(raw_mode=True), [], 0
        for _ in range(len(self._orders)):
            first, second, put = self._orders.popleft()
            if put:
                batch.put(first, second)
                written.append((first, second))
                size += len(second)
            else:
                batch.delete_range(first, second)
        if batch.is_empty():
            return
        how = WriteOptions()
        how.sync = self._sync
        try:
            self._db.write(batch, how)
            self.failure = None
        except Exception as error:  # rocksdict's own kind
            log.error("the hop log cannot be written: %s", error)
            self.failure = str(error)
        self._written_bytes += size
        for key, value in written:
            if self._fresh.get(key) is value:
                self._fresh.pop(key, None)

    def close(self) -> None:
        """Write what is left and let go of the database."""
        self._later.close()
