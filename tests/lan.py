"""Network namespaces on a bridge: cables can be pulled, and streams cut."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time

_ALL, _IP, _TCP = 0x0003, 0x0800, 6
_RST = 0x04
_CUT_WITHIN_S = 3.0
_SEEN_WITHIN_S = 0.1


def ip(*words: str) -> str:
    """What the command of that name prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10, text=True).stdout


def free_net(two: str) -> str:
    """Three octets, beginning with ``two``, of a network that this namespace is not on yet: another run may be at work
    beside us, and one that was killed leaves its switch, which would take all that we send."""
    taken = ip("-o", "-4", "addr")
    nets = (f"{two}.{i}" for i in range(1, 255))
    return next(net for net in nets if f" {net}." not in taken)


class Lan:
    """Namespaces ``1`` to ``size`` on one switch, each with an IPv4 and an IPv6 address; with ``us`` this
    process's own namespace is on it, too, as number 0."""

    def __init__(self, name: str, size: int, us: bool = False) -> None:
        self.name, self.size, self.us = name, size, us
        self.hub = f"{name}-hub"
        self.net = ""

    def space(self, i: int) -> str:
        return f"{self.name}-{i}"

    def prefix(self, i: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.space(i)) if i else ()

    def v4(self, i: int) -> str:
        return f"{self.net}.{i or 254}"

    def v6(self, i: int) -> str:
        return f"fd98::{i}"

    def build(self) -> None:
        self.net = free_net("10.98")
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "name", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.hub, "link", "set", "br0", "up")
        ip("-n", self.hub, "link", "set", "lo", "up")
        for i in range(0 if self.us else 1, self.size + 1):
            space = self.space(i)
            inside, where = ("eth0", ("-n", space)) if i else (f"{self.name}0", ())
            if i:
                ip("netns", "add", space)
            ip(*where, "link", "add", inside, "type", "veth", "peer", "name", f"p{i}", "netns", self.hub)
            ip("-n", self.hub, "link", "set", f"p{i}", "master", "br0", "up")
            ip(*where, "addr", "add", f"{self.v4(i)}/24", "dev", inside)
            ip(*where, "link", "set", inside, "up")
            if i:
                ip(*where, "addr", "add", f"{self.v6(i)}/64", "dev", inside, "nodad")
                ip(*where, "link", "set", "lo", "up")
                ip(*where, "route", "add", "224.0.0.0/4", "dev", inside)

    def cut(self, i: int) -> None:
        """Pull the cable of a namespace."""
        ip("-n", self.hub, "link", "set", f"p{i}", "nomaster")

    def heal(self, i: int) -> None:
        ip("-n", self.hub, "link", "set", f"p{i}", "master", "br0")

    def reset_streams(self, i: int, port: int) -> None:
        """Break the TCP streams that lead to a port of a namespace, as a router that forgot them would."""
        command = [sys.executable, "-m", "tests.lan", f"p{i}", str(port)]
        subprocess.run(["ip", "netns", "exec", self.hub, *command], check=True, timeout=20)

    def remove(self) -> None:
        for i in range(1, self.size + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(i))
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.hub)


def refused() -> str:
    """Why no namespaces can be had here; empty if they can."""
    probe = Lan(f"mesh{os.getpid()}p", 1)
    try:
        probe.build()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or ""
        return f"no network namespaces here ({said.strip() or error})"
    finally:
        probe.remove()
    return ""


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def _reset(ethernet: bytes, source: bytes, target: bytes, ports: tuple[int, int], sequence: int) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", *ports, sequence & 0xFFFFFFFF, 0, 5 << 4, _RST, 0, 0, 0)
    check = _checksum(source + target + struct.pack("!HH", _TCP, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, _TCP, 0, source, target)
    head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    return ethernet + struct.pack("!H", _IP) + head + tcp


def _break(interface: str, port: int) -> None:
    """Watch a cable and send resets to its namespace for the streams to ``port`` there, each as the answer to one of
    its packets, until a reset of its own is seen for what still comes: then it has closed the stream."""
    until = time.monotonic() + _CUT_WITHIN_S
    streams: dict[tuple[bytes, int], bool] = {}
    begin = 0.0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)) as sock:
        sock.bind((interface, 0))
        sock.settimeout(0.2)
        while time.monotonic() < until and not (streams and all(streams.values())):
            try:
                packet, _ = sock.recvfrom(65_536)
            except TimeoutError:
                continue
            if packet[12:14] != _IP.to_bytes(2, "big") or packet[23] != _TCP:
                continue
            size = (packet[14] & 15) * 4
            segment = packet[14 + size :]
            ports: tuple[int, int] = struct.unpack_from("!HH", segment)
            if port not in ports:
                continue
            from_it = ports[0] == port
            source, target = packet[26:30], packet[30:34]
            stream = (target, ports[1]) if from_it else (source, ports[0])
            flags = segment[13]
            if flags & _RST and from_it:
                streams[stream] = True
            begin = begin or time.monotonic()
            if stream not in streams and time.monotonic() < begin + _SEEN_WITHIN_S:
                streams[stream] = False
            if flags & 7 or streams.get(stream, True):
                continue
            sequence, answer = struct.unpack_from("!II", segment, 4)
            payload = struct.unpack_from("!H", packet, 16)[0] - size - (segment[12] >> 4) * 4
            if from_it:  # it has acknowledged so far
                sock.send(_reset(packet[6:12] + packet[:6], target, source, ports[::-1], answer))
            else:
                sock.send(_reset(packet[:12], source, target, ports, sequence + payload))


if __name__ == "__main__":
    _break(sys.argv[1], int(sys.argv[2]))
