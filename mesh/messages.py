"""What peers say to each other, as values; ``protos/mesh.proto`` is the same on the wire."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from mesh.types import Address, Epoch, Route, Sampling, SessionId, Stage, Standbys, Token

WIRE_VERSION = 1
DRAFTS = 1
"""Frames may end in guesses, which the last stage puts to the test."""
STEPS = 2
"""A frame may hold several steps, to be computed with the bits that they have one by one."""
STEPS_MAX = 16
"""Of a frame."""
FEATURES = DRAFTS | STEPS
"""Feature bits that this version speaks beyond the first wire version."""


class Cause(enum.Enum):
    """Why a stage refused or lost a session; values are those of the wire."""

    FULL = 1
    NO_SHARD = 2
    STREAM_BROKEN = 3
    SILENT = 4
    BAD_FRAME = 5
    RUNTIME = 6
    DEADLINE = 7
    STALE_EPOCH = 8
    DRAINING = 9
    NO_CACHE = 10
    TAKEN_OVER = 11


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a session at ``position`` (rule R2) along ``route``; ``stage`` is the receiver's place.

    ``positions`` is the most that the session may take, ``window`` the frames that may be
    unacknowledged on a hop, ``deadline_ms`` what was left when it was sent.
    """

    session: SessionId
    epoch: Epoch
    position: int
    route: Route
    stage: int
    owner_address: Address
    positions: int
    window: int
    deadline_ms: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sampling: Sampling
    exact: bool = False
    resume: SessionId | None = None
    """A session that the stages run, or kept when it was closed: this one begins with its KV cache up to ``position``. Or this one itself, in a later
    epoch for which every stage should have everything: one that does not refuses."""
    request: bytes = b""
    """For the last stage's token log: what another ingress needs to go on with the session (rule R6)."""
    expires_ms: int = 0
    """Of that log, milliseconds since the epoch."""
    standbys: Standbys = ()
    """Of each stage, a replica that is fed the same frames and sends nothing; empty: none at all."""
    standby: bool = False
    """The receiver is the standby of its stage."""
    steps: bool = False
    """Steps may be replayed several a frame: all agents of the route know how."""

    @property
    def here(self) -> Stage | None:
        """The receiver: ``None`` where the order makes no sense."""
        places = self.standbys if self.standby else getattr(self.route, "stages", ())
        return places[self.stage] if self.stage < len(places) else None

    def standby_of(self, stage: int) -> Stage | None:
        """Who is fed what a stage is fed."""
        return self.standbys[stage] if stage < len(self.standbys) else None

    @property
    def asks(self) -> bool:
        """Whether each stage tells where it stands before anything is sent to it: a later epoch of a session
        that some of them have and others lack."""
        return self.position > 0 and self.resume is None


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is open from ``position`` on: told by the last stage to the owner, or, where the ``Open``
    asks, by each stage to its sender when those behind it have told, and at once by one that has nothing."""

    session: SessionId
    epoch: Epoch
    stage: int
    position: int
    short: int = 0
    """Stages from here on that lacked something, as far as is known."""
    replayed: int = 0
    """Positions that hop logs replay to them, the most of any."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Stage to owner: not opened, and why."""

    session: SessionId
    epoch: Epoch
    stage: int
    cause: Cause
    reason: str
    retry_after_ms: int = 1000


@dataclass(slots=True)
class Frame:
    """``length`` positions of a session; ``payload`` is opaque here (token ids or activations).

    Mutable only in ``arrived_ns``, which the receiver stamps.
    """

    session: SessionId
    epoch: Epoch
    position: int
    length: int
    sample: bool
    payload: Any
    stage: int = 0
    """The receiver's place in the route."""
    times: tuple[int, ...] = ()
    """Three numbers a stage passed: see ``Token.times``."""
    drafts: tuple[int, ...] = ()
    """Tokens of the last positions that are guesses: the last stage samples before each of them and goes on while it
    was right; the next frame begins where one was wrong."""
    steps: bool = False
    """Its positions first ran one step at a time, and are to have those bits again; nothing is sampled."""
    arrived_ns: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token on its way from the last stage to the owner."""

    session: SessionId
    epoch: Epoch
    token: Token


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything below ``position`` has been computed at ``stage``."""

    session: SessionId
    epoch: Epoch
    position: int
    stage: int = 0
    """Who computed it."""
    held_us: int = 0
    """From the frame's arrival to this acknowledgement; the rest of the round trip was the hop."""


@dataclass(frozen=True, slots=True)
class Beacon:
    """Alive, however slow: sent while work is queued."""

    runs: int
    queued: int


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a session at one stage, which passes it on."""

    session: SessionId
    epoch: Epoch
    reason: str
    stage: int = 0
    """The receiver's place in the route."""
    keep: bool = False
    """It ended well: keep the KV cache for a session that goes on from it, while there is room."""
    alone: bool = False
    """This stage only: the others go on in a later epoch."""
    waits: bool = False
    """No end: the stage before was closed alone, and this epoch is over for those behind it as well."""


@dataclass(frozen=True, slots=True)
class HopLost:
    """A report to the owner: ``stage`` cannot go on (rule R1: peers report, the owner decides). The number after the
    last stage's is no stage: a stream home or a log is lost, no node is to blame, and the route may stay."""

    session: SessionId
    epoch: Epoch
    stage: int
    cause: Cause
    detail: str
    position: int = 0


@dataclass(frozen=True, slots=True)
class Witness:
    """Owner to witness: a copy of the token log, where the last stage shares the owner's node (rule R6). The first
    of a session, at position 0, carries prompt and request."""

    session: SessionId
    epoch: Epoch
    position: int
    tokens: tuple[Token, ...]
    expires_ms: int = 0
    prompt: tuple[int, ...] = ()
    request: bytes = b""


Message = (
    Witness | Open | Opened | Refused | list[Frame] | list[Sampled] | list[Ack] | Beacon | Close | HopLost
)
