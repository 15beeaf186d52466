"""A session as its owner sees it: a pure machine, events in, effects out.

Its states and the whole table of transitions are in ``session_states``.

The prompt goes out in chunks, at most ``window`` of them unacknowledged (rule R8); each token
that comes back is kept in the token log, shown to the client and fed to the first stage. Opening
is optimistic: frames follow the ``Open`` down the same stream without waiting for an answer,
because a stage that refuses drops what follows.

The feed comes first among the effects of a token: the next step computes while this one is
written down. ``KeepToken`` always stands before its ``EmitToken`` (rule R6).

When a stage is lost, the owner asks for another route and opens it in a new epoch at the last token (rule
R2). Stages that are on both routes go on with what they have; each tells its sender where it stands, and whoever
is further sends again what the other lacks: a stage from its hop log, the owner from the tokens, prompt and
answer as one prefill. What the client has seen is input from then on (rule R5). The same happens, without a loss,
when a stage should be left because it drains.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from mesh.errors import Full, InvalidTransition, MeshError, NoRoute, PeerError, StageLost, Unavailable
from mesh.messages import STEPS_MAX, Ack, Cause, Close, HopLost, Open, Opened, Refused, Sampled
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
from mesh.session_states import TRANSITIONS, Rung, State
from mesh.speculation import Speculation
from mesh.types import Address, Epoch, LayeredRoute, NodeId, SessionId, Stage, Standbys, Token

_NATURAL = (Finish.STOP, Finish.LENGTH)
_STORY_KEPT = 24
_ASK_AGAIN_NS = 100_000_000
_AVOIDED_NS, _SILENT_AVOIDED_NS = 300_000_000, 2_000_000_000
"""For so long a node that was lost is no part of another route: until membership knows, which takes longer for one
that fell silent. What comes back after that is as good as any other."""


class Session:
    """One generation with its route, owned by this node."""

    def __init__(
        self,
        order: SessionOrder,
        route: LayeredRoute,
        owner: NodeId,
        address: Address,
        now: int,
        taken: tuple[Epoch, tuple[int, ...]] | None = None,
        standbys: Standbys = (),
    ) -> None:
        """``taken``: it was begun by another owner, or before a restart; the epoch to open and the tokens that
        were generated."""
        self.order, self.route = order, route
        self.standbys = standbys
        """Replicas that are fed what their stages are fed, by place; they have all or nothing."""
        self.epoch, generated = taken or (Epoch(1, owner), ())
        self.address = address
        self.state = State.REPLAYING if generated else State.PREFILL
        self.generated = list(generated)
        self.speculation = Speculation((*order.prompt, *generated)) if order.speculate else None
        self.steps = False
        """All agents of the route know frames of several steps."""
        self.finish: Finish | None = None
        self.kept = False
        """Its stages were asked to keep what they computed."""
        self._sent = self._acked = 0
        self.firm = 0
        """Positions that the stages were fed, guesses not counted."""
        self._in_flight: deque[int] = deque()
        self._paused = False
        self._held: Token | None = None
        self._asking = False
        """The new route's stages have not told where they stand."""
        self.rung: Rung | None = None
        """Of the last recovery, once it is known."""
        self.replayed = 0
        """Positions that were sent again in the last recovery."""
        self._progress_ns = now
        self._story: deque[str] = deque(maxlen=_STORY_KEPT)
        self._lost: MeshError | None = None
        self._lost_ns = self._asked_ns = 0
        self._avoid: dict[NodeId, int] = {}
        """Nodes that were lost, and until when no route leads there."""
        self._left: LayeredRoute | None = None
        """The route of the epoch before."""
        self._new = 0
        """Stages of this one that have not been fed everything."""
        self._proven: tuple[Stage, ...] = ()
        """Those that the last token came through."""
        self._history = order.prompt
        """What goes through the stages before the first token of this epoch is sampled."""

    @property
    def positions(self) -> int:
        """Most positions that this session may take; what every stage reserves."""
        order = self.order
        return min(order.positions_max, len(order.prompt) + order.tokens_max)

    @property
    def _last_position(self) -> int:
        """The last token's: whoever sampled it had everything before."""
        return len(self.order.prompt) + len(self.generated) - 1

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.FAILED)

    def _go(self, state: State) -> None:
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise InvalidTransition("session", self.state.value, f"going to {state.value}", list(self._story))
        self.state = state

    def start(self, now: int) -> list[Effect]:
        """Open the route and send the first chunks."""
        if self.generated:
            done = self._complete()
            if done is not None:
                return self._finish(done)
        return self._open(now, self.order.resume)

    def _complete(self) -> Finish | None:
        """Whether the last token ends the answer."""
        if self.generated[-1] in self.order.stop_tokens:
            return Finish.STOP
        full = len(self.order.prompt) + len(self.generated) >= self.positions
        return Finish.LENGTH if full else None

    def _open(self, now: int, resume: tuple[SessionId, int] | None = None) -> list[Effect]:
        order = self.order
        kept, position = resume or (None, 0)
        self._history = (*order.prompt, *self.generated)
        self._asking = bool(self.generated) and kept is None
        if self._asking:
            position = self._last_position
        opening = Open(
            session=order.session,
            epoch=self.epoch,
            position=position,
            route=self.route,
            stage=0,
            owner_address=self.address,
            positions=self.positions,
            window=order.window,
            deadline_ms=max(1, (order.deadline_ns - now) // 1_000_000),
            prompt=order.prompt,
            generated=tuple(self.generated),
            sampling=order.sampling,
            exact=order.exact,
            resume=kept,
            request=order.request,
            expires_ms=order.expires_ms,
            standbys=self.standbys,
            steps=self.steps,
        )
        self._sent, self._acked, self._held = position, position, None
        if self.speculation is not None:
            self.speculation.forget()
        self._in_flight.clear()
        self._progress_ns = now
        return [SendOpen(opening)] if self._asking else [SendOpen(opening), *self._prefill()]

    def _opened(self, event: Opened, now: int) -> list[Effect]:
        """The new route's stages have told where they stand: send what the first of them lacks."""
        self._progress_ns = now
        if not self._asking:
            return []
        if event.position > self._sent:
            return self._fail(
                PeerError(f"a stage wants position {event.position} of a session of {self._sent}")
            )
        self._asking = False
        self.replayed = max(self._sent - event.position, event.replayed)
        if event.position < self._sent:
            self.rung = Rung.INGRESS
        elif event.short:
            # A stage that has nothing answers before it knows of those behind it.
            self.rung = Rung.WARM if max(event.short, self._new) == 1 else Rung.UPSTREAM
        else:
            self.rung = Rung.HOT
        self._sent = self._acked = event.position
        return self._prefill()

    @property
    def awaits_first_stage(self) -> bool:
        """Whether the first stage owes an answer: to the ``Open``, or for a frame."""
        running = not self.ended and self.state is not State.REROUTING
        return running and (self._asking or self._sent > self._acked)

    def next_deadline(self) -> int | None:
        """When a ``Tick`` is due; ``None`` once ended."""
        if self.ended:
            return None
        if self.state is State.REROUTING:
            return min(
                self.order.deadline_ns,
                self._asked_ns + _ASK_AGAIN_NS,
                self._lost_ns + self.order.recovery_timeout_ns,
            )
        if self._paused:
            return self.order.deadline_ns
        return min(self.order.deadline_ns, self._progress_ns + self.order.step_timeout_ns)

    def handle(self, event: Event, now: int) -> list[Effect]:
        """Take one event. Events of another epoch, and any after the end, change nothing."""
        self._story.append(type(event).__name__)
        if self.ended:
            return []
        if isinstance(event, HopLost) and self.state is State.REPLAYING:
            event = self._still(event)
        if isinstance(event, Opened | Refused | Ack | Sampled | HopLost) and event.epoch != self.epoch:
            return []
        if self.state is State.REROUTING and isinstance(event, Opened | Ack):
            return []
        match event:
            case Sampled(token=token):
                return self._sampled(token, now)
            case Ack(position=position):
                return self._acknowledged(position, now)
            case Opened():
                return self._opened(event, now)
            case ClientBusy():
                self._paused = True
                return []
            case ClientReady():
                return self._resume(now)
            case Tick():
                return self._tick(now)
            case Refused(cause=Cause.TAKEN_OVER, reason=reason):
                self._go(State.FAILED)
                return [Ended(error=Unavailable(f"another agent goes on with this session: {reason}"))]
            case Refused(cause=Cause.NO_CACHE) if self.state is not State.REROUTING:
                return self._open_again(now)
            case Refused(stage=stage):
                return self._lose(stage, _refusal(event, self.route), now)
            case HopLost(stage=stage):
                return self._lose(stage, _loss(event, self.route), now, event.cause is Cause.SILENT)
            case Rerouted(route=route, standbys=standbys):
                return self._reroute(route, standbys, now)
            case Cancelled(finish=finish):
                return self._finish(finish)
        raise InvalidTransition("session", self.state.value, repr(event), list(self._story))

    def _lose(self, stage: int, error: MeshError, now: int, silent: bool = False) -> list[Effect]:
        """A stage is lost, or refuses: ask for another route. The others wait, with what they have."""
        fresh = isinstance(error, Full | NoRoute) and not self.generated and self._lost is None
        if not self.order.recovery_timeout_ns or self.state is State.REROUTING:
            return self._fail(error) if self.state is not State.REROUTING else []
        if self._lost is None:
            self._lost, self._lost_ns = error, now
        # A refusal before the first token is an answer: it is given at once if nobody else can do it.
        if fresh:
            self._lost_ns = now - self.order.recovery_timeout_ns
        if 0 <= stage < len(self.route.stages):
            for_ns = _SILENT_AVOIDED_NS if silent else _AVOIDED_NS
            self._avoid[self.route.stages[stage].node] = now + for_ns
        self._go(State.REROUTING)
        return self._ask(now)

    def _ask(self, now: int) -> list[Effect]:
        self._asked_ns = now
        return [NeedRoute(frozenset(node for node, until in self._avoid.items() if until > now))]

    def _still(self, event: HopLost) -> HopLost:
        """Late news of the epoch before count when the node that is lost is on the new route as well."""
        left, route = self._left, self.route.stages
        if event.epoch.counter + 1 != self.epoch.counter or left is None:
            return event
        stage = left.stages[event.stage] if 0 <= event.stage < len(left.stages) else None
        if stage not in route or event.cause not in (Cause.SILENT, Cause.STREAM_BROKEN):
            return event
        return replace(event, epoch=self.epoch, stage=route.index(stage))

    def _open_again(self, now: int) -> list[Effect]:
        """A stage kept nothing after all: the whole prompt, or what the stages then say that they lack, on the same route."""
        self.epoch = Epoch(self.epoch.counter + 1, self.epoch.owner)
        return self._open(now)

    def _reroute(self, route: LayeredRoute, standbys: Standbys, now: int) -> list[Effect]:
        """Open the other route; stages that are on both in the same place go on there, and so do standbys. Only before the
        first token others, ``standbys``, can take their places: all are fed the prompt anew then."""
        left = {
            i: stage
            for i, stage in enumerate(self.route.stages)
            if i >= len(route.stages) or route.stages[i] != stage
        }
        if self.generated:
            standbys = tuple(
                s
                if s is not None and i < len(route.stages) and _stands_by(s, i, route, self._avoid)
                else None
                for i, s in enumerate(self.standbys)
            )
        closing = [self._close_one(i, s, "the session moved") for i, s in left.items() if s not in standbys]
        gone = [(i, s) for i, s in enumerate(self.standbys) if s and s not in (*standbys, *route.stages)]
        closing += [self._close_one(i, s, "the session moved") for i, s in gone]
        fed = {*self._proven, *self.standbys}
        self._new = sum(stage not in fed for stage in route.stages)
        self.standbys = standbys
        self._left, self.route = self.route, route
        self.epoch = Epoch(self.epoch.counter + 1, self.epoch.owner)
        self.replayed = 0
        self._go(State.REPLAYING)
        self.rung = None if self.generated else Rung.INGRESS
        resume = None
        if self.generated and not self._new and self.speculation is None:
            # All of them have everything: the session goes on from itself, and the token goes out with the Open. A stage that
            # lacks something after all refuses, as one does that kept nothing; then all are asked.
            self.rung, resume = Rung.HOT, (self.order.session, self._last_position)
        # What is left of the old route is told last: nobody waits for it.
        return [*self._open(now, resume), *closing]

    def _close_one(self, place: int, stage: Stage, reason: str) -> Effect:
        return SendClose(Close(self.order.session, self.epoch, reason, place, alone=True), stage.address)

    def _close_all(self, reason: str) -> list[Effect]:
        """Every stage for itself: where one is lost, nobody passes a close on."""
        places = [*enumerate(self.route.stages), *enumerate(self.standbys)]
        return [self._close_one(i, stage, reason) for i, stage in places if stage is not None]

    def _prefill(self) -> list[Effect]:
        prompt, chunk = self._history, self.order.chunk
        effects: list[Effect] = []
        while self._sent < len(prompt) and len(self._in_flight) < self.order.window:
            tokens = prompt[self._sent : self._frame_end(chunk)]
            last = self._sent + len(tokens) == len(prompt)
            steps = self._stepped and len(tokens) > 1
            effects.append(SendFrame(self._sent, tokens, last, steps=steps))
            self._sent += len(tokens)
            self.firm = self._sent
            self._in_flight.append(self._sent)
        return effects

    def _frame_end(self, chunk: int) -> int:
        """Where the next frame of a prefill ends. What was generated was first run one step at a time."""
        if not self._stepped:
            end = self._sent + chunk
            return min(end, len(self.order.prompt)) if self.order.exact else end
        # The last one is sampled after.
        most = STEPS_MAX if self.steps else 1
        return max(self._sent + 1, min(self._sent + most, len(self._history) - 1))

    @property
    def _stepped(self) -> bool:
        """Whether what is sent next first ran one step at a time, and has to again."""
        return self.order.exact and self._sent >= len(self.order.prompt)

    def _acknowledged(self, position: int, now: int) -> list[Effect]:
        self._progress_ns = now
        if position <= self._sent:  # else of guesses that were wrong
            self._acked = max(self._acked, position)
        while self._in_flight and self._in_flight[0] <= position:
            self._in_flight.popleft()
        return self._prefill() if self.state in (State.PREFILL, State.REPLAYING) else []

    def _sampled(self, token: Token, now: int) -> list[Effect]:
        expected = len(self.order.prompt) + len(self.generated)
        if token.position < expected:
            return []  # duplicate
        if token.position > expected or self._sent < expected or self._asking:
            awaited = "the next" if token.position == expected else f"position {expected}"
            why = f"{awaited} was due, and the stages have been fed up to {self._sent}"
            return self._fail(PeerError(f"the last stage sent position {token.position}: {why}"))
        rerouting = self.state is State.REROUTING
        if not rerouting:
            self._go(State.DECODE)
            self._lost, self._proven = None, self.route.stages
        self._progress_ns = now
        self.generated.append(token.token)
        more = self.speculation is not None and self.speculation.take(token.token, now)
        written: list[Effect] = [KeepToken(token), EmitToken(token)]
        done = self._complete()
        if done is not None:
            return written + self._finish(done, _NATURAL)
        if more:
            return written  # a guess was right: the last stage sampled the next token as well
        if rerouting:
            return written  # sampled before the loss; the next route goes on from it
        if self._paused:
            self._held = token
            return written
        return [self._feed(token, now), *written]

    def _feed(self, token: Token, now: int) -> Effect:
        position = token.position
        # The last token of all is computed by nobody: neither it nor what follows is worth a guess.
        room = self.positions - 2 - position
        drafts = self.speculation.guess(room, now) if self.speculation is not None else ()
        self.firm = position + 1
        self._sent = self.firm + len(drafts)
        self._acked = min(self._acked, position)
        return SendFrame(position, (token.token, *drafts), True, drafts)

    def _resume(self, now: int) -> list[Effect]:
        self._paused = False
        self._progress_ns = now
        held, self._held = self._held, None
        return [self._feed(held, now)] if held else []

    def _tick(self, now: int) -> list[Effect]:
        if now >= self.order.deadline_ns:
            return self._fail(StageLost(f"the request's deadline passed after {len(self.generated)} tokens"))
        if self.state is State.REROUTING:
            assert self._lost is not None
            if now >= self._lost_ns + self.order.recovery_timeout_ns:
                return self._fail(self._lost)
            if now >= self._asked_ns + _ASK_AGAIN_NS:
                return self._ask(now)
            return []
        if not self._paused and now >= self._progress_ns + self.order.step_timeout_ns:
            seconds = self.order.step_timeout_ns / 1e9
            error = StageLost(f"no stage of {self.route} made progress for {seconds:g} s")
            # Where the first stage has computed everything and those between said nothing, the token was lost.
            fed = self.generated and not self._asking and self._acked >= self._sent
            return self._lose(len(self.route.stages) - 1 if fed else -1, error, now, silent=True)
        return []

    def _finish(self, finish: Finish, natural: tuple[Finish, ...] = ()) -> list[Effect]:
        # A stop string is found when the next step is under way already: such a cache is not kept.
        self.kept = self.order.keep and self.state is State.DECODE and finish in natural
        broken = self.state in (State.REROUTING, State.REPLAYING)
        self.finish = finish
        self._go(State.DONE)
        if broken:
            return [*self._close_all(finish.value), Ended(finish=finish)]
        closing = [self._close(finish.value, self.kept)]
        if self.standbys and self.standbys[0] is not None:
            # Stages close the standbys of those behind them; nobody but the owner is before the first.
            closing.append(self._close_one(0, self.standbys[0], finish.value))
        return [*closing, Ended(finish=finish)]

    def _fail(self, error: MeshError) -> list[Effect]:
        self._go(State.FAILED)
        return [*self._close_all(str(error)), Ended(error=error)]

    def _close(self, reason: str, keep: bool) -> Effect:
        close = Close(self.order.session, self.epoch, reason, keep=keep)
        return SendClose(close, self.route.stages[0].address)


def _stands_by(stage: Stage, place: int, route: LayeredRoute, lost: dict[NodeId, int]) -> bool:
    """Whether a standby goes on as one: it is not in the route now, whose cut is the same, and not lost."""
    others = stage not in route.stages and stage.node not in lost
    return others and route.stages[place].layers == stage.layers


def _stage_name(route: LayeredRoute, index: int) -> str:
    if not 0 <= index < len(route.stages):
        return "part of the route"
    stage = route.stages[index]
    return f"stage {index} (layers {stage.layers} on {stage.node})"


def _refusal(event: Refused, route: LayeredRoute) -> MeshError:
    message = f"{_stage_name(route, event.stage)} refused the session: {event.reason}"
    if event.cause is Cause.FULL:
        return Full(message, retry_after_s=event.retry_after_ms / 1000)
    return NoRoute(message, retry_after_s=event.retry_after_ms / 1000)


def _loss(event: HopLost, route: LayeredRoute) -> MeshError:
    where = _stage_name(route, event.stage)
    return StageLost(f"{where} was lost: {event.cause.name.lower()}: {event.detail}")
