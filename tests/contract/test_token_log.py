"""One suite over both token logs, and what only the one on disk promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rocksdict import Rdict

from mesh.errors import ConfigError
from mesh.types import Epoch, NodeId, SessionId, Token
from node_agent.adapters import rocksdb_store
from node_agent.adapters.frame_store import WRITE_EVERY_S
from node_agent.adapters.memory_store import MemoryTokenLog
from node_agent.adapters.rocksdb_store import RocksTokenLog
from node_agent.ports import LoggedSession, TokenLog


def toks(position: int, *ids: int) -> list[Token]:
    return [Token(position + i, t) for i, t in enumerate(ids)]


def kept(log: TokenLog, session: SessionId) -> tuple[list[int], list[int]] | None:
    found = log.read(session)
    return None if found is None else (list(found.prompt), [t.token for t in found.tokens])


A, B = SessionId("aa" * 16), SessionId("ab" + "00" * 15)


@pytest.fixture(params=["rocksdb", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TokenLog]:
    made: TokenLog = RocksTokenLog(tmp_path / "tokens") if request.param == "rocksdb" else MemoryTokenLog()
    yield made
    made.close()


def test_tokens_come_back_in_order(log: TokenLog) -> None:
    log.begin(A, [1, 2, 3], 100.0)
    log.append(A, toks(3, 7))
    log.append(A, toks(4, 8, 9))
    assert kept(log, A) == ([1, 2, 3], [7, 8, 9])
    assert log.read(B) is None


def test_reading_stops_at_a_gap(log: TokenLog) -> None:
    log.begin(A, [1], 100.0)
    log.append(A, toks(1, 7))
    log.append(A, toks(3, 9))
    assert kept(log, A) == ([1], [7])


def test_forgetting_one_session_leaves_its_neighbours(log: TokenLog) -> None:
    for session in (A, B):
        log.begin(session, [1], 100.0)
        log.append(session, toks(1, 7))
    log.forget(A)
    assert log.read(A) is None
    assert kept(log, B) == ([1], [7])


def test_expired_sessions_go_and_live_ones_stay(log: TokenLog) -> None:
    log.begin(A, [1], 10.0)
    log.begin(B, [1], 20.0)
    assert list(log.expire(10.0)) == [A]
    assert log.read(A) is None
    assert log.read(B) is not None


def test_r1_whoever_takes_a_session_over_must_know_its_owner(log: TokenLog) -> None:
    first, second = Epoch(3, NodeId("n-a")), Epoch(4, NodeId("n-b"))
    log.begin(A, [1, 2], 100.0, first, b"request")
    log.append(A, [Token(2, 7, -0.5)])
    assert log.read(A) == LoggedSession((1, 2), (Token(2, 7, -0.5),), first, b"request")
    assert not log.take(A, Epoch(2, NodeId("n-a")), second)
    assert not log.take(B, first, second)
    assert log.take(A, first, second)
    assert not log.take(A, first, Epoch(4, NodeId("n-c"))), "it comes second"
    assert log.read(A) == LoggedSession((1, 2), (Token(2, 7, -0.5),), second, b"request")
    # A later epoch's begin keeps what is there.
    log.begin(A, [1, 2], 100.0, Epoch(5, NodeId("n-b")), b"request")
    found = log.read(A)
    assert found is not None
    assert len(found.tokens) == 1


def test_what_was_appended_survives_kill_9(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from mesh.types import Token
from node_agent.adapters.rocksdb_store import RocksTokenLog
log = RocksTokenLog(Path({str(tmp_path / "tokens")!r}))
log.begin({A!r}, [1, 2], 1e12)
for i in range(100000):
    log.append({A!r}, [Token(2 + i, i)])
    print(i, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = -1
        for line in process.stdout:
            last = int(line)
            if last >= 500:
                os.kill(process.pid, signal.SIGKILL)
                break
    log = RocksTokenLog(tmp_path / "tokens")
    found = log.read(A)
    assert found is not None
    assert len(found.tokens) > last
    assert [t.token for t in found.tokens] == list(range(len(found.tokens)))
    log.close()


def test_a_damaged_record_ends_the_reading(tmp_path: Path) -> None:
    log = RocksTokenLog(tmp_path / "tokens")
    log.begin(A, [1], 100.0)
    log.append(A, toks(1, 7, 8, 9))
    key = b"t" + bytes.fromhex(A) + (2).to_bytes(4, "big")
    log._db[key] = b"\0" * 8
    assert kept(log, A) == ([1], [7])
    log._db[b"s" + bytes.fromhex(A)] = b"junk"
    assert log.read(A) is None
    log.close()


def test_one_directory_has_one_agent(tmp_path: Path) -> None:
    log = RocksTokenLog(tmp_path / "tokens")
    with pytest.raises(ConfigError, match="in use by another agent"):
        RocksTokenLog(tmp_path / "tokens")
    log.close()


class CountingDb:
    """RocksDB, and how often its write-ahead log was synced by itself."""

    synced = 0

    def __init__(self, *args: Any) -> None:
        self._db = Rdict(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._db[key] = value

    def flush_wal(self, sync: bool) -> None:
        self._db.flush_wal(sync)
        CountingDb.synced += sync


def test_copies_reach_the_disk_a_moment_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them together, and none where nothing is to survive a power cut."""
    monkeypatch.setattr(rocksdb_store, "Rdict", CountingDb)
    for sync in (False, True):
        CountingDb.synced = 0
        log = RocksTokenLog(tmp_path / f"{sync}", sync)
        log.append(B, toks(1, 5))
        time.sleep(3 * WRITE_EVERY_S)
        assert CountingDb.synced == 0, "the owner's are synced as they are written"
        for position in range(1, 20):
            log.append(A, toks(position, 7), copy=True)
        time.sleep(6 * WRITE_EVERY_S)
        assert (1 <= CountingDb.synced <= 3) is sync
        log.append(A, toks(20, 7), copy=True)
        log.close()
        left = RocksTokenLog(tmp_path / f"{sync}")
        left.begin(A, [1], 100.0)
        found = left.read(A)
        assert found is not None
        assert len(found.tokens) == 20
        left.close()
