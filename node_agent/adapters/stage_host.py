"""This node's stages: takes what links bring, feeds the replicas, sends on what they compute.

Also the place where "the next stage is on this node" is decided: such a hop is a function call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mesh.adapters.grpc_links import Upstream
from mesh.messages import (
    Ack,
    Beacon,
    Cause,
    Close,
    Frame,
    HopLost,
    Message,
    Open,
    Opened,
    Refused,
    Sampled,
)
from mesh.types import Address, Digest, LayeredRoute, NodeId, SessionId, Token
from node_agent.adapters.metrics import StageMetrics
from node_agent.adapters.replica import Computed, Replica
from node_agent.stage import Refusal, StageSession

log = logging.getLogger(__name__)

ACK_DELAY_S = 0.04
"""Acknowledgements of decode steps are gathered this long: they are off the token's path, and a
message costs the same whether it carries one or twenty."""
BEACON_INTERVAL_S = 0.1
_HOP_SAMPLES = 32
_SENT_KEPT = 1024

Key = tuple[SessionId, int]


class Owner(Protocol):
    """The sessions that this node owns (the ingress side)."""

    def on_message(self, message: Message) -> None: ...


@dataclass(slots=True)
class _Placed:
    """A session at one of our replicas, and who feeds it."""

    replica: Replica
    metrics: StageMetrics
    upstream: Upstream
    order: Open


class StageHost:
    """Routes messages between links, replicas on this node and the sessions it owns."""

    def __init__(
        self,
        node: NodeId,
        address: Address,
        send: Callable[[Address, Message], None],
        refused: Callable[[str], None],
    ) -> None:
        self.node, self.address = node, address
        self.replicas: dict[Digest, Replica] = {}
        self.metrics: dict[Digest, StageMetrics] = {}
        self.owner: Owner | None = None
        self._send_remote, self._count_refused = send, refused
        self._placed: dict[Key, _Placed] = {}
        self._computed: list[Computed] = []
        """Rows not acknowledged yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._sent_ns: OrderedDict[tuple[SessionId, int, int], int] = OrderedDict()
        self._hops: dict[Address, deque[int]] = {}
        self._local = _LocalUpstream(self)

    @property
    def busy(self) -> bool:
        """Some session has a stage here, whoever owns it."""
        return bool(self._placed)

    # -- messages in ---------------------------------------------------------------------------

    def received(self, upstream: Upstream, message: Message) -> None:
        """A message came down a link (or from this node itself)."""
        if isinstance(message, list):
            if message and isinstance(message[0], Frame):
                self._frames(upstream, message)
            elif self.owner is not None:
                self.owner.on_message(message)
            return
        match message:
            case Open():
                self._open(upstream, message)
            case Close():
                self._close(message)
            case _:
                if self.owner is not None:
                    self.owner.on_message(message)

    def replied(self, address: Address, message: Message) -> None:
        """A message came back up a link that we dialled."""
        if isinstance(message, list):
            for ack in message:
                if isinstance(ack, Ack):
                    self._acknowledged(address, ack)

    def deliver(self, address: Address, message: Message) -> None:
        """Send to an agent, which may be this one."""
        if address == self.address:
            self.received(self._local, message)
        else:
            self._send_remote(address, message)

    # -- sessions ------------------------------------------------------------------------------

    def _open(self, upstream: Upstream, order: Open) -> None:
        route = order.route
        if not isinstance(route, LayeredRoute):
            self._refuse(order, Cause.NO_SHARD, "this agent opens layer-wise routes only")
            return
        stage = route.stages[order.stage]
        replica = self.replicas.get(stage.shard)
        if stage.node != self.node or replica is None:
            self._refuse(
                order, Cause.NO_SHARD, f"the shard {stage.shard[:12]} of layers {stage.layers} is not loaded"
            )
            return
        outcome = replica.open(order)
        if isinstance(outcome, Refusal):
            self._refuse(order, outcome.cause, outcome.reason)
            return
        self._placed[order.session, order.stage] = _Placed(
            replica, self.metrics[stage.shard], upstream, order
        )
        if order.stage + 1 < len(route.stages):
            left_ms = max(1, (outcome.deadline_ns - time.monotonic_ns()) // 1_000_000)
            onward = replace(order, stage=order.stage + 1, deadline_ms=left_ms)
            self.deliver(route.stages[onward.stage].address, onward)
        else:
            opened = Opened(order.session, order.epoch, order.stage, outcome.position)
            self.deliver(order.owner_address, opened)

    def _refuse(self, order: Open, cause: Cause, reason: str) -> None:
        self._count_refused(cause.name.lower())
        self.deliver(order.owner_address, Refused(order.session, order.epoch, order.stage, cause, reason))

    def _close(self, close: Close) -> None:
        key = (close.session, close.stage)
        placed = self._placed.get(key)
        if placed is None or close.epoch < placed.order.epoch:
            return
        self._forget(key, placed, close.keep)
        self._pass_close(placed.order, close.reason, close.keep)

    def _pass_close(self, order: Open, reason: str, keep: bool = False) -> None:
        route = order.route
        if isinstance(route, LayeredRoute) and order.stage + 1 < len(route.stages):
            onward = Close(order.session, order.epoch, reason, order.stage + 1, keep)
            self.deliver(route.stages[onward.stage].address, onward)

    def _forget(self, key: Key, placed: _Placed, keep: bool = False) -> None:
        del self._placed[key]
        placed.replica.close_session(key[0], placed.order.epoch, keep)
        placed.replica.dispatch()

    def _report(self, order: Open, stage: int, cause: Cause, detail: str, position: int = 0) -> None:
        """Tell the owner (rule R1); it closes the session everywhere."""
        lost = HopLost(order.session, order.epoch, stage, cause, detail, position)
        self.deliver(order.owner_address, lost)

    def failed(self, session: StageSession, cause: Cause, detail: str) -> None:
        """A replica could not compute a session's row."""
        order = session.order
        placed = self._placed.get((order.session, order.stage))
        if placed is not None:
            self._forget((order.session, order.stage), placed)
        self._report(order, order.stage, cause, detail, session.position)

    # -- frames --------------------------------------------------------------------------------

    def _frames(self, upstream: Upstream, frames: list[Frame]) -> None:
        now = time.monotonic_ns()
        touched: dict[int, Replica] = {}
        for frame in frames:
            placed = self._placed.get((frame.session, frame.stage))
            if placed is None:
                continue  # closed just now, or refused: what follows an Open is dropped with it
            frame.arrived_ns = now
            refusal = placed.replica.accept(frame)
            if refusal is not None:
                self._forget((frame.session, frame.stage), placed)
                self._report(placed.order, frame.stage, refusal.cause, refusal.reason)
                self._pass_close(placed.order, refusal.reason)
                continue
            touched[id(placed.replica)] = placed.replica
        for replica in touched.values():
            replica.dispatch()

    def forward(self, rows: list[Computed]) -> None:
        """A run is done: tokens to their owners, activations to the next stages, acks upstream."""
        tokens: dict[Address, list[Sampled]] = {}
        frames: dict[Address, list[Frame]] = {}
        for row in rows:
            order = row.session.order
            route = order.route
            if not isinstance(route, LayeredRoute):
                continue
            if isinstance(row.output, Token):
                times = (*row.frame.times, row.queue_us, row.compute_us, 0)
                out = row.output
                token = Token(out.position, out.token, out.logprob, out.top, times)
                tokens.setdefault(order.owner_address, []).append(Sampled(order.session, order.epoch, token))
            elif row.output is not None:
                stage = order.stage + 1
                address = route.stages[stage].address
                hop_us = self.hop_us(address)
                frames.setdefault(address, []).append(
                    Frame(
                        order.session,
                        order.epoch,
                        row.frame.position,
                        row.frame.length,
                        row.frame.sample,
                        row.output,
                        stage,
                        (*row.frame.times, row.queue_us, row.compute_us, hop_us),
                    )
                )
        for address, batch in tokens.items():
            self.deliver(address, batch)
        for address, onward in frames.items():
            if address != self.address:
                self._note_sent(onward)
            self.deliver(address, onward)
        self._computed.extend(rows)
        if self._brisk(rows[0]):
            self._loop.call_soon(self._account)
        elif self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY_S, self._account)

    def _note_sent(self, frames: list[Frame]) -> None:
        now = time.monotonic_ns()
        for frame in frames:
            self._sent_ns[frame.session, frame.stage, frame.position + frame.length] = now
        while len(self._sent_ns) > _SENT_KEPT:
            self._sent_ns.popitem(last=False)

    # -- acknowledgements ----------------------------------------------------------------------

    def _brisk(self, row: Computed) -> bool:
        """Whether an acknowledgement cannot wait: prefill needs its credit, others before it runs out."""
        waiting = len(self._computed)
        return row.frame.length > 1 or waiting * 2 >= row.session.order.window * max(1, len(self._placed))

    def _account(self) -> None:
        """Acknowledge and measure what was computed since the last time: off every token's path."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._computed = self._computed, []
        now = time.monotonic_ns()
        owed: dict[int, tuple[Upstream, dict[Key, Ack]]] = {}
        for row in rows:
            order = row.session.order
            placed = self._placed.get((order.session, order.stage))
            if placed is None:
                continue
            placed.metrics.ran(row.frame.length, row.compute_us, row.queue_us)
            held_us = (now - row.frame.arrived_ns) // 1000
            end = row.frame.position + row.frame.length
            # Cumulative: the last of each session says it all.
            _, acks = owed.setdefault(id(placed.upstream), (placed.upstream, {}))
            acks[order.session, order.stage] = Ack(order.session, order.epoch, end, order.stage, held_us)
        for upstream, acks in owed.values():
            upstream.reply(list(acks.values()))

    def _acknowledged(self, address: Address, ack: Ack) -> None:
        sent = self._sent_ns.pop((ack.session, ack.stage, ack.position), None)
        if sent is not None:
            round_us = (time.monotonic_ns() - sent) // 1000
            samples = self._hops.setdefault(address, deque(maxlen=_HOP_SAMPLES))
            samples.append(max(0, (round_us - ack.held_us) // 2))
        if ack.stage == 0:
            if self.owner is not None:
                self.owner.on_message([ack])
            return
        placed = self._placed.get((ack.session, ack.stage - 1))
        if placed is not None:
            placed.replica.acknowledged(ack.session, ack.epoch, ack.position)
            if sent is not None:
                placed.metrics.hopped(self.hop_us(address))

    def hop_us(self, address: Address) -> int:
        """Estimate of the one-way time to an address, microseconds; 0 if unknown.

        The least of the last samples: an acknowledgement that found us computing says nothing of the
        hop.
        """
        return min(self._hops.get(address, (0,)))

    def note_sent(self, address: Address, frames: list[Frame]) -> None:
        """The ingress sends frames itself; note when, so that its hop is measured as well."""
        if address != self.address:
            self._note_sent(frames)

    # -- losses --------------------------------------------------------------------------------

    def downstream_lost(self, address: Address, reason: str) -> None:
        """A link that we dialled broke: every session whose next stage is there is reported."""
        self._hops.pop(address, None)
        for placed in list(self._placed.values()):
            order, route = placed.order, placed.order.route
            if not isinstance(route, LayeredRoute):
                continue
            following = order.stage + 1
            if following < len(route.stages) and route.stages[following].address == address:
                self._report(order, following, Cause.STREAM_BROKEN, reason)
            elif order.owner_address == address and address != self.address:
                # Nobody is left to feed this session or to hear of it.
                self._forget((order.session, order.stage), placed)

    def upstream_lost(self, upstream: Upstream) -> None:
        """A peer's link to us ended: what it fed cannot go on, and the owner closes the rest."""
        for key, placed in list(self._placed.items()):
            if placed.upstream is upstream:
                self._forget(key, placed)
                self._pass_close(placed.order, "the stage before was lost")

    # -- time ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Beacons while there is work, and the end of sessions whose deadline passed."""
        while True:
            await asyncio.sleep(BEACON_INTERVAL_S)
            busy: dict[int, tuple[Upstream, Replica]] = {}
            for placed in self._placed.values():
                if placed.upstream is not self._local and placed.replica.working:
                    busy[id(placed.upstream)] = (placed.upstream, placed.replica)
            for upstream, replica in busy.values():
                upstream.reply(Beacon(replica.runs, replica.book.queued))
            now = time.monotonic_ns()
            for replica in self.replicas.values():
                replica.book.forget_idle(now)
                for session in replica.book.overdue(now):
                    stage = replica.book.sessions[session].order.stage
                    expired = self._placed.get((session, stage))
                    if expired is not None:
                        self._forget((session, stage), expired)


class _LocalUpstream:
    """The stage before is on this node, or this node's ingress."""

    def __init__(self, host: StageHost) -> None:
        self._host = host

    def reply(self, message: Message) -> None:
        self._host.replied(self._host.address, message)
