"""The vocabulary: one meaning per word, frozen, standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

NodeId = NewType("NodeId", str)
"""Stable name of a node, kept in its data directory."""

SessionId = NewType("SessionId", str)
"""32 lower-case hex digits, drawn by the owner."""

Address = NewType("Address", str)
"""``host:port`` of an agent's mesh port (gRPC)."""

Digest = NewType("Digest", str)
"""Lower-case hex SHA-256."""


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Layers ``[start, end)`` of a model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"layer range [{self.start}, {self.end}) is empty or negative")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """Version of a session's route. Frames of an older one are stale (rule R1)."""

    counter: int
    owner: NodeId


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """A scheduler's leadership. What an older one wants is refused."""

    counter: int
    leader: NodeId


@dataclass(frozen=True, slots=True, order=True)
class PolicyVersion:
    """Of the policy that a cluster follows; ``writer`` is the node at which it was applied."""

    counter: int
    writer: NodeId


NO_POLICY = PolicyVersion(0, NodeId(""))


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by name and by the digest of the file it was made from."""

    name: str
    digest: Digest

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What placement and routing need to know of a model."""

    ref: ModelRef
    layers: int
    width: int
    """Floats per position that cross a hop."""
    vocabulary: int
    context_max: int
    """Positions that the model was trained for."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as adverts and leases name it; ``digest`` is that of its manifest's contents."""

    model: ModelShape
    layers: LayerRange
    runtime: str
    quantization: str
    digest: Digest
    weight_bytes: int
    kv_bytes_per_token: int

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.end == self.model.layers

    def __str__(self) -> str:
        return f"{self.model.ref.name}:{self.layers}/{self.runtime}-{self.quantization}"


@dataclass(frozen=True, slots=True, order=True)
class Stage:
    """One replica's turn in a route."""

    node: NodeId
    address: Address
    layers: LayerRange
    shard: Digest


Standbys = tuple[Stage | None, ...]
"""By place in a route, who is fed what its stage is fed, to take over at once; ``None`` where nobody is."""


@dataclass(frozen=True, slots=True)
class LayeredRoute:
    """Stages in order; together they cover every layer once."""

    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        return " -> ".join(f"{s.node}[{s.layers}]" for s in self.stages)


@dataclass(frozen=True, slots=True)
class EnsembleRoute:
    """Members that answer the same request, and how their answers combine."""

    members: tuple[LayeredRoute, ...]
    combine: str


Route = LayeredRoute | EnsembleRoute


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage turns logits into a token (OpenAI's meanings).

    ``seed`` is the request's, or one drawn at the ingress; together with ``choice`` and the
    position it alone decides every random number (rule R5).
    """

    seed: int
    choice: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1
    """-1 none; 0 the chosen token's; k that and the k likeliest."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the model's natural-log probability of it."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token and its place in the session."""

    position: int
    """Position in the session that this token takes (prompt length + generated so far)."""
    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    times: tuple[int, ...] = field(default=(), compare=False)
    """Microseconds, three numbers a stage: queued (from arrival to the start of the run), computed,
    and on the hop onward (an estimate from acknowledgements; 0 where unknown)."""
