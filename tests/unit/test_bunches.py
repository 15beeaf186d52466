"""How many sessions' steps one run computes."""

from __future__ import annotations

import pytest

from node_agent.bunches import Bunches


def measured(**took: int) -> Bunches:
    """``size4=50``: a run of four takes 50."""
    bunches = Bunches([1, *(int(name.removeprefix("size")) for name in took if name != "size1")])
    for name, ns in took.items():
        for _ in range(2):
            bunches.took(int(name.removeprefix("size")), ns)
    return bunches


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [4]),
        (4, [4]),
        (5, [4, 1]),
        (6, [8]),
        (8, [8]),
        (9, [8, 1]),
        (13, [8, 4, 1]),
    ],
)
def test_the_cheapest_runs_are_taken(count: int, wanted: list[int]) -> None:
    bunches = measured(size1=10, size4=23, size8=35)
    assert sorted(bunches.plan(count), reverse=True) == wanted


def test_where_a_run_of_several_gains_nothing_steps_go_one_by_one() -> None:
    assert measured(size1=10, size4=44).plan(4) == [1, 1, 1, 1]


def test_a_size_that_never_ran_is_tried_and_its_first_run_counts_for_nothing() -> None:
    bunches = Bunches([1, 4])
    for _ in range(2):
        bunches.took(1, 10)
    assert bunches.plan(3) == [4]
    bunches.took(4, 1000)
    assert bunches.plan(3) == [4]
    bunches.took(4, 20)
    assert bunches.plan(3) == [4]
    assert bunches.plan(1) == [1]


def test_sizes_that_nobody_needs_are_not_tried() -> None:
    bunches = Bunches([1, 4, 8])
    assert bunches.plan(1) == [1]
    assert 8 not in bunches.plan(4)


def test_what_was_measured_in_a_bad_moment_is_tried_again() -> None:
    bunches = measured(size1=10, size4=60)
    tries = next(i for i in range(2000) if bunches.plan(4) == [4])
    assert tries > 100


def test_every_row_has_a_place_and_no_run_is_for_nobody() -> None:
    bunches = measured(size1=10, size4=23, size8=35)
    for count in range(1, 40):
        sizes = bunches.plan(count)
        assert sum(sizes) >= count > sum(sizes[:-1])
