"""A simulated agent: the production parts of ``node_agent.main.Agent``, wired to virtual time and the modelled network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from mesh.capabilities import Battery, Capabilities, Cpu, Disk
from mesh.gossip import Fact
from mesh.membership import Membership
from mesh.membership_events import Found
from mesh.messages import Message
from mesh.profiles import PROFILES
from mesh.session_events import SessionOrder
from mesh.types import Address, NodeId, Sampling, SessionId, Token
from node_agent.adapters.cold_loads import ColdLoads
from node_agent.adapters.control_loop import ControlLoop
from node_agent.adapters.fingerprint.memory import Memory
from node_agent.adapters.memory_store import MemoryFrames, MemoryTokenLog
from node_agent.adapters.metrics import AgentMetrics
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.planner import RoutePlanner
from node_agent.adapters.policy_book import PolicyBook
from node_agent.adapters.replica import Computed
from node_agent.adapters.replicas import ReplicaManager
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.adapters.stage_host import StageHost
from node_agent.adapters.takeover import Takeovers
from node_agent.config import AgentConfig
from node_agent.hop_log import HopLog
from node_agent.hysteresis import links_worth_telling, memory_worth_telling, place_worth_telling
from node_agent.lease import ShardKey
from node_agent.ports import Runtime
from scheduler.cluster import Node, NodeSeen
from scheduler.route import Group
from simulations.checks import TermChecks
from simulations.compute import ModelledCompute, ModelledRuntime
from simulations.consul import SimConsul
from simulations.control import SimAgents, SimPolicyFile
from simulations.links import SimLinks, SimMembership, SimRecords, sim_ask
from simulations.model import SimModel, SimShards
from simulations.network import Network
from simulations.nomad import SimFollower, SimNomad
from simulations.quiet import Quiet
from simulations.virtual_time import Machine, MachineClock, VirtualLoop

LOAD_S = 0.5
"""How often a node looks whether it has news, as in ``node_agent.main``."""
_LINKS_EVERY = 12
_CPU, _DISK = Cpu(4, 4.0), Disk(1 << 36, 1 << 35)
_MIB = 1 << 20
_STOP_TOKENS = frozenset({0})
GREEDY = Sampling(seed=1)

T = TypeVar("T")


class SimTokenLog(MemoryTokenLog):
    """Kept over restarts; tells of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.wrote: Callable[[], None] = lambda: None

    def append(self, session: SessionId, tokens: Sequence[Token], copy: bool = False) -> None:
        super().append(session, tokens, copy)
        self.wrote()


@dataclass(slots=True)
class NodeSpec:
    """What a node is, and keeps over restarts."""

    name: str
    kind: str
    address: Address
    model: SimModel
    config: AgentConfig
    held: ShardKey | None
    """Held from the start, by its settings."""
    speed: float = 1.0
    controlled: bool = False
    """A scheduler places the model."""
    slowness: float = 1.0
    """Factor on the time of every run; faults change it."""
    drift_ppm: int = 0
    disk_s: float = 0.0
    """What each write to its disk takes; faults change it."""
    corrupt: int = 0
    """Faults by which its activations come out wrong."""
    consul: SimConsul | None = None
    """Where it finds others, and who leads; else it is told."""
    nomad: SimNomad | None = None
    """Whose drains it follows while it leads."""
    labels: tuple[tuple[str, str], ...] = ()
    tokens: SimTokenLog = field(default_factory=SimTokenLog)
    """Its disk, with ``policy``."""
    policy: SimPolicyFile = field(default_factory=SimPolicyFile)
    battery: Battery | None = None
    busy_ns: int = 0
    """Time that it computed, in all its lives."""


class _CheckedHost(StageHost):
    """Tells of frames that were computed in another epoch than they were sent in (rule R2)."""

    broken: Callable[[str], None]

    def forward(self, rows: list[Computed]) -> None:
        for row in rows:
            epoch = row.session.order.epoch
            sent = getattr(row.frame, "sent", epoch)
            # A standby that takes its stage has still to compute what it was fed: all of that is before the new epoch begins.
            anew = row.frame.position + row.frame.length > row.session.order.position
            if sent != epoch and anew and not row.session.order.standby:
                self.broken(f"{self.node} computed a frame of epoch {sent.counter} in {epoch.counter}")
        super().forward(rows)


class SimNode:
    """One life of a node, from its start until it crashes or leaves."""

    def __init__(
        self,
        loop: VirtualLoop,
        network: Network,
        spec: NodeSpec,
        rngs: tuple[Random, Random],
        peers: list[Address],
        terms: TermChecks,
        quiet: Quiet,
    ) -> None:
        """``rngs``: of membership, and of all else."""
        self.terms, self._quiet = terms, quiet
        self.loop, self.network, self.spec, self.config = loop, network, spec, spec.config
        self.machine = Machine(loop, spec.name)
        self.clock = MachineClock(loop, spec.drift_ppm)
        self.address, self.id = spec.address, NodeId(spec.name)
        self.watchers: dict[Callable[[Node], None], None] = {}
        """Who is told of our record; a dict for its order."""
        self._probing_rng, self._rng = rngs
        self._still = False
        """Membership stands still, and we look for news only while there is work."""
        self._stir = asyncio.Event()
        self._told: Node | None = None
        self._links_told: Any = {}
        self._place_told: Any = None
        self._memory_told = 0
        self._looks = 0
        self.draining = False
        network.started(self)
        self.machine.run(self._boot, peers)

    def _boot(self, peers: list[Address]) -> None:
        """As ``node_agent.main.Agent._wire``."""
        spec, config, clock = self.spec, self.config, self.clock
        spec.tokens.wrote = self._wrote
        metrics = AgentMetrics(self.id)
        links = SimLinks(self)
        hops = HopLog(MemoryFrames(), config.log_limit << 20, 64 << 20) if config.log != "off" else None
        self.host = _CheckedHost(
            self.id, self.address, links.send, lambda why: None, hops, spec.tokens, links.drop, clock
        )
        self.host.broken = self.network.broken
        self.driver = SessionDriver(
            self.host, spec.tokens, metrics, config.sessions, config.keep, lambda: self.view.snapshot, clock
        )
        self.host.owner = self.driver
        self._started_ms = int(clock.time() * 1000)
        fact = Fact(self.id, self.address, self._started_ms, region=config.region)
        machine = Membership(fact, PROFILES[config.profile], self._probing_rng, clock.monotonic_ns())
        self.membership = SimMembership(self, machine)
        self.view = ClusterView(self.membership, SimRecords(self), clock)
        self.view.on_record = self.driver.note_record
        self.replicas = ReplicaManager(
            config,
            SimShards(spec.model, spec.speed),
            self.host,
            metrics,
            self._changed,
            self.capabilities,
            lambda: Memory(config.memory * _MIB, config.memory * _MIB),
            clock,
            self._compute,
        )
        self.policies = PolicyBook(spec.policy, self.id)
        self.takeovers = Takeovers(
            self.id, spec.tokens, lambda: self.view.snapshot, self.host.fence, sim_ask(self)
        )
        agents = SimAgents(self)
        self.planner = RoutePlanner(
            config,
            self.id,
            lambda: self.view.snapshot,
            self.driver,
            lambda: self.policies.policy,
            lambda: self._rng.randrange(1, 1 << 62),
            ColdLoads(
                lambda: self.view.snapshot,
                agents,
                lambda node, shard: self.driver.own_sessions()[node, shard],
                self.policies,
                config.context,
            ),
        )
        consul = spec.consul
        lock = None if consul is None else lambda told: consul.compete(self, told)
        nomad = None if spec.nomad is None else SimFollower(self, spec.nomad)
        self.control = ControlLoop(
            config, self.id, self.view, spec.model.demand_of, self.policies, agents, lock, clock, nomad
        )
        self.loop.create_task(self.host.run())
        self.loop.create_task(self.driver.run())
        self.loop.create_task(self._refresh())
        if spec.held is not None:
            self.loop.create_task(self._hold(spec.held))
        if spec.controlled:
            self.loop.create_task(self.control.run())
        if consul is not None:
            self.loop.create_task(consul.discover(self))
            return
        for address in peers:
            self.membership.handle(Found(address, "static"))

    async def _hold(self, key: ShardKey) -> None:
        async for _ in self.replicas.hold(key, "settings"):
            pass

    def _compute(self, runtime: Runtime) -> ModelledCompute:
        assert isinstance(runtime, ModelledRuntime)
        self.terms.loaded(self)
        again = self.spec.model.again
        return ModelledCompute(self.loop, self.clock, runtime, again, self._slowness, self._computed)

    def _slowness(self) -> float:
        # Steps of a real machine differ by a few per cent, and now and then by much more.
        noise = 1 + 0.04 * self._rng.random() + (0.5 if self._rng.random() < 0.01 else 0.0)
        return self.spec.slowness * noise

    @property
    def corrupts(self) -> bool:
        """What it computes comes out wrong now."""
        return self.spec.corrupt > 0

    def _wrote(self) -> None:
        # The agent writes tokens down on its event loop, before the client sees them.
        if self.spec.disk_s:
            self.machine.freeze_for(self.spec.disk_s)

    def _computed(self, ns: int) -> None:
        self.spec.busy_ns += ns

    # -- what peers see ------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """What its probes would find."""
        spec = self.spec
        speeds = (spec.model.probed(spec.speed),)
        return Capabilities(_CPU, _DISK, speeds=speeds, labels=spec.labels, battery=spec.battery)

    def record(self) -> Node:
        """This node as peers see it, as ``node_agent.adapters.own_record`` says it."""
        spec, config, replicas = self.spec, self.config, self.replicas
        terms = [t for t in (replicas.term, self.control.term) if t is not None]
        total = config.memory * _MIB
        self._memory_told = memory_worth_telling(self._memory_told, replicas.memory_free(), total)
        return Node(
            id=self.id,
            name=spec.name,
            address=self.address,
            api_address=Address(f"{spec.name}:api"),
            capabilities=self.capabilities(),
            memory_total_bytes=total,
            memory_free_bytes=self._memory_told,
            replicas=replicas.status(),
            models=(spec.model.name,),
            draining=self.draining,
            region=config.region,
            links=self._links_told,
            coordinate=self._place_told,
            layer_speeds=replicas.layer_speeds(),
            scheduler=config.scheduler == "on",
            started_ms=self._started_ms,
            term=max(terms, default=None),
            policy=self.policies.version,
        )

    def _changed(self) -> None:
        if hasattr(self, "control"):
            self._announce()

    async def _refresh(self) -> None:
        every_ns = int(LOAD_S * 1e9)
        while True:
            news, looked_ns = self._announce(), self.loop.now_ns
            if self._still and not news and not self.replicas_busy() and self.spec.battery is None:
                self._stir.clear()
                await self._stir.wait()
            # On at the next of the instants at which we would have looked anyway.
            passed_ns = self.loop.now_ns - looked_ns
            self._looks += passed_ns // every_ns
            await asyncio.sleep((every_ns - passed_ns % every_ns) / 1e9)

    def stand_still(self) -> None:
        """While nothing could come of it, ask nobody whether he lives (see ``simulations.quiet``)."""
        self._still = True
        self.membership.stand_still()

    def go_on(self) -> int:
        """Something happens: as before. How long it stood still, ns."""
        self._still = False
        self._wake()
        return self.membership.go_on()

    def _wake(self) -> None:
        self._stir.set()
        self._quiet.stirred(self)

    @property
    def at_rest(self) -> bool:
        """It stands still and feeds nobody: nothing of it has changed since the last look."""
        if not self._still or self._stir.is_set():
            return False
        return not any(replica.book.live for replica in self.host.replicas.values())

    def disturbed(self) -> None:
        """Something happened to this node."""
        self._quiet.disturb(self.config.region)

    def _announce(self) -> bool:
        """Tell peers our record if it changed; whether it did."""
        self._looks += 1
        if self._looks % _LINKS_EVERY == 0:
            machine = self.membership.machine
            measured = {n: m.meter.estimate() for n, m in machine.members.items() if m.reachable}
            self._links_told = links_worth_telling(self._links_told, measured)
            self._place_told = place_worth_telling(self._place_told, machine.vivaldi.here)
        record = self.record()
        if record == self._told:
            return False
        self._told = record
        self.view.apply(NodeSeen(record, self.clock.monotonic()))
        self.driver.note_record(record)
        for tell in list(self.watchers):
            tell(record)
        return True

    # -- the network ---------------------------------------------------------------------------

    def received(self, upstream: Any, message: Message) -> None:
        """A message came down a link."""
        self._wake()
        self.host.received(upstream, message)

    def asks(
        self,
        target: Address,
        question: Callable[[Any], T],
        told: Callable[[T], None],
        failed: Callable[[], None],
    ) -> None:
        """One request and its answer, at a peer: ``question(peer)`` runs there. ``failed`` where it cannot be asked."""
        stream = self.network.connect(self, target, lambda why: failed(), lambda: None, 1_500_000_000)
        if stream is None:
            return

        def ask() -> None:
            answer = question(stream.target)
            stream.send(False, 400, told, answer)
            stream.send(False, 0, stream.close, "done", False, False)

        stream.send(True, 200, ask)

    # -- sessions ------------------------------------------------------------------------------

    def begin(
        self, model: str, session: SessionId, prompt: tuple[int, ...], tokens: int
    ) -> tuple[SessionHandle, Group | None]:
        """As the API does: a route for a request, and its session; raises ``MeshError``."""
        self._wake()
        order = self._order(session, prompt, tokens)
        digest = self.spec.model.shape.ref.digest
        kept = self.driver.begins_alike(digest, order, self.config.prefix_cache, fixed=True)
        plan = self.planner.plan(model, order, draw=self.planner.draw(), kept=kept)
        if kept is not None and plan.resumed:
            order = self.driver.prefixes.begin(order, kept[0], plan.resumed)
        return self.driver.start(order, plan, model, self._replan(model)), plan.group

    async def resume(
        self, model: str, session: SessionId, tokens: int, group: Group | None, seen: int
    ) -> SessionHandle:
        """As the API does when a client reads on here: take the session over and go on with it. Raises ``RequestError``
        where fewer tokens are known than were ``seen``."""
        self._wake()
        self.driver.let_go(session)
        known, epoch = await self.takeovers.claim(session, seen, lambda request: tokens)
        order = self._order(session, known.prompt, tokens)
        plan = self.planner.plan(
            model, order, draw=self.planner.draw(), pin=group, done=len(known.tokens), holds=known.route
        )
        return self.driver.start(order, plan, model, self._replan(model), (epoch, known.tokens))

    def _replan(self, model: str) -> Any:
        return lambda session, before, avoid: self.planner.replan(model, (), session, before, avoid)

    def _order(self, session: SessionId, prompt: tuple[int, ...], tokens: int) -> SessionOrder:
        config = self.config
        return SessionOrder(
            session=session,
            prompt=prompt,
            sampling=GREEDY,
            tokens_max=tokens,
            stop_tokens=_STOP_TOKENS,
            positions_max=config.context,
            deadline_ns=self.clock.monotonic_ns() + int(config.request_timeout * 1e9),
            chunk=config.chunk,
            window=config.window,
            step_timeout_ns=int(config.step_timeout * 1e9),
            recovery_timeout_ns=int(config.recovery_timeout * 1e9),
            exact=config.replay == "exact" and config.speculation == "off",
            speculate=config.speculation == "on",
            keep=config.prefix_cache != "off",
            request=b"simulated",
        )

    # -- the end -------------------------------------------------------------------------------

    def replicas_busy(self) -> bool:
        """Sessions are fed here."""
        return self.host.busy or len(self.driver) > 0

    def crash(self, silently: bool = False) -> None:
        """``kill -9``; ``silently``: its machine loses power, so that nobody resets its connections."""
        self.machine.crash()
        self.network.gone(self, silently)
