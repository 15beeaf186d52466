"""mDNS between network namespaces on a bridge: found, gone, killed, cut off, healed; IPv4 and IPv6."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import AgentProcess, agent, start_agent, until


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


class Lan:
    """Namespaces ``1`` to ``size`` on one switch, each with an IPv4 and an IPv6 address."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.hub = f"{name}-hub"

    def space(self, i: int) -> str:
        return f"{self.name}-{i}"

    def prefix(self, i: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.space(i))

    def v4(self, i: int) -> str:
        return f"10.98.7.{i}"

    def v6(self, i: int) -> str:
        return f"fd98::{i}"

    def build(self) -> None:
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "name", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.hub, "link", "set", "br0", "up")
        for i in range(1, self.size + 1):
            space = self.space(i)
            ip("netns", "add", space)
            ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{i}", "netns", self.hub)
            ip("-n", self.hub, "link", "set", f"p{i}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{self.v4(i)}/24", "dev", "eth0")
            ip("-n", space, "addr", "add", f"{self.v6(i)}/64", "dev", "eth0", "nodad")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "route", "add", "224.0.0.0/4", "dev", "eth0")

    def cut(self, i: int) -> None:
        ip("-n", self.hub, "link", "set", f"p{i}", "nomaster")

    def heal(self, i: int) -> None:
        ip("-n", self.hub, "link", "set", f"p{i}", "master", "br0")

    def remove(self) -> None:
        for i in range(1, self.size + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(i))
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.hub)


def _refused() -> str:
    """Why no namespaces can be had here; empty if they can."""
    probe = Lan(f"mesh{os.getpid()}p", 1)
    try:
        probe.build()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or b""
        return f"no network namespaces here ({said.decode().strip() or error})"
    finally:
        probe.remove()
    return ""


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    reason = _refused()
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
