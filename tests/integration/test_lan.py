"""Two networks of namespaces side by side: each is reached, whatever another run made or left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from tests.lan import Lan, refused


def _answers(lan: Lan, i: int) -> bool:
    """Whether something that listens in namespace ``i`` is reached from here."""
    serve = "import socket; s = socket.create_server(('', 7000)); print('up', flush=True); s.settimeout(5); s.accept()"
    command = [*lan.prefix(i), sys.executable, "-c", serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        with contextlib.suppress(OSError), socket.create_connection((lan.v4(i), 7000), 2):
            pass
        return server.wait(10) == 0


def test_a_second_network_is_reached_beside_a_first() -> None:
    if why := refused():
        pytest.skip(why)
    with contextlib.ExitStack() as stack:
        lans = [Lan(f"mesh{os.getpid()}{end}", 1, us=True) for end in "xy"]
        for lan in lans:
            stack.callback(lan.remove)
            lan.build()
        assert [_answers(lan, 1) for lan in lans] == [True, True]
