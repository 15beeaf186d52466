"""What the agent asks of the world; adapters answer, tests answer with values in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mesh.types import (
    Address,
    Epoch,
    LayeredRoute,
    NodeId,
    PolicyVersion,
    SessionId,
    ShardInfo,
    Term,
    Token,
)
from node_agent.lease import Promise, ShardKey
from scheduler.nomad_view import NomadFacts
from scheduler.reconcile import Wanted

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_EPOCH = Epoch(0, NodeId(""))


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How a runtime computes. ``providers`` in order of preference; the first that is installed and loads is used."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 0
    """Threads of one run; 0 leaves it to the runtime."""
    cache: str = ""
    """Folder of this process alone, for weights in the form that this machine's processor wants; empty: none is kept."""
    delegates: tuple[str, ...] = ()
    """For LiteRT shards, as ``PATH:KEY=VALUE``, in order of preference; the first that computes right is used."""


class Runtime(Protocol):
    """A loaded shard with KV memory for a fixed number of session slots.

    A slot is a row of KV memory with room for ``capacity`` positions. Where a run writes is given
    with the run, so truncating a session to a position is running at that position again: what
    lies beyond is never read. Methods block and are never called two at a time.
    """

    info: ShardInfo
    slots: int
    capacity: int
    provider: str
    """What computes, e.g. ``CPUExecutionProvider``, and is told to peers."""
    batch: int
    """Most sessions whose steps are computed in one run."""
    batch_exact: bool
    """Whether a session's row of such a run has the bits that it has alone."""

    def decode(
        self, slot: int, positions: Sequence[int], inputs: NDArray[Any], logits: bool = True
    ) -> NDArray[Any]:
        """One step of the sessions in slots ``slot``, ``slot + 1``, ... at their ``positions``.

        ``inputs``: int64 ``[batch]`` tokens for a first shard, float32 ``[batch, width]`` otherwise.
        Returns float32 ``[batch, width]``, or logits ``[batch, vocabulary]`` of a last shard, which leaves its
        head out and returns nothing to read where ``logits`` is false. The result is overwritten by the next run.
        """
        ...

    def prefill(self, slot: int, position: int, inputs: NDArray[Any], logits: int = 1) -> NDArray[Any]:
        """A chunk of one session from ``position`` on.

        ``inputs``: int64 ``[steps]`` or float32 ``[steps, width]``. Returns float32 ``[steps, width]``,
        or of a last shard ``[logits, vocabulary]``: those after the chunk's last ``logits`` steps.
        """
        ...

    def prepare(self) -> None:
        """Open what sessions may need beyond a few positions, in the background where it takes long."""
        ...

    def hold_to_steps(self, inputs: NDArray[Any]) -> bool:
        """Whether ``replay`` gives some ``inputs`` of a session the bits of single steps as it is; it does so from then on."""
        ...

    def replay(self, slot: int, position: int, inputs: NDArray[Any]) -> NDArray[Any]:
        """Steps of one session from ``position`` on, with the bits that ``decode`` gives them one by one.

        ``inputs`` as for ``prefill``. Returns float32 ``[steps, width]``; of a last shard nothing to read.
        """
        ...

    def settle(self) -> None:
        """Do what the last run left for when its result is on its way; whatever is called next does it else."""
        ...

    def copy(self, source: int, target: int, positions: int) -> None:
        """Give slot ``target`` the first ``positions`` of slot ``source``, and nothing else."""
        ...

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system."""
        ...

    def close(self) -> None:
        """Drop weights and KV memory."""
        ...


class ShardSource(Protocol):
    """Where replicas come from."""

    async def find(self, key: ShardKey) -> ShardInfo:
        """What a lease asks for; raises ``InputError`` where it is not to be had on this node."""
        ...

    async def load(self, key: ShardKey, slots: int, capacity: int) -> Runtime:
        """Make it ready to compute, with KV memory for ``slots`` sessions of ``capacity`` positions."""
        ...


class PeerAgents(Protocol):
    """What a scheduler asks of agents. Raises ``PeerError`` where one cannot be reached."""

    def hold(self, address: Address, term: Term, wanted: Wanted) -> AsyncGenerator[bool, None]:
        """Have it hold a shard; yields whether it serves, on every change, for as long as the lease is this term's.
        What was held stays when this is iterated no more. Raises ``LeaseRefused`` with the agent's reason."""
        ...

    def borrow(self, address: Address, key: ShardKey, promise: Promise) -> AsyncGenerator[bool, None]:
        """As ``hold``, without a term: it is held for as long as this is iterated."""
        ...

    async def release(self, address: Address, term: Term, wanted: Wanted) -> None:
        """Have it let go."""
        ...

    async def policy(self, address: Address) -> tuple[PolicyVersion, str]:
        """The policy that it knows."""
        ...


class Orchestrator(Protocol):
    """Who else decides about nodes, beside the mesh."""

    def follow(self, on: bool) -> None:
        """Whether to keep ``facts`` up to date."""

    def facts(self) -> NomadFacts:
        """As it said last; nothing while we do not follow."""
        ...


class PolicyFile(Protocol):
    """Where a node keeps the policy that it knows."""

    def read(self) -> bytes | None:
        """``None`` if there is none; raises ``OSError``."""
        ...

    def write(self, content: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class LoggedSession:
    """What a token log holds of a session: ``tokens`` up to the first gap or damaged record; ``request`` is what
    an ingress needs to go on with it, ``epoch`` that of the owner that wrote last, or took it over since."""

    prompt: tuple[int, ...]
    tokens: tuple[Token, ...]
    epoch: Epoch
    request: bytes = b""
    route: LayeredRoute | None = None
    """Of that epoch: its stages may still have what they computed."""


class TokenLog(Protocol):
    """The tokens of sessions, kept before a client sees them (rule R6), by their owner, and by the last stage or
    a witness for when the owner's node is lost.

    ``expires_at`` is in seconds since the epoch. Every method raises ``OSError`` when the store
    cannot do it.
    """

    def begin(
        self,
        session: SessionId,
        prompt: Sequence[int],
        expires_at: float,
        epoch: Epoch = NO_EPOCH,
        request: bytes = b"",
        route: LayeredRoute | None = None,
    ) -> None:
        """A session, or a later epoch of one; tokens that are there stay."""
        ...

    def append(self, session: SessionId, tokens: Sequence[Token], copy: bool = False) -> None:
        """Keep tokens at their positions; returns when a killed process would not lose them, nor a power cut where the log
        is to survive one. Of a ``copy``, whose owner has them too, a power cut may take the last moment."""
        ...

    def read(self, session: SessionId) -> LoggedSession | None:
        """``None`` if unknown."""
        ...

    def take(self, session: SessionId, expected: Epoch, wanted: Epoch) -> bool:
        """Change the owner if it is still the ``expected`` one (rule R1)."""
        ...

    def forget(self, session: SessionId) -> None: ...

    def expire(self, now: float) -> Iterable[SessionId]:
        """Forget what has expired and say what that was."""
        ...

    def close(self) -> None: ...
