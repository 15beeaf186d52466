"""Tokens of sessions that other nodes own, kept here for them (rule R6). That a copy cannot be kept ends nothing."""

from __future__ import annotations

import logging

from mesh.messages import Open, Witness
from mesh.types import Epoch, LayeredRoute, SessionId, Token
from node_agent.ports import TokenLog

log = logging.getLogger(__name__)


class TokenCopies:
    """Of a last stage, and of whoever is asked to witness. Without a ``log`` nothing is kept."""

    def __init__(self, log: TokenLog | None) -> None:
        self._log = log

    def opened(self, order: Open) -> None:
        """A last stage begins, or goes on. All tokens are written, even where this stage survived: it may have been a
        standby, or not the last for a while."""
        route = order.route if isinstance(order.route, LayeredRoute) else None
        tokens = tuple(Token(len(order.prompt) + i, t) for i, t in enumerate(order.generated))
        self._keep(order.session, order.epoch, order.expires_ms, order.prompt, order.request, tokens, route)

    def sampled(self, order: Open, tokens: tuple[Token, ...]) -> None:
        """A last stage drew these."""
        kept = tuple(Token(t.position, t.token, t.logprob) for t in tokens)
        self._keep(order.session, order.epoch, order.expires_ms, (), b"", kept)

    def witnessed(self, told: Witness) -> None:
        """An owner that is its own last stage has somebody else keep its tokens."""
        self._keep(told.session, told.epoch, told.expires_ms, told.prompt, told.request, told.tokens)

    def _keep(
        self,
        session: SessionId,
        epoch: Epoch,
        expires_ms: int,
        prompt: tuple[int, ...],
        request: bytes,
        tokens: tuple[Token, ...],
        route: LayeredRoute | None = None,
    ) -> None:
        if self._log is None:
            return
        try:
            if request:
                self._log.begin(session, prompt, expires_ms / 1000, epoch, request, route)
            if tokens:
                self._log.append(session, tokens, copy=True)
        except OSError as error:
            log.error("a copy of a session's tokens cannot be kept: %s", error, extra={"session": session})
