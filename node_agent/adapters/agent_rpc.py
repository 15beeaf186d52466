"""The agent's control surface over gRPC: its record, joins, leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from math import nan
from typing import Any

import grpc

from mesh.adapters.codec import read_session
from mesh.adapters.membership_codec import valid_address
from mesh.errors import InputError, MeshError, PeerError, ShardError, StaleTerm
from mesh.forms import DEFAULT_RUNTIME, QUANTIZATIONS
from mesh.types import Address, PolicyVersion
from node_agent.adapters.records import node_record, read_term, replica_record
from node_agent.adapters.replicas import ReplicaManager
from node_agent.adapters.takeover import Takeovers, read_epoch, write_epoch, write_route
from node_agent.lease import Promise, ShardKey
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.cluster import Node


class AgentService(rpc.AgentServicer):
    """Serves ``protos/agent.proto``. ``tell`` must be called when the record changes."""

    def __init__(
        self,
        cluster: str,
        know: Callable[[list[Address], str], None],
        replicas: ReplicaManager,
        policy: Callable[[], tuple[PolicyVersion, str]],
        takeovers: Takeovers,
        drain: Callable[[bool], tuple[int, int]],
    ) -> None:
        self._drain = drain
        self._takeovers = takeovers
        self._cluster, self._know, self._replicas = cluster, know, replicas
        self._policy = policy
        self._record: pb.NodeRecord | None = None
        self._waiters: set[asyncio.Event] = set()
        self._closing = False

    def tell(self, record: Node) -> None:
        """Send our record to all who watch it. It is put into words once, not for each of them."""
        self._record = node_record(record, self._cluster)
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.set()

    def close(self) -> None:
        """End all watches."""
        self._closing = True
        self._wake()

    async def _admit(self, cluster: str, context: Any) -> None:
        if cluster != self._cluster:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this is cluster {self._cluster!r}, not {cluster!r}"
            )

    async def Watch(  # noqa: N802 (gRPC's name)
        self, request: pb.WatchRequest, context: Any
    ) -> AsyncIterator[pb.NodeRecord]:
        await self._admit(request.cluster, context)
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            while not self._closing:
                waiter.clear()
                if self._record is not None:
                    yield self._record
                await waiter.wait()
        finally:
            self._waiters.discard(waiter)

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:  # noqa: N802
        await self._admit(request.cluster, context)
        self._know([Address(a) for a in request.addresses if valid_address(a)], "join")
        return pb.JoinReply()

    async def HoldShard(  # noqa: N802
        self, request: pb.HoldShardRequest, context: Any
    ) -> AsyncIterator[pb.ReplicaRecord]:
        await self._admit(request.cluster, context)
        if self._closing:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this agent stops")
        key = _key(request)
        promise = Promise(request.sessions, request.context) if request.sessions and request.context else None
        term = read_term(request.term)
        if request.HasField("term") and term is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the term makes no sense")
        statuses = (
            self._replicas.hold_planned(key, term, promise)
            if term
            else self._replicas.hold(key, request.holder, promise)
        )
        try:
            async for status in statuses:
                have = status.shard.model.ref
                if not have.digest.startswith(request.model_digest.hex()):
                    wanted = request.model_digest.hex()[:12]
                    raise ShardError(
                        f"{have} is here, not {have.name}@{wanted}: pull that version onto this node"
                    )
                yield replica_record(status)
        except StaleTerm as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except InputError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except MeshError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        finally:
            await statuses.aclose()

    async def ReleaseShard(  # noqa: N802
        self, request: pb.ReleaseShardRequest, context: Any
    ) -> pb.ReleaseShardReply:
        await self._admit(request.shard.cluster, context)
        term = read_term(request.shard.term)
        if term is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a release needs the scheduler's term")
            raise AssertionError  # abort does not return
        try:
            self._replicas.release_planned(_key(request.shard), term)
        except StaleTerm as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.ReleaseShardReply()

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:  # noqa: N802
        await self._admit(request.cluster, context)
        stages, sessions = self._drain(not request.undo)
        return pb.DrainReply(stages=stages, sessions=sessions)

    async def TakeOver(self, request: pb.TakeOverRequest, context: Any) -> pb.TakeOverReply:  # noqa: N802
        await self._admit(request.cluster, context)
        try:
            session = read_session(request.session)
        except PeerError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise AssertionError from None  # abort does not return
        wanted = read_epoch(request.wanted) if request.HasField("wanted") else None
        known, taken = self._takeovers.answer(session, read_epoch(request.expected), wanted)
        if known is None:
            return pb.TakeOverReply()
        return pb.TakeOverReply(
            found=True,
            taken=taken,
            epoch=write_epoch(known.epoch),
            request=known.request,
            prompt=known.prompt,
            tokens=[t.token for t in known.tokens],
            logprobs=[nan if t.logprob is None else t.logprob for t in known.tokens],
            route=write_route(known.route),
        )

    async def GetPolicy(self, request: pb.PolicyRequest, context: Any) -> pb.PolicyDocument:  # noqa: N802
        await self._admit(request.cluster, context)
        version, text = self._policy()
        return pb.PolicyDocument(version=version.counter, writer=version.writer, text=text)


def _key(request: pb.HoldShardRequest) -> ShardKey:
    # What is unknown is refused where the shard is looked for, with the reason.
    runtime = request.runtime or DEFAULT_RUNTIME
    quantization = request.quantization or QUANTIZATIONS.get(runtime, ("",))[0]
    return ShardKey(request.model, request.layer_start, request.layer_end, runtime, quantization)
