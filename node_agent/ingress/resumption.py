"""What another ingress needs to go on with a session, and how a client says what it has seen. Pure.

Every event of a stream has an id, ``SESSION:TOKENS``: the session and how many of its tokens the client has, when it has
read that event. ``Last-Event-ID`` brings it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import msgspec

from mesh.errors import RequestError
from mesh.types import Sampling, Token
from node_agent.ingress.schema import Generation
from scheduler.route import Group

_ID = re.compile(r"(?:chatcmpl-|cmpl-)?([0-9a-f]{32})(?::(\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """Everything about a session but its tokens. ``group`` pins digest, runtime and quantization (rule R7)."""

    generation: Generation
    class_name: str
    sampling: Sampling
    tokens_max: int
    positions_max: int
    group: Group
    created: int


def write_record(record: SessionRecord) -> bytes:
    """For the token log; texts are left out, their tokens are kept beside it."""
    plain = replace(record.generation, messages=(), prompts=())
    return msgspec.json.encode(replace(record, generation=plain))


def read_record(data: bytes) -> SessionRecord:
    """Raises ``RequestError`` where the record is of a version that cannot be read."""
    try:
        return msgspec.json.decode(data, type=SessionRecord)
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"what is kept of the session cannot be read: {error}", code="not_resumable", status=409
        ) from None


def event_id(session: str, tokens: int) -> str:
    """The id of an event after which the client has so many tokens."""
    return f"{session}:{tokens}"


def parse_event_id(text: str) -> tuple[str, int]:
    """Session and tokens; an id without a count is a client that has none."""
    found = _ID.fullmatch(text.strip())
    if found is None:
        raise RequestError(
            f"{text[:80]!r} is no event id; send the 'id' of the last event that came, SESSION:TOKENS",
            param="Last-Event-ID",
        )
    return found[1], int(found[2] or 0)


def check_seen(session: str, seen: int, tokens: tuple[Token, ...]) -> None:
    """A client cannot have more than the log: raises ``RequestError``."""
    if seen > len(tokens):
        raise RequestError(
            f"session {session} has {len(tokens)} tokens in the log, {seen} were named; ask for one that came",
            param="Last-Event-ID",
            code="beyond_log",
            status=409,
        )
