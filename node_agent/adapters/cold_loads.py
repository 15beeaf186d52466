"""Leases that this ingress holds in need: shards that nobody served any more, for its sessions that wait for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing

from mesh.errors import LeaseRefused, PeerError
from mesh.session import Session
from mesh.types import Digest, LayeredRoute, NodeId, ShardInfo
from node_agent.adapters.policy_book import PolicyBook
from node_agent.lease import Promise, ShardKey
from node_agent.ports import PeerAgents
from scheduler.cluster import ClusterSnapshot
from scheduler.cold_load import SESSIONS, ColdLoad, cold_loads, served_beside
from scheduler.policy import ClassPolicy
from scheduler.reconcile import Refusals, Wanted

log = logging.getLogger(__name__)

_LOOK_S = 2.0
LINGER_S = 30.0
"""A shard that no session of ours uses any more, or that somebody else serves again, is held for so long: those that go on
over it are handed over."""
_UNUSED_S = 2.0
"""What no session has used yet is held for so long after it was last asked for: sessions that wait ask each 100 ms."""
_SHARDS_KNOWN = 256


class ColdLoads:
    """``used`` says how many of our sessions have a replica in their routes. A model that the policy names is left to the
    scheduler, and so is every model while others know a later policy than we do."""

    def __init__(
        self,
        view: Callable[[], ClusterSnapshot],
        agents: PeerAgents,
        used: Callable[[NodeId, Digest], int],
        policies: PolicyBook,
        context: int,
    ) -> None:
        self._view, self._agents, self._used, self._policies = view, agents, used, policies
        self._context = context
        self._shards: dict[Digest, ShardInfo] = {}
        """Of routes that we know: who is lost may be forgotten before it is needed."""
        self._loans: dict[Digest, asyncio.Task[None]] = {}
        self._asked: dict[Digest, float] = {}
        """Of what is on loan, when a session last asked for it."""
        self._refusals = Refusals()

    def note(self, route: LayeredRoute) -> None:
        """Remember what the stages of a route are."""
        nodes = self._view().nodes
        for stage in route.stages:
            node = nodes.get(stage.node)
            for replica in node.replicas if node is not None else ():
                if replica.shard.digest == stage.shard:
                    self._shards[stage.shard] = replica.shard
        while len(self._shards) > _SHARDS_KNOWN:
            del self._shards[next(iter(self._shards))]

    def want(self, session: Session, avoid: frozenset[NodeId], rules: Sequence[ClassPolicy]) -> None:
        """Have what a session lacks loaded somewhere, if that can be."""
        shards = [s for stage in session.route.stages if (s := self._shards.get(stage.shard))]
        if not shards or self._scheduled(shards[0].model.ref.name):
            return
        now = asyncio.get_running_loop().time()
        refused = frozenset(w.node for w in self._refusals.now(now))
        context = min(self._context, shards[0].model.context_max)
        done = len(session.order.prompt) + len(session.generated)
        self._asked |= {s.digest: now for s in shards if s.digest in self._loans}
        for load in cold_loads(self._view(), shards, context, done, avoid | refused, rules):
            if load.shard.digest not in self._loans:
                log.warning("nobody serves %s: %s loads it", load.shard, load.node)
                task = asyncio.create_task(self._lend(load, context), name=f"cold load {load.shard}")
                self._loans[load.shard.digest], self._asked[load.shard.digest] = task, now

    def _scheduled(self, model: str) -> bool:
        book = self._policies
        return model in book.policy.models or any(n.policy > book.version for n in self._view().alive())

    async def _lend(self, load: ColdLoad, context: int) -> None:
        shard, now = load.shard.digest, asyncio.get_running_loop().time
        stream = asyncio.create_task(self._hold(load, context))
        until = 0.0
        try:
            while now() < max(until, self._asked[shard] + _UNUSED_S) and not stream.done():
                await asyncio.wait({stream}, timeout=_LOOK_S)
                if self._needed(load):
                    until = now() + LINGER_S
        finally:
            stream.cancel()
            del self._loans[shard], self._asked[shard]

    def _needed(self, load: ColdLoad) -> bool:
        shard = load.shard.digest
        return self._used(load.node, shard) > 0 and not served_beside(self._view(), shard, load.node)

    async def _hold(self, load: ColdLoad, context: int) -> None:
        shard = load.shard
        layers = shard.layers
        key = ShardKey(shard.model.ref.name, layers.start, layers.end, shard.runtime, shard.quantization)
        try:
            async with aclosing(self._agents.borrow(load.address, key, Promise(SESSIONS, context))) as states:
                async for _ in states:
                    pass
        except (PeerError, LeaseRefused) as error:
            log.warning("%s does not load %s: %s", load.node, shard, error)
            wanted = Wanted(load.node, key.model, layers, key.runtime, key.quantization, SESSIONS, context)
            self._refusals.add(wanted, str(error), asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Let go of everything."""
        for task in list(self._loans.values()):
            task.cancel()
        await asyncio.gather(*self._loans.values(), return_exceptions=True)
