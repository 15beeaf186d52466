"""An engine's threads leave the processor alone on which their caller computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.adapters.worker_threads import WorkerThreads

ALLOWED: list[int] = sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))
pytestmark = pytest.mark.skipif(
    len(ALLOWED) < 2, reason="one processor, or a system that does not tell them apart"
)


class Caller:
    """Is where the test says."""

    def __init__(self) -> None:
        self.at = ALLOWED[0]
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return self.at


@pytest.fixture
def sleeper() -> Iterator[threading.Thread]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    yield thread
    over.set()
    thread.join()


def test_threads_that_were_started_keep_off_the_callers_processor(sleeper: threading.Thread) -> None:
    caller = Caller()
    workers = WorkerThreads(caller)
    with workers.started():
        sleeper.start()
    assert workers.ids == [sleeper.native_id]
    for here in (ALLOWED[0], ALLOWED[1], ALLOWED[0]):
        caller.at = here
        workers.make_room()
        assert os.sched_getaffinity(workers.ids[0]) == set(ALLOWED) - {here}
    assert os.sched_getaffinity(0) == set(ALLOWED)


def test_other_threads_are_left_alone(sleeper: threading.Thread) -> None:
    workers = WorkerThreads(Caller())
    with workers.started():
        pass
    sleeper.start()
    workers.make_room()
    assert workers.ids == []
    assert sleeper.native_id is not None
    assert os.sched_getaffinity(sleeper.native_id) == set(ALLOWED)


def test_whoever_may_use_one_processor_only_keeps_its_workers_there(sleeper: threading.Thread) -> None:
    workers = WorkerThreads(Caller())
    with workers.started():
        sleeper.start()
    os.sched_setaffinity(0, ALLOWED[:1])
    try:
        workers.make_room()
        assert os.sched_getaffinity(workers.ids[0]) == set(ALLOWED)
    finally:
        os.sched_setaffinity(0, ALLOWED)


def test_a_thread_that_has_ended_is_forgotten() -> None:
    caller, thread = Caller(), threading.Thread(target=lambda: over.wait())
    over = threading.Event()
    workers = WorkerThreads(caller)
    with workers.started():
        thread.start()
    over.set()
    thread.join()
    workers.make_room()
    assert workers.ids == []
    workers.make_room()
    assert caller.asked == 1


def test_the_starting_thread_keeps_its_name_whatever_happens() -> None:
    def name() -> str:
        return Path("/proc/thread-self/comm").read_text()

    before = name()
    with pytest.raises(ValueError, match="no model"), WorkerThreads().started():
        raise ValueError("no model")
    assert name() == before
