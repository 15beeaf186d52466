"""Which sessions' KV caches are at their stages, or may still be, by the tokens that they hold. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mesh.session_events import SessionOrder
from mesh.types import Digest, LayeredRoute, SessionId

KEPT_MAX = 64
WORTH_POSITIONS = 32
"""Fewer are computed again as fast: of a prefix, and of what a kept session has beyond it."""


@dataclass(frozen=True, slots=True)
class KeptSession:
    """``tokens`` have been computed at every stage of ``route``, or will be by a session that runs."""

    session: SessionId
    model: Digest
    tokens: tuple[int, ...]
    route: LayeredRoute
    canonical: int = 0
    """Of those positions, how many have the bits that they have in any session of that prompt."""


class PrefixBook:
    """The last finished sessions; the oldest are forgotten."""

    def __init__(self) -> None:
        self._kept: OrderedDict[SessionId, KeptSession] = OrderedDict()

    def add(self, kept: KeptSession) -> None:
        """A session ended well and its stages were asked to keep it."""
        self._kept[kept.session] = kept
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def longest(
        self, model: Digest, prompt: Sequence[int], running: Iterable[KeptSession] = (), grid: int = 0
    ) -> tuple[KeptSession, int] | None:
        """The session that shares most of a prompt, of the finished and those that are ``running``, and how many positions; at
        least one position is left to compute, for its logits are wanted. With a ``grid``, only what has canonical bits,
        and a multiple of so many positions: chunks of a prompt begin there."""
        best: tuple[KeptSession, int] | None = None
        for kept in (*running, *self._kept.values()):
            if kept.model == model:
                shared = _shared(kept.tokens, prompt)
                if grid:
                    shared = min(shared, kept.canonical) // grid * grid
                if shared >= WORTH_POSITIONS and (best is None or shared >= best[1]):
                    best = kept, shared
        return best

    def begin(self, order: SessionOrder, kept: KeptSession, positions: int) -> SessionOrder:
        """The order of a session that begins with so many positions of another; where that has little more, its cache becomes the
        new one's."""
        if len(kept.tokens) - positions < WORTH_POSITIONS:
            self.drop(kept.session)
        elif kept.session in self._kept:
            self._kept.move_to_end(kept.session)
        return replace(order, resume=(kept.session, positions), canonical=positions <= kept.canonical)

    def drop(self, session: SessionId) -> None:
        """Its stages have it no longer."""
        self._kept.pop(session, None)


def _shared(tokens: tuple[int, ...], prompt: Sequence[int]) -> int:
    most = min(len(tokens), len(prompt) - 1)
    if tokens[:most] == tuple(prompt[:most]):
        return most
    return next(i for i in range(most) if tokens[i] != prompt[i])
