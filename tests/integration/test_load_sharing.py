"""The real model on two replicas: a node that is slowed to a fifth loses its share, a new one takes load."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from tests.agents import AgentProcess, agent, until
from tests.conftest import MODEL

SHARD = f"{MODEL}:0-30/int8"
WITHIN_S = 10.0
FAIR_WITHIN_S, FAIR_OVER_S = 30.0, 5.0


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 1 whose processor quota we may set."""
    folder = Path(f"/sys/fs/cgroup/cpu/mesh-load-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "cpu.cfs_period_us").write_text("100000")
    except OSError:
        pytest.skip("no cgroup v1 of the cpu controller that we may change")
    yield folder
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


class Load:
    """A client that asks one agent without pause, and notes who answered when."""

    def __init__(self, ingress: AgentProcess) -> None:
        self.ingress = ingress
        self.answers: list[tuple[float, str]] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        while not self._stop.is_set():
            request = urllib.request.Request(
                f"http://{self.ingress.api}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    session = json.load(answer)["id"]
                url = f"http://{self.ingress.api}/mesh/v1/sessions/{session}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    route = json.load(answer)
            except OSError as error:
                self.errors.append(str(error))
                continue
            self.answers.append((time.monotonic(), route["stages"][0]["node"]))

    def is_fair(self, *nodes: str) -> bool:
        """Whether each gave at least a fifth of the last seconds' answers."""
        shares = self.shares(time.monotonic() - FAIR_OVER_S)
        return shares.total() >= len(nodes) * 3 and min(shares[n] for n in nodes) >= 0.2 * shares.total()

    def shares(self, since: float) -> Counter[str]:
        return Counter(node for at, node in self.answers if at >= since)


def test_shares_follow_speed_and_newcomers_take_load(store: ModelStore, tmp_path: Path, cgroup: Path) -> None:
    make_shard(store, MODEL, 0, 30, "int8")
    home = str(store.root.parent)
    with agent(tmp_path / "ingress", home=home) as ingress:
        peers = ingress.address
        with agent(tmp_path / "one", home=home, peers=peers, shards=SHARD, threads="1", slots="2") as one:
            until(lambda: _serving(ingress) == {one.node}, 30)
            with Load(ingress) as load:
                until(lambda: len(load.answers) >= 3, 30)
                # A newcomer takes load without anybody being restarted.
                with agent(
                    tmp_path / "two", home=home, peers=peers, shards=SHARD, threads="1", slots="2"
                ) as two:
                    until(lambda: _serving(ingress) == {one.node, two.node}, 30)
                    until(lambda: load.shares(0)[two.node] >= 3, WITHIN_S)
                    begin = time.monotonic()
                    time.sleep(5)
                    fair = load.shares(begin)
                    # Slowed to a fifth, it soon gets next to nothing, and that stays so.
                    (cgroup / "cpu.cfs_quota_us").write_text("20000")
                    (cgroup / "cgroup.procs").write_text(str(two.process.pid))
                    time.sleep(WITHIN_S)
                    begin = time.monotonic()
                    time.sleep(8)
                    slowed = load.shares(begin)
                    (cgroup / "cpu.cfs_quota_us").write_text("-1")
    assert load.errors == []
    assert min(fair[one.node], fair[two.node]) >= 0.2 * fair.total(), fair
    assert slowed[two.node] <= 0.1 * slowed.total(), slowed


def _serving(observer: AgentProcess) -> set[str]:
    return {n["id"] for n in observer.report()["nodes"] for r in n["replicas"] if r["state"] == "serving"}
