"""Losses: peers that are gone. A session's owner is told until it acts (rule R1); what is here waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from mesh.adapters.grpc_links import Upstream
from mesh.clock import Clock
from mesh.messages import Cause, Close, HopLost, Message, Open
from mesh.types import Address, LayeredRoute
from node_agent.adapters.placed import Key, Placed, next_stage

_REPORT_AGAIN_NS = 100_000_000
"""Until a report is repeated for the first time: an owner that heard of it has opened another epoch by then."""


class PassClose(Protocol):
    """Tells those behind a stage, but not who is ``lost``."""

    def __call__(self, order: Open, close: Close, lost: Address | None = None) -> None: ...


class Losses:
    """Of one node at ``here``; ``placed`` are its stages by key, as they are now."""

    def __init__(
        self,
        placed: Mapping[Key, Placed],
        here: Address,
        deliver: Callable[[Address, Message], None],
        pass_close: PassClose,
        clock: Clock,
    ) -> None:
        self._placed, self._here, self._clock = placed, here, clock
        self._deliver, self._pass_close = deliver, pass_close

    def insist(self, placed: Placed, stage: int, cause: Cause, detail: str, position: int = 0) -> None:
        """Tell the owner of a session that goes on here when it acts. What breaks one stream may break the next: it is
        told again until then, at ever longer intervals, since an owner that is gone will never."""
        order = placed.order
        if not order.standby:
            placed.report = HopLost(order.session, order.epoch, stage, cause, detail, position)
            placed.report_wait_ns = _REPORT_AGAIN_NS
            self._tell_owner(placed)

    def remind(self, now: int) -> None:
        """Tell owners again that have not acted."""
        for placed in list(self._placed.values()):
            if placed.report is not None and now >= placed.report_ns:
                self._tell_owner(placed)

    def _tell_owner(self, placed: Placed) -> None:
        assert placed.report is not None
        placed.report_ns = self._clock.monotonic_ns() + placed.report_wait_ns
        placed.report_wait_ns *= 2
        self._deliver(placed.order.owner_address, placed.report)

    def downstream(self, address: Address, cause: Cause, reason: str) -> None:
        """A peer that was sent to is lost: the sessions whose next stage it was, or whose owner it was told."""
        for placed in list(self._placed.values()):
            order, following = placed.order, next_stage(placed.order)
            if order.standby:
                continue  # it sends nothing there
            told = following is None or placed.report is not None
            if told and order.owner_address == address and address != self._here:
                # If only the stream broke, its tokens or reports are lost; the owner hears of it over another one.
                if placed.waits:
                    continue
                if placed.report is not None:
                    self._tell_owner(placed)
                else:
                    self.insist(placed, no_stage(order), Cause.STREAM_BROKEN, "a stream to the owner")
                self.wait(placed, reason, lost=address)
            elif following is not None and following.address == address and not placed.waits:
                # What was under way is lost: nothing may follow it over a new link in this epoch.
                placed.replica.book.hush(order.session)
                self.insist(placed, order.stage + 1, cause, reason)

    def upstream(self, upstream: Upstream) -> None:
        """A peer's link to us ended: what it fed waits, with what is computed, for a later epoch."""
        for placed in list(self._placed.values()):
            if placed.upstream is upstream:
                self.wait(placed, "the stage before was lost")

    def wait(self, placed: Placed, why: str, lost: Address | None = None) -> None:
        """Keep a session for a later epoch, here and behind here: its end may have been lost with who is ``lost``."""
        if placed.waits:
            return  # those behind were told, and may be lost as well: telling them again would dial for ever
        order = placed.order
        placed.replica.book.orphan(order.session, self._clock.monotonic_ns())
        self._pass_close(order, Close(order.session, order.epoch, why, waits=True), lost)

    def owing(self) -> set[Address]:
        """Next stages that owe an acknowledgement, or where they stand."""
        found = set()
        for placed in self._placed.values():
            order, following = placed.order, next_stage(placed.order)
            session = placed.replica.book.sessions.get(order.session)
            if session is None or session.last or session.orphan_ns or session.hushed or order.standby:
                continue
            if following is not None and (session.unacknowledged or not session.told):
                found.add(following.address)
        return found


def no_stage(order: Open) -> int:
    """The number after the last stage's: nobody is to blame, and the route may stay."""
    assert isinstance(order.route, LayeredRoute)
    return len(order.route.stages)
