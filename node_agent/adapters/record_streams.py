"""Records of peers over gRPC: one ``Watch`` stream for each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import grpc

from mesh.adapters.grpc_links import QUIET_CHANNEL_OPTIONS
from mesh.errors import PeerError
from mesh.profiles import Profile
from mesh.types import Address
from node_agent.adapters.records import read_node
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.cluster import Node

_CONNECT_S = 3.0


class RecordStreams:
    """A ``node_agent.adapters.peers.RecordSource``."""

    def __init__(self, cluster: str, profile: Profile) -> None:
        self._cluster = cluster
        # Now and then, for middleboxes that forget idle streams: membership watches the peer itself.
        self._options = (
            *QUIET_CHANNEL_OPTIONS,
            ("grpc.keepalive_time_ms", profile.sync_interval // 1_000_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        )

    async def __call__(self, address: Address) -> AsyncIterator[Node]:
        await _knock(address)
        try:
            async with grpc.aio.insecure_channel(address, self._options) as channel:
                stream = rpc.AgentStub(channel).Watch(pb.WatchRequest(cluster=self._cluster))
                # The first record must come soon; later ones come when there is news.
                async with asyncio.timeout(_CONNECT_S):
                    record = await stream.read()
                while record is not grpc.aio.EOF:
                    yield self._read(cast("pb.NodeRecord", record))
                    record = await stream.read()
        except TimeoutError:
            raise PeerError(f"no record within {_CONNECT_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise PeerError(f"{error.code().name.lower()}: {error.details()}") from error

    def _read(self, record: pb.NodeRecord) -> Node:
        if record.cluster != self._cluster:
            raise PeerError(f"it belongs to cluster {record.cluster!r}, not {self._cluster!r}")
        return read_node(record)


async def _knock(address: Address) -> None:
    """Raise ``PeerError`` where nobody listens: all peers of a node that died ask for it in the same millisecond, while sessions are
    brought back on the same cores, and a channel costs twenty times as much to learn the same."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        raise PeerError(f"no connection within {_CONNECT_S:g} s") from None
    except OSError as error:
        raise PeerError(f"no connection: {error}") from error
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
