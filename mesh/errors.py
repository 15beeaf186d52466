"""Every error that crosses a boundary of this project.

::

    MeshError
    ├── InputError            what we were given is wrong; the giver can mend it
    │   ├── ConfigError         a setting, a flag, an environment variable
    │   ├── ModelFileError      a GGUF that we cannot read or do not support
    │   ├── ShardError          a shard or manifest that does not match
    │   └── RequestError        a request to the API (carries OpenAI's param and code)
    ├── Unavailable           right input, wrong moment; says when to come back
    │   ├── NoRoute             no set of replicas covers the model's layers
    │   ├── Full                a stage has no memory or slot for the session
    │   ├── StageLost           a stage went away in the middle of a generation
    │   ├── StaleTerm           a later leader of the scheduler is known
    │   └── LeaseRefused        an agent does not hold what a scheduler wants there
    ├── PeerError             a peer broke the wire contract; its fault, not ours
    └── InvalidTransition     a state machine got an event it cannot get; our bug

Messages name the thing, the value and what to do about it.
"""

from __future__ import annotations


class MeshError(Exception):
    """Root of the tree."""


class InputError(MeshError):
    """What we were given is wrong; the giver can mend it."""


class ConfigError(InputError):
    """A setting, flag or environment variable that makes no sense."""


class ModelFileError(InputError):
    """A model file that is not readable, not whole or not supported."""


class ShardError(InputError):
    """A shard, manifest or set of shards that does not match."""


class RequestError(InputError):
    """A request to the API that cannot be answered as it stands.

    ``param`` names the offending field (``None`` when it is the whole body), ``code`` is
    OpenAI's machine-readable code, ``status`` the HTTP status.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class Unavailable(MeshError):
    """Right input, wrong moment. ``retry_after_s`` is our honest guess of when to try again."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoute(Unavailable):
    """No set of live replicas covers the model's layers."""


class Full(Unavailable):
    """A stage or the ingress has no room for another session."""


class StageLost(Unavailable):
    """A stage of the route went away in the middle of a generation."""


class StaleTerm(Unavailable):
    """A plan of a leader whose term is over."""


class LeaseRefused(Unavailable):
    """An agent does not hold what a scheduler wants there."""


class PeerError(MeshError):
    """A peer broke the wire contract."""


class InvalidTransition(MeshError):
    """A state machine was handed an event that its state does not know: a bug of ours.

    Carries the machine's ``story`` (its last events), so that the report is the diagnosis.
    """

    def __init__(self, machine: str, state: str, event: str, story: list[str]) -> None:
        super().__init__(f"{machine} in state {state} cannot take {event}; before it: {' -> '.join(story)}")
        self.story = story
