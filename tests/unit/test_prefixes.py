"""Which session a prompt can begin with, and as far as where."""

from __future__ import annotations

from mesh.types import Digest, SessionId
from node_agent.prefixes import KEPT_MAX, WORTH_POSITIONS, KeptSession, PrefixBook
from tests.builders import order, route

MODEL = Digest("0" * 64)
SYSTEM = tuple(range(100))


def kept(name: str, *tokens: int, canonical: int = 0, model: Digest = MODEL) -> KeptSession:
    return KeptSession(SessionId(name), model, (*SYSTEM, *tokens), route(3), canonical)


def test_the_session_that_shares_most_is_found_and_one_position_is_left() -> None:
    book = PrefixBook()
    short, long = kept("a", 200, 201), kept("b", 200, 300, 301)
    book.add(short)
    book.add(long)
    assert book.longest(MODEL, (*SYSTEM, 200, 300, 400)) == (long, 102)
    assert book.longest(MODEL, (*SYSTEM, 200)) == (long, 100)
    assert book.longest(MODEL, SYSTEM[: WORTH_POSITIONS + 1]) == (long, WORTH_POSITIONS)
    assert book.longest(MODEL, SYSTEM[:WORTH_POSITIONS]) is None
    assert book.longest(Digest("1" * 64), (*SYSTEM, 200)) is None


def test_a_session_that_runs_counts_as_well() -> None:
    book, runs = PrefixBook(), kept("r", 200, 201, 202)
    book.add(kept("a", 200))
    assert book.longest(MODEL, (*SYSTEM, 200, 201, 202, 203), [runs]) == (runs, 103)


def test_on_a_grid_only_canonical_positions_count_in_whole_chunks() -> None:
    book = PrefixBook()
    book.add(kept("a", 200, 201))
    assert book.longest(MODEL, (*SYSTEM, 200, 201, 202), grid=64) is None
    clean = kept("b", canonical=64)
    book.add(clean)
    assert book.longest(MODEL, (*SYSTEM, 200, 201, 202), grid=64) == (clean, 64)
    assert book.longest(MODEL, SYSTEM[:60], grid=64) is None


def test_a_session_that_has_much_more_than_was_shared_stays() -> None:
    book = PrefixBook()
    turn = kept("a", *range(200, 300))
    book.add(turn)
    begun = book.begin(order(), turn, 100)
    assert begun.resume == (turn.session, 100)
    assert not begun.canonical
    assert book.longest(MODEL, (*turn.tokens, 1)) == (turn, 200)
    book.begin(order(), turn, 200 - WORTH_POSITIONS + 1)
    assert book.longest(MODEL, (*turn.tokens, 1)) is None


def test_what_was_used_last_is_forgotten_last() -> None:
    book = PrefixBook()
    first = kept("0", *range(200, 300))
    book.add(first)
    for i in range(1, KEPT_MAX):
        book.add(kept(str(i), i))
    book.begin(order(), first, 100)
    book.add(kept("more", 7))
    assert book.longest(MODEL, (*first.tokens, 1)) == (first, 200)


def test_what_is_gone_at_its_stages_is_dropped() -> None:
    book = PrefixBook()
    book.add(kept("a", 200))
    book.drop(SessionId("a"))
    book.drop(SessionId("a"))
    assert book.longest(MODEL, (*SYSTEM, 200, 1)) is None
