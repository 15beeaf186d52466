"""Sessions that begin with another one's KV cache: when it is copied, when it is taken over, and what happens where it goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.messages import Cause
from mesh.types import Epoch
from node_agent.stage import Copy, Refusal, StageBook, StageSession
from tests.builders import OWNER, frame, opening
from tests.unit.test_stage import book, computed, name, opened

SHARED = 40
"""Positions that all prompts here have in common."""
POSITIONS = 100


def roomy(slots: int = 4, budget: int = 10_000) -> StageBook:
    return book(slots=slots, capacity=256, budget=budget)


def fed(b: StageBook, i: int, position: int, length: int) -> None:
    assert b.accept(frame(position, length, session=name(i))) is None


def running(b: StageBook, i: int, positions: int) -> StageSession:
    """A session that has computed so many."""
    session = opened(b, i, positions=POSITIONS)
    fed(b, i, 0, positions)
    computed(b, b.next_run(0))
    return session


def kept(b: StageBook, i: int, positions: int) -> StageSession:
    session = running(b, i, positions)
    assert b.close(name(i), keep_now=1) is session
    return session


def test_a_session_gets_a_copy_of_a_running_one_once_that_has_computed_what_they_share() -> None:
    b = roomy()
    first = opened(b, 1, positions=POSITIONS)
    fed(b, 1, 0, 30)
    fed(b, 1, 30, 30)
    second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    fed(b, 2, SHARED, 1)
    assert second.slot != first.slot
    assert computed(b, b.next_run(0)) == [(first.slot, 0)]
    assert not b.copies
    assert computed(b, b.next_run(0)) == [(first.slot, 30)]
    run = b.next_run(0)
    assert b.copies == [Copy(first.slot, second.slot, SHARED)]
    assert computed(b, run) == [(second.slot, SHARED)]
    assert second.position == SHARED + 1


def test_what_is_kept_is_copied_where_it_has_more_than_they_share_and_nobody_has_to_go_for_it() -> None:
    b = roomy()
    first = kept(b, 1, 80)
    second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    fed(b, 2, SHARED, 1)
    run = b.next_run(0)
    assert b.copies == [Copy(first.slot, second.slot, SHARED)]
    assert computed(b, run) == [(second.slot, SHARED)]
    assert list(b.kept) == [name(1)]


def test_what_is_kept_is_taken_over_where_little_more_is_there_or_no_room_for_both() -> None:
    for b, computed_before in (
        (roomy(), 60),
        (roomy(slots=1), 80),
        (roomy(budget=POSITIONS * 10 * 2 - 1), 80),
    ):
        first = kept(b, 1, computed_before)
        second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
        assert (second.slot, second.source) == (first.slot, None)
        assert not b.kept
        fed(b, 2, SHARED, 1)
        assert computed(b, b.next_run(0)) == [(first.slot, SHARED)]
        assert not b.copies


def test_a_copy_of_a_copy_waits_for_both() -> None:
    b = roomy()
    first = opened(b, 1, positions=POSITIONS)
    second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    third = opened(b, 3, positions=POSITIONS, resume=name(2), position=SHARED)
    fed(b, 3, SHARED, 1)
    assert b.next_run(0) is None
    assert not b.copies
    fed(b, 1, 0, SHARED)
    computed(b, b.next_run(0))
    run = b.next_run(0)
    assert b.copies == [Copy(first.slot, second.slot, SHARED), Copy(second.slot, third.slot, SHARED)]
    assert computed(b, run) == [(third.slot, SHARED)]


def test_who_waits_for_one_that_ends_too_soon_is_told_once() -> None:
    b = roomy()
    opened(b, 1, positions=POSITIONS)
    second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    fed(b, 2, SHARED, 1)
    b.close(name(1))
    for _ in range(2):
        assert b.next_run(0) is None
        assert len(b.bereft) == 1
        assert b.bereft[0] is second


def test_one_that_ends_and_is_kept_is_waited_for_no_longer_than_it_takes() -> None:
    b = roomy()
    first = running(b, 1, 60)
    second = opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    b.close(name(1), keep_now=1)
    fed(b, 2, SHARED, 1)
    b.next_run(0)
    assert b.copies == [Copy(first.slot, second.slot, SHARED)]
    assert not b.bereft


def test_a_session_that_has_not_got_its_cache_is_not_kept() -> None:
    b = roomy()
    opened(b, 1, positions=POSITIONS)
    opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    b.close(name(2), keep_now=1)
    assert not b.kept
    assert b.freed == [1]


def test_a_later_epoch_waits_for_nobody() -> None:
    b = roomy()
    opened(b, 1, positions=POSITIONS)
    opened(b, 2, positions=POSITIONS, resume=name(1), position=SHARED)
    second = Epoch(2, OWNER)
    again = b.open(opening(session=name(2), epoch=second, positions=POSITIONS), 0)
    assert isinstance(again, StageSession)
    assert (again.source, again.position) == (None, 0)
    assert b.accept(frame(0, 8, session=name(2), epoch=second)) is None
    assert computed(b, b.next_run(0)) == [(again.slot, 0)]
    assert not b.copies


def test_what_was_never_there_is_refused() -> None:
    refusal = roomy().open(opening(session=name(2), resume=name(1), position=SHARED), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.NO_CACHE


def token(session: int, position: int) -> int:
    """Of a session's prompt: what all share, then its own."""
    return position if position < SHARED else 1000 * session + position


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_whatever_comes_a_session_computes_over_its_own_prompt(moves: list[tuple[int, int, int]]) -> None:
    """Slots are modelled as the tokens that were computed in them."""
    b = roomy(slots=3, budget=POSITIONS * 10 * 3)
    memory: list[list[int]] = [[], [], []]

    def run() -> None:
        while b.freed:
            memory[b.freed.pop()] = []
        found = b.next_run(10**9)
        while b.copies:
            copy = b.copies.pop(0)
            assert len(memory[copy.source]) >= copy.positions
            memory[copy.target] = memory[copy.source][: copy.positions]
        b.bereft.clear()
        if found is None:
            return
        for _, session, each in found.live:
            i = int(session.order.session, 16)
            held = memory[session.slot]
            assert held[: each.position] == [token(i, p) for p in range(each.position)]
            held[each.position :] = [token(i, each.position + n) for n in range(each.length)]
            b.finished(session, each)
            session.credit = 4

    for what, i, j in moves:
        session = b.sessions.get(name(i))
        if what == 0 and session is None and name(i) not in b.kept:
            b.open(opening(session=name(i), positions=POSITIONS), 0)
        elif what == 1 and session is None and name(i) not in b.kept:
            b.open(opening(session=name(i), positions=POSITIONS, resume=name(j), position=SHARED - j), 0)
        elif what == 2 and session is not None and session.queued_to + 15 <= POSITIONS:
            b.accept(frame(session.queued_to, 15, session=name(i)))
        elif what == 3:
            b.close(name(i), keep_now=1 if j % 2 else None)
        else:
            run()
        taken = [s.slot for s in (*b.sessions.values(), *b.kept.values())]
        assert len(taken) == len(set(taken)) <= 3
        assert b.reserved_bytes == POSITIONS * 10 * len(taken)
