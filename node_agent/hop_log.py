"""What each stage has sent onward, so that a stage that is new can be given it again (rule R4). Pure.

A log is of one session and one shard: the outputs of its frames, whole, from a first position to a last, each with
its length and a checksum. It serves the process that wrote it: a stage that restarted has lost its KV cache, is fed
from further up anyway, and gives the next stage its outputs anew while it computes them.

When the store is full, slow or broken, the log that would grow is dropped whole and marked absent: its session goes
on, and a loss behind this stage is then replayed from further up. Nothing is trimmed from a log that lives.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mesh.types import Digest, SessionId

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEAD = struct.Struct("<II")
_POSITION = struct.Struct(">I")
_PREFIX = b"a"
_SHARD_BYTES = 8


class FrameStore(Protocol):
    """Where records go. ``put`` returns at once; what it was given can be read at once, and is on disk later."""

    def put(self, key: bytes, value: bytes) -> None: ...

    def get(self, key: bytes) -> bytes | None: ...

    def drop(self, start: bytes, end: bytes) -> None:
        """Forget keys in ``[start, end)``."""
        ...

    @property
    def behind_bytes(self) -> int:
        """Given and not written yet."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be written any more."""
        ...


@dataclass(slots=True)
class _Log:
    start: int
    end: int
    begins: list[int] = field(default_factory=list)
    """Where its frames begin."""
    bytes: int = 0
    """An upper bound: what was truncated still counts."""


Key = tuple[SessionId, Digest]


class HopLog:
    """The logs of all stages of a node. ``absent(session, why)`` is called when one is dropped."""

    def __init__(
        self,
        store: FrameStore,
        limit_bytes: int,
        behind_bytes: int,
        absent: Callable[[SessionId, str], None] = lambda session, why: None,
    ) -> None:
        self._store, self._limit, self._behind, self._absent = store, limit_bytes, behind_bytes, absent
        self._logs: dict[Key, _Log] = {}
        self.bytes = 0
        """In all logs that live."""
        self.written = 0
        """Since the start, trimmed ones included."""

    def __len__(self) -> int:
        return len(self._logs)

    def open(self, session: SessionId, shard: Digest, position: int) -> None:
        """A stage computes from ``position`` on: what its log holds beyond is forgotten (rule R2). Without a log
        that reaches it, one begins there."""
        key = (session, shard)
        log = self._logs.get(key)
        if log is not None and log.start <= position <= log.end:
            self._cut(key, log, position)
            return
        self.forget(session, shard)
        self._logs[key] = _Log(position, position)

    def append(self, session: SessionId, shard: Digest, position: int, output: NDArray[np.float32]) -> None:
        """Keep a frame's output, float32 ``[length, width]``. A gap ends the log."""
        key = (session, shard)
        log = self._logs.get(key)
        if log is None:
            return
        if log.begins and log.begins[-1] < position < log.end:
            self._cut(key, log, position)  # the last frame ended in guesses, and one was wrong
        if position != log.end:
            self._drop(key, f"a frame at {position} came where {log.end} was due")
            return
        size = output.nbytes + _HEAD.size
        if self._store.failure is not None:
            self._drop(key, f"the hop log cannot be written: {self._store.failure}")
        elif self.bytes + size > self._limit:
            self._drop(key, f"the hop log is full ({self._limit >> 20} MiB)")
        elif self._store.behind_bytes > self._behind:
            self._drop(key, "the disk is too slow for the hop log")
        else:
            self._store.put(_key(key, position), _packed(position, output))
            log.begins.append(position)
            log.end = position + len(output)
            log.bytes += size
            self.bytes += size
            self.written += size

    def _cut(self, key: Key, log: _Log, position: int) -> None:
        """Forget what is beyond a position, which may be within a frame."""
        kept = bisect_left(log.begins, position)
        self._store.drop(_key(key, position), _key(key, log.end))
        del log.begins[kept:]
        last = log.begins[-1] if log.begins else position
        if last < position < log.end:
            frame = self.frame(*key, last)
            if frame is not None and len(frame) > position - last:
                self._store.put(_key(key, last), _packed(last, frame[: position - last]))
        log.end = position

    def whole_from(self, session: SessionId, shard: Digest, end: int) -> int | None:
        """The first position of a log that goes on to ``end`` without a gap; ``None`` if there is none."""
        log = self._logs.get((session, shard))
        return log.start if log is not None and log.end >= end else None

    def frame(self, session: SessionId, shard: Digest, position: int) -> NDArray[Any] | None:
        """The frame that began at ``position``, float32 ``[length, width]``; ``None`` if there is none or it is
        damaged."""
        value = self._store.get(_key((session, shard), position))
        if value is None or len(value) <= _HEAD.size:
            return None
        length, check = _HEAD.unpack_from(value)
        body = value[_HEAD.size :]
        if not length or zlib.crc32(body, position) != check or len(body) % (4 * length):
            return None
        return np.frombuffer(body, dtype="<f4").reshape(length, -1)

    def forget(self, session: SessionId, shard: Digest) -> None:
        """A session has ended here."""
        key = (session, shard)
        log = self._logs.pop(key, None)
        if log is not None:
            self.bytes -= log.bytes
            if log.end > log.start:
                self._store.drop(_key(key, log.start), _key(key, log.end))

    def _drop(self, key: Key, why: str) -> None:
        self.forget(*key)
        self._absent(key[0], why)


def _packed(position: int, output: NDArray[Any]) -> bytes:
    body = output.tobytes()
    return _HEAD.pack(len(output), zlib.crc32(body, position)) + body


def _key(key: Key, position: int) -> bytes:
    session, shard = key
    return _PREFIX + bytes.fromhex(session) + bytes.fromhex(shard)[:_SHARD_BYTES] + _POSITION.pack(position)
