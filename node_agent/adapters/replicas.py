"""Replicas of this node: loaded with their first lease, unloaded with their last."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

from mesh.capabilities import Capabilities
from mesh.clock import Clock
from mesh.errors import Full, InputError, MeshError, ShardError, StaleTerm
from mesh.types import ShardInfo, Term
from node_agent.adapters.compute import Compute
from node_agent.adapters.fingerprint.memory import Memory, probe_memory
from node_agent.adapters.metrics import AgentMetrics, StageMetrics
from node_agent.adapters.replica import Replica
from node_agent.adapters.stage_host import StageHost
from node_agent.config import AgentConfig
from node_agent.lease import LeaseBook, Promise, ShardKey
from node_agent.ports import Runtime, ShardSource
from scheduler.cluster import Replica as ReplicaStatus
from scheduler.cluster import ReplicaState
from scheduler.layer_speed import LayerSpeed
from scheduler.layer_times import LayerTimes
from scheduler.speed import StageSpeed, guess

log = logging.getLogger(__name__)

_MIB = 1 << 20
_MEMORY_MARGIN = 0.9
_KV_SHARE = 0.5
_PROBE_S = 2.0
_PLANNED = "planned"


@dataclass(slots=True)
class _Held:
    key: ShardKey
    promise: Promise | None = None
    info: ShardInfo | None = None
    state: ReplicaState = ReplicaState.LOADING
    reason: str = ""
    replica: Replica | None = None
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the next change, and replaced by a fresh one: several may wait for it."""
    full: bool = False
    """It failed for want of memory."""


class ReplicaManager:
    """Loads and unloads replicas as leases come and go; ``changed`` is called on every change."""

    def __init__(
        self,
        config: AgentConfig,
        source: ShardSource,
        host: StageHost,
        metrics: AgentMetrics,
        changed: Callable[[], None],
        capabilities: Callable[[], Capabilities],
        probe: Callable[[], Memory] = probe_memory,
        clock: Clock = time,
        compute: Callable[[Runtime], Compute] | None = None,
    ) -> None:
        """``compute`` says where a runtime's work is done; a thread each, if it does not."""
        self.capabilities = capabilities
        self._config, self._source, self._host = config, source, host
        self._metrics, self._changed = metrics, changed
        self._probe, self._clock, self._compute = probe, clock, compute
        self._numbers = itertools.count(1)
        self._leases: LeaseBook[ShardKey] = LeaseBook()
        self._held: dict[ShardKey, _Held] = {}
        self._committed_bytes = 0
        self._memory, self._probe_due = probe(), 0.0
        self._loading = asyncio.Lock()
        self._unloading: set[asyncio.Task[None]] = set()
        self.term: Term | None = None
        """The latest of the schedulers' that wanted something here."""
        self._planned: dict[ShardKey, Term] = {}
        self._layer_times: dict[tuple[str, str, str], LayerTimes] = {}

    def memory_free(self) -> int:
        """Bytes that further shards and their KV memory may take."""
        if self._config.memory:
            return max(0, self._config.memory * _MIB - self._committed_bytes)
        return int(self.memory().free * _MEMORY_MARGIN)

    def memory(self) -> Memory:
        """This machine's memory, at most ``_PROBE_S`` old: records go out several times a second."""
        now = self._clock.monotonic()
        if now >= self._probe_due:
            self._memory, self._probe_due = self._probe(), now + _PROBE_S
        return self._memory

    def status(self) -> tuple[ReplicaStatus, ...]:
        """All replicas as peers see them."""
        return tuple(
            self._status(held) for _, held in sorted(self._held.items(), key=lambda i: str(i[0])) if held.info
        )

    def _status(self, held: _Held) -> ReplicaStatus:
        assert held.info is not None
        book = held.replica.book if held.replica else None
        speed = held.replica.speed() if held.replica else None
        if held.replica is not None and held.replica.own_speed is not None:
            self._learn(held.info, held.replica.own_speed)
        return ReplicaStatus(
            held.info,
            held.state,
            held.reason,
            book.live if book else 0,
            book.slots if book else 0,
            book.capacity if book else 0,
            book.reserved_bytes if book else 0,
            book.kv_budget_bytes if book else 0,
            held.replica.runtime.provider if held.replica else "",
            self._leases.count(held.key),
            speed,
            self._planned.get(held.key),
        )

    def _learn(self, info: ShardInfo, speed: StageSpeed) -> None:
        key = (info.model.ref.digest, info.runtime, info.quantization)
        self._layer_times.setdefault(key, LayerTimes()).add(info, speed, self._clock.monotonic())

    def _expected(self, info: ShardInfo) -> tuple[StageSpeed, bool]:
        """Until it has run: by it or other cuts of the model that ran here before, else by the machine's probe; and whether
        something ran."""
        times = self._layer_times.get((info.model.ref.digest, info.runtime, info.quantization))
        expected = times.stage(info) if times else None
        return expected or guess(info, self.capabilities()), times is not None and times.ran

    def layer_speeds(self) -> tuple[LayerSpeed, ...]:
        """What was measured here of each model, loaded or not."""
        now = self._clock.monotonic()
        speeds = (times.told(now) for _, times in sorted(self._layer_times.items(), key=lambda i: i[0]))
        return tuple(s for s in speeds if s is not None)

    def expect(self, probed: Iterable[LayerSpeed]) -> None:
        """What forms of models were measured to take here before any of them ran."""
        for speed in probed:
            self._layer_times.setdefault((speed.model, speed.runtime, speed.quantization), LayerTimes(speed))

    async def hold(
        self, key: ShardKey, holder: str, promise: Promise | None = None
    ) -> AsyncGenerator[ReplicaStatus, None]:
        """Hold a replica for as long as this is iterated; yields its status on every change.

        Raises ``InputError`` or ``Full`` when it cannot be loaded.
        """
        lease = str(next(self._numbers))
        held = self._acquire(key, lease, holder, promise)
        try:
            async for status in self._statuses(held):
                yield status
        finally:
            self._release(key, lease)

    async def hold_planned(
        self, key: ShardKey, term: Term, promise: Promise | None = None
    ) -> AsyncGenerator[ReplicaStatus, None]:
        """A scheduler's lease: it stays when this is iterated no more, until ``release_planned``. Ends when
        a later term takes the lease over. Raises ``StaleTerm``, ``InputError`` or ``Full``."""
        self._heed(term)
        known = key in self._planned and key in self._held
        self._planned[key] = term
        held = self._held[key] if known else self._acquire(key, _PLANNED, f"scheduler {term.leader}", promise)
        self._tell(held)
        try:
            async for status in self._statuses(held):
                if self._planned.get(key) != term:
                    return
                if status.state is ReplicaState.FAILED:
                    raise Full(status.reason) if held.full else ShardError(status.reason)
                yield status
        except MeshError:
            # What cannot be loaded is not kept: the scheduler hears why and decides anew.
            if self._planned.get(key) == term:
                self._let_go(key)
            raise

    def release_planned(self, key: ShardKey, term: Term) -> None:
        """End a scheduler's lease; raises ``StaleTerm``. Nothing happens where there is none."""
        self._heed(term)
        if key in self._planned:
            self._let_go(key)

    def _heed(self, term: Term) -> None:
        """Follow the latest term, refuse older ones: plans of two leaders never mix."""
        if self.term is not None and term < self.term:
            raise StaleTerm(
                f"term {term.counter} of {term.leader} is over: {self.term.leader} leads in term {self.term.counter}"
            )
        if term != self.term:
            self.term = term
            self._changed()

    def _let_go(self, key: ShardKey) -> None:
        del self._planned[key]
        self._release(key, _PLANNED)

    def _acquire(self, key: ShardKey, lease: str, holder: str, promise: Promise | None) -> _Held:
        held = self._held.get(key)
        if self._leases.acquire(key, lease, holder) or held is None:
            held = self._held[key] = _Held(key, promise)
            held.task = asyncio.create_task(self._load(held), name=f"load {key}")
        return held

    def _release(self, key: ShardKey, lease: str) -> None:
        held = self._held.get(key)
        if self._leases.release(key, lease) and held is not None:
            self._begin_unload(held)

    async def _statuses(self, held: _Held) -> AsyncGenerator[ReplicaStatus, None]:
        while True:
            changed = held.changed
            if held.state is ReplicaState.FAILED and held.info is None:
                raise InputError(held.reason)
            if held.info is not None:
                yield self._status(held)
            if held.state is ReplicaState.DRAINING:
                return
            await changed.wait()

    async def _load(self, held: _Held) -> None:
        key = held.key
        try:
            async with self._loading:
                info = held.info = await self._source.find(key)
                self._tell(held)
                try:
                    kv_budget, slots, capacity = self._memory_for(info, held.promise)
                except Full:
                    if not self._unloading:
                        raise
                    # What is on its way out will leave room.
                    await asyncio.wait(set(self._unloading), timeout=self._config.drain_timeout + 5)
                    kv_budget, slots, capacity = self._memory_for(info, held.promise)
                runtime = await self._source.load(key, slots, capacity + 1)
                self._serve(held, info, runtime, kv_budget)
        except (MeshError, OSError) as error:
            held.state, held.reason, held.full = ReplicaState.FAILED, str(error), isinstance(error, Full)
            log.error("shard %s:%s-%s was not loaded: %s", key.model, key.start, key.end, error)
        finally:
            self._tell(held)

    def _serve(self, held: _Held, info: ShardInfo, runtime: Runtime, kv_budget: int) -> None:
        host, (speed, ran) = self._host, self._expected(info)
        compute = self._compute(runtime) if self._compute else None
        held.replica = Replica(
            runtime, kv_budget, host.forward, host.failed, speed, self._clock, compute, ran
        )
        host.replicas[info.digest] = held.replica
        host.metrics[info.digest] = StageMetrics(self._metrics, info)
        self._committed_bytes += info.weight_bytes + kv_budget
        held.state = ReplicaState.SERVING
        log.info(
            "serving %s on %s",
            info,
            runtime.provider,
            extra={"shard": str(info), "model_version": str(info.model.ref)},
        )

    def _memory_for(self, info: ShardInfo, promise: Promise | None) -> tuple[int, int, int]:
        """KV budget in bytes, slots and positions a slot; raises ``Full`` when memory does not do."""
        config = self._config
        self._probe_due = 0.0  # what counts now is what is free now
        free = self.memory_free() - info.weight_bytes
        context = min(promise.context if promise else config.context, info.model.context_max)
        slots = promise.sessions if promise else config.slots
        all_slots = slots * context * info.kv_bytes_per_token
        budget = all_slots if promise else config.kv_memory * _MIB or min(all_slots, int(free * _KV_SHARE))
        if free < 0 or budget > free or budget < context * info.kv_bytes_per_token:
            sessions = slots if promise else 1
            kv_memory = sessions * context * info.kv_bytes_per_token
            raise Full(
                f"{info} needs {info.weight_bytes / _MIB:.0f} MiB for weights and {kv_memory / _MIB:.0f} MiB of KV "
                f"memory (sessions: {sessions}, of {context} positions); {self.memory_free() / _MIB:.0f} MiB are free. "
                "Lower context, or cut smaller shards"
            )
        return budget, slots, context

    def _begin_unload(self, held: _Held) -> None:
        del self._held[held.key]
        self._tell(held)
        task = asyncio.create_task(self._unload(held), name=f"unload {held.key}")
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self, held: _Held) -> None:
        if held.task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({held.task})
        if held.replica is None or held.info is None:
            return
        held.state = ReplicaState.DRAINING
        await held.replica.drain(self._config.drain_timeout)
        if self._host.replicas.get(held.info.digest) is held.replica:
            del self._host.replicas[held.info.digest]
            del self._host.metrics[held.info.digest]
        self._committed_bytes -= held.info.weight_bytes + held.replica.book.kv_budget_bytes
        self._metrics.forget(held.info)
        log.info("unloaded %s", held.info, extra={"shard": str(held.info)})

    def _tell(self, held: _Held) -> None:
        held.changed.set()
        held.changed = asyncio.Event()
        self._changed()

    async def close(self) -> None:
        """Drain and unload everything; leases end with the streams that hold them."""
        for held in list(self._held.values()):
            self._begin_unload(held)
        if self._unloading:
            await asyncio.wait(set(self._unloading), timeout=self._config.drain_timeout + 5)
