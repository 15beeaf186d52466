"""One replica's sessions: who has which slot, what may be computed next. Pure.

Every session at a stage is a small record: the epoch that opened it, the next position it wants,
the frames that wait, and the credit it has towards the next stage. ``next_run`` picks what the
runtime does next:

- Decode steps of different sessions run together (continuous batching). A batch is a range of
  neighbouring slots, because KV memory is one block per layer; a slot in between that has
  nothing to do computes a row that nobody reads.
- A prefill chunk runs alone and yields to decode steps (rule R8), but not for ever: after
  ``DECODES_PER_PREFILL`` batches a waiting chunk gets its turn.
- What a recovery has to do again goes first, up to the token that was due when the stage was lost: a reader waits for
  that one, the others' for one that is not due yet. After ``DUE_PER_OTHER`` runs of it others get a turn.
- The first stage gathers: it lets decode frames wait a little for those of other sessions, until
  as many bunches travel the route as it has machines. More would share no weights, fewer would
  leave machines idle; stages on one machine (or one alone) do best with a single bunch. Later
  stages get the bunches as they are.
- A step that is asked for again right after it was computed is not computed again: what it gave is kept.
- A frame runs only when the next stage has room for its result, so nothing piles up between stages.
- A session whose prompt begins as another one's does gets that one's KV cache, as far as they are the same: a copy, while the
  other runs or is worth more than that part, once it has computed it; else the slot itself.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from mesh.messages import Cause, Frame, Open
from mesh.types import Epoch, LayeredRoute, SessionId, ShardInfo
from node_agent.prefixes import WORTH_POSITIONS

DECODES_PER_PREFILL = 4
DUE_PER_OTHER = 16
"""Runs; of chunks as ingresses cut them, a thousand positions: what a whole conversation takes."""
STANDBY_WINDOW = 512
"""Frames that a standby may be behind: nobody waits for its acknowledgements."""
NOTHING_ONWARD = 1 << 30
KEPT_NS = 600_000_000_000
_GAP_MAX = 1
BATCH_MAX = 64
GATHER_MAX_NS = 50_000_000
"""Longest that a decode frame waits for others; usually a step's time at most, and only to join."""
_CYCLE_SMOOTHING = 8


@dataclass(slots=True)
class StageSession:
    """A session at this stage. ``position`` is the next one wanted; below it all is computed, and none of it a guess."""

    order: Open
    slot: int
    reserved_bytes: int
    deadline_ns: int
    last: bool
    position: int
    queue: deque[Frame] = field(default_factory=deque)
    queued_to: int = 0
    """Positions below this are computed or queued."""
    firm_to: int = 0
    """Those from here to ``queued_to`` are guesses: the next frame may begin among them."""
    credit: int = 0
    unacknowledged: deque[int] = field(default_factory=deque)
    """End positions of frames that the next stage has not acknowledged."""
    running: bool = False
    machines: int = 1
    """Distinct hosts on the route."""
    stepped_ns: int = 0
    """When its last decode step began here; 0 before the first."""
    kept_ns: int = 0
    """When it was closed and kept for a session that goes on from it."""
    sampled: list[int] = field(default_factory=list)
    """Tokens sampled here in this epoch (last stage): with those of the ``Open``, what penalties look at."""
    told: bool = True
    """The next stage has told where it stands; nothing is computed before."""
    hushed: bool = False
    """The next stage was lost: nothing goes on in this epoch, whatever it may still say."""
    onward: int = 0
    """What the next stage wants next: nothing below it is sent there."""
    resending: int | None = None
    """Position from which the hop log is being replayed to the next stage; nothing is computed meanwhile."""
    orphan_ns: int = 0
    """When its sender or its owner was lost; it waits for a later epoch, unless somebody needs the room."""
    source: SessionId | None = None
    """The session whose KV cache it begins with, until it has it: nothing is computed before."""
    stepped: tuple[Frame, Any] | None = None
    """Its last frame and what that gave, where it was a step and nothing was written to the session's KV cache since."""

    def begin(self) -> tuple[Frame, Any]:
        """The next frame, to be computed now; with what it gives where that is known: a recovery asks again for the step that
        stages before the lost one, and standbys, have computed."""
        frame, self.running = self.queue.popleft(), True
        before, self.stepped = self.stepped, None
        if before is None or not _same_step(before[0], frame):
            return frame, None
        return frame, before[1]

    @property
    def runnable(self) -> bool:
        if not self.queue or self.running or self.orphan_ns or self.source is not None:
            return False
        return self.last or (self.told and self.resending is None and (self.credit > 0 or self.silent))

    @property
    def silent(self) -> bool:
        """Whether the next stage has what the next frame gives, so that it is sent nothing."""
        return self.queue[0].position + self.queue[0].length <= self.onward

    @property
    def due(self) -> bool:
        """Whether the next frame is of a session that stands still: the token that it leads to was due before this epoch."""
        order = self.order
        came = bool(order.generated) and not order.standby
        return came and self.queue[0].position < len(order.prompt) + len(order.generated)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a session or frame was not taken."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Copy:
    """The first ``positions`` of a slot are wanted in another."""

    source: int
    target: int
    positions: int


@dataclass(slots=True)
class Run:
    """What to compute: rows of slots ``slot``, ``slot + 1``, ...; ``None`` is a row nobody reads.

    ``positions`` has one entry a row. A single entry whose frame is longer than 1 is a prefill.
    """

    slot: int
    rows: tuple[tuple[StageSession, Frame] | None, ...]
    positions: tuple[int, ...]
    known: Any = None
    """What its only row gives, which need not be computed again."""

    @property
    def live(self) -> Iterator[tuple[int, StageSession, Frame]]:
        """Row index, session and frame of the rows that count."""
        return ((i, *row) for i, row in enumerate(self.rows) if row is not None)


class StageBook:
    """All sessions of one replica."""

    def __init__(
        self,
        shard: ShardInfo,
        slots: int,
        capacity: int,
        kv_budget_bytes: int,
        batch: int = BATCH_MAX,
        batch_exact: bool = True,
    ) -> None:
        """``batch``: most sessions whose decode steps run together; ``batch_exact``: whether those do as well whose text
        must be what it would be alone."""
        self._batch_max, self._batch_exact = batch, batch_exact
        self.shard, self.capacity, self.kv_budget_bytes = shard, capacity, kv_budget_bytes
        self.sessions: dict[SessionId, StageSession] = {}
        self.kept: OrderedDict[SessionId, StageSession] = OrderedDict()
        """Closed sessions whose KV cache is still in its slot, the longest kept first: the first to go when
        somebody needs the room."""
        self.freed: list[int] = []
        """Slots whose memory may go back; whoever reads them empties this."""
        self.copies: list[Copy] = []
        """To be made before the next run; likewise."""
        self.bereft: list[StageSession] = []
        """Sessions whose source ended before it had what they share; likewise."""
        self.reserved_bytes = 0
        self.draining = False
        self._slots: list[StageSession | None] = [None] * slots
        self._decodes_since_prefill = 0
        self._due_since_other = 0
        self._cycle_ns = 0
        """Smoothed time between a session's decode steps."""
        self.gathering_until: int | None = None
        """Set by ``next_run`` when frames wait for others: when to ask again at the latest."""

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def live(self) -> int:
        """Sessions that are fed: those that wait for a later epoch go when somebody needs the room."""
        return sum(not s.orphan_ns for s in self.sessions.values())

    @property
    def queued(self) -> int:
        """Frames that wait, all sessions together."""
        return sum(len(s.queue) for s in self.sessions.values())

    def open(self, order: Open, now: int) -> StageSession | Refusal:
        """Admit a session, or truncate one that is here to a new epoch's position (rule R2)."""
        known = self.sessions.get(order.session)
        if known is not None:
            return self._reopen(known, order)
        if self.draining:
            return Refusal(Cause.DRAINING, "the replica is draining")
        if order.positions > self.capacity:
            return Refusal(
                Cause.FULL,
                f"{order.positions} positions were asked for, this replica has room for {self.capacity} a session",
            )
        reserved = order.positions * self.shard.kv_bytes_per_token
        source = self._source(order, reserved)
        slot, refusal = self._resume(order) if order.resume is not None and source is None else (None, None)
        if refusal is not None:
            return refusal
        if slot is None:
            slot = self._slot_beside(source)
        if slot is None and self._drop_orphan():
            slot = self._slot_beside()
        while self.kept and self.reserved_bytes + reserved > self.kv_budget_bytes:
            self._let_go(next(iter(self.kept)))
        while self.reserved_bytes + reserved > self.kv_budget_bytes and self._drop_orphan():
            pass
        if self.reserved_bytes + reserved > self.kv_budget_bytes:
            if order.resume is not None and source is None and slot is not None:
                self.freed.append(slot)
            return Refusal(
                Cause.FULL,
                f"no KV memory: {reserved} bytes wanted, {self.kv_budget_bytes - self.reserved_bytes} "
                f"of {self.kv_budget_bytes} free",
            )
        if slot is None:
            return Refusal(Cause.FULL, f"all {self.slots} session slots are taken")
        session = StageSession(
            order=order,
            slot=slot,
            reserved_bytes=reserved,
            deadline_ns=now + order.deadline_ms * 1_000_000,
            last=self.shard.last,
            position=order.position if order.resume else 0,
            queued_to=order.position if order.resume else 0,
            firm_to=order.position if order.resume else 0,
            credit=order.window,
            machines=_machines(order),
            told=self.shard.last or order.standby or not order.asks,
            onward=NOTHING_ONWARD if order.standby else 0,
            source=source.order.session if source is not None else None,
        )
        self._slots[slot] = session
        self.sessions[order.session] = session
        self.reserved_bytes += reserved
        return session

    def _source(self, order: Open, reserved: int) -> StageSession | None:
        """The session that a new one gets a copy from: one that runs, or one that is kept and has more than they share, where
        nobody has to go for it."""
        running = self.sessions.get(order.resume) if order.resume is not None else None
        kept = self.kept.get(order.resume) if order.resume is not None else None
        if kept is None or kept.position - order.position < WORTH_POSITIONS:
            return running
        free = None in self._slots and self.reserved_bytes + reserved <= self.kv_budget_bytes
        return kept if free else None

    def _resume(self, order: Open) -> tuple[int | None, Refusal | None]:
        """The slot of a kept session that is long enough, which is then no longer kept."""
        assert order.resume is not None
        kept = self.kept.get(order.resume)
        if kept is None or kept.position < order.position:
            return None, Refusal(Cause.NO_CACHE, f"session {order.resume} is not kept here any more")
        self._let_go(order.resume)
        self.freed.remove(kept.slot)  # its memory is wanted
        return kept.slot, None

    def _slot_beside(self, source: StageSession | None = None) -> int | None:
        """A slot next to those that are in use, whatever is kept there but for the ``source``: neighbours are computed together.
        Where nothing is in use, a free one, or that of the longest kept."""
        used = [s.slot for s in self.sessions.values()]
        spared = source.slot if source is not None else -1
        open_ = [i for i in range(self.slots) if i not in used and i != spared]
        if not open_:
            return None
        empty = [i for i in open_ if self._slots[i] is None]
        if used:
            slot = min(open_, key=lambda i: (min(abs(i - u) for u in used), i not in empty, i))
        else:
            slot = empty[0] if empty else next(iter(self.kept.values())).slot
        for session, kept in list(self.kept.items()):
            if kept.slot == slot:
                self._let_go(session)
        return slot

    def _let_go(self, session: SessionId) -> None:
        kept = self.kept.pop(session)
        self._slots[kept.slot] = None
        self.reserved_bytes -= kept.reserved_bytes
        self.freed.append(kept.slot)

    def forget_idle(self, now: int) -> None:
        """Let go of what nobody has gone on from for long."""
        while self.kept and next(iter(self.kept.values())).kept_ns < now - KEPT_NS:
            self._let_go(next(iter(self.kept)))

    def _drop_orphan(self) -> bool:
        """End the session that waits longest for a later epoch; false if none does."""
        waiting = [i for i, s in self.sessions.items() if s.orphan_ns and not s.running]
        if not waiting:
            return False
        self.close(min(waiting, key=lambda i: self.sessions[i].orphan_ns))
        return True

    def orphan(self, session_id: SessionId, now: int) -> None:
        """Its sender or its owner is lost: stop, and wait with what is computed."""
        session = self.sessions.get(session_id)
        if session is not None and not session.orphan_ns:
            session.orphan_ns = now

    def _reopen(self, session: StageSession, order: Open) -> StageSession | Refusal:
        if order.epoch <= session.order.epoch:
            return Refusal(Cause.STALE_EPOCH, f"the session is at epoch {session.order.epoch.counter}")
        if order.positions > session.order.positions:
            return Refusal(Cause.FULL, "a new epoch cannot take more positions than the first")
        # What a standby has not got round to is as good in the new epoch: its frames are the same.
        fed = order.standby or order.resume is not None
        behind = list(takewhile(lambda f: fed and f.position + f.length <= order.position, session.queue))
        while behind and behind[-1].drafts:
            behind.pop()  # where it was right is not known
        if session.running:
            behind = []
        reached = behind[-1].position + behind[-1].length if behind else session.position
        if order.resume is not None and not order.standby and reached < order.position:
            return Refusal(
                Cause.NO_CACHE, f"position {reached} is due here, the session goes on from {order.position}"
            )
        session.order = order
        session.position = session.queued_to = min(session.position, order.position)
        session.queue.clear()
        for frame in behind:
            frame.epoch, frame.sample = order.epoch, False  # the owner has those tokens
            session.queue.append(frame)
            session.queued_to = frame.position + frame.length
        session.firm_to = session.queued_to
        session.unacknowledged.clear()
        session.credit = order.window
        session.running = False
        session.sampled.clear()
        session.told = self.shard.last or order.standby or not order.asks
        session.hushed = False
        session.onward = NOTHING_ONWARD if order.standby else 0 if order.asks else order.position
        session.resending, session.orphan_ns, session.source = None, 0, None
        return session

    def told(self, session_id: SessionId, epoch: Epoch, position: int, logged_from: int | None) -> int | None:
        """The next stage wants ``position``. What this stage then wants of its sender: its own next position when
        its hop log, whole from ``logged_from`` on (``None``: there is none), holds the rest; else it must be given
        that again and forgets it (rules R2 and R4). ``None`` if nobody waits for this."""
        session = self.sessions.get(session_id)
        if session is None or epoch != session.order.epoch or session.told or session.hushed:
            return None
        session.told, session.onward = True, position
        if position < session.position:
            if logged_from is not None and logged_from <= position:
                session.resending, session.onward = position, session.position
            else:
                session.position = session.queued_to = session.firm_to = position
        return session.position

    def hush(self, session_id: SessionId) -> None:
        """Compute and send no more of a session in this epoch."""
        session = self.sessions[session_id]
        session.told, session.hushed = False, True

    def resent(self, session: StageSession, end: int) -> None:
        """A frame of the hop log, up to ``end``, is on its way to the next stage."""
        session.credit -= 1
        session.unacknowledged.append(end)
        session.resending = end if end < session.position else None

    def accept(self, frame: Frame) -> Refusal | None:
        """Queue a frame. Duplicates, unknown sessions, stale epochs and those that were refused here are dropped without
        a word; a gap, a flood or a frame beyond the reservation is the peer's fault and is returned."""
        session = self.sessions.get(frame.session)
        if session is None or frame.epoch != session.order.epoch:
            return None
        end = frame.position + frame.length
        if frame.length < 1 or end > session.order.positions:
            return Refusal(
                Cause.BAD_FRAME,
                f"frame [{frame.position}, {end}) is not within the {session.order.positions} reserved positions",
            )
        anew = session.firm_to <= frame.position < session.queued_to
        if end <= session.queued_to and not anew:
            return None
        if frame.position != session.queued_to and not anew:
            return Refusal(
                Cause.BAD_FRAME,
                f"frame [{frame.position}, {end}) came where position {session.queued_to} was due",
            )
        if len(session.queue) >= (STANDBY_WINDOW if session.order.standby else session.order.window):
            return Refusal(Cause.BAD_FRAME, f"more than {session.order.window} unacknowledged frames")
        session.queue.append(frame)
        session.queued_to, session.firm_to = end, end - len(frame.drafts)
        return None

    def next_run(self, now: int) -> Run | None:
        """What to compute now; the sessions in it are marked running. ``copies`` come before."""
        self.gathering_until = None
        self._provide()
        ready = [s for s in self.sessions.values() if s.runnable]
        due = [s for s in ready if s.due]
        if due and (self._due_since_other < DUE_PER_OTHER or len(due) == len(ready)):
            self._due_since_other += 1
            ready = due
        else:
            self._due_since_other = 0
            ready = [s for s in ready if not s.due]
        decodes = [s for s in ready if s.queue[0].length == 1]
        if len(decodes) < len(ready) and (not decodes or self._decodes_since_prefill >= DECODES_PER_PREFILL):
            return self._chunk([s for s in ready if s.queue[0].length > 1])
        if not decodes:
            return None
        able = [s for s in decodes if self._batch_exact or not s.order.exact]
        waits = not due and self.shard.first and self._batch_max > 1 and len(able) == len(decodes)
        if waits and (until := self._gather(decodes, now)) is not None:
            self.gathering_until = until
            return None
        self._decodes_since_prefill += 1
        oldest = min(decodes, key=lambda s: s.queue[0].arrived_ns)
        together = self._batch_exact or not oldest.order.exact
        chosen = _neighbours(able, self._batch_max) if together else [oldest]
        for session in chosen:
            self._stepped(session, now)
        return self._batch(chosen)

    def _provide(self) -> None:
        """Sessions that wait for another one's KV cache get it, where that has computed what they share."""
        for session in [s for s in self.sessions.values() if s.source is not None]:
            assert session.source is not None
            source = self.sessions.get(session.source) or self.kept.get(session.source)
            if source is None:
                if not any(s is session for s in self.bereft):
                    self.bereft.append(session)
            elif source.source is None and source.position >= session.order.position:
                self.copies.append(Copy(source.slot, session.slot, session.order.position))
                session.source = None

    def _chunk(self, chunks: list[StageSession]) -> Run:
        session = min(chunks, key=lambda s: s.queue[0].arrived_ns)
        self._decodes_since_prefill = 0
        frame, _ = session.begin()
        return Run(session.slot, ((session, frame),), (frame.position,))

    def _gather(self, ready: list[StageSession], now: int) -> int | None:
        """Until when the ready frames should wait for more; ``None`` when they should go."""
        patience = min(self._cycle_ns, GATHER_MAX_NS)
        until = min(s.queue[0].arrived_ns for s in ready) + patience
        if now >= until:
            return None
        # Those that will be back soon; a paused client's session is not waited for.
        away = sum(
            1
            for s in self.sessions.values()
            if s.stepped_ns and not s.queue and now - s.stepped_ns < 2 * self._cycle_ns
        )
        machines = min(s.machines for s in ready)
        return until if len(ready) * machines < len(ready) + away else None

    def _stepped(self, session: StageSession, now: int) -> None:
        if session.stepped_ns:
            step = min(now - session.stepped_ns, GATHER_MAX_NS)
            self._cycle_ns += (step - self._cycle_ns) // _CYCLE_SMOOTHING
        session.stepped_ns = now

    def _batch(self, sessions: list[StageSession]) -> Run:
        first, last = sessions[0].slot, sessions[-1].slot
        if first == last:
            frame, known = sessions[0].begin()
            return Run(first, ((sessions[0], frame),), (frame.position,), known)
        rows: list[tuple[StageSession, Frame] | None] = []
        positions = []
        chosen = {s.slot for s in sessions}
        for slot in range(first, last + 1):
            session = self._slots[slot]
            if slot in chosen and session is not None:
                frame, _ = session.begin()
                rows.append((session, frame))
                positions.append(frame.position)
            else:
                # The row writes beyond all that the slot has or is to get: overwritten before it is read.
                rows.append(None)
                positions.append(min(session.queued_to, self.capacity) if session else 0)
                if session is not None:
                    session.stepped = None
        return Run(first, tuple(rows), tuple(positions))

    def finished(self, session: StageSession, frame: Frame, output: Any = None) -> bool:
        """Note that a frame was computed, and what it gave; false if its session was closed or reopened meanwhile."""
        current = self.sessions.get(frame.session)
        if current is not session or frame.epoch != session.order.epoch:
            return False
        session.running = False
        end = frame.position + frame.length
        session.position = end - len(frame.drafts)
        if frame.length == 1 and not session.last and output is not None:
            session.stepped = frame, output
        if not session.last and end > session.onward:
            session.credit -= 1
            session.unacknowledged.append(end)
        return True

    def acknowledged(self, session_id: SessionId, epoch: Epoch, position: int) -> None:
        """The next stage has computed everything below ``position``: credit returns."""
        session = self.sessions.get(session_id)
        if session is None or epoch != session.order.epoch:
            return
        while session.unacknowledged and session.unacknowledged[0] <= position:
            session.unacknowledged.popleft()
            session.credit += 1

    def close(
        self, session_id: SessionId, epoch: Epoch | None = None, keep_now: int | None = None
    ) -> StageSession | None:
        """End a session; an older epoch ends nothing. With ``keep_now`` (the time) its KV cache is kept while
        nobody else needs the room, else slot and memory are free."""
        session = self.sessions.get(session_id)
        if session is None or (epoch is not None and epoch < session.order.epoch):
            return None
        del self.sessions[session_id]
        idle = not session.running and not session.queue and session.source is None
        if keep_now is not None and not self.draining and idle:
            session.kept_ns = keep_now
            self.kept[session_id] = session
            return session
        self._slots[session.slot] = None
        self.reserved_bytes -= session.reserved_bytes
        self.freed.append(session.slot)
        return session

    def overdue(self, now: int) -> list[SessionId]:
        """Sessions whose deadline has passed."""
        return [i for i, s in self.sessions.items() if now >= s.deadline_ns]


def _same_step(before: Frame, frame: Frame) -> bool:
    same = frame.length == 1 and frame.position == before.position
    return same and frame.payload.tobytes() == before.payload.tobytes()


def _machines(order: Open) -> int:
    """Distinct hosts on a route: what can compute at the same time."""
    if not isinstance(order.route, LayeredRoute):
        return 1
    return len({stage.address.rsplit(":", 1)[0] for stage in order.route.stages})


def _neighbours(sessions: list[StageSession], most: int) -> list[StageSession]:
    """The cluster of neighbouring slots, ``most`` of them, that holds the frame that waits longest."""
    if len(sessions) == 1:
        return sessions
    clusters: list[list[StageSession]] = []
    for session in sorted(sessions, key=lambda s: s.slot):
        near = clusters and session.slot - clusters[-1][-1].slot <= 1 + _GAP_MAX
        if near and session.slot - clusters[-1][0].slot < most:
            clusters[-1].append(session)
        else:
            clusters.append([session])
    return min(clusters, key=lambda c: min(s.queue[0].arrived_ns for s in c))
