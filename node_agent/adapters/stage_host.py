"""This node's stages: takes what links bring, feeds the replicas, sends on what they compute.

Also the place where "the next stage is on this node" is decided: such a hop is a function call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from mesh.adapters.grpc_links import Upstream
from mesh.clock import Clock
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
    Witness,
)
from mesh.types import Address, Digest, Epoch, LayeredRoute, NodeId, SessionId, Token
from node_agent.adapters.acknowledgements import Acknowledgements
from node_agent.adapters.losses import Losses, no_stage
from node_agent.adapters.metrics import StageMetrics
from node_agent.adapters.placed import Key, Placed, next_stage
from node_agent.adapters.replays import Replays, stands_at
from node_agent.adapters.replica import Computed, Replica
from node_agent.hop_log import HopLog
from node_agent.hop_times import HopTimes
from node_agent.hop_watch import HopWatch
from node_agent.ports import NO_EPOCH, TokenLog
from node_agent.stage import Refusal, StageSession
from node_agent.token_copies import TokenCopies

log = logging.getLogger(__name__)

BEACON_INTERVAL_S = 0.03
_TIDY_NS = 1_000_000_000
_FENCES_KEPT = _CLOSED_KEPT = 4096
_ORPHAN_NS = 120_000_000_000
"""How long a stage keeps what it computed for a session whose sender or owner is lost."""


class Owner(Protocol):
    """The sessions that this node owns (the ingress side)."""

    def on_message(self, message: Message) -> None: ...

    def awaited(self) -> set[Address]:
        """First stages that owe an acknowledgement."""
        ...

    def silent(self, address: Address, reason: str) -> None:
        """A first stage gives no sign of life."""
        ...


class StageHost:
    """Routes messages between links, replicas on this node and the sessions it owns."""

    def __init__(
        self,
        node: NodeId,
        address: Address,
        send: Callable[[Address, Message], None],
        refused: Callable[[str], None],
        hops: HopLog | None = None,
        tokens: TokenLog | None = None,
        drop: Callable[[Address], None] = lambda address: None,
        clock: Clock = time,
        dial: Callable[[Address], None] = lambda address: None,
    ) -> None:
        """``send`` to a peer, ``drop`` the link to one that is silent, ``dial`` one that may soon be sent to; ``refused`` counts
        sessions by reason."""
        self.node, self.address, self._clock = node, address, clock
        self._copies = TokenCopies(tokens)
        self._fences: OrderedDict[SessionId, Epoch] = OrderedDict()
        """Owners that took sessions over: what an older one wants is refused."""
        self._closed: OrderedDict[Key, Epoch] = OrderedDict()
        """What was closed: an ``Open`` that a frozen or slow stage passes on later must not bring it back."""
        self.hops = hops
        self.watch: HopWatch[Address] = HopWatch()
        self.replicas: dict[Digest, Replica] = {}
        self.metrics: dict[Digest, StageMetrics] = {}
        self.owner: Owner | None = None
        self._send_remote, self._drop_link, self._dial_link, self._count_refused = send, drop, dial, refused
        self._placed: dict[Key, Placed] = {}
        self._acks = Acknowledgements(self._placed, clock)
        self._replays = Replays(self._placed, hops, self.feed, self._damaged)
        self._losses = Losses(self._placed, address, self.deliver, self._pass_close, clock)
        self._hop_times = HopTimes()
        self._local = _LocalUpstream(self)
        self._work = asyncio.Event()
        """There may be something to look after."""

    @property
    def busy(self) -> bool:
        """Some session has a stage here that is fed, whoever owns it."""
        books = ((placed.replica.book, key[0]) for key, placed in self._placed.items())
        return any(i in book.sessions and not book.sessions[i].orphan_ns for book, i in books)

    @property
    def stages(self) -> int:
        """Stages of sessions that are fed here."""
        return sum(replica.book.live for replica in self.replicas.values())

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
            case Witness():
                self._witness(message)
            case _:
                if self.owner is not None:
                    self.owner.on_message(message)

    def replied(self, address: Address, message: Message) -> None:
        """A message came back up a link that we dialled."""
        if address != self.address:
            self.watch.heard(address, self._clock.monotonic_ns())
        if isinstance(message, Opened):
            self._told(message)
        elif isinstance(message, list):
            for ack in message:
                if isinstance(ack, Ack):
                    self._acknowledged(address, ack)

    def deliver(self, address: Address, message: Message) -> None:
        """Send to an agent, which may be this one."""
        if address == self.address:
            self.received(self._local, message)
        else:
            self._send_remote(address, message)

    def feed(self, address: Address, frames: list[Frame]) -> None:
        """Send frames to a stage that acknowledges them; the hop is measured, and its silence noticed."""
        self._work.set()
        if address != self.address:
            self._hop_times.sent(frames, self._clock.monotonic_ns())
        self.deliver(address, frames)

    # -- sessions ------------------------------------------------------------------------------

    def _open(self, upstream: Upstream, order: Open) -> None:
        route = order.route
        if not isinstance(route, LayeredRoute):
            self._refuse(order, Cause.NO_SHARD, "this agent opens layer-wise routes only")
            return
        stage = order.here
        replica = self.replicas.get(stage.shard) if stage else None
        if stage is None or stage.node != self.node or replica is None:
            what = f"the shard {stage.shard[:12]} of layers {stage.layers}" if stage else "that stage"
            self._refuse(order, Cause.NO_SHARD, f"{what} is not loaded")
            return
        fence = self._fences.get(order.session)
        if fence is not None and order.epoch != fence and order.epoch.counter <= fence.counter:
            self._refuse(order, Cause.TAKEN_OVER, f"its owner is {fence.owner}")
            return
        if order.epoch <= self._closed.get((order.session, order.stage), NO_EPOCH):
            self._refuse(order, Cause.STALE_EPOCH, "the session was closed here")
            return
        outcome = replica.open(order)
        if isinstance(outcome, Refusal):
            self._refuse(order, outcome.cause, outcome.reason)
            return
        placed = Placed(replica, self.metrics[stage.shard], upstream, order)
        before = self._placed.get((order.session, order.stage))
        self._placed[order.session, order.stage] = placed
        self._work.set()
        if self.hops is not None and not outcome.last:
            self.hops.open(order.session, stage.shard, outcome.position)
        self._dial_ahead(order)
        if order.standby:
            return
        if outcome.last and order.request and order.owner_address != self.address:
            self._copies.opened(order)
        if order.stage + 1 < len(route.stages):
            left_ms = max(1, (outcome.deadline_ns - self._clock.monotonic_ns()) // 1_000_000)
            onward = replace(order, stage=order.stage + 1, deadline_ms=left_ms)
            self.deliver(route.stages[onward.stage].address, onward)
            standby = order.standby_of(onward.stage)
            if standby is not None:
                self.deliver(standby.address, replace(onward, standby=True))
            if order.asks and not outcome.position:
                # It wants everything, whatever those behind it have: its sender need not wait for them.
                upstream.reply(stands_at(order, 0))
        elif order.asks:
            upstream.reply(stands_at(order, outcome.position))
        else:
            opened = Opened(order.session, order.epoch, order.stage, outcome.position)
            self.deliver(order.owner_address, opened)
        if before is not None:
            self._leave(before, order)

    def _leave(self, before: Placed, order: Open) -> None:
        """The next stage is another one now. The owner tells the old one as well, but may have done so before our Open of that epoch
        arrived there; who was lost behind a broken stream got nothing late, and would only be dialled in vain. A standby that is none
        any more is told at once: the owner tells it later, and may be lost by then."""
        place = order.stage + 1
        spare, stay = before.order.standby_of(place), (order.standby_of(place), next_stage(order))
        if spare is not None and spare not in stay and not before.order.standby:
            gone = Close(order.session, order.epoch, "the session moved", place, alone=True)
            self.deliver(spare.address, gone)
        told = before.report
        lost = told is not None and told.stage == order.stage + 1 and told.cause is Cause.STREAM_BROKEN
        if next_stage(before.order) != next_stage(order) and not lost:
            left = Close(order.session, before.order.epoch, "the session moved", waits=True)
            self._pass_close(before.order, left)

    def _dial_ahead(self, order: Open) -> None:
        """Have links for what is told when something is lost, or, of a standby, when it takes its stage: a session that waits should
        not wait for a handshake as well."""
        following = next_stage(order)
        for address in (order.owner_address, following.address if following is not None else self.address):
            if address != self.address:
                self._dial_link(address)

    def _witness(self, message: Witness) -> None:
        fence = self._fences.get(message.session)
        if fence is None or message.epoch >= fence:
            self._copies.witnessed(message)

    def fence(self, session: SessionId, epoch: Epoch) -> None:
        """Another ingress owns a session from now on: the old one is told, its stages here wait for the new one."""
        self._fences[session] = epoch
        while len(self._fences) > _FENCES_KEPT:
            self._fences.popitem(last=False)
        now = self._clock.monotonic_ns()
        for key, placed in self._placed.items():
            order = placed.order
            if key[0] != session or order.epoch >= epoch:
                continue
            placed.replica.book.orphan(session, now)
            reason = f"its owner is {epoch.owner}"
            refused = Refused(session, order.epoch, order.stage, Cause.TAKEN_OVER, reason)
            self.deliver(order.owner_address, refused)

    def _told(self, opened: Opened) -> None:
        """A stage behind ours, or behind the owner, told where it stands."""
        if opened.stage > 0:
            self._replays.told(opened)
        elif self.owner is not None:
            self.owner.on_message(opened)

    def _damaged(self, placed: Placed, position: int) -> None:
        """A session's hop log cannot be read."""
        placed.replica.book.hush(placed.order.session)  # its owner may be here, and end it at once
        self._losses.insist(placed, no_stage(placed.order), Cause.NO_CACHE, "a hop log is damaged", position)

    def _refuse(self, order: Open, cause: Cause, reason: str) -> None:
        self._count_refused(cause.name.lower())
        if order.standby:
            return  # then there is none: the session does without
        self.deliver(order.owner_address, Refused(order.session, order.epoch, order.stage, cause, reason))

    def _close(self, close: Close) -> None:
        key = (close.session, close.stage)
        placed = self._placed.get(key)
        if close.waits:
            if placed is not None and close.epoch == placed.order.epoch:
                self._losses.wait(placed, close.reason)
            return
        self._closed[key] = max(close.epoch, self._closed.pop(key, NO_EPOCH))
        while len(self._closed) > _CLOSED_KEPT:
            self._closed.popitem(last=False)
        if placed is None or close.epoch < placed.order.epoch:
            return
        self._forget(key, placed, close.keep)
        # Those behind this stage may know nothing of a later epoch: what this one passed on late opened them.
        self._pass_close(placed.order, replace(close, alone=False, waits=close.alone))

    def _pass_close(self, order: Open, close: Close, lost: Address | None = None) -> None:
        """Tell the next stage and its standby, but not who is ``lost``."""
        following = next_stage(order)
        if following is None or order.standby:
            return
        onward = replace(close, epoch=order.epoch, stage=order.stage + 1)
        if following.address != lost:
            self.deliver(following.address, onward)
        standby = order.standby_of(onward.stage)
        if standby is not None and standby.address != lost:
            self.deliver(standby.address, replace(onward, keep=False, alone=True))

    def _forget(self, key: Key, placed: Placed, keep: bool = False) -> None:
        del self._placed[key]
        if placed.replica.close_session(key[0], placed.order.epoch, keep) and self.hops is not None:
            self.hops.forget(key[0], placed.replica.book.shard.digest)
        placed.replica.dispatch()

    def _report(self, order: Open, stage: int, cause: Cause, detail: str, position: int = 0) -> None:
        """Tell the owner (rule R1) of a session that has ended here."""
        if not order.standby:
            lost = HopLost(order.session, order.epoch, stage, cause, detail, position)
            self.deliver(order.owner_address, lost)

    def failed(self, session: StageSession, cause: Cause, detail: str) -> None:
        """A replica could not compute a session's row, or has not what it was to begin with (``NO_CACHE``): it may begin anew."""
        order = session.order
        placed = self._placed.get((order.session, order.stage))
        if placed is not None:
            self._forget((order.session, order.stage), placed)
        if cause is Cause.NO_CACHE:
            self._refuse(order, cause, detail)
        else:
            self._report(order, order.stage, cause, detail, session.position)

    # -- frames --------------------------------------------------------------------------------

    def _frames(self, upstream: Upstream, frames: list[Frame]) -> None:
        now = self._clock.monotonic_ns()
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
                self._pass_close(placed.order, Close(frame.session, frame.epoch, refusal.reason))
                continue
            touched[id(placed.replica)] = placed.replica
        for replica in touched.values():
            replica.dispatch()

    def forward(self, rows: list[Computed]) -> None:
        """A run is done: tokens to their owners, activations to the next stages, acks upstream."""
        tokens: dict[Address, list[Sampled]] = {}
        self._log_tokens(rows)
        frames: dict[Address, list[Frame]] = {}
        copies: dict[Address, list[Frame]] = {}
        for row in rows:
            order, following = row.session.order, next_stage(row.session.order)
            if row.session.last and row.output:
                tokens.setdefault(order.owner_address, []).extend(_sampled(row))
            if following is None or not row.session.told:
                continue
            frame = self._onward(row, following.address)
            if frame is None:
                continue
            frames.setdefault(following.address, []).append(frame)
            standby = order.standby_of(frame.stage)
            if standby is not None:
                copies.setdefault(standby.address, []).append(frame)
        for address, batch in tokens.items():
            self.deliver(address, batch)
        for address, onward in frames.items():
            self.feed(address, onward)
        for address, onward in copies.items():
            self.deliver(address, onward)
        if self.hops is not None:
            for row in rows:
                if not row.session.last:
                    self._log_output(self.hops, row)
        self._acks.computed(rows)

    def _log_output(self, hops: HopLog, row: Computed) -> None:
        session, shard = row.session.order.session, self._shard_of(row.session)
        # Steps stay steps, however they came: another replay of them is to know.
        size = 1 if row.frame.steps else row.frame.length
        for at in range(0, row.frame.length, size):
            hops.append(session, shard, row.frame.position + at, row.output[at : at + size])

    def _onward(self, row: Computed, address: Address) -> Frame | None:
        """What the next stage, at ``address``, is given of a row; none where it has that already."""
        order, given = row.session.order, row.frame
        position, output = given.position, row.output
        known = row.session.onward - position
        if known >= len(output):
            return None
        if known > 0:
            position, output = row.session.onward, output[known:]
        times = (*given.times, row.queue_us, row.compute_us, self._hop_times.one_way_us(address))
        return Frame(
            order.session,
            order.epoch,
            position,
            len(output),
            given.sample,
            output,
            order.stage + 1,
            times,
            given.drafts,
            given.steps and len(output) > 1,
        )

    def _log_tokens(self, rows: list[Computed]) -> None:
        for row in rows:
            order = row.session.order
            if row.session.last and row.output and order.request and order.owner_address != self.address:
                self._copies.sampled(order, row.output)

    def _shard_of(self, session: StageSession) -> Digest:
        here = session.order.here
        assert here is not None
        return here.shard

    # -- acknowledgements ----------------------------------------------------------------------

    def _acknowledged(self, address: Address, ack: Ack) -> None:
        measured = self._hop_times.acknowledged(address, ack, self._clock.monotonic_ns())
        if ack.stage == 0:
            if self.owner is not None:
                self.owner.on_message([ack])
            return
        placed = self._placed.get((ack.session, ack.stage - 1))
        if placed is not None:
            placed.replica.acknowledged(ack.session, ack.epoch, ack.position)
            self._replays.go_on(placed)
            if measured:
                placed.metrics.hopped(self._hop_times.one_way_us(address))

    def hop_us(self, address: Address) -> int:
        """Estimate of the one-way time to an address, microseconds; 0 if unknown."""
        return self._hop_times.one_way_us(address)

    # -- losses --------------------------------------------------------------------------------

    def downstream_lost(self, address: Address, reason: str) -> None:
        """A link that we dialled broke: every session whose next stage is there is reported."""
        self._hop_times.forget(address)
        self.watch.forget(address)
        self._losses.downstream(address, Cause.STREAM_BROKEN, reason)

    def upstream_lost(self, upstream: Upstream) -> None:
        """A peer's link to us ended: what it fed waits, with what is computed, for a later epoch."""
        self._losses.upstream(upstream)

    # -- time ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Beacons while there is work, peers that owe a sign of life, and the end of sessions that are overdue."""
        tidied = 0
        while True:
            if self._placed or self._owing():
                await asyncio.sleep(BEACON_INTERVAL_S)
                self._beacon()
                self._look(self._clock.monotonic_ns())
            else:
                self.watch.rest()
                await self._rest()
            now = self._clock.monotonic_ns()
            if now - tidied >= _TIDY_NS:
                tidied = now
                self._tidy(now)

    async def _rest(self) -> None:
        """Until there is work: wake-ups cost a battery more than sessions that never come, and take processors from whoever else
        computes there. What is kept of sessions that are over must be let go of in time."""
        self._work.clear()
        kept = any(replica.book.kept for replica in self.replicas.values())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TIDY_NS / 1e9 if kept else None):
                await self._work.wait()

    def _beacon(self) -> None:
        busy: dict[int, tuple[Upstream, Replica]] = {}
        for placed in self._placed.values():
            session = placed.replica.book.sessions.get(placed.order.session)
            # Whoever waits for the next stage's answer says so, or it would be taken for silent itself.
            waits = session is not None and not session.told
            if placed.upstream is not self._local and (waits or placed.replica.working):
                busy[id(placed.upstream)] = (placed.upstream, placed.replica)
        for upstream, replica in busy.values():
            upstream.reply(Beacon(replica.runs, replica.book.queued))

    def _owing(self) -> set[Address]:
        return self.owner.awaited() if self.owner is not None else set()

    def _look(self, now: int) -> None:
        """Report the next stages that are silent (rule R1: the owner decides)."""
        self._losses.remind(now)
        owing = self._owing() | self._losses.owing()
        owing.discard(self.address)
        for address, silent_ns in self.watch.look(owing, now, int(BEACON_INTERVAL_S * 1e9)):
            reason = f"no sign of life for {silent_ns / 1e6:.0f} ms"
            log.warning("%s is silent: %s", address, reason)
            self._drop_link(address)
            self._losses.downstream(address, Cause.SILENT, reason)
            if self.owner is not None:
                self.owner.silent(address, reason)

    def _tidy(self, now: int) -> None:
        for replica in self.replicas.values():
            replica.book.forget_idle(now)
        for key, placed in list(self._placed.items()):
            session = placed.replica.book.sessions.get(key[0])
            # Evicted, or open under another place of a later route; or its time is up.
            if session is None or now >= session.deadline_ns or _abandoned(session, now):
                self._forget(key, placed)
                if session is None and self.hops is not None:
                    self.hops.forget(key[0], placed.replica.book.shard.digest)


def _sampled(row: Computed) -> Iterator[Sampled]:
    """What the owner is told of a last stage's row."""
    times = (*row.frame.times, row.queue_us, row.compute_us, 0)
    order = row.session.order
    for token in row.output:
        yield Sampled(
            order.session, order.epoch, Token(token.position, token.token, token.logprob, token.top, times)
        )
        times = ()  # they share one step: it is told once


def _abandoned(session: StageSession, now: int) -> bool:
    return session.orphan_ns > 0 and now - session.orphan_ns > _ORPHAN_NS


class _LocalUpstream:
    """The stage before is on this node, or this node's ingress."""

    def __init__(self, host: StageHost) -> None:
        self._host = host

    def reply(self, message: Message) -> None:
        self._host.replied(self._host.address, message)
