"""mDNS between network namespaces on a bridge: found, gone, killed, cut off, healed; IPv4 and IPv6."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import AgentProcess, agent, start_agent, until
from tests.lan import Lan, refused

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    reason = refused()
    if reason:
        pytest.skip(reason)
    found = Lan(f"mesh{os.getpid()}", 3)
    try:
        found.build()
        yield found
    finally:
        found.remove()


def see(observer: AgentProcess, **wanted: str) -> bool:
    by_name = {n["name"]: n["state"] for n in observer.report()["nodes"]}
    return all(by_name.get(name) == state for name, state in wanted.items())


def test_found_left_killed_cut_and_healed(lan: Lan, tmp_path: Path) -> None:
    def start(i: int) -> AgentProcess:
        return start_agent(tmp_path / f"n{i}", lan.prefix(i), host=lan.v4(i), mdns="on")

    one, two, three = start(1), start(2), start(3)
    agents = [one, two, three]
    try:
        until(lambda: see(one, n2="alive", n3="alive") and see(three, n1="alive", n2="alive"), 15)
        until(lambda: all("mdns" in n["sources"] for n in one.report()["nodes"] if n["name"] != "n1"))
        assert one.report()["discovery"]["mdns"] == f"on {lan.v4(1)}"

        # A clean exit is seen at once, and says so.
        three.end()
        until(lambda: see(one, n3="left"), 2)
        agents[2] = three = start(3)
        until(lambda: see(one, n3="alive"), 10)

        # mDNS goes on listing a process that was killed; it is out all the same.
        three.sends(signal.SIGKILL)
        until(lambda: not see(one, n3="alive"), 2)
        three.end()
        agents[2] = three = start(3)
        until(lambda: see(one, n3="alive") and see(three, n1="alive", n2="alive"), 10)

        # A cable is pulled: each half knows, says why, and serves on; then they merge.
        lan.cut(3)
        until(lambda: not see(one, n3="alive") and not see(two, n3="alive"), 4)
        until(lambda: not see(three, n1="alive") and not see(three, n2="alive"), 4)
        assert see(one, n2="alive")
        until(lambda: see(one, n3="dead") and see(three, n1="dead", n2="dead"), 25)
        lan.heal(3)
        until(lambda: see(one, n3="alive") and see(two, n3="alive"), 5)
        until(lambda: see(three, n1="alive", n2="alive"), 2)
    finally:
        for each in agents:
            each.end()


def test_ipv6(lan: Lan, tmp_path: Path) -> None:
    with (
        agent(tmp_path / "n1", lan.prefix(1), host=lan.v6(1), mdns="on") as one,
        agent(tmp_path / "n2", lan.prefix(2), host=lan.v6(2), mdns="on") as two,
    ):
        assert one.address.startswith("[fd98::1]:")
        until(lambda: see(one, n2="alive") and see(two, n1="alive"), 15)


def test_strangers_and_an_agent_that_is_alone(lan: Lan, tmp_path: Path) -> None:
    with (
        agent(tmp_path / "n1", lan.prefix(1), host=lan.v4(1), mdns="on", cluster="red") as red,
        agent(tmp_path / "n2", lan.prefix(2), host=lan.v4(2), mdns="on", cluster="blue"),
    ):
        time.sleep(3)
        report = red.report()
        assert [n["name"] for n in report["nodes"]] == ["n1"]
        assert report["waiting_for"] == f"no other agent yet (mdns: on {lan.v4(1)})"
