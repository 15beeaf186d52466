"""Token log in memory, for tests and for agents told to keep nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mesh.types import Epoch, LayeredRoute, SessionId, Token
from node_agent.ports import NO_EPOCH, LoggedSession


@dataclass(slots=True)
class _Kept:
    prompt: tuple[int, ...]
    expires_at: float
    epoch: Epoch
    request: bytes
    route: LayeredRoute | None
    tokens: dict[int, Token] = field(default_factory=dict)


class MemoryTokenLog:
    """``node_agent.ports.TokenLog`` that a restart empties."""

    def __init__(self) -> None:
        self._sessions: dict[SessionId, _Kept] = {}

    def begin(
        self,
        session: SessionId,
        prompt: Sequence[int],
        expires_at: float,
        epoch: Epoch = NO_EPOCH,
        request: bytes = b"",
        route: LayeredRoute | None = None,
    ) -> None:
        known = self._sessions.get(session)
        tokens = known.tokens if known else {}
        self._sessions[session] = _Kept(tuple(prompt), expires_at, epoch, request, route, tokens)

    def append(self, session: SessionId, tokens: Sequence[Token], copy: bool = False) -> None:
        if session in self._sessions:
            self._sessions[session].tokens.update((t.position, t) for t in tokens)

    def read(self, session: SessionId) -> LoggedSession | None:
        known = self._sessions.get(session)
        if known is None:
            return None
        tokens, position = [], len(known.prompt)
        while position in known.tokens:
            kept = known.tokens[position]
            tokens.append(Token(position, kept.token, kept.logprob))
            position += 1
        return LoggedSession(known.prompt, tuple(tokens), known.epoch, known.request, known.route)

    def take(self, session: SessionId, expected: Epoch, wanted: Epoch) -> bool:
        known = self._sessions.get(session)
        if known is None or known.epoch != expected:
            return False
        known.epoch = wanted
        return True

    def forget(self, session: SessionId) -> None:
        self._sessions.pop(session, None)

    def expire(self, now: float) -> Iterable[SessionId]:
        gone = [s for s, kept in self._sessions.items() if kept.expires_at <= now]
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
