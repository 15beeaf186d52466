"""When a stage's acknowledgements go upstream."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from mesh.messages import Ack, Message
from mesh.types import SessionId
from node_agent.adapters.acknowledgements import ACK_DELAY_S, Acknowledgements
from node_agent.adapters.placed import Key, Placed
from node_agent.adapters.replica import Computed
from tests.builders import frame, opening

WINDOW = 8
OTHER = SessionId("ef" * 16)


class Upstream:
    """Remembers what came back up."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def reply(self, message: Message) -> None:
        assert isinstance(message, list)
        self.heard += [ack.position for ack in message if isinstance(ack, Ack)]


class Stages:
    """Stages of two sessions on one node, both fed by the same peer."""

    def __init__(self) -> None:
        self.upstream = Upstream()
        mine = opening(window=WINDOW)
        self.placed: dict[Key, Placed] = {}
        for order in (mine, replace(mine, session=OTHER)):
            metrics: Any = SimpleNamespace(ran=lambda *_: None)
            replica: Any = None
            self.placed[order.session, order.stage] = Placed(replica, metrics, self.upstream, order)
        self.acks = Acknowledgements(self.placed, time)

    def computed(self, position: int, length: int = 1) -> None:
        placed = next(iter(self.placed.values()))
        session = cast("Any", SimpleNamespace(order=placed.order))
        self.acks.computed([Computed(session, frame(position, length), None, 0, 0)])


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_step_s_acknowledgement_waits_for_others() -> None:
    async def story() -> None:
        stages = Stages()
        stages.computed(0)
        stages.computed(1)
        await turn()
        assert stages.upstream.heard == []
        await asyncio.sleep(ACK_DELAY_S * 1.5)
        assert stages.upstream.heard == [2]

    asyncio.run(story())


def test_credit_comes_back_before_it_runs_out_however_many_sessions_wait_here() -> None:
    """An exact replay sends steps as fast as its window lets it."""

    async def story() -> None:
        stages = Stages()
        for position in range(WINDOW // 2):
            stages.computed(position)
        await turn()
        assert stages.upstream.heard == [WINDOW // 2]

    asyncio.run(story())


def test_prefill_is_acknowledged_at_once() -> None:
    async def story() -> None:
        stages = Stages()
        stages.computed(0, 64)
        await turn()
        assert stages.upstream.heard == [64]

    asyncio.run(story())
