"""Replays: a next stage that lost what it had computed is fed again, from this stage's hop log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mesh.messages import Frame, Open, Opened
from mesh.types import Address, Digest
from node_agent.adapters.placed import Key, Placed, next_stage
from node_agent.hop_log import HopLog
from node_agent.stage import StageSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MERGED_MAX = 128
"""Positions of a replay's frame when it need not be exact; of a message else."""
_FRAMES_MAX = 8
"""Frames of a message: steps that are replayed one by one take less to compute than a message each takes to carry."""


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
        """Replay the hop log to the next stage, as far as there is credit: a message a turn of the loop."""
        order, book = placed.order, placed.replica.book
        session, following = book.sessions.get(order.session), next_stage(order)
        if session is None or session.order is not order or following is None or not session.told:
            return
        frames: list[Frame] = []
        count = 0
        while session.resending is not None and session.credit > 0:
            if len(frames) >= _FRAMES_MAX or count >= _MERGED_MAX:
                break
            start = session.resending
            payload = self._logged(session, start, book.shard.digest)
            if payload is None:
                if self._hops is not None:
                    self._hops.forget(order.session, book.shard.digest)
                self._damaged(placed, start)
                return
            count += len(payload)
            frames.append(
                Frame(order.session, order.epoch, start, len(payload), False, payload, order.stage + 1)
            )
            book.resent(session, start + len(payload))
        if frames:
            self._feed(following.address, frames)
            self._loop.call_soon(self.go_on, placed)

    def _logged(self, session: StageSession, start: int, shard: Digest) -> NDArray[np.float32] | None:
        """The frame of the hop log at ``start``: as it first ran, or several in one; none where it cannot be read."""
        assert self._hops is not None
        position, count = start, 0
        pieces: list[NDArray[np.float32]] = []
        while position < session.position and (not pieces or count < _MERGED_MAX):
            piece = self._hops.frame(session.order.session, shard, position)
            if piece is None:
                return None
            # The last one may end in guesses.
            piece = piece[: session.position - position]
            if session.order.exact:
                return piece
            pieces.append(piece)
            position += len(piece)
            count += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stands_at(order: Open, position: int, short: int = 0, replayed: int = 0) -> Opened:
    """What a stage tells its sender of an ``Open`` that asks."""
    short += position < order.position
    return Opened(order.session, order.epoch, order.stage, position, short, replayed)
