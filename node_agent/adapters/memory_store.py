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
