"""Which finished sessions' KV caches may still be at their stages, by the tokens that they hold. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.types import Digest, LayeredRoute, SessionId

KEPT_MAX = 64
WORTH_POSITIONS = 32
"""A shorter prefix is computed again as fast."""


@dataclass(frozen=True, slots=True)
class KeptSession:
    """``tokens`` have been computed at every stage of ``route``."""

    session: SessionId
    model: Digest
    tokens: tuple[int, ...]
    route: LayeredRoute


class PrefixBook:
    """The last finished sessions; the oldest are forgotten."""

    def __init__(self) -> None:
        self._kept: OrderedDict[SessionId, KeptSession] = OrderedDict()

    def add(self, kept: KeptSession) -> None:
        """A session ended well and its stages were asked to keep it."""
        self._kept[kept.session] = kept
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def longest(self, model: Digest, prompt: Sequence[int]) -> tuple[KeptSession, int] | None:
        """The session that shares most of a prompt, and how many positions; at least one position is left
        to compute, for its logits are wanted."""
        best: tuple[KeptSession, int] | None = None
        for kept in self._kept.values():
            if kept.model == model:
                shared = _shared(kept.tokens, prompt)
                if shared >= WORTH_POSITIONS and (best is None or shared >= best[1]):
                    best = kept, shared
        return best

    def take(self, session: SessionId) -> None:
        """Its cache becomes another session's."""
        self._kept.pop(session, None)


def _shared(tokens: tuple[int, ...], prompt: Sequence[int]) -> int:
    most = min(len(tokens), len(prompt) - 1)
    if tokens[:most] == tuple(prompt[:most]):
        return most
    return next(i for i in range(most) if tokens[i] != prompt[i])
