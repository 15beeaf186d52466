"""How long a hop takes is half of what an acknowledgement took, less what the frame was held for."""

from __future__ import annotations

from mesh.messages import Ack
from mesh.types import Address, Epoch
from node_agent.hop_times import HopTimes
from tests.builders import OWNER, SESSION, frame

MS = 1_000_000
A, B = Address("a:1"), Address("b:1")


def ack(position: int, held_us: int = 0, stage: int = 0) -> Ack:
    return Ack(SESSION, Epoch(1, OWNER), position, stage, held_us)


def test_half_of_the_round_trip_less_what_it_was_held_for() -> None:
    times = HopTimes()
    times.sent([frame(0), frame(1)], 10 * MS)
    assert times.acknowledged(A, ack(1, held_us=3000), 14 * MS)
    assert times.one_way_us(A) == 500
    assert times.one_way_us(B) == 0


def test_the_least_of_the_last_samples_counts() -> None:
    times = HopTimes()
    for position, took_ms in enumerate((4, 1, 9)):
        times.sent([frame(position)], 100 * MS)
        times.acknowledged(A, ack(position + 1), (100 + took_ms) * MS)
    assert times.one_way_us(A) == 500
    for position in range(3, 40):
        times.sent([frame(position)], 100 * MS)
        times.acknowledged(A, ack(position + 1), 102 * MS)
    assert times.one_way_us(A) == 1000


def test_what_was_never_sent_measures_nothing() -> None:
    times = HopTimes()
    assert not times.acknowledged(A, ack(1), 5 * MS)
    times.sent([frame(0)], 0)
    assert times.acknowledged(A, ack(1, held_us=900_000), 5 * MS)
    assert times.one_way_us(A) == 0  # clocks of two machines, or a held time that is longer than the trip
    assert not times.acknowledged(A, ack(1), 6 * MS)


def test_a_link_that_is_gone_is_forgotten_and_memory_is_bounded() -> None:
    times = HopTimes()
    times.sent([frame(0)], 0)
    times.acknowledged(A, ack(1), 2 * MS)
    times.forget(A)
    assert times.one_way_us(A) == 0
    times.sent([frame(i) for i in range(5000)], 0)
    assert not times.acknowledged(A, ack(1), MS)
    assert times.acknowledged(A, ack(5000), MS)
