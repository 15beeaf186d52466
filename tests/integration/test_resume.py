"""The ingress is lost in mid-answer: its client goes on with the stream, there or elsewhere, without a token lost."""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from tests.agents import AgentProcess, agent, start_agent, until
from tests.conftest import MODEL

Mesh = tuple[AgentProcess, AgentProcess, list[AgentProcess]]
TOKENS = 90
BODY = {
    "model": MODEL,
    "prompt": "The history of the sea begins with",
    "max_tokens": TOKENS,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {"2": -100, "0": -100},
}


@dataclass
class Reader:
    """Reads one stream, or the rest of it."""

    text: str = ""
    last_id: str = ""
    finish: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)

    def read(self, api: str, at: int = -1, then: Callable[[], None] = lambda: None) -> Reader:
        """Ask; or go on after the last event, where one has come. ``then`` is called at ``at`` tokens."""
        host, port = api.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            if self.last_id:
                session = self.last_id.split(":")[0]
                path = f"/mesh/v1/sessions/{session}/stream"
                connection.request("GET", path, headers={"Last-Event-ID": self.last_id})
            else:
                connection.request(
                    "POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"}
                )
            answer = connection.getresponse()
            assert answer.status == http.client.OK, answer.read()
            name = ""
            while line := answer.readline():
                if line.startswith(b"id: "):
                    name = line[4:].decode().strip()
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.error = event["error"]
                    break
                self.usage = event.get("usage") or self.usage
                for choice in event["choices"]:
                    self.text += choice["text"]
                    self.finish = choice["finish_reason"] or self.finish
                self.last_id = name or self.last_id
                if 0 <= at <= int(self.last_id.split(":")[1]):
                    at = -1
                    then()
        except (OSError, http.client.HTTPException):
            pass  # it broke off
        finally:
            connection.close()
        return self

    @property
    def tokens(self) -> int:
        return int(self.last_id.split(":")[1])


def settings(home: str, peers: str, i: int) -> dict[str, str]:
    shards = f"{MODEL}:{'0-15' if i < 2 else '15-30'}/int8"
    return {"home": home, "peers": peers, "shards": shards, "threads": "1", "slots": "4", "context": "512"}


@pytest.fixture
def fleet(store: ModelStore, tmp_path: Path) -> Iterator[Mesh]:
    """Two ingresses that host nothing, and a host for each half of the model."""
    for start, end in ((0, 15), (15, 30)):
        make_shard(store, MODEL, start, end, "int8")
    home = str(store.root.parent)
    with ExitStack() as stack:
        one = stack.enter_context(agent(tmp_path / "one", home=home))
        two = stack.enter_context(agent(tmp_path / "two", home=home, peers=one.address))
        hosts = [
            stack.enter_context(agent(tmp_path / f"h{i}", **settings(home, one.address, i)))  # type: ignore[arg-type]
            for i in (0, 2)
        ]
        until(lambda: serving(one) == 2 and serving(two) == 2, 40, "not everything serves")
        yield one, two, hosts


def serving(observer: AgentProcess) -> int:
    nodes = observer.report()["nodes"]
    return sum(r["state"] == "serving" for n in nodes if n["state"] == "alive" for r in n["replicas"])


def test_a_killed_ingress_is_taken_over_by_another(
    fleet: Mesh,
) -> None:
    one, two, _ = fleet
    calm = Reader().read(one.api)
    assert (calm.finish, calm.tokens) == ("length", TOKENS)
    hit = Reader().read(one.api, 25, one.process.kill)
    assert 25 <= hit.tokens < TOKENS
    assert not hit.finish
    begin = time.monotonic()
    hit.read(two.api)
    assert (hit.text, hit.finish, hit.tokens) == (calm.text, "length", TOKENS)
    assert hit.usage["completion_tokens"] == TOKENS
    assert time.monotonic() - begin < 10
    # Asked again, it tells the rest again; a session that ended is only read.
    again = Reader(last_id=calm.last_id.split(":")[0] + ":0").read(two.api)
    assert again.text == calm.text
    for event, status, code in (
        (hit.last_id.split(":")[0] + f":{TOKENS + 1}", 409, "beyond_log"),
        ("ab" * 16 + ":3", 404, "not_found"),
        ("junk", 400, None),
    ):
        path = f"http://{two.api}/mesh/v1/sessions/{event.split(':')[0]}/stream"
        request = urllib.request.Request(path, headers={"Last-Event-ID": event})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        body = json.loads(caught.value.read())["error"]
        assert (caught.value.code, body["code"]) == (status, code), body


def test_r1_the_old_owner_of_a_session_is_refused_and_ends_its_stream(
    fleet: Mesh,
) -> None:
    one, two, _ = fleet
    calm = Reader().read(one.api)
    other = Reader()

    old = Reader()

    def take() -> None:
        other.last_id, other.text = old.last_id, old.text
        other.read(two.api)

    old.read(one.api, 20, take)
    assert (other.text, other.finish) == (calm.text, "length")
    assert "another agent goes on" in old.error["message"]
    assert calm.text.startswith(old.text)


@pytest.mark.parametrize("log", ["async", "sync"])
def test_after_everything_was_killed_sessions_go_on(store: ModelStore, tmp_path: Path, log: str) -> None:
    """All agents die at once; with ``sync`` what is left is a copy of their disks of that moment."""
    make_shard(store, MODEL, 0, 30, "int8")
    told = {
        "home": str(store.root.parent),
        "shards": f"{MODEL}:0-30/int8",
        "threads": "1",
        "log": log,
        "context": "512",
    }
    first = start_agent(tmp_path / "a", (), None, **told)
    hit = Reader()
    try:
        until(lambda: serving(first) == 1, 40)
        calm = Reader().read(first.api)

        def pull_the_plug() -> None:
            if log == "sync":
                shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("LOCK"))
            first.process.kill()

        hit.read(first.api, 31, pull_the_plug)
    finally:
        first.end()
    assert hit.tokens >= 31
    with agent(tmp_path / ("b" if log == "sync" else "a"), **told) as second:  # type: ignore[arg-type]
        until(lambda: serving(second) == 1, 40)
        if log == "sync":
            # The copy is of the moment of the fault: what was shown later is not in it, and that is said.
            hit.last_id = hit.last_id.split(":")[0] + ":31"
            hit.text = ""
            rest = hit.read(second.api)
            assert calm.text.endswith(rest.text)
        else:
            assert hit.read(second.api).text == calm.text
        assert (hit.finish, hit.tokens) == ("length", TOKENS)
        assert second.process.poll() is None


def test_a_client_that_left_may_come_back(
    fleet: Mesh,
) -> None:
    one, _, _ = fleet
    calm = Reader().read(one.api)
    left = Reader()

    class Gone(Exception):
        pass

    def leave() -> None:
        raise Gone

    with pytest.raises(Gone):
        left.read(one.api, 10, leave)
    until(lambda: not sessions(one), 5, "a session whose client left goes on")
    left.read(one.api)
    assert (left.text, left.finish) == (calm.text, "length")


def sessions(ingress: AgentProcess) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://{ingress.api}/mesh/v1/sessions", timeout=5) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found
