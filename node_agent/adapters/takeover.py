"""Sessions change hands: what this node's token log holds for others, and claiming what others hold.

The holder of a token log is the arbiter (rule R1): it changes a session's owner by compare-and-set, refuses the
old owner's epochs from then on, and tells it, so that its stream ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import grpc
import msgspec

from mesh.adapters.codec import read_tokens
from mesh.adapters.grpc_links import QUIET_CHANNEL_OPTIONS
from mesh.errors import RequestError, Unavailable
from mesh.gossip import MemberState
from mesh.types import Address, Epoch, LayeredRoute, NodeId, SessionId
from node_agent.ingress.resumption import check_seen
from node_agent.ports import NO_EPOCH, LoggedSession, TokenLog
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.cluster import ClusterSnapshot

log = logging.getLogger(__name__)

_ASK_S = 1.5
_NAMED = 5
_ASKED_MAX = 64
"""Peers that are asked for a session: more than ever hold one."""


@dataclass(frozen=True, slots=True)
class _Found:
    holder: Address | None
    """``None`` is this node."""
    session: LoggedSession


Ask = Callable[
    [Address, SessionId, Epoch | None, Epoch | None], Awaitable[tuple[LoggedSession | None, bool] | None]
]
"""Ask an agent what its log holds of a session; with the epochs expected and wanted, to change its owner, and whether
it did. ``None`` where it does not answer in time."""


class Takeovers:
    """``fence(session, epoch)`` is called when somebody else becomes the owner of a session that we serve."""

    def __init__(
        self,
        node: NodeId,
        tokens: TokenLog,
        view: Callable[[], ClusterSnapshot],
        fence: Callable[[SessionId, Epoch], None],
        ask: Ask,
    ) -> None:
        self._node, self._log, self._ask = node, tokens, ask
        self._view, self._fence = view, fence

    def answer(
        self, session: SessionId, expected: Epoch | None, wanted: Epoch | None
    ) -> tuple[LoggedSession | None, bool]:
        """What our log holds; with ``wanted`` whether its owner was changed."""
        taken = False
        try:
            if expected is not None and wanted is not None and wanted > expected:
                taken = self._log.take(session, expected, wanted)
                if taken:
                    self._fence(session, wanted)
            return self._log.read(session), taken
        except OSError as error:
            log.error("the token log cannot be read: %s", error)
            return None, False

    async def claim(
        self, session: SessionId, seen: int, most: Callable[[bytes], int]
    ) -> tuple[LoggedSession, Epoch]:
        """Become the owner of a session of which a client has ``seen`` so many tokens: what is known of it, and the
        epoch to open. ``most`` tells of its request how many it may have. Raises ``RequestError`` where nobody
        knows it, or as many tokens, and ``Unavailable`` where somebody who may know more cannot be asked now, or
        another claim came first."""
        found, away = await self._find(session)
        if not found:
            others = f"; {', '.join(away[:_NAMED])} cannot be asked now" if away else ""
            raise RequestError(
                f"no session {session} is known here or to the peers that answer; it may have expired{others}",
                code="not_found",
                status=404,
            )
        best = max(found, key=lambda f: (f.session.epoch, len(f.session.tokens)))
        longest = max((f.session.tokens for f in found), key=len)
        if away and len(longest) < seen <= most(best.session.request):
            raise Unavailable(
                f"of the session {session} {len(longest)} tokens are known to those that answer; "
                f"{', '.join(away[:_NAMED])} may know more, and cannot be asked now",
                retry_after_s=1,
            )
        check_seen(session, seen, longest)
        wanted = Epoch(best.session.epoch.counter + 1, self._node)
        answers = [await self._take(each, session, wanted) for each in found]
        # Whoever knew the last owner decides; older copies follow.
        newest = [
            ok for each, ok in zip(found, answers, strict=True) if each.session.epoch == best.session.epoch
        ]
        if not all(newest):
            raise Unavailable(f"session {session} was just taken over by another agent", retry_after_s=1)
        # A token that was logged anywhere is what it is (rule R5).
        return replace(best.session, tokens=longest), wanted

    async def _find(self, session: SessionId) -> tuple[list[_Found], list[str]]:
        """Who holds something of it, and the names of those that cannot be asked."""
        ours, _ = self.answer(session, None, None)
        found = [_Found(None, ours)] if ours is not None else []
        others = [n for n in self._view().nodes.values() if n.id != self._node]
        peers = [n for n in others if n.state is MemberState.ALIVE][:_ASKED_MAX]
        away = [n.name for n in others if n.state in (MemberState.SUSPECT, MemberState.DEAD)]
        answers = await asyncio.gather(*(self._ask(n.address, session, None, None) for n in peers))
        for node, answer in zip(peers, answers, strict=True):
            if answer is None:
                away.append(node.name)
            elif answer[0] is not None:
                found.append(_Found(node.address, answer[0]))
        return found, away

    async def _take(self, found: _Found, session: SessionId, wanted: Epoch) -> bool:
        if found.holder is None:
            return self.answer(session, found.session.epoch, wanted)[1]
        answer = await self._ask(found.holder, session, found.session.epoch, wanted)
        return answer is not None and answer[1]


class AskByRpc:
    """``Ask`` over gRPC."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    async def __call__(
        self, address: Address, session: SessionId, expected: Epoch | None, wanted: Epoch | None
    ) -> tuple[LoggedSession | None, bool] | None:
        request = pb.TakeOverRequest(cluster=self._cluster, session=bytes.fromhex(session))
        if expected is not None and wanted is not None:
            request.expected.CopyFrom(write_epoch(expected))
            request.wanted.CopyFrom(write_epoch(wanted))
        try:
            async with grpc.aio.insecure_channel(address, QUIET_CHANNEL_OPTIONS) as channel:
                reply = await rpc.AgentStub(channel).TakeOver(request, timeout=_ASK_S)
        except grpc.aio.AioRpcError as error:
            log.debug("%s does not say what it knows of a session: %s", address, error.details())
            return None
        if not reply.found:
            return None, False
        prompt = tuple(reply.prompt)
        tokens = read_tokens(len(prompt), reply.tokens, reply.logprobs)
        route = read_route(reply.route)
        known = LoggedSession(prompt, tokens, read_epoch(reply.epoch), reply.request, route)
        return known, reply.taken


def write_route(route: LayeredRoute | None) -> bytes:
    return b"" if route is None else msgspec.json.encode(route)


def read_route(data: bytes) -> LayeredRoute | None:
    """``None`` where there is none, or none that can be read: it is only a hint."""
    try:
        return msgspec.json.decode(data, type=LayeredRoute) if data else None
    except (msgspec.MsgspecError, ValueError):
        return None


def write_epoch(epoch: Epoch) -> pb.SessionEpoch:
    return pb.SessionEpoch(counter=epoch.counter, owner=epoch.owner)


def read_epoch(epoch: pb.SessionEpoch) -> Epoch:
    return Epoch(epoch.counter, NodeId(epoch.owner)) if epoch.counter else NO_EPOCH
