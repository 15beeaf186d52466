"""Runs the sessions that this node owns: the pure ``Session`` on asyncio, links and token log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mesh.clock import Clock
from mesh.errors import Full, MeshError, NoRoute, Unavailable
from mesh.messages import DRAFTS, STEPS, Cause, Frame, HopLost, Message, Refused, Witness
from mesh.retry_budget import RetryBudget
from mesh.session import Session
from mesh.session_events import (
    Cancelled,
    ClientBusy,
    ClientReady,
    Effect,
    EmitToken,
    Ended,
    Event,
    Finish,
    KeepToken,
    NeedRoute,
    Rerouted,
    SendClose,
    SendFrame,
    SendOpen,
    SessionOrder,
    Tick,
)
from mesh.session_states import State
from mesh.types import Address, Digest, Epoch, LayeredRoute, NodeId, SessionId, Token
from node_agent.adapters.metrics import AgentMetrics
from node_agent.adapters.session_accounts import SessionAccounts
from node_agent.adapters.stage_host import StageHost
from node_agent.ports import TokenLog
from node_agent.prefixes import KeptSession, PrefixBook
from node_agent.trace import SessionTrace
from scheduler.cluster import ClusterSnapshot, Node
from scheduler.route import Group, RoutePlan
from scheduler.routing import mixed, troubled

log = logging.getLogger(__name__)

_TOLD_LATE_S = 0.3
"""How long stages that a session left wait to be told."""
TICK_S = 0.1
TRACES_KEPT = 256
_RECORD_LAG_S = 0.6
"""A record may be so old when it comes."""
_LEFT_KEPT = 1024
CLIENT_BEHIND_MAX = 64
"""Tokens that may wait for a client before its session, and no other, is paused."""
_CLIENT_BEHIND_RESUME = 8


Replan = Callable[[Session, RoutePlan, frozenset[NodeId]], RoutePlan]
"""Another route for a session that runs, without some nodes; raises ``NoRoute``."""


class SessionHandle:
    """One running session as the API sees it: an iterator of tokens, then a finish or an error."""

    def __init__(
        self, driver: SessionDriver, session: Session, trace: SessionTrace, plan: RoutePlan, replan: Replan
    ) -> None:
        self.session, self.trace = session, trace
        self.plan, self.replan = plan, replan
        self._driver = driver
        self._waiting: asyncio.Queue[Token | Ended] = asyncio.Queue()
        self.witness: Address | None = None
        """Who keeps a copy of the tokens, where the last stage does not."""
        self.pending: deque[Effect] = deque()
        """Effects that wait for the next step to be on its way."""
        self.ended: Ended | None = None

    def push(self, item: Token | Ended) -> None:
        """From the driver: a token for the client, or the end."""
        self._waiting.put_nowait(item)
        if isinstance(item, Token) and self._waiting.qsize() == CLIENT_BEHIND_MAX:
            self._driver.handle(self.session, ClientBusy())

    async def tokens(self) -> AsyncIterator[Token]:
        """Tokens in order; raises the session's error. ``finish`` is set when it ends well."""
        while True:
            item = await self._waiting.get()
            if isinstance(item, Ended):
                self.ended = item
                if item.error is not None:
                    raise item.error
                return
            if self._waiting.qsize() == _CLIENT_BEHIND_RESUME:
                self._driver.handle(self.session, ClientReady())
            yield item

    @property
    def finish(self) -> Finish | None:
        return self.ended.finish if self.ended else None

    def stop(self, finish: Finish = Finish.CANCELLED) -> None:
        """Free the session along its route at once; harmless when it has ended."""
        self._driver.handle(self.session, Cancelled(finish))


class SessionDriver:
    """All sessions owned by this node, at most ``sessions_max`` of them."""

    def __init__(
        self,
        host: StageHost,
        token_log: TokenLog,
        metrics: AgentMetrics,
        sessions_max: int,
        keep_s: float,
        view: Callable[[], ClusterSnapshot],
        clock: Clock = time,
    ) -> None:
        self._clock = clock
        self._host, self._log = host, token_log
        self._accounts = SessionAccounts(metrics)
        self._sessions_max, self._keep_s = sessions_max, keep_s
        self._view, self._looked_at = view, ClusterSnapshot()
        self.learner = self._accounts.learner
        self.prefixes = PrefixBook()
        self.ours_told: dict[tuple[NodeId, Digest], int] = {}
        """Of the sessions in each replica's record, ours."""
        self._left: deque[tuple[float, tuple[NodeId, Digest]]] = deque(maxlen=_LEFT_KEPT)
        self._running: dict[SessionId, SessionHandle] = {}
        self.traces: OrderedDict[SessionId, SessionTrace] = OrderedDict()
        self.draining = False
        self._begun = asyncio.Event()
        self._budget = RetryBudget(sessions_max)
        self._loop = asyncio.get_running_loop()
        self._frames: dict[Address, list[Frame]] = {}
        self._copies: dict[Address, list[Frame]] = {}
        """For standbys of first stages."""
        self._written_later: list[SessionHandle] = []

    def __len__(self) -> int:
        return len(self._running)

    def start(
        self,
        order: SessionOrder,
        plan: RoutePlan,
        model: str,
        replan: Replan,
        taken: tuple[Epoch, tuple[Token, ...]] | None = None,
    ) -> SessionHandle:
        """Begin a session; raises ``Full`` when this ingress runs as many as it may. ``replan`` is asked when
        a stage is lost or should be left. ``taken``: go on with one that has these tokens, in that epoch."""
        if self.draining:
            raise Unavailable("this agent is draining; ask another", retry_after_s=5)
        if len(self._running) >= self._sessions_max:
            self._accounts.refused()
            raise Full(f"this agent runs {len(self._running)} sessions already, its limit")
        now = self._clock.monotonic_ns()
        route = plan.route
        epoch, tokens = taken or (Epoch(1, self._host.node), ())
        order = replace(order, expires_ms=int((self._clock.time() + self._keep_s) * 1000))
        known = (epoch, tuple(t.token for t in tokens))
        session = Session(order, route, self._host.node, self._host.address, now, known, plan.standbys)
        self._hold_to_features(session, route)
        trace = SessionTrace(
            order.session,
            model,
            route,
            len(order.prompt),
            now,
            plan.ttft_us / 1000,
            plan.tpot_us / 1000,
            plan.ways_us,
            cached_tokens=order.resume[1] if order.resume is not None else 0,
            waited=order.resume is not None and order.resume[0] in self._running,
            mixed=mixed(plan.group),
            learned=self.learner.learned,
        )
        handle = SessionHandle(self, session, trace, plan, replan)
        try:
            self._log.begin(order.session, order.prompt, order.expires_ms / 1000, epoch, order.request, route)
            self._log.append(order.session, tokens)
        except OSError as error:
            raise Unavailable(f"the token log cannot be written: {error}", retry_after_s=5) from error
        for token in tokens:
            handle.push(token)
        self._choose_witness(handle)
        self._running[order.session] = handle
        self._begun.set()
        self.traces[order.session] = trace
        while len(self.traces) > TRACES_KEPT:
            self.traces.popitem(last=False)
        self._accounts.owned(len(self._running))
        self._carry_out(handle, session.start(now))
        self._feed()
        return handle

    def begins_alike(
        self, model: Digest, order: SessionOrder, sharing: str, fixed: bool
    ) -> tuple[KeptSession, int] | None:
        """Another session that one may begin with, and for how many positions. ``sharing``: the setting ``prefix_cache``; ``fixed``:
        its text must not depend on what ran before."""
        if sharing == "off":
            return None
        grid = order.chunk if sharing == "auto" and fixed else 0
        return self.prefixes.longest(model, order.prompt, self._prompts(), grid)

    def _prompts(self) -> Iterator[KeptSession]:
        """What the sessions that run have at their stages, or soon have."""
        for handle in self._running.values():
            if handle.session.state in (State.PREFILL, State.DECODE) and handle.plan.group is not None:
                yield _at_stages(handle, handle.plan.group, handle.session.order.prompt)

    def let_go(self, session: SessionId) -> None:
        """End a session that runs here, as its reader asks for it again elsewhere or here."""
        handle = self._running.get(session)
        if handle is not None:
            handle.stop()

    def own_sessions(self, but: Session | None = None) -> Counter[tuple[NodeId, Digest]]:
        """How many of our sessions each replica has now, standbys with the others, as records count them, which tell it half a
        second late. ``but``: a session that asks for another route is no load that it would meet."""
        running = (handle.session for handle in self._running.values())
        return Counter(key for session in running if session is not but for key in _replicas(session))

    def note_record(self, node: Node) -> None:
        """A node told its load: of the sessions that it counts, these are ours, some of which may just have
        ended. What is left is others', and goes on when ours are long gone."""
        since = self._clock.monotonic() - _RECORD_LAG_S
        while self._left and self._left[0][0] < since:
            self._left.popleft()
        ours = self.own_sessions()
        ours.update(key for _, key in self._left)
        for replica in node.replicas:
            key = (node.id, replica.shard.digest)
            self.ours_told[key] = min(replica.sessions, ours[key])

    def on_message(self, message: Message) -> None:
        """A token, acknowledgement, refusal or loss for a session of ours.

        Tokens that come together are fed on together: a batch stays a batch over all its stages.
        """
        events = message if isinstance(message, list) else [message]
        for event in events:
            handle = self._running.get(getattr(event, "session", SessionId("")))
            if handle is not None:
                self._step(handle, event)  # type: ignore[arg-type]
        self._feed()

    def handle(self, session: Session, event: Event) -> None:
        """Give an event to a session and do what it asks for."""
        handle = self._running.get(session.order.session)
        if handle is not None:
            self._step(handle, event)
            self._feed()

    def _step(self, handle: SessionHandle, event: Event) -> None:
        try:
            now = self._clock.monotonic_ns()
            if isinstance(event, Refused) and event.cause is Cause.NO_CACHE and handle.session.order.resume:
                self.prefixes.drop(handle.session.order.resume[0])
                handle.trace.cached_tokens = 0
            effects = handle.session.handle(event, now)
            if any(isinstance(e, NeedRoute) for e in effects):
                handle.trace.lost(_why(event), now, isinstance(event, Refused))
            for effect in effects:
                if isinstance(effect, EmitToken):
                    going = handle.session.state is not State.REROUTING
                    stalled_us = handle.trace.token(effect.token, now, going)
                    if stalled_us:
                        self._accounts.recovered(handle.session, handle.trace, stalled_us)
            self._carry_out(handle, effects)
        except MeshError as error:
            log.exception("session %s failed", handle.session.order.session)
            self._end(handle, Ended(error=error))

    def report(self) -> list[dict[str, Any]]:
        """``/mesh/v1/sessions``: those that run, with their routes and epochs."""
        rows = []
        for handle in self._running.values():
            session, trace = handle.session, handle.trace
            rows.append(
                {
                    "session": session.order.session,
                    "model": trace.model,
                    "state": session.state.value,
                    "epoch": session.epoch.counter,
                    "prompt_tokens": len(session.order.prompt),
                    "tokens": len(session.generated),
                    "route": [
                        {"node": s.node, "layers": [s.layers.start, s.layers.end]}
                        for s in session.route.stages
                    ],
                    "recoveries": len(trace.recoveries),
                }
            )
        return rows

    def awaited(self) -> set[Address]:
        """First stages that owe an answer."""
        return {
            h.session.route.stages[0].address for h in self._running.values() if h.session.awaits_first_stage
        }

    def silent(self, address: Address, reason: str) -> None:
        """A first stage gives no sign of life."""
        self._first_lost(address, Cause.SILENT, reason)

    def link_lost(self, address: str, reason: str) -> None:
        """The link to a first stage broke."""
        self._first_lost(Address(address), Cause.STREAM_BROKEN, reason)

    def _first_lost(self, address: Address, cause: Cause, reason: str) -> None:
        for handle in list(self._running.values()):
            session = handle.session
            if session.route.stages[0].address == address:
                lost = HopLost(session.order.session, session.epoch, 0, cause, reason)
                self.handle(session, lost)

    def _carry_out(self, handle: SessionHandle, effects: list[Effect]) -> None:
        """Do what a session asks for, in order; but feed a next step before writing the last down.

        What is written waits in line for the loop's next turn: a feed on this node may come back
        with the next token before it returns.
        """
        if effects and isinstance(effects[0], SendFrame) and handle.session.generated:
            self._carry_one(handle, effects[0])
            handle.pending.extend(effects[1:])
            self._written_later.append(handle)
            return
        if any(isinstance(effect, SendOpen) for effect in effects):
            # A stage of this node answers at once: what is left for the epoch that it refused would go in the name of this one.
            handle.pending = deque(e for e in handle.pending if not isinstance(e, SendFrame))
        handle.pending.extend(effects)
        self._drain(handle)

    def _drain_all(self, handles: list[SessionHandle]) -> None:
        for handle in handles:
            self._drain(handle)

    def _drain(self, handle: SessionHandle) -> None:
        while handle.pending:
            self._carry_one(handle, handle.pending.popleft())

    def _feed(self) -> None:
        """Send the frames that the last events asked for, one message an address.

        Only then is the writing down put in line, so that it stands behind the sending.
        """
        if self._frames:
            frames, self._frames = self._frames, {}
            for address, batch in frames.items():
                self._host.feed(address, batch)
        if self._copies:
            copies, self._copies = self._copies, {}
            for address, batch in copies.items():
                self._host.deliver(address, batch)
        if self._written_later:
            handles, self._written_later = self._written_later, []
            self._loop.call_soon(self._drain_all, handles)

    def _carry_one(self, handle: SessionHandle, effect: Effect) -> None:
        session = handle.session
        first = session.route.stages[0].address
        match effect:
            case NeedRoute(avoid):
                self._reroute(handle, avoid)
            case SendFrame(position, tokens, sample, drafts, steps):
                payload = np.array(tokens, dtype=np.int64)
                frame = Frame(
                    session.order.session,
                    session.epoch,
                    position,
                    len(tokens),
                    sample,
                    payload,
                    drafts=drafts,
                    steps=steps,
                )
                self._frames.setdefault(first, []).append(frame)
                standby = session.standbys[0] if session.standbys else None
                if standby is not None:
                    self._copies.setdefault(standby.address, []).append(replace(frame))
            case KeepToken(token):
                try:
                    self._log.append(session.order.session, (token,))
                except OSError as error:
                    self._lose(handle, f"the token log cannot be written: {error}")
                if handle.witness is not None:
                    self._host.deliver(handle.witness, self._copy(session, token.position, (token,)))
            case EmitToken(token):
                handle.push(token)
            case SendOpen(order):
                self._host.deliver(first, order)
                standby = order.standby_of(0)
                if standby is not None:
                    self._host.deliver(standby.address, replace(order, standby=True))
            case SendClose(close, address) if session.state is State.REPLAYING:
                # What the session left is most often dead, and dialled in vain: not while the session waits.
                self._loop.call_later(_TOLD_LATE_S, self._host.deliver, address, close)
            case SendClose(close, address):
                self._feed()
                self._host.deliver(address, close)
            case Ended():
                self._end(handle, effect)

    def _reroute(self, handle: SessionHandle, avoid: frozenset[NodeId]) -> bool:
        """Give a session another route, if there is one now; otherwise it asks again."""
        try:
            if not self._budget.take(self._clock.monotonic_ns(), len(self._view().alive())):
                self._accounts.held()
                raise NoRoute("this node's budget of recoveries is spent")
            plan = handle.replan(handle.session, handle.plan, avoid)
        except NoRoute as error:
            recovery = handle.trace.recoveries[-1] if handle.trace.recoveries else None
            if recovery is None or not recovery.waited:
                why = recovery.cause if recovery else ""
                log.warning(
                    "no other route yet (%s): %s", why, error, extra={"session": handle.session.order.session}
                )
            if recovery is not None:
                recovery.waited = True
            return False
        handle.plan = plan
        handle.trace.rerouted(plan.route)
        handle.trace.mixed = mixed(plan.group)
        self._hold_to_features(handle.session, plan.route)
        self._step(handle, Rerouted(plan.route, plan.standbys))
        self._choose_witness(handle)
        order, epoch = handle.session.order, handle.session.epoch
        try:
            self._log.begin(
                order.session, order.prompt, order.expires_ms / 1000, epoch, order.request, plan.route
            )
        except OSError as error:  # the next token will not get past it
            log.error("the token log cannot be written: %s", error)
        return True

    def _hold_to_features(self, session: Session, route: LayeredRoute) -> None:
        """No guesses on a route with an agent that would take them for the prompt, and no frames of several steps
        where one would take them for a chunk."""
        nodes = self._view().nodes
        stages = (*route.stages, *(s for s in session.standbys if s is not None))
        on_route = [node.features if (node := nodes.get(stage.node)) else 0 for stage in stages]
        session.steps = all(features & STEPS for features in on_route)
        if session.speculation is not None and not all(features & DRAFTS for features in on_route):
            session.speculation = None

    def _choose_witness(self, handle: SessionHandle) -> None:
        """Where the last stage is on this node, another keeps a copy of the tokens (rule R6)."""
        session, here = handle.session, self._host.address
        before, handle.witness = handle.witness, None
        stages = session.route.stages
        if session.ended or stages[-1].address != here or not session.order.request:
            return
        others = [s.address for s in stages if s.address != here]
        others += [n.address for n in self._view().alive() if n.address != here and n.reachable]
        if not others:
            return
        handle.witness = before if before in others else others[0]
        if handle.witness != before:
            first = len(session.order.prompt)
            tokens = tuple(Token(first + i, t) for i, t in enumerate(session.generated))
            self._host.deliver(handle.witness, self._copy(session, 0, tokens))

    def _copy(self, session: Session, position: int, tokens: tuple[Token, ...]) -> Witness:
        order = session.order
        whole = (order.expires_ms, order.prompt, order.request) if position == 0 else (0, (), b"")
        at = tokens[0].position if tokens else len(order.prompt)
        return Witness(order.session, session.epoch, at, tokens, *whole)

    def _look(self) -> None:
        """Sessions leave stages whose nodes went silent, and those that drain if they can."""
        snapshot = self._view()
        if snapshot is self._looked_at:
            return
        self._looked_at = snapshot
        for handle in list(self._running.values()):
            session = handle.session
            if session.ended or session.state is State.REROUTING:
                continue
            trouble = troubled(snapshot, session.route)
            if trouble is None:
                continue
            stage, cause, detail = trouble
            if cause is not Cause.DRAINING:
                self.handle(session, HopLost(session.order.session, session.epoch, stage, cause, detail))
            elif session.state is State.DECODE:
                handle.trace.lost(f"{cause.name.lower()}: {detail}", self._clock.monotonic_ns())
                if not self._reroute(handle, frozenset()):
                    handle.trace.stayed()
                self._feed()

    def _lose(self, handle: SessionHandle, reason: str) -> None:
        """Our own disk failed: no token may reach the client that is not in the log (rule R6)."""
        handle.pending.clear()
        for effect in handle.session.handle(Cancelled(), self._clock.monotonic_ns()):
            if isinstance(effect, SendClose):
                self._carry_one(handle, effect)
        self._end(handle, Ended(error=Unavailable(reason, retry_after_s=5)))

    def _end(self, handle: SessionHandle, ended: Ended) -> None:
        order, trace = handle.session.order, handle.trace
        if self._running.pop(order.session, None) is None:
            return
        session = handle.session
        if session.kept and handle.plan.group is not None:
            tokens = (*order.prompt, *session.generated)[: session.firm]
            self.prefixes.add(_at_stages(handle, handle.plan.group, tokens))
        left = self._clock.monotonic()
        self._left.extend((left, key) for key in _replicas(session))
        if session.speculation is not None:
            trace.guesses, trace.guesses_right = session.speculation.made, session.speculation.right
        trace.ingress_hop_us = self._host.hop_us(trace.route.stages[0].address)
        trace.outcome = ended.finish.value if ended.finish else f"failed: {ended.error}"
        handle.push(ended)
        self._accounts.ended(trace, ended, len(self._running))

    async def run(self) -> None:
        """Deadlines, and tokens of sessions that nobody will ask for again."""
        sweep_s = max(1.0, min(60.0, self._keep_s / 4))
        swept = self._clock.monotonic()
        while True:
            if self._running:
                await asyncio.sleep(TICK_S)
                self._tick()
            else:
                await self._idle(sweep_s)
            if self._clock.monotonic() - swept >= sweep_s:
                swept = self._clock.monotonic()
                try:
                    await asyncio.to_thread(lambda: list(self._log.expire(self._clock.time())))
                except OSError as error:
                    log.error("the token log cannot be trimmed: %s", error)

    async def _idle(self, at_most_s: float) -> None:
        self._begun.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._begun.wait()

    def _tick(self) -> None:
        self._look()
        now = self._clock.monotonic_ns()
        for handle in list(self._running.values()):
            due = handle.session.next_deadline()
            if due is not None and now >= due:
                self.handle(handle.session, Tick())

    def stop_all(self, reason: str) -> None:
        """End every session: the agent stops."""
        for handle in list(self._running.values()):
            handle.stop()
            self._end(handle, Ended(error=Unavailable(reason)))


def _replicas(session: Session) -> list[tuple[NodeId, Digest]]:
    """Those that compute for a session."""
    return [(stage.node, stage.shard) for stage in (*session.route.stages, *session.standbys) if stage]


def _at_stages(handle: SessionHandle, group: Group, tokens: tuple[int, ...]) -> KeptSession:
    """A session's KV cache of these ``tokens``. Of one that is exact, whole chunks of the prompt have the bits that they would have
    in any other: what follows was computed in steps, and the last chunk ends where the prompt does."""
    order = handle.session.order
    clean = order.exact and order.canonical
    canonical = len(order.prompt) // order.chunk * order.chunk if clean else 0
    return KeptSession(order.session, group[0], tokens, handle.session.route, min(canonical, len(tokens)))


def _why(event: Event) -> str:
    match event:
        case HopLost(cause=cause, detail=detail) | Refused(cause=cause, reason=detail):
            return f"{cause.name.lower()}: {detail}"
    return "no_progress: nothing came for as long as a step may take"
