"""Leases are asked for of nodes that answer; of one that does not they are not left on their way."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from mesh.errors import PeerError
from mesh.types import Address, NodeId
from node_agent.adapters import lease_streams
from node_agent.adapters.lease_streams import LeaseStreams
from node_agent.lease import Promise, ShardKey

KEY = ShardKey("tiny", 0, 2, "onnx", "int8")


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A peer that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


async def borrow(port: int) -> None:
    streams = LeaseStreams("mesh", NodeId("n-1"))
    async for _ in streams.borrow(Address(f"127.0.0.1:{port}"), KEY, Promise(1, 64)):
        pass


def test_a_node_that_does_not_answer_is_given_up(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_streams, "_CONNECT_S", 0.3)
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"no connection within 0\.3 s"):
        asyncio.run(borrow(listening.getsockname()[1]))
    assert time.monotonic() - begin < 5


def test_a_node_that_refuses_is_given_up_at_once(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    listening.close()
    with pytest.raises(PeerError, match=r"refused|connect"):
        asyncio.run(borrow(port))
