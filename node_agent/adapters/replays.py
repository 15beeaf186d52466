"""Replays: a next stage that lost what it had computed is fed again, from this stage's hop log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mesh.messages import STEPS_MAX, Frame, Open, Opened
from mesh.types import Address, Digest
from node_agent.adapters.placed import Key, Placed, next_stage
from node_agent.hop_log import HopLog
from node_agent.stage import StageSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MERGED_MAX = 128
"""Positions of a replay's frame when it need not be exact; steps go by ``STEPS_MAX``."""


class Replays:
    """Of one node; ``placed`` are its stages by key, as they are now."""

    def __init__(
        self,
        placed: Mapping[Key, Placed],
        hops: HopLog | None,
        feed: Callable[[Address, list[Frame]], None],
        damaged: Callable[[Placed, int], None],
    ) -> None:
        """``feed`` sends frames; ``damaged`` hears of a session whose log cannot be read at a position."""
        self._placed, self._hops = placed, hops
        self._feed, self._damaged = feed, damaged
        self._loop = asyncio.get_running_loop()

    def told(self, opened: Opened) -> None:
        """A stage behind ours told where it stands: replay to it, tell our own sender."""
        placed = self._placed.get((opened.session, opened.stage - 1))
        if placed is None:
            return
        order, book = placed.order, placed.replica.book
        session = book.sessions.get(opened.session)
        if session is None or opened.position > order.position:
            return
        reached, shard = session.position, book.shard.digest
        logged = self._hops.whole_from(opened.session, shard, reached) if self._hops is not None else None
        wanted = book.told(opened.session, opened.epoch, opened.position, logged)
        if wanted is None:
            return
        if self._hops is not None:
            self._hops.open(opened.session, shard, wanted)
        resent = max(opened.replayed, wanted - opened.position)
        placed.upstream.reply(stands_at(order, wanted, opened.short, resent))
        self._loop.call_soon(self.go_on, placed)
        placed.replica.dispatch()

    def go_on(self, placed: Placed) -> None:
        """Replay the hop log to the next stage, as far as there is credit: a frame a turn of the loop."""
        order, book = placed.order, placed.replica.book
        session, following = book.sessions.get(order.session), next_stage(order)
        if session is None or session.order is not order or following is None:
            return
        if not session.told or session.resending is None or session.credit <= 0:
            return
        start = session.resending
        payload, steps = self._logged(session, start, book.shard.digest)
        if payload is None:
            if self._hops is not None:
                self._hops.forget(order.session, book.shard.digest)
            self._damaged(placed, start)
            return
        frame = Frame(
            order.session, order.epoch, start, len(payload), False, payload, order.stage + 1, steps=steps
        )
        book.resent(session, start + len(payload))
        self._feed(following.address, [frame])
        self._loop.call_soon(self.go_on, placed)

    def _logged(
        self, session: StageSession, start: int, shard: Digest
    ) -> tuple[NDArray[np.float32] | None, bool]:
        """The frame of the hop log at ``start``: as it first ran, or several in one; none where it cannot be read. And whether
        it is several steps, to be computed with the bits of steps."""
        assert self._hops is not None
        order = session.order
        position = start
        pieces: list[NDArray[np.float32]] = []
        most = _MERGED_MAX if not order.exact else STEPS_MAX if order.steps else 1
        while position < session.position and position - start < most:
            piece = self._hops.frame(order.session, shard, position)
            if piece is None:
                return None, False
            # The last one may end in guesses.
            piece = piece[: session.position - position]
            whole = order.exact and len(piece) > 1  # was no step (rule R3)
            if whole and pieces:
                break
            pieces.append(piece)
            position += len(piece)
            if whole:
                break
        steps = order.exact and len(pieces) > 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces), steps


def stands_at(order: Open, position: int, short: int = 0, replayed: int = 0) -> Opened:
    """What a stage tells its sender of an ``Open`` that asks."""
    short += position < order.position
    return Opened(order.session, order.epoch, order.stage, position, short, replayed)
