"""Token log in memory, for tests and for agents told to keep nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh.types import SessionId


class MemoryTokenLog:
    """``node_agent.ports.TokenLog`` that a restart empties."""

    def __init__(self) -> None:
        self._sessions: dict[SessionId, tuple[list[int], float, dict[int, int]]] = {}

    def begin(self, session: SessionId, prompt: Sequence[int], expires_at: float) -> None:
        self._sessions[session] = (list(prompt), expires_at, {})

    def append(self, session: SessionId, position: int, tokens: Sequence[int]) -> None:
        if session in self._sessions:
            self._sessions[session][2].update(enumerate(tokens, position))

    def read(self, session: SessionId) -> tuple[list[int], list[int]] | None:
        if session not in self._sessions:
            return None
        prompt, _, kept = self._sessions[session]
        tokens, position = [], len(prompt)
        while position in kept:
            tokens.append(kept[position])
            position += 1
        return list(prompt), tokens

    def forget(self, session: SessionId) -> None:
        self._sessions.pop(session, None)

    def expire(self, now: float) -> Iterable[SessionId]:
        gone = [s for s, (_, expires_at, _) in self._sessions.items() if expires_at <= now]
        for session in gone:
            self.forget(session)
        return gone

    def close(self) -> None:
        self._sessions.clear()


class MemoryFrames:
    """``node_agent.hop_log.FrameStore`` that keeps everything in memory."""

    behind_bytes = 0
    failure: str | None = None

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}

    def put(self, key: bytes, value: bytes) -> None:
        self.records[key] = value

    def get(self, key: bytes) -> bytes | None:
        return self.records.get(key)

    def drop(self, start: bytes, end: bytes) -> None:
        for key in [k for k in self.records if start <= k < end]:
            del self.records[key]
