"""Hop logs over both stores: whole, truncated, bounded, and honest when they are not there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mesh.types import Digest, SessionId
from node_agent.adapters.frame_store import RocksFrames
from node_agent.adapters.memory_store import MemoryFrames
from node_agent.adapters.rocksdb_store import RocksTokenLog
from node_agent.hop_log import FrameStore, HopLog

A, B = SessionId("aa" * 16), SessionId("ab" + "00" * 15)
SHARD, OTHER = Digest("01" * 32), Digest("02" * 32)
WIDTH = 8


@pytest.fixture(params=["rocksdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FrameStore]:
    if request.param == "memory":
        yield MemoryFrames()
        return
    tokens = RocksTokenLog(tmp_path / "tokens")
    frames = RocksFrames(tokens.db)
    yield frames
    frames.close()
    tokens.close()


def rows(length: int, value: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.full((length, WIDTH), value, dtype=np.float32)


def settle(store: FrameStore) -> None:
    while store.behind_bytes:
        time.sleep(0.01)


def filled(store: FrameStore, **limits: int) -> tuple[HopLog, list[str]]:
    said: list[str] = []
    log = HopLog(
        store, limits.get("limit", 1 << 20), limits.get("behind", 1 << 20), lambda s, why: said.append(why)
    )
    log.open(A, SHARD, 0)
    log.append(A, SHARD, 0, rows(4, 0.5))
    for position in range(4, 8):
        log.append(A, SHARD, position, rows(1, position))
    return log, said


@pytest.mark.parametrize("written", [False, True], ids=["just given", "on disk"])
def test_r3_frames_come_back_as_they_were_sent(store: FrameStore, written: bool) -> None:
    log, _ = filled(store)
    if written:
        settle(store)
    assert log.whole_from(A, SHARD, 8) == 0
    position, seen = 0, []
    while position < 8:
        frame = log.frame(A, SHARD, position)
        assert frame is not None
        seen.append((position, frame.shape, float(frame[0, 0])))
        position += len(frame)
    assert seen == [(0, (4, 8), 0.5), *((p, (1, 8), float(p)) for p in range(4, 8))]
    # A log is of one session and one shard (rule R7).
    assert log.frame(A, OTHER, 0) is None
    assert log.whole_from(B, SHARD, 8) is None
    assert log.whole_from(A, SHARD, 9) is None


def test_r2_a_later_epoch_truncates_and_goes_on(store: FrameStore) -> None:
    log, _ = filled(store)
    log.open(A, SHARD, 6)
    assert log.whole_from(A, SHARD, 6) == 0
    assert log.whole_from(A, SHARD, 7) is None
    log.append(A, SHARD, 6, rows(1, 60))
    settle(store)
    frame = log.frame(A, SHARD, 6)
    assert frame is not None
    assert float(frame[0, 0]) == 60
    # One that begins further on than the log reaches begins anew, and says so.
    log.open(A, SHARD, 20)
    assert log.whole_from(A, SHARD, 20) == 20


def test_r4_a_log_that_cannot_grow_is_dropped_whole_and_that_is_told(store: FrameStore) -> None:
    log, said = filled(store, limit=250)
    assert said == ["the hop log is full (0 MiB)"]
    assert log.whole_from(A, SHARD, 8) is None
    assert (log.bytes, len(log)) == (0, 0)
    log.append(A, SHARD, 8, rows(1, 8))
    assert len(said) == 1, "once a session"
    log.open(B, SHARD, 0)
    log.append(B, SHARD, 0, rows(1, 1))
    assert log.whole_from(B, SHARD, 1) == 0, "others have room again"
    log.append(B, SHARD, 5, rows(1, 1))
    assert said[1] == "a frame at 5 came where 1 was due"


def test_a_damaged_record_is_no_frame(store: FrameStore) -> None:
    log, _ = filled(store)
    settle(store)
    key = b"a" + bytes.fromhex(A) + bytes.fromhex(SHARD)[:8] + (5).to_bytes(4, "big")
    whole = store.get(key)
    assert whole is not None
    store.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert log.frame(A, SHARD, 5) is None
    assert log.frame(A, SHARD, 4) is not None
    store.put(key, b"")
    assert log.frame(A, SHARD, 5) is None


def test_a_store_that_fails_or_is_slow_drops_logs_and_no_session() -> None:
    class Failing(MemoryFrames):
        pass

    slow, broken = Failing(), Failing()
    log, said = filled(slow)
    slow.behind_bytes = 1 << 30
    log.append(A, SHARD, 8, rows(1, 8))
    assert said == ["the disk is too slow for the hop log"]
    log, said = filled(broken)
    broken.failure = "No space left on device"
    log.append(A, SHARD, 8, rows(1, 8))
    assert said == ["the hop log cannot be written: No space left on device"]


def test_ended_sessions_leave_nothing_and_a_restart_begins_empty(tmp_path: Path) -> None:
    tokens = RocksTokenLog(tmp_path / "tokens")
    frames = RocksFrames(tokens.db, sync=True)
    log, _ = filled(frames)
    log.open(B, SHARD, 0)
    log.append(B, SHARD, 0, rows(2, 1))
    log.forget(A, SHARD)
    settle(frames)
    frames.close()
    assert left(tokens) == 1
    again = RocksFrames(tokens.db)
    assert left(tokens) == 0
    again.close()
    tokens.close()


def left(tokens: RocksTokenLog) -> int:
    """Frames in the database."""
    return sum(isinstance(key, bytes) and key.startswith(b"a") for key in tokens.db.keys())  # noqa: SIM118


@pytest.mark.parametrize("written", [False, True], ids=["just given", "on disk"])
def test_r4_a_log_holds_no_guess_that_was_wrong(store: FrameStore, written: bool) -> None:
    log, said = filled(store)
    log.append(A, SHARD, 8, rows(5, 8.0))
    if written:
        settle(store)
    log.append(A, SHARD, 10, rows(2, 10.0))  # from the third on they were wrong
    log.append(A, SHARD, 12, rows(4, 12.0))
    log.open(A, SHARD, 14)  # a later epoch
    log.append(A, SHARD, 14, rows(1, 14.0))
    found, position = [], 8
    while position < 15:
        frame = log.frame(A, SHARD, position)
        assert frame is not None
        found.append((position, len(frame), float(frame[0, 0])))
        position += len(frame)
    assert found == [(8, 2, 8.0), (10, 2, 10.0), (12, 2, 12.0), (14, 1, 14.0)]
    assert not said
