"""Guesses: where they come from, and that they are made only where they pay."""

from __future__ import annotations

from random import Random

import pytest

from mesh.speculation import GUESSES_MAX, Speculation

MS = 1_000_000
STEP, EXTRA = 80 * MS, 1 * MS


def generate(
    prompt: list[int], text: list[int], extra: int = EXTRA, wobble: float = 0.1
) -> tuple[float, Speculation]:
    """A session that generates ``text``: how much faster than in single steps, and its guesses."""
    rng, now, at = Random(1), 0, 1
    guesses = Speculation(prompt)
    guesses.take(text[0], now)
    while at < len(text):
        tried = guesses.guess(len(text) - at - 1, now)
        now += int((STEP + extra * len(tried)) * rng.uniform(1 - wobble, 1 + wobble))
        for guess in (*tried, None):
            guesses.take(text[at], now)
            at += 1
            if guess != text[at - 1]:
                break
    return (len(text) - 1) * STEP / now, guesses


def test_what_follows_the_same_words_is_guessed_once_a_step_was_measured() -> None:
    guesses = Speculation([5, 6, 7, 8, 9, 10, 11, 5, 6])
    assert guesses.guess(8, 0) == (), "what a step takes is not known"
    assert not guesses.take(7, STEP)
    made = guesses.guess(8, STEP)
    assert made == (8, 9, 10, 11, 5, 6, 7, 8)[: len(made)]
    assert len(made) > 2
    assert [guesses.take(t, 2 * STEP) for t in (8, 9, 12)] == [True, True, False]
    assert (guesses.made, guesses.right) == (len(made), 2)
    assert guesses.guess(8, 2 * STEP) == (), "nothing followed 12"


def test_the_longest_and_latest_match_counts_and_a_guess_may_go_round() -> None:
    guesses = Speculation([1, 2, 3, 9, 2, 3, 4, 9, 1, 2])
    guesses.guess(1, 0)
    guesses.take(3, STEP)
    assert guesses.guess(1, STEP) == (9,), "three words say more than two, and the latest two say 4"
    round_ = Speculation([7, 8, 7])
    round_.guess(0, 0)
    round_.take(8, STEP)
    assert round_.guess(3, STEP) == (7, 8, 7), "the last of them stands nowhere yet"


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_no_more_than_there_is_room_for(room: int) -> None:
    guesses = Speculation([1, 2, 3, 4] * 30)
    for i in range(20):
        made = guesses.guess(room, i * STEP)
        assert len(made) <= min(room, GUESSES_MAX)
        for token in made:
            guesses.take(token, (i + 1) * STEP)
        guesses.take([1, 2, 3, 4][len(guesses._history) % 4], (i + 1) * STEP)


def test_a_text_that_repeats_itself_is_several_times_as_fast() -> None:
    prompt = [Random(2).randrange(50, 5000) for _ in range(200)]
    gain, guesses = generate(prompt, prompt[20:180])
    assert gain > 5
    assert guesses.right > 0.9 * guesses.made


@pytest.mark.parametrize(("slow", "goes_on"), [(0, True), (1, True), (2, False)])
def test_a_first_step_with_guesses_that_takes_its_time_is_not_believed_alone(
    slow: int, goes_on: bool
) -> None:
    """What it needs may be loaded then, once."""
    guesses, now = Speculation([1, 2, 3, 4] * 3), 0
    guesses.guess(1, now)
    guesses.take(1, now := now + STEP)
    for i in range(2):
        guess = guesses.guess(1, now)
        assert len(guess) == 1
        now += (4 if i < slow else 1) * STEP
        assert guesses.take(guess[0], now)
        guesses.take(guess[0] % 4 + 1, now)
    assert bool(guesses.guess(1, now)) is goes_on


def test_what_does_not_come_true_is_guessed_ever_less() -> None:
    """A text of few words in no order: matches everywhere, and none of them tells anything."""
    rng = Random(3)
    gain, guesses = generate(
        [rng.randrange(40) for _ in range(300)], [rng.randrange(40) for _ in range(300)], extra=STEP // 4
    )
    assert gain > 0.95
    assert guesses.made < 60


def test_guesses_that_cost_as_much_as_a_step_are_not_made_for_long() -> None:
    rng = Random(4)
    prompt = [rng.randrange(50, 5000) for _ in range(100)]
    text = [t if rng.random() < 0.7 else rng.randrange(5000, 9000) for t in prompt]
    gain, guesses = generate(prompt, text, extra=STEP)
    assert gain > 0.9
    assert guesses.made < 20


def test_a_lost_step_measures_nothing_and_its_guesses_are_void() -> None:
    guesses = Speculation([1, 2, 3, 1])
    guesses.guess(2, 0)
    guesses.take(2, STEP)
    assert guesses.guess(2, STEP) == (3, 1)
    guesses.forget()
    assert not guesses.take(3, 100 * STEP)
    assert guesses.guess(2, 100 * STEP) == (1, 2)
