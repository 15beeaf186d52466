"""Network namespaces on a switch of our own, which delays every packet by its pair of ports.

The kernels that tests run on need not have netem: the switch is this file, run as a process in a
namespace of its own, on raw sockets. Delays are one way, each direction for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.lan import free_net, ip

_ETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)
"""Transmit checksums, TCP segmentation, generic segmentation and receive: raw sockets need whole packets."""


@dataclass
class DelayedLan:
    """Namespaces ``1`` to ``size``; we ourselves sit at port 0, undelayed."""

    name: str
    size: int
    delays_ms: dict[tuple[int, int], float] = field(default_factory=dict)
    net: str = ""
    _switch: subprocess.Popen[bytes] | None = None

    def prefix(self, i: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", f"{self.name}-{i}")

    def address(self, i: int) -> str:
        return f"{self.net}.{i or 200}"

    def build(self) -> None:
        self.net = free_net("10.99")
        hub = f"{self.name}-hub"
        ip("netns", "add", hub)
        for i in range(self.size + 1):
            inside = f"{self.name}0" if i == 0 else "eth0"
            where = [] if i == 0 else ["-n", f"{self.name}-{i}"]
            if i:
                ip("netns", "add", f"{self.name}-{i}")
                ip(*where, "link", "set", "lo", "up")
            ip(*where, "link", "add", inside, "type", "veth", "peer", "name", f"p{i}", "netns", hub)
            ip(*where, "addr", "add", f"{self.address(i)}/24", "dev", inside)
            ip(*where, "link", "set", inside, "up")
            ip("-n", hub, "link", "set", f"p{i}", "up", "promisc", "on")
            plain = [sys.executable, "-m", "tests.delayed_lan", "plain", inside]
            subprocess.run([*(self.prefix(i) if i else ()), *plain], check=True, timeout=20)
        delays = [[a, b, ms] for (a, b), ms in self.delays_ms.items()]
        command = ["ip", "netns", "exec", hub, sys.executable, "-m", "tests.delayed_lan", "switch"]
        self._switch = subprocess.Popen([*command, str(self.size), json.dumps(delays)], stdin=subprocess.PIPE)

    def remove(self) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            assert self._switch.stdin is not None
            self._switch.stdin.close()
        for i in range(1, self.size + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", f"{self.name}-{i}")
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", f"{self.name}-hub")

    def __enter__(self) -> DelayedLan:
        try:
            self.build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def refused() -> str:
    """Why such a network cannot be made here; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        ip("netns", "add", "mesh-can-we")
        ip("netns", "del", "mesh-can-we")
    except (OSError, subprocess.SubprocessError):
        return "no network namespaces here"
    return ""


def _plain(interface: str) -> None:
    """Turn offloads off, so that packets are whole when raw sockets see them."""
    with socket.socket() as sock:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            with contextlib.suppress(OSError):
                fcntl.ioctl(sock, _ETHTOOL, request)


def _switch(ports: int, delays: dict[tuple[int, int], int]) -> None:
    """Forward until standard input ends."""
    sockets = []
    for i in range(ports + 1):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((f"p{i}", 0))
        sock.setblocking(False)
        sockets.append(sock)
    places = {s.fileno(): i for i, s in enumerate(sockets)}
    known: dict[bytes, int] = {}
    waiting: list[tuple[int, int, int, bytes]] = []
    count = 0
    while True:
        now = time.monotonic_ns()
        while waiting and waiting[0][0] <= now:
            _, _, port, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                sockets[port].send(packet)
            now = time.monotonic_ns()
        left_s = max(0, waiting[0][0] - now) / 1e9 if waiting else 0.05
        # select knows microseconds; poll would round to milliseconds.
        for ready in select.select([sys.stdin, *sockets], [], [], left_s)[0]:
            if ready is sys.stdin:
                return
            descriptor = ready.fileno()
            for arrived, source, target, packet in _packets(sockets, places[descriptor], known):
                count += 1
                due = arrived + delays.get((source, target), 0)
                heapq.heappush(waiting, (due, count, target, packet))


def _packets(
    sockets: list[socket.socket], source: int, known: dict[bytes, int]
) -> Iterator[tuple[int, int, int, bytes]]:
    while True:
        try:
            packet, where = sockets[source].recvfrom(65_536)
        except OSError:
            return
        if where[2] == socket.PACKET_OUTGOING:
            continue
        arrived = time.monotonic_ns()
        known[packet[6:12]] = source
        target = known.get(packet[:6])
        for port in range(len(sockets)) if target is None else (target,):
            if port != source:
                yield arrived, source, port, packet


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        _plain(sys.argv[2])
    else:
        _switch(int(sys.argv[2]), {(a, b): int(ms * 1e6) for a, b, ms in json.loads(sys.argv[3])})
