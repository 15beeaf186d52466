"""Silence: learned limits, two looks, and no blame from who was held up itself."""

from __future__ import annotations

from node_agent.hop_watch import FACTOR, FLOOR_NS, HopWatch

MS = 1_000_000
EVERY = 30 * MS


def heard_every(watch: HopWatch[str], gap: int, times: int, begin: int = EVERY) -> int:
    """Signs at equal distances while something is outstanding; the time after the last."""
    now = begin
    for _ in range(times):
        watch.look(["a"], now, EVERY)
        now += gap
        watch.heard("a", now)
    return now


def silent_after(watch: HopWatch[str], now: int, owing: bool = True) -> int | None:
    """Looks as often as due until it is told; how long that took, milliseconds."""
    for i in range(400):
        told = watch.look(["a"] if owing else [], now + i * EVERY, EVERY)
        if told:
            return (i * EVERY) // MS
    return None


def test_a_few_signs_of_who_is_new_tell_a_little() -> None:
    for gap, count, limit in (
        (10, 3, 1000),
        (10, 4, 400),
        (10, 23, 400),
        (10, 24, 100),
        (200, 4, 600),
        (400, 8, 1000),
    ):
        watch: HopWatch[str] = HopWatch()
        heard_every(watch, gap * MS, count)
        assert watch.limit_ns("a") == limit * MS


def test_the_limit_is_learned_with_a_floor() -> None:
    watch: HopWatch[str] = HopWatch()
    assert watch.limit_ns("a") == 1000 * MS
    now = heard_every(watch, 10 * MS, 64)
    assert watch.limit_ns("a") == FLOOR_NS
    took = silent_after(watch, now)
    assert took is not None
    assert FLOOR_NS // MS < took <= FLOOR_NS // MS + 3 * EVERY // MS, "two looks must agree"
    slow: HopWatch[str] = HopWatch()
    heard_every(slow, 80 * MS, 64)
    assert slow.limit_ns("a") == FACTOR * 80 * MS


def test_who_owes_nothing_may_be_silent() -> None:
    watch: HopWatch[str] = HopWatch()
    now = heard_every(watch, 10 * MS, 64)
    assert silent_after(watch, now, owing=False) is None
    # What it owes counts from when it began to owe.
    assert watch.look(["a"], now + 20_000 * MS, EVERY) == []


def test_a_sign_clears_the_doubt() -> None:
    watch: HopWatch[str] = HopWatch()
    now = heard_every(watch, 10 * MS, 64)
    for step in range(1, 5):
        assert watch.look(["a"], now + step * EVERY, EVERY) == []
    watch.heard("a", now + 4 * EVERY)
    assert watch.look(["a"], now + 5 * EVERY, EVERY) == []


def test_whoever_was_held_up_itself_accuses_nobody() -> None:
    watch: HopWatch[str] = HopWatch()
    now = heard_every(watch, 10 * MS, 64)
    watch.look(["a"], now, EVERY)
    # Half a second passes between two looks: its own doing, whatever came lies unread.
    assert watch.look(["a"], now + 500 * MS, EVERY) == []
    assert watch.look(["a"], now + 530 * MS, EVERY) == []


def test_another_process_at_the_address_is_learned_anew() -> None:
    watch: HopWatch[str] = HopWatch()
    heard_every(watch, 10 * MS, 64)
    watch.forget("a")
    assert watch.limit_ns("a") == 1000 * MS
