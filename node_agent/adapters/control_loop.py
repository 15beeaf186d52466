"""The scheduler at work: who leads, what should be loaded, and the leases that make it so.

Everything is decided by pure files (``scheduler.leadership``, ``placement``, ``reconcile``); here are the clock,
the streams that keep leases and Consul's lock. A leader that is lost stops nothing but re-planning: leases
outlive their streams until a later leader takes them over or ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mesh.clock import Clock
from mesh.errors import InputError, LeaseRefused, PeerError, RequestError
from mesh.forms import choices
from mesh.types import NO_POLICY, Address, NodeId, PolicyVersion, Term
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.policy_book import PolicyBook
from node_agent.config import AgentConfig
from node_agent.plan_report import infeasible_report, nomad_report, plan_report
from node_agent.ports import Orchestrator, PeerAgents
from scheduler.cluster import ClusterSnapshot
from scheduler.demand import ModelDemand
from scheduler.form_choice import chosen_form
from scheduler.leadership import Leadership, elder
from scheduler.placement import place
from scheduler.plan import Infeasible, Plan
from scheduler.policy import ModelPolicy, Policy, parse_policy
from scheduler.reconcile import (
    FlapBook,
    Hold,
    Reconciler,
    Refusals,
    Release,
    Settling,
    Wanted,
    planned_now,
)

log = logging.getLogger(__name__)

TICK_S = 0.5
PLAN_S = 2.0
"""Between plans when nothing was lost."""
Lock = Callable[[Callable[[bool], None]], Awaitable[None]]
"""Competes to lead until cancelled, and tells whether we do."""
_SMALLER = {"fp32": {"int8": 0.29}}
"""Quantizations that take less room, and how much of it: to say what would fit."""


class ControlLoop:
    """Run by every agent that may lead; plans for whoever asks on any agent."""

    def __init__(
        self,
        config: AgentConfig,
        me: NodeId,
        view: ClusterView,
        demand: Callable[[str, str, str], ModelDemand],
        book: PolicyBook,
        agents: PeerAgents,
        lock: Lock | None = None,
        clock: Clock = time,
        orchestrator: Orchestrator | None = None,
    ) -> None:
        """``demand`` of a model, runtime and quantization raises ``InputError`` where this node lacks the model, and may
        block; without a ``lock`` the eldest leads."""
        self._config, self._me, self._view, self._demand_of = config, me, view, demand
        self.book, self._agents, self._compete, self._clock = book, agents, lock, clock
        self._orchestrator = orchestrator
        self._leadership = Leadership(me)
        self._lock: bool | None = None if lock is None else False
        self._demands: dict[tuple[str, str, str], ModelDemand] = {}
        self._flaps, self._settling = FlapBook(), Settling()
        self._reconciler = Reconciler(config.moves)
        self._streams: dict[Wanted, asyncio.Task[None]] = {}
        self._refusals = Refusals()
        self.answers: dict[str, Plan | Infeasible] = {}
        """Our latest plans, by model, while we lead."""
        self._planned_at, self._planned_for = 0.0, (NO_POLICY, frozenset[NodeId]())
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def term(self) -> Term | None:
        """While we lead."""
        return self._leadership.term

    # -- for people ----------------------------------------------------------------------------

    def apply(self, text: str, name: str, version: PolicyVersion | None) -> dict[str, Any]:
        """Make ``text`` the cluster's policy; raises ``ConfigError`` or ``RequestError``."""
        applied = self.book.apply(text, name, version)
        log.info("policy %d was applied here (%s)", applied.counter, name)
        return {"version": [applied.counter, applied.writer]}

    async def report(self, text: str | None = None, name: str = "policy") -> dict[str, Any]:
        """What the policy of the cluster, or another one, comes to on our snapshot, and what would change."""
        policy = self.book.policy if text is None else parse_policy(text, name) if text.strip() else Policy()
        snapshot = self._view.snapshot
        planned = planned_now(snapshot)
        names = {n.id: n.name for n in snapshot.nodes.values()}
        models = {}
        for model, answer in (await self._place_all(snapshot, policy)).items():
            here = {p: s for p, s in planned.items() if p[1] == model}
            if isinstance(answer, Plan):
                digest = (await self._demand(model, answer.runtime, answer.quantization)).shape.ref.digest
                models[model] = plan_report(answer, here, snapshot, digest)
            else:
                models[model] = infeasible_report(answer, names)
        leader = max((n.term for n in snapshot.nodes.values() if n.term), default=None)
        leading = leader is not None and any(n.id == leader.leader for n in snapshot.alive())
        unwanted = sorted({p[1] for p in planned} - policy.models.keys())
        return {
            "policy": self.book.text,
            "version": [self.book.version.counter, self.book.version.writer],
            "models": models,
            "unloads": unwanted,
            "leader": leader.leader if leader and leading else None,
            "leader_name": names.get(leader.leader) if leader and leading else None,
            "term": leader.counter if leader else 0,
            "schedulers": sum(n.scheduler for n in snapshot.alive()),
            "elder": elder(snapshot),
            "nomad": self._of_orchestrator(snapshot),
        }

    def _of_orchestrator(self, snapshot: ClusterSnapshot) -> dict[str, Any] | None:
        """``None`` where we do not follow one: only a leader does."""
        if self._orchestrator is None or self.term is None:
            return None
        return nomad_report(self._orchestrator.facts(), snapshot)

    async def _place_all(self, snapshot: ClusterSnapshot, policy: Policy) -> dict[str, Plan | Infeasible]:
        """Every model of a policy, by name; what one takes, the next does not find free."""
        answers: dict[str, Plan | Infeasible] = {}
        taken: Counter[NodeId] = Counter()
        for model, wishes in sorted(policy.models.items()):
            try:
                answer = await self._place(snapshot, model, wishes, taken)
            except (InputError, OSError) as error:
                answer = Infeasible("model", str(error))
            if isinstance(answer, Plan):
                taken.update(answer.takes())
            answers[model] = answer
        return answers

    async def _place(
        self, snapshot: ClusterSnapshot, model: str, wishes: ModelPolicy, taken: Mapping[NodeId, int]
    ) -> Plan | Infeasible:
        usual = next(iter(choices(wishes.runtime, wishes.quantization).items()))
        shape = (await self._demand(model, *usual)).shape
        demand = await self._demand(model, *chosen_form(snapshot, shape, wishes))
        others = [demand.scaled(q, s) for q, s in _SMALLER.get(demand.quantization, {}).items()]
        refused = self._refusals.held_off() | self._avoided(snapshot)
        flapping = self._flaps.held_off(self._clock.monotonic())
        answer = await asyncio.to_thread(place, snapshot, demand, wishes, others, refused | flapping, taken)
        if isinstance(answer, Infeasible) and flapping:
            # Nodes that come and go are better than none.
            anyhow = await asyncio.to_thread(place, snapshot, demand, wishes, others, refused, taken)
            answer = anyhow if isinstance(anyhow, Plan) else answer
        return answer

    def _avoided(self, snapshot: ClusterSnapshot) -> dict[NodeId, str]:
        by_name = self._orchestrator.facts().avoid if self._orchestrator else {}
        return {n.id: by_name[n.name] for n in snapshot.nodes.values() if n.name in by_name}

    async def _demand(self, model: str, runtime: str, quantization: str) -> ModelDemand:
        """Raises ``InputError`` where this node lacks the model."""
        key = (model, runtime, quantization)
        known = self._demands.get(key)
        if known is None:
            known = self._demands[key] = await asyncio.to_thread(self._demand_of, *key)
        return known

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled; leases stay."""
        lock = None
        if self._compete is not None and self._config.scheduler == "on":
            lock = asyncio.ensure_future(self._compete(self._told_of_lock))
        try:
            while True:
                await asyncio.sleep(TICK_S)
                try:
                    await self._step()
                except Exception:
                    log.exception("the scheduler's step failed; serving goes on, the next step comes")
        finally:
            if lock is not None:
                lock.cancel()
                await asyncio.gather(lock, return_exceptions=True)
            self._drop_streams()
            if self._orchestrator is not None:
                self._orchestrator.follow(False)

    def _told_of_lock(self, leads: bool) -> None:
        self._lock = leads

    async def _step(self) -> None:
        now, snapshot = self._clock.monotonic(), self._view.snapshot
        await self._learn_policy(snapshot)
        self._flaps.look(snapshot, now)
        before = self._leadership.term
        able = self._config.scheduler == "on"
        term = self._leadership.look(snapshot, self._lock if able else False, now)
        if term != before:
            self._drop_streams()
            if self._orchestrator is not None:
                self._orchestrator.follow(term is not None)
            log.info("we lead in term %d", term.counter) if term else log.info("we lead no more")
        known = self.book.version
        if term is None or known == NO_POLICY or any(n.policy > known for n in snapshot.alive()):
            return  # whoever does not know what is wanted must not unload it
        wanted = await self._wanted(snapshot, now)
        if wanted is not None:
            self._act(term, wanted, now)

    async def _learn_policy(self, snapshot: ClusterSnapshot) -> None:
        """Fetch the latest policy from whoever says that it has it."""
        latest = max(snapshot.alive(), key=lambda n: n.policy, default=None)
        if latest is None or latest.policy <= self.book.version:
            return
        try:
            version, text = await self._agents.policy(latest.address)
        except PeerError as error:
            log.debug("policy of %s: %s", latest.id, error)
            return
        self.book.learn(version, text)

    async def _wanted(self, snapshot: ClusterSnapshot, now: float) -> frozenset[Wanted] | None:
        """What should be loaded, once it has settled; ``None`` while there was never anything to want."""
        lost = frozenset(n.id for n in snapshot.alive())
        if self._planned_for != (self.book.version, lost) or now >= self._planned_at + PLAN_S:
            await self._plan(snapshot)
            self._planned_at, self._planned_for = now, (self.book.version, lost)
        wanted: set[Wanted] = set()
        for model, answer in self.answers.items():
            if isinstance(answer, Plan):
                wanted |= wanted_of(answer)
            elif self._settling.current:
                # What cannot be planned anew stays as far as it is there.
                wanted |= {w for w in self._settling.current if w.model == model}
        alive = {n.id for n in snapshot.alive()}
        current = self._settling.current or frozenset()
        broken = any(w.node not in alive for w in current)
        applied = {w.model for w in wanted} != {w.model for w in current}
        return self._settling.look(frozenset(wanted), broken or applied, now)

    async def _plan(self, snapshot: ClusterSnapshot) -> None:
        answers = await self._place_all(snapshot, self.book.policy)
        for model, answer in answers.items():
            if isinstance(answer, Infeasible) and self.answers.get(model) != answer:
                log.warning("%s cannot be placed: %s", model, answer)
        self.answers = answers

    def _act(self, term: Term, wanted: frozenset[Wanted], now: float) -> None:
        for each in [w for w, task in self._streams.items() if task.done() or w not in wanted]:
            self._streams.pop(each).cancel()
        snapshot, refused = self._view.snapshot, self._refusals.now(now)
        for action in self._reconciler.step(wanted, frozenset(self._streams), snapshot, refused, now):
            each = action.wanted
            address = snapshot.nodes[each.node].address
            match action:
                case Hold():
                    log.info("placing %s:%s on %s", each.model, each.layers, each.node)
                    task = asyncio.create_task(self._keep(term, each, address), name=f"lease {each.layers}")
                    self._streams[each] = task
                case Release(why=why):
                    log.info("releasing %s:%s on %s: %s", each.model, each.layers, each.node, why)
                    release = asyncio.create_task(self._release(term, each, address))
                    self._releases.add(release)
                    release.add_done_callback(self._releases.discard)

    async def _keep(self, term: Term, wanted: Wanted, address: Address) -> None:
        try:
            async with contextlib.aclosing(self._agents.hold(address, term, wanted)) as statuses:
                async for serves in statuses:
                    if serves:
                        self._refusals.clear(wanted)
        except (PeerError, LeaseRefused) as error:
            log.warning("%s did not keep %s:%s: %s", wanted.node, wanted.model, wanted.layers, error)
            if isinstance(error, LeaseRefused):
                self._refusals.add(wanted, str(error), self._clock.monotonic())

    async def _release(self, term: Term, wanted: Wanted, address: Address) -> None:
        with contextlib.suppress(PeerError):  # it shows in the snapshot, and is tried again
            await self._agents.release(address, term, wanted)

    def _drop_streams(self) -> None:
        for task in self._streams.values():
            task.cancel()
        self._streams.clear()


def wanted_of(plan: Plan) -> frozenset[Wanted]:
    """A plan's replicas as leases."""
    return frozenset(
        Wanted(s.node, plan.model, s.layers, plan.runtime, plan.quantization, plan.sessions, plan.context)
        for s in plan.stages
    )


def check_version(value: Any) -> PolicyVersion | None:
    """``[counter, writer]`` of a request, or ``None``."""
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)):
        raise RequestError(f"version is {value!r}; it must be what 'GET /mesh/v1/plan' says", param="version")
    return PolicyVersion(value[0], NodeId(str(value[1])))
