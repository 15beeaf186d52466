"""A loaded shard at work: one compute thread, fed by the book that decides what runs next.

The event loop decides (``StageBook``), the thread computes; they share nothing but the run that is
handed over. What was computed is copied out of the runtime's buffer in the thread, so that the
next run may start while the last one's rows are still being sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.clock import Clock
from mesh.messages import Cause, Frame, Open
from mesh.types import Epoch, SessionId, Token
from node_agent.adapters.compute import Compute, ComputeThread
from node_agent.ports import Runtime
from node_agent.sampling import sample
from node_agent.stage import Refusal, Run, StageBook, StageSession
from scheduler.speed import SpeedMeter, StageSpeed, worth_telling

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05
BRIEF_MAX_NS = 10_000_000
"""A decode step under this is computed on the event loop."""
_STEP_SMOOTHING = 8


@dataclass(slots=True)
class Computed:
    """A row of a run: ``output`` is float32 ``[length, width]``, or of a last shard what it sampled: a tuple of
    tokens, several where guesses were right, none where nothing was asked for."""

    session: StageSession
    frame: Frame
    output: Any
    queue_us: int
    compute_us: int


class Replica:
    """Runs a ``StageBook`` over a ``Runtime``.

    ``forward(rows)`` is called on the loop with what a run computed, ``failed(session, cause,
    detail)`` for each session whose row could not be. ``speed`` is believed until runs are measured.
    """

    def __init__(
        self,
        runtime: Runtime,
        kv_budget_bytes: int,
        forward: Callable[[list[Computed]], None],
        failed: Callable[[StageSession, Cause, str], None],
        speed: StageSpeed,
        clock: Clock = time,
        compute: Compute | None = None,
        ran: bool = False,
    ) -> None:
        """``speed`` is expected until enough has run; ``ran``: because other cuts did, here."""
        self.runtime, self._clock = runtime, clock
        self._first, self._last = runtime.info.first, runtime.info.last
        self.compute = compute or ComputeThread(f"compute {runtime.info.layers}", clock)
        self._speed, self._told, self._told_s = SpeedMeter(speed, ran), speed, clock.monotonic()
        # One position of each slot is for rows that nobody reads.
        self.book = StageBook(
            runtime.info,
            runtime.slots,
            runtime.capacity - 1,
            kv_budget_bytes,
            runtime.batch,
            runtime.batch_exact,
        )
        self.runs = 0
        self._forward, self._failed = forward, failed
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self._nested = False
        self._timer: asyncio.TimerHandle | None = None
        self._step_ns = 0
        """Smoothed time of a decode step; 0 until one was measured."""

    @property
    def working(self) -> bool:
        """Something is queued or being computed."""
        return self._busy or self.book.queued > 0

    def speed(self) -> StageSpeed:
        """How fast it is, for peers."""
        now = self._clock.monotonic()
        told = worth_telling(self._told, self._speed.speed(now), now - self._told_s)
        if told is not self._told:
            self._told, self._told_s = told, now
        return self._told

    @property
    def own_speed(self) -> StageSpeed | None:
        """What ``speed`` was last found at here and by itself, once enough has run; not rounded."""
        return self._speed.own

    def open(self, order: Open) -> StageSession | Refusal:
        return self.book.open(order, self._clock.monotonic_ns())

    def accept(self, frame: Frame) -> Refusal | None:
        """Take a frame; ``dispatch`` starts it."""
        refusal = self._check(frame) or self.book.accept(frame)
        if refusal is None:
            frame.arrived_ns = frame.arrived_ns or self._clock.monotonic_ns()
        return refusal

    def _check(self, frame: Frame) -> Refusal | None:
        payload, info = frame.payload, self.runtime.info
        if len(frame.drafts) >= frame.length:
            return Refusal(Cause.BAD_FRAME, f"a frame of {frame.length} has {len(frame.drafts)} guesses")
        if frame.steps and (frame.length == 1 or frame.sample or frame.drafts):
            return Refusal(
                Cause.BAD_FRAME, "a frame of several steps is replayed, and nothing sampled after it"
            )
        if self._first:
            if payload.dtype != np.int64 or payload.shape != (frame.length,):
                return Refusal(Cause.BAD_FRAME, "the first stage takes tokens, one a position")
            tokens = payload.tolist()
            if min(tokens) < 0 or max(tokens) >= info.model.vocabulary:
                return Refusal(Cause.BAD_FRAME, "a token is outside the vocabulary")
            return None
        if payload.dtype != np.float32 or payload.shape != (frame.length, info.model.width):
            return Refusal(
                Cause.BAD_FRAME,
                f"activations have the shape {list(payload.shape)}, due is {[frame.length, info.model.width]}",
            )
        # Finite if every value is; one call where isfinite().all() takes two, on every token's path.
        if not isfinite(np.vdot(payload, payload)):
            return Refusal(Cause.BAD_FRAME, "activations hold NaN or infinity")
        return None

    def acknowledged(self, session: SessionId, epoch: Epoch, position: int) -> None:
        self.book.acknowledged(session, epoch, position)
        self.dispatch()

    def close_session(self, session: SessionId, epoch: Epoch | None = None, keep: bool = False) -> bool:
        """End a session; free its slot at once, or keep its KV cache while there is room."""
        return self.book.close(session, epoch, self._clock.monotonic_ns() if keep else None) is not None

    def dispatch(self) -> None:
        """Start the next run if the thread is idle."""
        if self._busy:
            return
        # Nothing computes now: a freed slot's pages can go before anybody else writes there.
        while self.book.freed:
            self.runtime.release(self.book.freed.pop())
        now = self._clock.monotonic_ns()
        run = self.book.next_run(now)
        for copy in self.book.copies:  # in this order: one may be of another
            self.runtime.copy(copy.source, copy.target, copy.positions)
        self.book.copies.clear()
        if self.book.bereft:
            self._loop.call_soon(self._let_down)
        if run is None:
            until = self.book.gathering_until
            if until is not None and self._timer is None:
                self._timer = self._loop.call_later((until - now) / 1e9, self._gathered)
            return
        self._busy = True
        if run.known is not None:
            self._loop.call_soon(self._done, run, [run.known], now, now)
        elif not self._brief(run):
            self.compute.submit(partial(self._attempt, run, True), partial(self._done, run))
        elif self._nested:
            # Two turns on: the token that led here is shown first, not a whole step later.
            self._loop.call_soon(self._loop.call_soon, self._run_here, run)
        else:
            self._run_here(run)

    def _let_down(self) -> None:
        while self.book.bereft:
            session = self.book.bereft.pop()
            if self.book.sessions.get(session.order.session) is session and session.source is not None:
                self._failed(
                    session, Cause.NO_CACHE, f"session {session.source} ended too soon to go on from it"
                )

    def _gathered(self) -> None:
        self._timer = None
        self.dispatch()

    def _brief(self, run: Run) -> bool:
        """Whether a run is a decode step that is known to be short.

        Such a run is computed on the loop: handing it to the thread and back costs two wake-ups,
        a tenth of a small stage's step. Receiving waits for at most ``BRIEF_MAX_NS``.
        """
        known = self.compute.inline and 0 < self._step_ns < BRIEF_MAX_NS
        return known and run.rows[0] is not None and run.rows[0][1].length == 1

    def _run_here(self, run: Run) -> None:
        self._nested = True
        try:
            started = self._clock.monotonic_ns()
            outcome = self._attempt(run)
            self._done(run, outcome, started, self._clock.monotonic_ns())
        finally:
            self._nested = False

    def _attempt(self, run: Run, settled: bool = False) -> list[Any] | Exception:
        """``settled``: with what it leaves for later, for which the event loop must not wait after a long run."""
        try:
            outcome = self._run(run)
            if settled:
                self.runtime.settle()
            return outcome
        except Exception as error:  # the replica must live; the sessions of this run do not
            return error

    def _run(self, run: Run) -> list[Any]:
        """Outputs by row: activations ``[length, width]`` or tokens, as ``Computed`` has them."""
        live = list(run.live)
        _, _, first = live[0]
        # The head of a last shard is half of its step; what is replayed samples nothing.
        logits = any(frame.sample and not s.order.standby for _, s, frame in live)
        if first.steps:
            result = self.runtime.replay(run.slot, run.positions[0], first.payload)
        elif first.length > 1:
            wanted = 1 + len(first.drafts) if logits else 0
            result = self.runtime.prefill(run.slot, run.positions[0], first.payload, wanted)
        else:
            result = self.runtime.decode(run.slot, run.positions, self._gather(run), logits)
        if not self._last:
            result = result.copy()
            if len(live) == len(run.rows) == 1:
                return [result]
            return [result[i : i + 1] if row else None for i, row in enumerate(run.rows)]
        outputs: list[Any] = [()] * len(run.rows)
        for i, session, frame in live:
            if frame.sample and not session.order.standby:
                outputs[i] = self._sample(session, frame, result[i : i + 1 + len(frame.drafts)])
        return outputs

    def _gather(self, run: Run) -> NDArray[Any]:
        info = self.runtime.info
        if len(run.rows) == 1 and run.rows[0] is not None:
            return run.rows[0][1].payload  # type: ignore[no-any-return]
        inputs: NDArray[Any] = (
            np.zeros(len(run.rows), dtype=np.int64)
            if self._first
            else np.zeros((len(run.rows), info.model.width), dtype=np.float32)
        )
        for i, _, frame in run.live:
            inputs[i] = frame.payload[0]
        return inputs

    def _sample(self, session: StageSession, frame: Frame, logits: NDArray[np.float32]) -> tuple[Token, ...]:
        """The next token, and those after it for as long as the frame guessed right."""
        position = frame.position + frame.length - len(frame.drafts)
        how = session.order.sampling
        history = (*session.order.generated, *session.sampled) if session.sampled else session.order.generated
        found: list[Token] = []
        for i, row in enumerate(logits):
            token, logprob, top = sample(row, how, history, position + i)
            found.append(Token(position + i, token, logprob, top))
            if i == len(frame.drafts) or token != frame.drafts[i]:
                break
            history = (*history, token)
        return tuple(found)

    def _done(self, run: Run, outcome: list[Any] | Exception, started: int, ended: int) -> None:
        self.runs += 1
        compute_us = (ended - started) // 1000
        results = []
        for i, session, frame in run.live:
            output: Any = None if isinstance(outcome, Exception) else outcome[i]
            if not self.book.finished(session, frame, output):
                continue
            if isinstance(outcome, Exception):
                log.error("run failed: %s", outcome, exc_info=outcome)
                self._failed(session, Cause.RUNTIME, f"{type(outcome).__name__}: {outcome}")
                continue
            if session.last:
                session.sampled.extend(t.token for t in output)
            queue_us = max(0, (started - frame.arrived_ns) // 1000)
            results.append(Computed(session, frame, output, queue_us, compute_us))
        try:
            if results:
                self._forward(results)
            self._settle(run)
        finally:
            self._busy = False  # not before: what the results lead to may be computed on the thread
        self._measured(run, compute_us, started, ended)
        self.dispatch()

    def _settle(self, run: Run) -> None:
        try:
            self.runtime.settle()
        except Exception as error:  # as of a run: its sessions do not live on
            log.error("run failed: %s", error, exc_info=error)
            for _, session, _ in run.live:
                self._failed(session, Cause.RUNTIME, f"{type(error).__name__}: {error}")

    def _measured(self, run: Run, compute_us: int, started: int, ended: int) -> None:
        first = next(run.live)[2]
        if first.drafts or first.steps or run.known is not None:
            pass  # neither a step nor a chunk as sessions without guesses have them
        elif first.length > 1:
            self._speed.prefilled(first.length, compute_us, ended / 1e9, first.position)
        else:
            if not self._last or any(f.sample and not s.order.standby for _, s, f in run.live):
                self._speed.decoded(len(run.rows), compute_us, ended / 1e9, first.position)
            self._step_ns += ((ended - started) - self._step_ns) // _STEP_SMOOTHING or 1

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions, wait for the running ones, then drop weights and memory."""
        self.book.draining = True
        deadline = self._clock.monotonic() + timeout_s
        while self.book.live and self._clock.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        for session in list(self.book.sessions.values()):
            self._failed(session, Cause.DRAINING, "the replica was unloaded")
        await self.compute.close(self.runtime.close)
