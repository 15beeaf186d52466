"""Sampling: only seed, choice and position decide."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mesh.types import Sampling
from node_agent.sampling import WrongResult, sample, uniform

HOT = Sampling(seed=7, temperature=1.0)


def logits(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


def draws(how: Sampling, values: tuple[float, ...], count: int = 4000) -> Counter[int]:
    return Counter(sample(logits(*values), how, (), position)[0] for position in range(count))


def test_r5_the_random_number_is_fixed_for_ever() -> None:
    # Written down: another value would change the text of sessions that move between versions.
    assert len({uniform(s, c, p) for s in range(4) for c in range(4) for p in range(4)}) == 64
    assert all(0 <= uniform(2**64 - 1, 1, p) < 1 for p in range(100))
    assert uniform(1, 0, 0) == 0.024005199298366517


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert sample(logits(0, 3, 3, 1), Sampling(seed=1), (), 0)[0] == 1


def test_frequencies_follow_the_softmax() -> None:
    counts = draws(HOT, (0.0, 1.0, 2.0))
    weights = np.exp([0.0, 1.0, 2.0])
    for token, share in enumerate(weights / weights.sum()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    values = (0.0, 1.0, 2.0, 3.0)
    assert set(draws(replace(HOT, top_k=2), values)) == {2, 3}
    assert set(draws(replace(HOT, top_p=0.5), values)) == {3}
    assert set(draws(replace(HOT, top_p=0.0), values)) == {3}


def drawn_from_all(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], how: Sampling, at: int) -> int:
    """What a draw is by definition: all tokens sorted, and cut."""
    scaled = values.astype(np.float64) / how.temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))[: how.top_k or None]
    cumulative = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
    kept = np.searchsorted(cumulative, how.top_p * cumulative[-1]) + 1 if how.top_p < 1 else len(order)
    target = uniform(how.seed, how.choice, at) * cumulative[kept - 1]
    return int(order[np.searchsorted(cumulative[:kept], target, side="right")])


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 300.0])
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 7, "top_p": 0.5}]
)
def test_a_draw_is_the_one_from_all_tokens_though_few_are_sorted(spread: float, cut: dict[str, Any]) -> None:
    numbers = np.random.default_rng(5)
    for at in range(60):
        values = (numbers.standard_normal(3000) * spread).astype(np.float32)
        values[:50] = -np.inf
        how = replace(HOT, temperature=0.3 + at % 5 / 2, **cut)
        assert sample(values.copy(), how, (), at)[0] == drawn_from_all(values, how, at)


def test_the_least_temperature_there_is_takes_the_likeliest() -> None:
    assert set(draws(replace(HOT, temperature=5e-324), (1.0, 90.0, -90.0), 20)) == {1}


def test_temperature_sharpens() -> None:
    assert draws(replace(HOT, temperature=0.1), (0.0, 1.0))[1] > draws(HOT, (0.0, 1.0))[1]


def test_choices_and_seeds_differ() -> None:
    values = tuple([0.0] * 50)
    texts = {
        tuple(sample(logits(*values), replace(HOT, seed=s, choice=c), (), p)[0] for p in range(20))
        for s in (1, 2)
        for c in (0, 1)
    }
    assert len(texts) == 4


def test_penalties_look_at_what_was_generated() -> None:
    how = Sampling(seed=1, frequency_penalty=1.0, presence_penalty=0.5)
    assert sample(logits(2.0, 1.0), how, (), 0)[0] == 0
    assert sample(logits(2.0, 1.0), how, (0,), 0)[0] == 1
    assert sample(logits(2.9, 1.0), replace(how, frequency_penalty=0.5), (0, 0), 0)[0] == 0


def test_bias_forbids() -> None:
    assert sample(logits(9.0, 1.0), Sampling(seed=1, logit_bias=((0, -100.0),)), (), 0)[0] == 1


def test_logprobs_are_the_models_own() -> None:
    token, logprob, top = sample(logits(0.0, 1.0, 2.0), Sampling(seed=1, logprobs=2), (), 0)
    total = np.log(np.exp([0.0, 1.0, 2.0]).sum())
    assert token == 2
    assert logprob == pytest.approx(2.0 - total)
    assert [t.token for t in top] == [2, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_results_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(WrongResult):
        sample(logits(0.0, bad), Sampling(seed=1), (), 0)
