"""What a session's trace makes of the times that tokens bring along."""

from __future__ import annotations

import pytest

from mesh.types import Address, Digest, LayeredRoute, LayerRange, NodeId, SessionId, Stage, Token
from node_agent.trace import SessionTrace

MS = 1_000_000


def test_what_is_left_of_a_token_is_neither_computed_nor_waited_for_nor_on_the_way() -> None:
    stages = tuple(
        Stage(NodeId(name), Address("127.0.0.1:1"), LayerRange(at, at + 3), Digest(name))
        for at, name in ((0, "a"), (3, "b"))
    )
    trace = SessionTrace(SessionId("s"), "tiny", LayeredRoute(stages), 8, 0, predicted_ways_us=1500.0)
    for i in range(5):
        first = 100 if i == 0 else 1  # a prompt's computation says nothing of a step's
        times = (200, 4000 * first, 900, 300, 5000 * first, 0)
        trace.token(Token(i, i, times=times), (50 + 13 * i) * MS)
    assert trace.left_us == pytest.approx(13_000 - 200 - 300 - 4000 - 5000 - 1500)
