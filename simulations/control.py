"""What a scheduler and agents say to each other over the modelled network, and the file in which an agent keeps its policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mesh.errors import LeaseRefused, MeshError, PeerError
from mesh.types import Address, PolicyVersion, Term
from node_agent.lease import Promise, ShardKey
from scheduler.cluster import Replica as ReplicaStatus
from scheduler.cluster import ReplicaState
from scheduler.reconcile import Wanted

if TYPE_CHECKING:
    from simulations.node import SimNode

Tell = Callable[[bool | MeshError | None], None]
_DIAL_NS = 3_000_000_000
_RPC_S = 10.0
_HEAD_BYTES, _STATUS_BYTES = 200, 300


class SimPolicyFile:
    """A ``node_agent.ports.PolicyFile``: outlives restarts of the agent."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def read(self) -> bytes | None:
        return self.content

    def write(self, content: bytes) -> None:
        self.content = content


class SimAgents:
    """A ``node_agent.ports.PeerAgents``."""

    def __init__(self, node: SimNode) -> None:
        self._node = node

    def hold(self, address: Address, term: Term, wanted: Wanted) -> AsyncGenerator[bool, None]:
        def serving(host: SimNode, tell: Tell) -> Coroutine[Any, Any, None]:
            known, promise = host.terms.latest(host), Promise(wanted.sessions, wanted.context)
            statuses = host.replicas.hold_planned(_key(wanted), term, promise)
            return serve(statuses, tell, lambda: host.terms.obeyed(host, term, known), patient=True)

        return self._hold(address, serving)

    def borrow(self, address: Address, key: ShardKey, promise: Promise) -> AsyncGenerator[bool, None]:
        def serving(host: SimNode, tell: Tell) -> Coroutine[Any, Any, None]:
            return serve(host.replicas.hold(key, "ingress", promise), tell, lambda: None, patient=False)

        return self._hold(address, serving)

    async def _hold(
        self, address: Address, serving_of: Callable[[SimNode, Tell], Coroutine[Any, Any, None]]
    ) -> AsyncGenerator[bool, None]:
        node = self._node
        news: asyncio.Queue[bool | MeshError | None] = asyncio.Queue()
        serving: list[asyncio.Task[None]] = []

        def lost(reason: str) -> None:
            news.put_nowait(PeerError(reason))

        def ended() -> None:
            for task in serving:
                task.cancel()

        stream = node.network.connect(node, address, lost, ended, _DIAL_NS)
        if stream is None:
            raise PeerError(str(await news.get()))

        def begin() -> None:
            target: Any = stream.target

            def tell(what: bool | MeshError | None) -> None:
                stream.send(False, _STATUS_BYTES, news.put_nowait, what)

            serving.append(node.loop.create_task(serving_of(target, tell)))

        stream.send(True, _HEAD_BYTES, begin)
        try:
            while (found := await news.get()) is not None:
                if isinstance(found, MeshError):
                    raise found
                yield found
        finally:
            stream.close("held no more", tell_source=False)

    async def release(self, address: Address, term: Term, wanted: Wanted) -> None:
        def question(host: Any) -> None:
            known = host.terms.latest(host)
            host.replicas.release_planned(_key(wanted), term)
            host.terms.obeyed(host, term, known)

        await self._ask(address, question)

    async def policy(self, address: Address) -> tuple[PolicyVersion, str]:
        found: tuple[PolicyVersion, str] = await self._ask(
            address, lambda host: (host.policies.version, host.policies.text)
        )
        return found

    async def _ask(self, address: Address, question: Callable[[Any], Any]) -> Any:
        """Run ``question`` at a peer; raises ``PeerError``."""
        answer: asyncio.Future[Any] = self._node.loop.create_future()

        def told(found: Any) -> None:
            if not answer.done():
                answer.set_result(found)

        def guarded(host: Any) -> Any:
            try:
                return question(host)
            except MeshError as error:
                return PeerError(str(error))

        self._node.asks(address, guarded, told, lambda: told(PeerError("no answer")))
        try:
            async with asyncio.timeout(_RPC_S):
                found = await answer
        except TimeoutError:
            found = PeerError("no answer in time")
        if isinstance(found, PeerError):
            raise found
        return found


async def serve(
    statuses: AsyncGenerator[ReplicaStatus, None], tell: Tell, met: Callable[[], None], patient: bool
) -> None:
    """As ``AgentService.HoldShard``, on the agent that is asked. ``met``: it does what was wanted. A lease that is not
    ``patient`` ends with a load that failed."""
    try:
        async with aclosing(statuses):
            async for status in statuses:
                if status.state is ReplicaState.FAILED and not patient:
                    raise LeaseRefused(status.reason)
                met()
                tell(status.state is ReplicaState.SERVING)
        tell(None)
    except MeshError as error:
        tell(LeaseRefused(str(error)))


def _key(wanted: Wanted) -> ShardKey:
    layers = wanted.layers
    return ShardKey(wanted.model, layers.start, layers.end, wanted.runtime, wanted.quantization)
