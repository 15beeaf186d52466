"""Sessions on asyncio over a runtime that answers at once: order, slow clients, failing disks, limits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mesh.errors import Full, MeshError, NoRoute, Unavailable
from mesh.messages import DRAFTS, FEATURES, STEPS
from mesh.session import Session
from mesh.session_events import Finish, SessionOrder
from mesh.types import LayeredRoute, NodeId, SessionId, Stage, Token
from node_agent.adapters.memory_store import MemoryTokenLog
from node_agent.adapters.metrics import AgentMetrics, StageMetrics
from node_agent.adapters.replica import BRIEF_MAX_NS, Replica
from node_agent.adapters.session_driver import CLIENT_BEHIND_MAX, SessionDriver, SessionHandle
from node_agent.adapters.stage_host import StageHost
from scheduler.cluster import ClusterSnapshot
from scheduler.route import RoutePlan
from scheduler.speed import StageSpeed
from tests.builders import ADDRESS, OWNER, cluster, node, order, shard

INFO = shard(0, 6)
ROUTE = LayeredRoute((Stage(OWNER, ADDRESS, INFO.layers, INFO.digest),))


class CountingRuntime:
    """Says position modulo the vocabulary, so that a token tells its place."""

    info, slots, capacity, provider, batch, batch_exact = INFO, 4, 1024, "test", 64, True

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.fails_at = -1

    def _logits(self, positions: Sequence[int]) -> Any:
        if self.fails_at in positions:
            raise RuntimeError("out of order")
        time.sleep(self.step_s)
        logits = np.zeros((len(positions), INFO.model.vocabulary), dtype=np.float32)
        for row, position in enumerate(positions):
            logits[row, (position + 1) % 90] = 1.0
        return logits

    def decode(self, slot: int, positions: Sequence[int], inputs: Any, logits: bool = True) -> Any:
        return self._logits(positions)

    def prefill(self, slot: int, position: int, inputs: Any, logits: int = 1) -> Any:
        end = position + len(inputs)
        return self._logits(range(end - logits, end))

    def replay(self, slot: int, position: int, inputs: Any) -> Any:
        return self._logits(range(0))

    def prepare(self) -> None:
        pass

    def hold_to_steps(self, inputs: Any) -> bool:
        return True

    def copy(self, source: int, target: int, positions: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class FailingTokenLog(MemoryTokenLog):
    """Fails on cue."""

    fails_at = -1

    def append(self, session: SessionId, tokens: Sequence[Token], copy: bool = False) -> None:
        if tokens and tokens[0].position == self.fails_at:
            raise OSError("no space left on device")
        super().append(session, tokens, copy)


class Bench:
    def __init__(
        self, runtime: CountingRuntime | None = None, view: Callable[[], ClusterSnapshot] = ClusterSnapshot
    ) -> None:
        self.runtime = runtime or CountingRuntime()
        self.log = FailingTokenLog()
        metrics = AgentMetrics("n")
        self.host = StageHost(OWNER, ADDRESS, lambda address, message: None, lambda reason: None)
        self.replica = Replica(
            self.runtime, 1 << 30, self.host.forward, self.host.failed, StageSpeed(1000, 100, 100, 2000)
        )
        self.host.replicas[INFO.digest] = self.replica
        self.host.metrics[INFO.digest] = StageMetrics(metrics, INFO)
        self.driver = SessionDriver(self.host, self.log, metrics, sessions_max=2, keep_s=60, view=view)
        self.host.owner = self.driver

    def start(self, tokens: int = 50, **changes: Any) -> SessionHandle:
        base: SessionOrder = order(
            session=SessionId(secrets.token_hex(16)),
            tokens_max=tokens,
            positions_max=1000,
            deadline_ns=time.monotonic_ns() + 10**11,
            step_timeout_ns=10**11,
            **changes,
        )

        def nowhere(session: Session, plan: RoutePlan, avoid: frozenset[NodeId]) -> RoutePlan:
            raise NoRoute("there is no other route")

        return self.driver.start(base, RoutePlan(ROUTE, (), 0.0, 0.0), "tiny", nowhere)


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 30))


async def collect(handle: SessionHandle) -> list[int]:
    return [token.position async for token in handle.tokens()]


@pytest.mark.parametrize("step_s", [0.0, BRIEF_MAX_NS / 1e9 * 1.2], ids=["on the loop", "on the thread"])
def test_every_position_comes_once_in_order_and_is_in_the_log(step_s: float) -> None:
    async def story() -> None:
        bench = Bench(CountingRuntime(step_s))
        handle = bench.start(tokens=30)
        assert await collect(handle) == list(range(10, 40))
        assert handle.finish is Finish.LENGTH
        kept = bench.log.read(handle.session.order.session)
        assert kept is not None
        assert [t.token for t in kept.tokens] == [p % 90 for p in range(10, 40)]
        assert not bench.replica.book.sessions
        assert len(bench.driver) == 0

    run(story)


def test_a_stage_of_this_node_that_kept_nothing_gets_the_whole_prompt_at_once() -> None:
    """It refuses while the session is still being opened: what that had left to send is of an epoch that is over."""

    async def story() -> None:
        bench = Bench()
        handle = bench.start(tokens=5, resume=(SessionId("c" * 32), 8))
        assert await collect(handle) == list(range(10, 15))
        assert handle.trace.recoveries == []
        assert handle.trace.cached_tokens == 0

    run(story)


def test_sessions_side_by_side_do_not_mix() -> None:
    async def story() -> None:
        bench = Bench()
        one, two = bench.start(tokens=40), bench.start(tokens=60, prompt=tuple(range(25)))
        results = list(await asyncio.gather(collect(one), collect(two)))
        assert results == [list(range(10, 50)), list(range(25, 85))]

    run(story)


def test_a_session_that_asks_for_another_route_is_no_load_that_it_would_meet() -> None:
    async def story() -> None:
        bench = Bench()
        one, two = bench.start(tokens=40), bench.start(tokens=40)
        here = (OWNER, INFO.digest)
        assert bench.driver.own_sessions()[here] == 2
        assert bench.driver.own_sessions(but=one.session)[here] == 1
        spare = replace(ROUTE.stages[0], node=NodeId("spare"))
        two.session.standbys = (spare,)  # it computes as well
        assert bench.driver.own_sessions()[spare.node, spare.shard] == 1
        await asyncio.gather(collect(one), collect(two))
        assert not bench.driver.own_sessions()

    run(story)


def test_r8_a_slow_client_pauses_its_own_session_and_no_other() -> None:
    async def story() -> None:
        bench = Bench()
        slow, quick = bench.start(tokens=500), bench.start(tokens=200)
        assert len(await collect(quick)) == 200
        await asyncio.sleep(0.05)
        assert CLIENT_BEHIND_MAX <= len(slow.session.generated) <= CLIENT_BEHIND_MAX + 2
        assert len(await collect(slow)) == 500

    run(story)


def test_r6_a_token_that_cannot_be_kept_is_not_shown() -> None:
    async def story() -> None:
        bench = Bench()
        bench.log.fails_at = 15
        handle = bench.start()
        shown = []
        with pytest.raises(Unavailable, match="token log cannot be written: no space left"):
            async for token in handle.tokens():
                shown.append(token.position)
        assert shown == [10, 11, 12, 13, 14]
        assert not bench.replica.book.sessions

    run(story)


def test_a_runtime_that_fails_ends_its_session_and_not_the_replica() -> None:
    async def story() -> None:
        bench = Bench()
        bench.runtime.fails_at = 20
        with pytest.raises(MeshError, match="runtime: RuntimeError: out of order"):
            await collect(bench.start())
        bench.runtime.fails_at = -1
        assert len(await collect(bench.start())) == 50

    run(story)


def test_stopping_frees_everything_at_once() -> None:
    async def story() -> None:
        bench = Bench()
        handle = bench.start(tokens=900)
        tokens = handle.tokens()
        for _ in range(3):
            await anext(tokens)
        handle.stop()
        assert not bench.replica.book.sessions
        assert len(bench.driver) == 0
        handle.stop()

    run(story)


def test_the_ingress_has_its_own_limit() -> None:
    async def story() -> None:
        bench = Bench()
        first, _ = bench.start(), bench.start()
        with pytest.raises(Full, match="runs 2 sessions already"):
            bench.start()
        await collect(first)
        bench.start()
        bench.driver.draining = True
        with pytest.raises(Unavailable, match="draining"):
            bench.start()

    run(story)


def test_a_trace_adds_up() -> None:
    async def story() -> None:
        bench = Bench(CountingRuntime(0.002))
        handle = bench.start(tokens=20)
        await collect(handle)
        report = handle.trace.report()
        assert report["tokens"] == 20
        assert report["outcome"] == "length"
        (stage,) = report["stages"]
        assert 2.0 <= stage["compute_ms"] <= report["tpot_ms"]

    run(story)


@pytest.mark.parametrize(("features", "together"), [(FEATURES, True), (FEATURES & ~STEPS, False)])
def test_steps_are_replayed_together_only_on_a_route_of_agents_that_know_how(
    features: int, together: bool
) -> None:
    async def story() -> None:
        there = cluster(*(node(stage.node, features=features) for stage in ROUTE.stages))
        assert Bench(view=lambda: there).start(tokens=5).session.steps == together

    run(story)


@pytest.mark.parametrize(("features", "guesses"), [(FEATURES, True), (FEATURES & ~DRAFTS, False)])
def test_nothing_is_guessed_on_a_route_with_an_agent_that_takes_no_guesses(
    features: int, guesses: bool
) -> None:
    async def story() -> None:
        there = cluster(*(node(stage.node, features=features) for stage in ROUTE.stages))
        handle = Bench(view=lambda: there).start(tokens=5, speculate=True)
        assert (handle.session.speculation is not None) == guesses
        assert await collect(handle) == list(range(10, 15))

    run(story)
