"""What happens to a session (events), what it asks for (effects) and what it is to do (its order)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mesh.errors import MeshError
from mesh.messages import Ack, Close, HopLost, Open, Opened, Refused, Sampled
from mesh.types import Address, LayeredRoute, NodeId, Sampling, SessionId, Standbys, Token


class Finish(enum.Enum):
    """Why a session is done (OpenAI's finish reasons, and a client that left)."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client left, or the text layer found a stop string (``finish`` says which)."""

    finish: Finish = Finish.CANCELLED


@dataclass(frozen=True, slots=True)
class ClientBusy:
    """The client does not read: feed no further tokens."""


@dataclass(frozen=True, slots=True)
class ClientReady:
    """The client reads again."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline may have passed."""


@dataclass(frozen=True, slots=True)
class Rerouted:
    """Another route is there; also asked for while all is well, to leave a node that drains."""

    route: LayeredRoute
    standbys: Standbys = ()
    """For a session that has nothing yet: they are fed from the prompt on, like its stages."""


Event = Opened | Refused | Ack | Sampled | HopLost | Cancelled | ClientBusy | ClientReady | Tick | Rerouted


@dataclass(frozen=True, slots=True)
class SendOpen:
    """Open the route."""

    order: Open


@dataclass(frozen=True, slots=True)
class SendFrame:
    """``tokens`` from ``position`` on, to the first stage."""

    position: int
    tokens: tuple[int, ...]
    sample: bool
    drafts: tuple[int, ...] = ()
    """The last of the tokens, where those are guesses."""
    steps: bool = False
    """Each first ran as a step of its own."""


@dataclass(frozen=True, slots=True)
class KeepToken:
    """Write a token to the token log."""

    token: Token


@dataclass(frozen=True, slots=True)
class EmitToken:
    """Show a token to the client."""

    token: Token


@dataclass(frozen=True, slots=True)
class SendClose:
    """Close a stage at ``address``, which passes it on down its route."""

    close: Close
    address: Address


@dataclass(frozen=True, slots=True)
class NeedRoute:
    """Find a route without these nodes; answer with ``Rerouted``, or not at all: it is asked again."""

    avoid: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Ended:
    """The last effect of a session: ``finish`` or ``error``."""

    finish: Finish | None = None
    error: MeshError | None = None


Effect = SendOpen | SendFrame | KeepToken | EmitToken | SendClose | NeedRoute | Ended


@dataclass(frozen=True, slots=True)
class SessionOrder:
    """What a session is asked to do. Times are nanoseconds on the clock of ``now``."""

    session: SessionId
    prompt: tuple[int, ...]
    sampling: Sampling
    tokens_max: int
    stop_tokens: frozenset[int]
    positions_max: int
    """Positions that the model's context holds."""
    deadline_ns: int
    chunk: int = 64
    window: int = 4
    step_timeout_ns: int = 30_000_000_000
    recovery_timeout_ns: int = 0
    """How long a session without a route waits for another one; 0: it fails at once."""
    exact: bool = False
    """A replay runs the frames again as they were first run, so that the same bits come out; otherwise it runs
    large chunks, which is quicker."""
    speculate: bool = False
    """Guess tokens where that pays: several positions are then computed in one step, which rounds otherwise."""
    keep: bool = False
    """Ask the stages to keep the KV cache when it ends well."""
    resume: tuple[SessionId, int] | None = None
    """A session that the route's stages run or kept, and how many of the prompt's positions it shares."""
    canonical: bool = True
    """Whether what it begins with has the bits that any session of its prompt would compute there."""
    request: bytes = b""
    """What another ingress needs to go on with it; opaque here, for the last stage's token log (rule R6)."""
    expires_ms: int = 0
    """Of that log, milliseconds since the epoch."""
