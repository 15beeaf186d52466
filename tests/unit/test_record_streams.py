"""Asking a peer for its record."""

from __future__ import annotations

import asyncio
import socket

import pytest

from mesh.errors import PeerError
from mesh.profiles import LAN
from mesh.types import Address
from node_agent.adapters.record_streams import RecordStreams


def test_where_nobody_listens_that_is_said_at_once() -> None:
    async def story() -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))  # and does not listen
            address = Address(f"127.0.0.1:{reserved.getsockname()[1]}")
            with pytest.raises(PeerError, match="no connection"):
                await asyncio.wait_for(anext(RecordStreams("local", LAN)(address)), 1)

    asyncio.run(story())


def test_a_name_that_nobody_has_is_said_too() -> None:
    async def story() -> None:
        with pytest.raises(PeerError, match="no connection"):
            await anext(RecordStreams("local", LAN)(Address("nobody.invalid:7070")))

    asyncio.run(story())
