"""What a scheduler asks of agents, over gRPC: to hold shards, to let them go, and which policy they know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc

from mesh.adapters.grpc_links import QUIET_CHANNEL_OPTIONS
from mesh.errors import LeaseRefused, PeerError
from mesh.types import Address, NodeId, PolicyVersion, Term
from node_agent.adapters.records import read_version, term_record
from node_agent.lease import Promise, ShardKey
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.reconcile import Wanted

_RPC_S = 10.0
_CONNECT_S = 2.0
"""Of a node that does not answer a lease is not waited for: others may load the shard."""
_DECIDED = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE)


class LeaseStreams:
    """A ``node_agent.ports.PeerAgents``."""

    def __init__(self, cluster: str, me: NodeId) -> None:
        self._cluster, self._me = cluster, me

    def hold(self, address: Address, term: Term, wanted: Wanted) -> AsyncGenerator[bool, None]:
        return self._hold(address, self._request(term, wanted))

    def borrow(self, address: Address, key: ShardKey, promise: Promise) -> AsyncGenerator[bool, None]:
        return self.keep(address, key, promise, f"ingress {self._me}")

    def keep(
        self, address: Address, key: ShardKey, promise: Promise | None, holder: str, digest: str = ""
    ) -> AsyncGenerator[bool, None]:
        """A lease that ends with the stream; refused where the model there is not ``digest``, if one is given."""
        request = pb.HoldShardRequest(
            cluster=self._cluster,
            model=key.model,
            model_digest=bytes.fromhex(digest),
            layer_start=key.start,
            layer_end=key.end,
            runtime=key.runtime,
            quantization=key.quantization,
            holder=holder,
            sessions=promise.sessions if promise else 0,
            context=promise.context if promise else 0,
        )
        return self._hold(address, request)

    async def _hold(self, address: Address, request: pb.HoldShardRequest) -> AsyncGenerator[bool, None]:
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                await _connect(channel)
                async for status in rpc.AgentStub(channel).HoldShard(request):
                    if status.state == pb.REPLICA_STATE_FAILED:
                        raise LeaseRefused(status.reason)
                    yield status.state == pb.REPLICA_STATE_SERVING
        except grpc.aio.AioRpcError as error:
            away = error.code() is grpc.StatusCode.UNAVAILABLE
            raise (PeerError if away else LeaseRefused)(_said(error)) from error

    async def release(self, address: Address, term: Term, wanted: Wanted) -> None:
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                request = pb.ReleaseShardRequest(shard=self._request(term, wanted))
                await rpc.AgentStub(channel).ReleaseShard(request, timeout=_RPC_S)
        except grpc.aio.AioRpcError as error:
            raise PeerError(_said(error)) from error

    async def policy(self, address: Address) -> tuple[PolicyVersion, str]:
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                request = pb.PolicyRequest(cluster=self._cluster)
                found = await rpc.AgentStub(channel).GetPolicy(request, timeout=_RPC_S)
        except grpc.aio.AioRpcError as error:
            raise PeerError(_said(error)) from error
        return read_version(found.version, found.writer), found.text

    def _request(self, term: Term, wanted: Wanted) -> pb.HoldShardRequest:
        return pb.HoldShardRequest(
            cluster=self._cluster,
            model=wanted.model,
            layer_start=wanted.layers.start,
            layer_end=wanted.layers.end,
            runtime=wanted.runtime,
            quantization=wanted.quantization,
            holder=f"scheduler {self._me}",
            term=term_record(term),
            sessions=wanted.sessions,
            context=wanted.context,
        )


async def _connect(channel: grpc.aio.Channel) -> None:
    """Until the channel is ready, or the peer refuses, which the call then says; raises ``PeerError`` where neither comes."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            while (state := channel.get_state(try_to_connect=True)) not in _DECIDED:
                await channel.wait_for_state_change(state)
    except TimeoutError:
        raise PeerError(f"no connection within {_CONNECT_S:g} s") from None


def _said(error: grpc.aio.AioRpcError) -> str:
    return error.details() or error.code().name
