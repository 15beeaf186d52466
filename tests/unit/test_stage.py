"""A replica's book: admission, order, batches, credit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.messages import Cause, Frame
from mesh.types import Epoch, SessionId
from node_agent.stage import DUE_PER_OTHER, GATHER_MAX_NS, KEPT_NS, Refusal, Run, StageBook, StageSession
from tests.builders import OWNER, SESSION, frame, opening, route, shard


def book(start: int = 0, end: int = 2, slots: int = 4, capacity: int = 64, budget: int = 10_000) -> StageBook:
    return StageBook(shard(start, end), slots, capacity, budget)


def name(i: int) -> SessionId:
    return SessionId(f"{i:032x}")


def opened(b: StageBook, i: int, **changes: object) -> StageSession:
    session = b.open(opening(session=name(i), **changes), 0)
    assert isinstance(session, StageSession)
    return session


def computed(b: StageBook, run: Run | None) -> list[tuple[int, int]]:
    """Finish a run: slot and position of its live rows."""
    assert run is not None
    for _, session, each in run.live:
        b.finished(session, each)
    return [(s.slot, f.position) for _, s, f in run.live]


def test_r8_opening_reserves_memory_and_a_full_replica_says_why() -> None:
    b = book(budget=32 * 10 * 2)
    opened(b, 1)
    opened(b, 2)
    refusal = b.open(opening(session=name(3)), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.FULL
    assert "0 of 640 free" in refusal.reason
    b.close(name(1))
    opened(b, 3)


def test_slots_and_capacity_are_limits_of_their_own() -> None:
    b = book(slots=1)
    assert isinstance(b.open(opening(positions=65), 0), Refusal)
    opened(b, 1)
    refusal = b.open(opening(session=name(2)), 0)
    assert isinstance(refusal, Refusal)
    assert "slots" in refusal.reason


def test_a_draining_replica_takes_no_new_session() -> None:
    b = book()
    b.draining = True
    refusal = b.open(opening(), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.DRAINING


def test_frames_of_older_and_refused_epochs_and_duplicates_are_dropped_without_a_word() -> None:
    b = book()
    b.open(opening(epoch=Epoch(2, OWNER)), 0)
    assert b.accept(frame(epoch=Epoch(1, OWNER))) is None
    assert b.accept(frame(epoch=Epoch(3, OWNER))) is None
    assert b.queued == 0
    assert b.accept(frame(epoch=Epoch(2, OWNER))) is None
    assert b.accept(frame(epoch=Epoch(2, OWNER))) is None
    assert b.queued == 1


def test_gaps_floods_and_overruns_are_the_peers_fault() -> None:
    b = book()
    b.open(opening(positions=8, window=2), 0)
    for bad in (frame(1), frame(0, 9)):
        refusal = b.accept(bad)
        assert isinstance(refusal, Refusal)
        assert refusal.cause is Cause.BAD_FRAME
    assert b.accept(frame(0)) is None
    assert b.accept(frame(1)) is None
    assert isinstance(b.accept(frame(2)), Refusal)


def test_r2_a_new_epoch_truncates_to_its_position() -> None:
    b = book()
    session = b.open(opening(), 0)
    assert isinstance(session, StageSession)
    b.accept(frame(0, 6))
    computed(b, b.next_run(1))
    assert session.position == 6
    b.open(opening(epoch=Epoch(2, OWNER), position=4), 0)
    assert (session.position, session.queued_to) == (4, 4)
    assert b.accept(frame(4, epoch=Epoch(2, OWNER))) is None
    assert isinstance(b.open(opening(epoch=Epoch(1, OWNER)), 0), Refusal)


def test_r2_what_was_running_when_a_new_epoch_opened_does_not_count() -> None:
    b = book()
    b.open(opening(), 0)
    b.accept(frame(0, 6))
    run = b.next_run(1)
    assert run is not None
    b.open(opening(epoch=Epoch(2, OWNER), position=0), 0)
    _, session, old = next(run.live)
    assert not b.finished(session, old)
    assert session.position == 0


def test_r3_a_frame_is_run_whole_and_alone_in_its_session() -> None:
    b = book()
    b.open(opening(), 0)
    b.accept(frame(0, 6))
    b.accept(frame(6, 2))
    run = b.next_run(1)
    assert run is not None
    assert [f.length for _, _, f in run.live] == [6]
    assert b.next_run(1) is None, "the session is running"


def test_r8_no_run_without_credit_downstream() -> None:
    b = book()
    session = opened(b, 1, window=2)
    for position in (0, 1):
        b.accept(frame(position, session=name(1)))
        computed(b, b.next_run(1))
    b.accept(frame(2, session=name(1)))
    assert b.next_run(1) is None
    b.acknowledged(name(1), session.order.epoch, 1)
    assert computed(b, b.next_run(1)) == [(0, 2)]


def test_steps_of_neighbouring_slots_run_together_gaps_included() -> None:
    b = book(start=2, end=4, slots=8)
    for i in range(6):
        opened(b, i)
    for i in (0, 1, 3, 5):
        b.accept(frame(0, session=name(i), arrived_ns=i + 1))
    run = b.next_run(1)
    assert run is not None
    assert [i for i, _, _ in run.live] == [0, 1, 3, 5]
    assert run.rows[2] is None
    assert run.rows[4] is None


def test_a_run_takes_no_more_sessions_than_the_runtime() -> None:
    b = StageBook(shard(2, 4), 8, 64, 10_000, batch=3)
    for i in range(5):
        opened(b, i)
        b.accept(frame(0, session=name(i), arrived_ns=i + 1))
    assert computed(b, b.next_run(1)) == [(0, 0), (1, 0), (2, 0)]
    assert computed(b, b.next_run(1)) == [(3, 0), (4, 0)]


def test_fixed_texts_run_alone_where_a_batch_would_change_their_bits() -> None:
    b = StageBook(shard(2, 4), 8, 64, 10_000, batch=4, batch_exact=False)
    for i, exact in enumerate((False, True, False)):
        opened(b, i, exact=exact)
    for i, arrived in ((0, 2), (1, 1), (2, 3)):
        b.accept(frame(0, session=name(i), arrived_ns=arrived))
    assert computed(b, b.next_run(1)) == [(1, 0)]
    assert computed(b, b.next_run(1)) == [(0, 0), (2, 0)]


def test_r8_prefill_yields_to_decode_steps_but_not_for_ever() -> None:
    b = book(start=2, end=4)
    opened(b, 1)
    opened(b, 2)
    b.accept(frame(0, 8, session=name(1)))
    kinds = []
    for position in range(6):
        b.accept(frame(position, session=name(2)))
        run = b.next_run(1)
        assert run is not None
        kinds.append(max(f.length for _, _, f in run.live))
        computed(b, run)
        b.acknowledged(name(2), Epoch(1, OWNER), position + 1)
    assert kinds[:5] == [1, 1, 1, 1, 8]


@pytest.mark.parametrize("length", [1, 2])
def test_r8_what_was_due_goes_before_steps_and_prefill_but_not_for_ever(length: int) -> None:
    """A session that is being recovered stands still, whether chunks are replayed to it or steps."""
    b = book(start=2, end=4, capacity=2000, budget=10_000_000)
    opened(b, 1)
    opened(b, 2, prompt=tuple(range(98)), generated=(5, 6), positions=2000)
    opened(b, 3)
    b.accept(frame(0, 8, session=name(3)))
    ran = []
    for turn in range(DUE_PER_OTHER + 2):
        b.accept(frame(turn, session=name(1)))
        b.accept(frame(length * turn, length, session=name(2)))
        run = b.next_run(1)
        assert run is not None
        ran.append({s.order.session for _, s, _ in run.live})
        computed(b, run)
        for i in (1, 2):
            b.acknowledged(name(i), Epoch(1, OWNER), length * turn + length)
    assert [name(2) in r for r in ran] == [True] * DUE_PER_OTHER + [False, True]
    assert all(len(r) == 1 for r in ran)


@pytest.mark.parametrize(
    ("position", "order"),
    [(5, {"generated": (5, 6)}), (2, {}), (2, {"generated": (5, 6), "standby": True})],
    ids=["beyond the last token", "a prompt only", "a standby"],
)
def test_r8_what_was_not_due_waits_its_turn(position: int, order: dict[str, object]) -> None:
    b = book(start=2, end=4)
    opened(b, 1)
    waiting = opened(b, 2, **order)
    waiting.position = waiting.queued_to = waiting.firm_to = position
    b.accept(frame(0, session=name(1), arrived_ns=1))
    b.accept(frame(position, 2, session=name(2), arrived_ns=0))
    assert computed(b, b.next_run(1)) == [(0, 0)]


def step(b: StageBook, i: int, position: int, now: int) -> None:
    b.accept(frame(position, session=name(i), arrived_ns=now))


def test_the_first_stage_waits_for_the_other_half_of_a_bunch() -> None:
    b = book(slots=4)
    here = route()  # one machine: a single bunch is best
    for i in (0, 1):
        opened(b, i, route=here, window=8)
    for turn in range(4):
        now = 1_000_000 * turn + 1
        for i in (0, 1):
            step(b, i, turn, now)
        assert len(computed(b, b.next_run(now))) == 2
    step(b, 0, 4, 4_000_001)
    assert b.next_run(4_000_002) is None
    assert b.gathering_until is not None
    step(b, 1, 4, 4_100_000)
    assert len(computed(b, b.next_run(4_100_001))) == 2


def test_waiting_for_others_ends_in_time_when_they_do_not_come() -> None:
    b = book(slots=4)
    for i in (0, 1):
        opened(b, i, route=route(), window=8)
    for turn in range(4):
        for i in (0, 1):
            step(b, i, turn, 1_000_000 * turn + 1)
        computed(b, b.next_run(1_000_000 * turn + 1))
    step(b, 0, 4, 4_000_001)
    assert b.next_run(4_000_002) is None
    until = b.gathering_until
    assert until is not None
    assert until <= 4_000_001 + GATHER_MAX_NS
    assert len(computed(b, b.next_run(until))) == 1


def test_a_route_over_three_machines_keeps_three_bunches() -> None:
    b = book(slots=4)
    for i in range(3):
        opened(b, i, route=route(2, 4), window=8)
    for turn in range(4):
        for i in range(3):
            step(b, i, turn, 1_000_000 * turn + 1)
        while (run := b.next_run(1_000_000 * turn + 1)) is not None:
            computed(b, run)
    step(b, 0, 4, 4_000_001)
    assert len(computed(b, b.next_run(4_000_002))) == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_memory_and_slots_add_up_whatever_opens_and_closes(script: list[tuple[int, bool]]) -> None:
    b = book(slots=3, budget=32 * 10 * 2)
    live: set[SessionId] = set()
    for i, opens in script:
        if opens and name(i) not in live:
            if isinstance(b.open(opening(session=name(i)), 0), StageSession):
                live.add(name(i))
        elif not opens:
            assert (b.close(name(i)) is not None) == (name(i) in live)
            live.discard(name(i))
        assert set(b.sessions) == live
        assert b.reserved_bytes == 320 * len(live) <= b.kv_budget_bytes
        assert len({s.slot for s in b.sessions.values()}) == len(live)


def test_a_session_is_overdue_at_its_deadline() -> None:
    b = book()
    b.open(opening(deadline_ms=5), 0)
    assert b.overdue(4_999_999) == []
    assert b.overdue(5_000_000) == [SESSION]


# -- kept caches -----------------------------------------------------------------------------


def kept(b: StageBook, i: int, positions: int = 8, at: int = 0) -> StageSession:
    """A session that computed so many positions, was closed and kept."""
    session = opened(b, i)
    b.accept(frame(0, positions, session=name(i)))
    computed(b, b.next_run(0))
    assert b.close(name(i), keep_now=at) is session
    return session


def test_a_closed_session_is_gone_on_from_in_its_own_slot() -> None:
    b = book()
    before = kept(b, 1, positions=8)
    assert list(b.sessions) == []
    assert b.freed == []
    after = opened(b, 2, resume=name(1), position=6)
    assert (after.slot, after.position, after.queued_to) == (before.slot, 6, 6)
    assert not b.kept
    assert b.accept(frame(6, 2, session=name(2))) is None
    assert computed(b, b.next_run(0)) == [(after.slot, 6)]
    assert b.reserved_bytes == after.reserved_bytes


def test_what_is_not_kept_or_not_long_enough_is_refused_and_costs_nothing() -> None:
    b = book()
    kept(b, 1, positions=4)
    for wanted in (
        opening(session=name(2), resume=name(9), position=2),
        opening(session=name(2), resume=name(1), position=5),
    ):
        refusal = b.open(wanted, 0)
        assert isinstance(refusal, Refusal)
        assert refusal.cause is Cause.NO_CACHE
    assert list(b.kept) == [name(1)]


def test_whoever_needs_the_room_gets_it_the_longest_kept_goes_first() -> None:
    b = book(slots=3, budget=32 * 10 * 3)
    kept(b, 1)
    kept(b, 2)
    opened(b, 3)
    assert list(b.kept) == [name(1), name(2)]
    opened(b, 4)
    assert len(b.kept) == 1
    opened(b, 5)
    assert not b.kept
    assert sorted(b.freed) == [0, 1]
    assert isinstance(b.open(opening(session=name(6)), 0), Refusal)
    assert b.reserved_bytes == 32 * 10 * 3


def test_sessions_side_by_side_stay_neighbours_whatever_is_kept() -> None:
    b = book(slots=8, budget=32 * 10 * 8)
    for i in range(6):
        kept(b, i)
    first = opened(b, 10)
    assert first.slot == 6, "an empty slot first"
    slots = sorted(opened(b, 11 + i).slot for i in range(3))
    assert sorted([first.slot, *slots]) == list(range(min(first.slot, *slots), min(first.slot, *slots) + 4))
    assert len(b.kept) == 4


def test_kept_caches_are_forgotten_in_time_and_never_by_a_draining_replica() -> None:
    b = book()
    kept(b, 1, at=5)
    b.forget_idle(5 + KEPT_NS)
    assert b.kept
    b.forget_idle(6 + KEPT_NS)
    assert not b.kept
    assert b.reserved_bytes == 0
    opened(b, 2)
    b.draining = True
    b.close(name(2), keep_now=9)
    assert not b.kept


def test_a_session_with_a_step_under_way_is_not_kept() -> None:
    b = book()
    opened(b, 1)
    b.accept(frame(0, 1, session=name(1)))
    assert b.next_run(0) is not None
    b.close(name(1), keep_now=1)
    assert not b.kept


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=60))
def test_slots_and_memory_add_up_whatever_comes(moves: list[tuple[int, int]]) -> None:
    b = book(slots=3, budget=32 * 10 * 3)
    for what, i in moves:
        if what == 0 and name(i) not in b.kept:
            b.open(opening(session=name(i)), 0)
        elif what == 1:
            b.close(name(i), keep_now=1)
        elif what == 2:
            b.close(name(i))
        elif name(i) not in b.sessions and name(i) not in b.kept:
            b.open(opening(session=name(i), resume=name((i + 1) % 8), position=0), 0)
        taken = [s.slot for s in (*b.sessions.values(), *b.kept.values())]
        assert len(taken) == len(set(taken)) <= 3
        assert b.reserved_bytes == 320 * len(taken)
        assert not set(b.freed) & {s.slot for s in b.kept.values()}
        b.freed.clear()


# -- recovery ---------------------------------------------------------------------------------


def computing(b: StageBook, positions: int, window: int = 64) -> StageSession:
    """A session that has computed and sent so many positions, one at a time."""
    session = opened(b, 1, window=window)
    for position in range(positions):
        b.accept(frame(position, session=name(1)))
        computed(b, b.next_run(10**9))
    b.acknowledged(name(1), session.order.epoch, positions)
    return session


def reopened(b: StageBook, position: int, **changes: object) -> StageSession:
    return opened(b, 1, window=64, epoch=Epoch(2, OWNER), position=position, **changes)


def test_r2_a_stage_computes_nothing_before_the_next_has_told_where_it_stands() -> None:
    b = book()
    computing(b, 6)
    session = reopened(b, 5)
    assert session.position == 5
    b.accept(frame(5, session=name(1), epoch=Epoch(2, OWNER)))
    assert b.next_run(10**9) is None
    assert b.told(name(1), Epoch(1, OWNER), 5, 0) is None, "an older epoch's answer"
    assert b.told(name(1), Epoch(2, OWNER), 5, 0) == 5
    assert b.told(name(1), Epoch(2, OWNER), 5, 0) is None, "an answer counts once"
    assert computed(b, b.next_run(10**9)) == [(0, 5)]


def test_r2_what_was_lost_in_an_epoch_is_begun_again_by_the_next_one_only() -> None:
    b = book()
    computing(b, 6)
    reopened(b, 5)
    b.hush(name(1))
    assert b.told(name(1), Epoch(2, OWNER), 5, 0) is None, "a silent stage answers after all"
    b.accept(frame(5, session=name(1), epoch=Epoch(2, OWNER)))
    assert b.next_run(10**9) is None
    opened(b, 1, window=64, epoch=Epoch(3, OWNER), position=5)
    b.accept(frame(5, session=name(1), epoch=Epoch(3, OWNER)))
    assert b.told(name(1), Epoch(3, OWNER), 5, 0) == 5
    assert computed(b, b.next_run(10**9)) == [(0, 5)]


def test_r4_what_the_next_stage_lacks_is_replayed_from_the_log_before_anything_new() -> None:
    b = book()
    computing(b, 6)
    session = reopened(b, 5)
    assert b.told(name(1), Epoch(2, OWNER), 0, logged_from=0) == 5
    b.accept(frame(5, session=name(1), epoch=Epoch(2, OWNER)))
    assert b.next_run(10**9) is None
    asked = []
    while session.resending is not None:
        asked.append(session.resending)
        b.resent(session, session.resending + 1)
    assert asked == [0, 1, 2, 3, 4]
    assert list(session.unacknowledged) == [1, 2, 3, 4, 5]
    assert computed(b, b.next_run(10**9)) == [(0, 5)]


def test_r4_without_a_log_a_stage_asks_for_what_the_next_one_lacks() -> None:
    for logged_from in (None, 3):
        b = book()
        computing(b, 6)
        session = reopened(b, 5)
        assert b.told(name(1), Epoch(2, OWNER), 2, logged_from) == 2
        assert (session.position, session.queued_to, session.resending) == (2, 2, None)
        assert b.accept(frame(2, session=name(1), epoch=Epoch(2, OWNER))) is None


def test_a_new_stage_sends_only_what_the_next_one_lacks() -> None:
    b = book()
    session = reopened(b, 5)
    assert session.position == 0
    assert b.told(name(1), Epoch(2, OWNER), 4, logged_from=0) == 0
    for position in range(5):
        b.accept(frame(position, session=name(1), epoch=Epoch(2, OWNER)))
        computed(b, b.next_run(10**9))
    # Credit is spent on what was sent alone.
    assert list(session.unacknowledged) == [5]


def test_a_session_whose_sender_is_lost_waits_unless_somebody_needs_the_room() -> None:
    b = book(slots=2)
    computing(b, 6)
    opened(b, 2)
    b.orphan(name(1), 7)
    assert b.live == 1
    b.accept(frame(6, session=name(1)))
    assert b.next_run(10**9) is None
    # It goes on where it was in a later epoch ...
    assert reopened(b, 6).position == 6
    assert b.live == 2
    # ... or makes room.
    b.orphan(name(1), 8)
    opened(b, 3)
    assert set(b.sessions) == {name(2), name(3)}
    assert isinstance(b.open(opening(session=name(4)), 0), Refusal)


def test_a_standby_computes_all_and_sends_nothing() -> None:
    b = book()
    session = opened(b, 1, window=1, standby=True)
    for position in range(20):
        assert b.accept(frame(position, session=name(1))) is None, "nobody waits for its acknowledgements"
    for position in range(18):
        assert computed(b, b.next_run(10**9)) == [(0, position)]
    assert (session.credit, list(session.unacknowledged)) == (1, [])
    # In a later epoch it goes on as one, with what it has not got round to; or takes its stage.
    session = opened(b, 1, window=1, epoch=Epoch(2, OWNER), position=19, standby=True)
    assert (session.position, session.queued_to, len(session.queue)) == (18, 19, 1)
    assert computed(b, b.next_run(10**9)) == [(0, 18)]
    session = opened(b, 1, window=4, epoch=Epoch(3, OWNER), position=19)
    assert (session.position, session.onward, session.told) == (19, 0, False)


def test_r2_who_should_have_everything_goes_on_without_being_told_or_refuses_and_keeps_what_it_has() -> None:
    b = book()
    computing(b, 6)
    refusal = b.open(
        opening(session=name(1), window=64, epoch=Epoch(2, OWNER), position=7, resume=name(1)), 0
    )
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.NO_CACHE
    assert b.accept(frame(7, session=name(1), epoch=Epoch(2, OWNER))) is None
    session = b.sessions[name(1)]
    assert (session.position, session.queue, session.order.epoch) == (
        6,
        type(session.queue)(),
        Epoch(1, OWNER),
    )
    # What follows the Open of an epoch for which it has everything is computed at once.
    assert reopened(b, 6, resume=name(1)) is session
    b.accept(frame(6, session=name(1), epoch=Epoch(2, OWNER)))
    assert computed(b, b.next_run(10**9)) == [(0, 6)]
    # Who knows nothing of the session has nothing.
    refusal = b.open(opening(session=name(2), epoch=Epoch(2, OWNER), position=7, resume=name(2)), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.NO_CACHE


def test_a_standby_that_is_behind_takes_its_stage_with_what_it_has_not_got_round_to() -> None:
    b = book()
    session = opened(b, 1, window=1, standby=True)
    for position in range(6):
        b.accept(frame(position, session=name(1)))
    for position in range(4):
        assert computed(b, b.next_run(10**9)) == [(0, position)]
    assert reopened(b, 6, resume=name(1)) is session
    assert (session.position, session.queued_to) == (4, 6)
    assert [f.sample for f in session.queue] == [False, False], "those tokens are known"
    b.accept(frame(6, session=name(1), epoch=Epoch(2, OWNER)))
    for position in range(4, 7):
        assert computed(b, b.next_run(10**9)) == [(0, position)]
    # The next stage has what came before this epoch.
    assert list(session.unacknowledged) == [7]


def guess(position: int, drafts: int, i: int = 1, **changes: object) -> Frame:
    return frame(position, 1 + drafts, session=name(i), drafts=(7,) * drafts, **changes)


def test_a_frame_may_begin_where_a_guess_was_wrong_and_nowhere_else() -> None:
    b = book()
    session = opened(b, 1)
    b.accept(frame(0, 4, session=name(1)))
    computed(b, b.next_run(0))
    assert b.accept(guess(4, 3)) is None
    assert computed(b, b.next_run(0)) == [(0, 4)]
    assert (session.position, session.queued_to) == (5, 8), "guesses are not what is sure"
    assert b.accept(guess(4, 3)) is None, "a duplicate"
    assert b.next_run(0) is None
    late = b.accept(frame(9, session=name(1)))
    assert late is not None
    assert late.cause is Cause.BAD_FRAME
    assert b.accept(frame(6, session=name(1))) is None
    assert computed(b, b.next_run(0)) == [(0, 6)]
    assert (session.position, session.queued_to) == (7, 7)
    assert b.accept(frame(6, session=name(1))) is None
    assert b.next_run(0) is None, "a duplicate, now that it is sure"


def test_r8_credit_comes_back_whatever_guesses_were_wrong() -> None:
    b = book()
    session = opened(b, 1, window=4)
    ends = []
    for position in range(12):
        assert b.accept(guess(position, 3)) is None
        assert computed(b, b.next_run(0)), f"stuck at {position}"
        ends.append(position + 4)
        b.acknowledged(name(1), Epoch(1, OWNER), ends[-1])
    assert session.credit == 4


def test_r2_a_later_epoch_goes_on_from_what_is_sure() -> None:
    b = book()
    opened(b, 1)
    b.accept(frame(0, 4, session=name(1)))
    computed(b, b.next_run(0))
    b.accept(guess(4, 3))
    computed(b, b.next_run(0))
    session = opened(b, 1, epoch=Epoch(2, OWNER), position=7)
    assert session.position == 5, "whether the guesses were right only the owner knows"


def test_r2_a_standby_that_cannot_know_which_guesses_were_right_is_behind() -> None:
    b = book()
    opened(b, 1, standby=True)
    b.accept(frame(0, 4, session=name(1)))
    b.accept(guess(4, 3))
    session = opened(b, 1, epoch=Epoch(2, OWNER), position=8, standby=True)
    assert [f.position for f in session.queue] == [0]
    assert session.queued_to == 4


def test_a_row_that_nobody_reads_spares_guesses_that_came_true() -> None:
    b = book()
    for i in (1, 2, 3):
        opened(b, i)
        b.accept(frame(0, 4, session=name(i)))
        computed(b, b.next_run(0))
    b.accept(guess(4, 3, 2))
    computed(b, b.next_run(0))
    for i in (1, 3):
        b.accept(frame(4, session=name(i)))
    run = b.next_run(10**9)
    assert run is not None
    assert run.positions == (4, 8, 4)


def stepped(b: StageBook, position: int, value: float = 1.0, epoch: int = 1, i: int = 1) -> object:
    """A frame of one position: what it was known to give, after it has given ``(position, epoch)``."""
    payload = np.full((1, 4), value, dtype=np.float32)
    b.accept(frame(position, session=name(i), epoch=Epoch(epoch, OWNER), payload=payload))
    run = b.next_run(10**9)
    assert run is not None
    for _, session, each in run.live:
        b.finished(session, each, (position, epoch))
    return run.known


def test_a_step_that_a_recovery_asks_for_again_gives_what_it_gave() -> None:
    b = book(start=2, end=4)
    opened(b, 1, window=64)
    assert [stepped(b, position) for position in range(3)] == [None] * 3
    reopened(b, 2, resume=name(1))
    assert stepped(b, 2, epoch=2) == (2, 1)
    assert stepped(b, 3, epoch=2) is None


def test_a_step_is_computed_again_where_anything_is_not_as_it_was() -> None:
    def recovered(start: int = 2, end: int = 4, position: int = 2) -> StageBook:
        b = StageBook(shard(start, end), 4, 64, 10_000)
        opened(b, 1, window=64)
        for each in range(3):
            stepped(b, each)
        reopened(b, position, resume=name(1))
        return b

    assert stepped(recovered(), 2, value=2.0, epoch=2) is None, "it was given something else"
    assert stepped(recovered(position=1), 1, epoch=2) is None, "the cache has what came after"
    assert stepped(recovered(end=6), 2, epoch=2) is None, "the last stage samples"
    b = recovered()
    b.sessions[name(1)].queued_to = 3
    payload = np.ones((2, 4), dtype=np.float32)
    b.sessions[name(1)].queue.append(frame(2, 2, session=name(1), epoch=Epoch(2, OWNER), payload=payload))
    run = b.next_run(10**9)
    assert run is not None
    assert run.known is None, "it is a chunk now"


def test_a_step_is_computed_again_where_a_row_that_nobody_reads_was_written_over_it() -> None:
    b = book(start=2, end=4)
    for i in range(1, 4):
        opened(b, i, window=64)
        stepped(b, 0, i=i)
    opened(b, 2, window=64, epoch=Epoch(2, OWNER), position=0, resume=name(2))
    for i in (1, 3):
        payload = np.ones((1, 4), dtype=np.float32)
        b.accept(frame(1, session=name(i), payload=payload))
    run = b.next_run(10**9)
    assert run is not None
    assert [row is None for row in run.rows] == [False, True, False]
    computed(b, run)
    assert stepped(b, 0, epoch=2, i=2) is None


def test_a_step_that_failed_is_not_known() -> None:
    b = book(start=2, end=4)
    session = opened(b, 1, window=64)
    b.accept(frame(0, session=name(1), payload=np.ones((1, 4), dtype=np.float32)))
    run = b.next_run(10**9)
    computed(b, run)
    assert session.stepped is None
