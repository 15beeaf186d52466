"""What a stage owes for computed rows: acknowledgements upstream and figures, gathered off every token's path."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from mesh.adapters.grpc_links import Upstream
from mesh.clock import Clock
from mesh.messages import Ack
from node_agent.adapters.placed import Key, Placed
from node_agent.adapters.replica import Computed

ACK_DELAY_S = 0.04
"""Acknowledgements of decode steps are gathered this long: a message costs the same whether it carries one or twenty."""


class Acknowledgements:
    """Of one node; ``placed`` are its stages by key, as they are now."""

    def __init__(self, placed: Mapping[Key, Placed], clock: Clock) -> None:
        self._placed, self._clock = placed, clock
        self._loop = asyncio.get_running_loop()
        self._computed: list[Computed] = []
        """Rows not acknowledged yet."""
        self._waiting: dict[Key, int] = {}
        """How many of them are of each session's stage."""
        self._timer: asyncio.TimerHandle | None = None

    def computed(self, rows: Sequence[Computed]) -> None:
        """A run is done; its rows are acknowledged soon."""
        self._computed.extend(rows)
        brisk = False
        for row in rows:
            order = row.session.order
            key = (order.session, order.stage)
            waiting = self._waiting[key] = self._waiting.get(key, 0) + 1
            # Prefill needs its credit, and so does whoever sends steps without waiting for their tokens (an exact replay),
            # before it runs out.
            brisk = brisk or row.frame.length > 1 or waiting * 2 >= order.window
        if brisk:
            self._loop.call_soon(self._account)
        elif self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY_S, self._account)

    def _account(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._computed = self._computed, []
        self._waiting.clear()
        now = self._clock.monotonic_ns()
        owed: dict[int, tuple[Upstream, dict[Key, Ack]]] = {}
        for row in rows:
            order, frame = row.session.order, row.frame
            placed = self._placed.get((order.session, order.stage))
            if placed is None or frame.epoch != order.epoch:
                continue  # of an epoch that is over
            placed.metrics.ran(frame.length, row.compute_us, row.queue_us)
            if order.standby:
                continue
            end = frame.position + frame.length
            # Cumulative: the furthest of each session says it all, be it of guesses that were wrong.
            _, acks = owed.setdefault(id(placed.upstream), (placed.upstream, {}))
            key = (order.session, order.stage)
            if key not in acks or acks[key].position <= end:
                held_us = (now - frame.arrived_ns) // 1000
                acks[key] = Ack(order.session, order.epoch, end, order.stage, held_us)
        for upstream, acks in owed.values():
            upstream.reply(list(acks.values()))
