"""200 nodes that lose a tenth of all packets each way: nobody dies who lives, and who dies is seen.

``python -m tests.benchmarks.membership_virtual`` is the same over 1,000 node-hours.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.membership_virtual import report, run


@pytest.mark.timeout(300)
def test_losses_kill_nobody_and_deaths_are_seen() -> None:
    outcomes = [run(seed, seconds=200, kills=4) for seed in (101, 102)]
    figures = report(outcomes)
    assert figures["node_hours"] > 20
    assert figures["false_deaths"] == 0
    assert figures["suspected_everywhere_s_p50"] <= 3
    assert figures["declared_everywhere_s_p99"] <= 10


def test_twice_the_loss_still_kills_nobody() -> None:
    assert run(7, seconds=60, kills=0, loss=0.2).false_deaths == 0
