"""The cluster view: watches every agent that we know and folds their records into a snapshot.

Agents are known from settings, from ``Join`` calls and from each other's records. A peer that
stops sending is silent within ``SILENCE_S`` and out of new routes; it is watched on, and back as
soon as it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import cast

import grpc

from mesh.adapters.grpc_links import CHANNEL_OPTIONS
from mesh.errors import PeerError
from mesh.types import Address, NodeId
from node_agent.adapters.records import read_node
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.cluster import ClusterEvent, ClusterSnapshot, Node, NodeLeft, NodeSeen, NodeSilent

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
SILENCE_S = 1.5
_RETRY_S = (0.1, 2.0)
_FORGET_S = 60.0
PEERS_MAX = 512
_OWN_STALL_S = 0.2
"""A timeout that fires so much late says that this process was held up, not its peer."""


class ClusterView:
    """Our snapshot, kept by one watching task a peer."""

    def __init__(self, cluster: str, self_id: NodeId, self_address: Address) -> None:
        self.snapshot = ClusterSnapshot()
        self._cluster, self._self_id, self._self_address = cluster, self_id, self_address
        self._watches: dict[Address, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.on_new_peers: Callable[[], None] = lambda: None

    @property
    def peers(self) -> tuple[Address, ...]:
        """Addresses of the agents that we watch."""
        return tuple(sorted(self._watches))

    def apply(self, event: ClusterEvent) -> None:
        """Fold an event into the snapshot."""
        before = self.snapshot
        self.snapshot = before.apply(event, time.monotonic_ns())
        if self.snapshot is not before:
            self._changed.set()

    def know(self, addresses: Iterable[Address]) -> None:
        """Watch these agents, if we do not yet."""
        new = [a for a in addresses if a != self._self_address and a not in self._watches]
        for address in new[: max(0, PEERS_MAX - len(self._watches))]:
            self._watches[address] = asyncio.create_task(self._watch(address), name=f"watch {address}")
        if new:
            self.on_new_peers()

    async def _watch(self, address: Address) -> None:
        wait_s, node, silent_since = _RETRY_S[0], None, time.monotonic()
        said = ""
        while True:
            reason = "no answer"
            patient_until = 0.0
            try:
                async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
                    stream = rpc.AgentStub(channel).Watch(
                        pb.WatchRequest(cluster=self._cluster, address=self._self_address)
                    )
                    while True:
                        patient_until = time.monotonic() + SILENCE_S
                        async with asyncio.timeout(SILENCE_S):
                            record = await stream.read()
                        if record is grpc.aio.EOF:
                            reason = "it ended the watch"
                            break
                        node = self._seen(address, cast("pb.NodeRecord", record))
                        wait_s, silent_since, said = _RETRY_S[0], time.monotonic(), ""
                        if node is None:
                            return
            except TimeoutError:
                if time.monotonic() - patient_until > _OWN_STALL_S:
                    continue  # it was us who did not listen: accuse nobody, ask again
                reason = f"silent for {SILENCE_S:g} s"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name.lower()}: {error.details()}"
            except PeerError as error:
                reason = str(error)
            if reason != said:
                log.warning("peer %s: %s", address, reason)
                said = reason
            if node is not None:
                self.apply(NodeSilent(node.id, reason))
                if time.monotonic() - silent_since > _FORGET_S:
                    self.apply(NodeLeft(node.id))
                    node = None
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _RETRY_S[1])

    def _seen(self, address: Address, record: pb.NodeRecord) -> Node | None:
        """Fold a record in; ``None`` if there is nothing to watch there (ourselves)."""
        node = read_node(record)
        if record.cluster != self._cluster:
            raise PeerError(f"it belongs to cluster {record.cluster!r}, not {self._cluster!r}")
        if node.id == self._self_id:
            if node.address != self._self_address:
                log.error("%s has our node id %s: give it its own data directory", address, node.id)
            self._watches.pop(address, None)
            return None
        self.apply(NodeSeen(node))
        self.know(node.peers)
        return node

    async def close(self) -> None:
        """Stop watching."""
        tasks = list(self._watches.values())
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
