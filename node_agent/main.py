"""Wires one agent and runs it: links, stages, leases, sessions, API.

Start-up order: data directory (locked by RocksDB), peer port, API port, then shards. Shut-down is
the reverse: no new requests, running sessions get ``drain_timeout`` to end, leases end, ports close.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from mesh.adapters.grpc_links import SERVER_OPTIONS, Identity, LinkPool, LinkServer
from mesh.adapters.logs import set_up_logs
from mesh.adapters.membership_driver import open_socket
from mesh.discovery import Discovery
from mesh.errors import ConfigError, InputError, MeshError, NoRoute, RequestError
from mesh.gossip import MemberState
from mesh.profiles import PROFILES
from mesh.session import Session, SessionOrder
from mesh.types import Address, Digest, LayeredRoute, NodeId, SessionId
from node_agent.adapters.agent_rpc import AgentService
from node_agent.adapters.control_loop import ControlLoop
from node_agent.adapters.discovery_setup import consul_of, discovery_of
from node_agent.adapters.frame_store import RocksFrames
from node_agent.adapters.http_api import HttpApi, Job, new_choice, new_envelope
from node_agent.adapters.identity import node_identity
from node_agent.adapters.memory_store import MemoryTokenLog
from node_agent.adapters.metrics import AgentMetrics
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.own_record import OwnRecord
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.policy_book import PolicyBook
from node_agent.adapters.replicas import ReplicaManager, ShardKey
from node_agent.adapters.rocksdb_store import RocksTokenLog
from node_agent.adapters.session_driver import SessionDriver, SessionHandle
from node_agent.adapters.stage_host import StageHost
from node_agent.config import AgentConfig, join_address, parse_shard
from node_agent.hop_log import HopLog
from node_agent.ingress.chat import TextModel
from node_agent.ingress.schema import Generation
from node_agent.nodes_report import nodes_report
from node_agent.paths import default_home
from node_agent.ports import TokenLog
from node_agent.prefixes import KeptSession
from node_agent.route_report import route_report
from protos.gen import agent_pb2_grpc, membership_pb2_grpc, mesh_pb2_grpc
from scheduler.cluster import Node, NodeSeen
from scheduler.cost import Percentile
from scheduler.policy import ClassPolicy
from scheduler.routing import Group, Kept, RoutePlan, Router, RouteRequest, models_served

log = logging.getLogger(__name__)

SERVICE = "inference_mesh"
"""Name of this agent in the standard gRPC health service."""
SERVING = HealthCheckResponse.SERVING
_LONG_TEXT = 4096
_LOAD_S = 0.5
_PROBE_S = 2.0
_PORT_TRIES = 8
_DISCOVERY_RETRY_S = 10.0
_ALONE_S = 3.0
_SPEED_AFTER_S = 4.0
"""Shards are loaded by then, and the first answer is not held up by our measuring."""
_TOKENS_EXPECTED = 256
"""Of an answer whose length nobody limited."""
_TOKENS_SOON = 32
"""Of a session that lost a stage: what goes on soon matters more than what is a little faster later."""
_ALTERNATIVES = 2
_FIRST_LINKS_S = 3.0
_GRACE_S = 0.5
_BEHIND_BYTES = 64 << 20
"""Activations that may wait for the disk."""
_COLLECT_AFTER = 10_000
_SWITCH_INTERVAL_S = 5e-5


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a started agent listens."""

    node: str
    address: str
    api_address: str
    pid: int


class Agent:
    """One node. ``run`` returns when ``stop`` was called and everything has ended."""

    def __init__(self, config: AgentConfig) -> None:
        home = Path(config.home) if config.home else default_home()
        self.config = config
        self.store = ModelStore(home)
        self.data_dir = Path(config.data_dir) if config.data_dir else home / "agent"
        self._stopping = asyncio.Event()
        self._texts: dict[str, TextModel] = {}
        self._models_here: tuple[str, ...] = ()
        self._started_monotonic = time.monotonic_ns()
        self._told: Node | None = None
        self._twin: Address | None = None
        self._router = Router()
        self._discovery: list[Discovery] = []
        self._discovering: list[asyncio.Task[None]] = []

    async def run(self, ready: Callable[[Ready], None]) -> None:
        """Start, call ``ready`` once everything listens, serve until stopped."""
        config = self.config
        self.identity = node_identity(self.data_dir)
        self.node_id = self.identity.node
        self.name = config.name or socket.gethostname()
        self.own = OwnRecord(config, self.identity, self.name, self.data_dir)
        set_up_logs(config.log_level, config.log_format, {"node": self.node_id, "name": self.name})
        self.metrics = AgentMetrics(self.node_id)
        if config.log == "off":
            await self._serve(MemoryTokenLog(), None, ready)
            return
        token_log = RocksTokenLog(self.data_dir / "tokens", sync=config.log == "sync")
        frames = RocksFrames(token_log.db, sync=config.log == "sync")
        hops = HopLog(frames, config.log_limit << 20, _BEHIND_BYTES, self._hop_log_dropped)
        try:
            await self._serve(token_log, hops, ready)
        finally:
            frames.close()
            token_log.close()

    def _hop_log_dropped(self, session: SessionId, why: str) -> None:
        self.metrics.hop_log_absent.labels(self.node_id).inc()
        log.warning("a session has no hop log any more: %s", why, extra={"session": session})

    def stop(self) -> None:
        """Begin an orderly end."""
        self._stopping.set()

    async def _serve(self, token_log: TokenLog, hops: HopLog | None, ready: Callable[[Ready], None]) -> None:
        config = self.config
        server = grpc.aio.server(options=SERVER_OPTIONS)
        port, sock = self._listen(server)
        self.address = self.own.address = Address(join_address(config.advertise or config.host, port))
        self._wire(token_log, hops, server, sock)
        await server.start()
        api = HttpApi(
            self.start_generation,
            self.list_models,
            self.list_nodes,
            self.explain,
            self.control,
            self.driver,
            self.metrics,
            self._gauges,
        )
        try:
            try:
                self.api_port = await api.listen(config.api_host, config.api_port)
            except OSError as error:
                raise ConfigError(
                    f"the API cannot listen on {config.api_host}:{config.api_port} ({error.strerror}); "
                    "choose another with --api-port"
                ) from None
            self._announce()
            await self.health.set("", SERVING)
            await self.health.set(SERVICE, SERVING)
            ready(Ready(self.node_id, self.address, self._api_address, os.getpid()))
            # What is here now lives as long as we do, and a step leaves hardly a cycle behind.
            gc.freeze()
            gc.set_threshold(_COLLECT_AFTER)
            log.info("agent %s listens on %s, API on %s", self.name, self.address, self._api_address)
            await self._until_stopped()
            await self._drain()
            await self.view.leave()
        finally:
            self.driver.stop_all("the agent stopped")
            await api.close()
            self.service.close()
            await self.view.close()
            await self.pool.close()
            await server.stop(_GRACE_S)
            await self.replicas.close()

    def _listen(self, server: grpc.aio.Server) -> tuple[int, socket.socket]:
        """The peer port, TCP for gRPC and UDP for membership under one number."""
        config = self.config
        for _ in range(_PORT_TRIES):
            try:
                sock = open_socket(config.host, config.port)
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
                    raise ConfigError(
                        f"{config.host} is no address of this machine ({error.strerror}); --host must be one "
                        "that peers can connect to"
                    ) from None
                raise ConfigError(
                    f"UDP port {config.port} on {config.host} is taken or not ours ({error.strerror}); "
                    "choose another with --port"
                ) from None
            wanted = sock.getsockname()[1]
            try:
                port = server.add_insecure_port(join_address(config.host, wanted))
            except RuntimeError:
                port = 0
            if port:
                return port, sock
            sock.close()
            if config.port:
                break
        raise ConfigError(
            f"port {config.port} on {config.host} is taken or not ours; choose another with --port"
        )

    def _wire(
        self, token_log: TokenLog, hops: HopLog | None, server: grpc.aio.Server, sock: socket.socket
    ) -> None:
        config, identity = self.config, Identity(self.config.cluster, self.node_id)
        self.host = StageHost(
            self.node_id,
            self.address,
            lambda address, message: self.pool.send(address, message),
            lambda reason: self.metrics.refused.labels(self.node_id, reason).inc(),
            hops,
        )
        self.pool = LinkPool(identity, self.host.replied, self._link_lost)
        self.driver = SessionDriver(
            self.host, token_log, self.metrics, config.sessions, config.keep, lambda: self.view.snapshot
        )
        self.host.owner = self.driver
        self.view = ClusterView(config.cluster, self.own.fact(), PROFILES[config.profile], sock)
        self.view.on_twin = self._told_of_twin
        self.view.on_record = self.driver.note_record
        self.view.on_suspicion = self.metrics.suspicions.labels(self.node_id).inc
        self.replicas = ReplicaManager(
            config, self.store, self.host, self.metrics, self._announce, lambda: self.own.capabilities
        )
        self.policies = PolicyBook(self.data_dir, self.node_id)
        self.control = ControlLoop(
            config, self.node_id, self.view, self.store, self.policies, consul_of(config)
        )
        self.service = AgentService(
            config.cluster,
            self.record,
            self.view.know,
            self.replicas,
            lambda: (self.policies.version, self.policies.text),
        )
        self.health = HealthServicer()
        self._discovery = discovery_of(config)
        self.links = LinkServer(identity, self.host.received, self.host.upstream_lost)
        mesh_pb2_grpc.add_PeerServicer_to_server(self.links, server)
        agent_pb2_grpc.add_AgentServicer_to_server(self.service, server)
        membership_pb2_grpc.add_MembershipServicer_to_server(self.view.driver, server)
        add_HealthServicer_to_server(self.health, server)
        self.api_port = config.api_port

    def _link_lost(self, address: Address, reason: str) -> None:
        self.host.downstream_lost(address, reason)
        self.driver.link_lost(address, reason)

    async def _until_stopped(self) -> None:
        self._discovering = [
            asyncio.create_task(self._discover(d), name=f"discovery: {d.name}") for d in self._discovery
        ]
        tasks = [
            asyncio.create_task(self.host.run(), name="stages"),
            asyncio.create_task(self.driver.run(), name="sessions"),
            asyncio.create_task(self.control.run(), name="scheduler"),
            asyncio.create_task(self._stopping.wait(), name="stop"),
            asyncio.create_task(self._refresh(), name="capabilities"),
            *self._discovering,
            *(asyncio.create_task(self._hold(s), name=f"hold {s}") for s in self.config.shards),
        ]
        try:
            while not self._stopping.is_set():
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled():
                        task.result()  # a part that fails ends the agent, loudly
                    tasks.remove(task)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _discover(self, discovery: Discovery) -> None:
        """A directory that fails in a way nobody thought of must not end the agent."""
        while True:
            try:
                await discovery.run(self.own.advert(), self.view.found, self.view.gone)
            except Exception:
                log.exception("discovery by %s failed; again in %g s", discovery.name, _DISCOVERY_RETRY_S)
            await asyncio.sleep(_DISCOVERY_RETRY_S)

    async def _hold(self, text: str) -> None:
        """A lease from the settings, for as long as the agent runs."""
        model, start, end, quantization = parse_shard(text)
        key = ShardKey(model, start, end, "onnx", quantization)
        async for _ in self.replicas.hold(key, "settings"):
            pass

    async def _drain(self) -> None:
        """Refuse what is new; give what runs its time, sessions that others own included."""
        self.driver.draining = True
        await self.health.enter_graceful_shutdown()
        self._announce()
        deadline = time.monotonic() + self.config.drain_timeout
        while (len(self.driver) or self.host.busy) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    # -- what we say of ourselves --------------------------------------------------------------

    @property
    def _api_address(self) -> Address:
        return Address(join_address(self.config.api_host, self.api_port))

    def record(self) -> Node:
        """This node as peers see it."""
        self.own.api_address = self._api_address
        terms = [t for t in (self.replicas.term, self.control.term) if t is not None]
        return self.own.record(
            self.replicas,
            self._models_here,
            self.driver.draining,
            max(terms, default=None),
            self.policies.version,
            self.driver.learner.learned,
        )

    def _announce(self) -> None:
        """Tell peers what changed, if anything did."""
        self._models_here = tuple(self.store.names())
        record = self.record()
        if record != self._told:
            self._told = record
            self.view.apply(NodeSeen(record, time.monotonic()))
            self.driver.note_record(record)
            self.service.changed()

    async def _refresh(self) -> None:
        """Tell of sessions and memory within ``_LOAD_S``, of the machine within ``_PROBE_S``, and of links
        as rarely as views are exchanged: a radio has room for few bytes."""
        machine = self.view.membership
        now = time.monotonic()
        due = {"machine": now, "links": now + _FIRST_LINKS_S, "speeds": now + _SPEED_AFTER_S}
        alone_at = now + _ALONE_S
        while True:
            now = time.monotonic()
            if now >= due["links"]:
                due["links"] = now + machine.profile.sync_interval / 6e9
                self.own.look_at_links(machine)
            if now >= due["speeds"]:
                due["speeds"], due["machine"] = float("inf"), now
                await asyncio.to_thread(self.own.measure_speeds)
            if now >= due["machine"]:
                due["machine"] = now + _PROBE_S
                if self.own.look_at_machine():
                    for discovery in self._discovery:
                        discovery.update(self.own.advert())
            if machine.members:
                alone_at = float("inf")
            elif now >= alone_at:
                alone_at = float("inf")
                log.info("waiting for peers: %s", self.list_nodes()["waiting_for"])
            self._announce()
            await asyncio.sleep(_LOAD_S)

    def _told_of_twin(self, address: Address) -> None:
        self._twin = address
        for task in self._discovering:  # takes our adverts back
            task.cancel()

    def list_models(self) -> list[dict[str, Any]]:
        """``/v1/models``: models of which a replica is known anywhere."""
        created = self.own.started_ns // 10**9
        return [
            {"id": name, "object": "model", "created": created, "owned_by": "inference-mesh"}
            for name in sorted(models_served(self.view.snapshot))
        ]

    def list_nodes(self) -> dict[str, Any]:
        """``/mesh/v1/nodes``: membership, records and links as this agent sees them."""
        self._announce()
        status = {d.name: d.status() for d in self._discovery}
        return nodes_report(
            self.config.cluster, self.view, status, self._twin, self._started_monotonic, time.monotonic_ns()
        )

    def _gauges(self) -> None:
        metrics = self.metrics
        for replica in self.replicas.status():
            labels = metrics.labels(replica.shard)
            metrics.sessions.labels(*labels).set(replica.sessions)
            metrics.kv_reserved.labels(*labels).set(replica.kv_reserved_bytes)
            metrics.kv_budget.labels(*labels).set(replica.kv_budget_bytes)
        if self.host.hops is not None:
            metrics.hop_log.labels(self.node_id).set(self.host.hops.bytes)
            metrics.hop_log_written.labels(self.node_id).set(self.host.hops.written)
        states = [m.fact.state for m in self.view.membership.members.values()]
        for state in MemberState:
            metrics.members.labels(self.node_id, state.name.lower()).set(states.count(state))
        driver = self.view.driver
        for direction, total in (("sent", driver.bytes_sent), ("received", driver.bytes_received)):
            metrics.membership_bytes.labels(self.node_id, direction).set(total)
        for address, count in self.pool.bytes_sent().items():
            metrics.wire_bytes.labels(self.node_id, address, "frames").set(count)
        for peer, count in self.links.bytes_sent().items():
            metrics.wire_bytes.labels(self.node_id, peer, "replies").set(count)

    # -- requests ------------------------------------------------------------------------------

    async def start_generation(self, generation: Generation, class_name: str = "") -> Job:
        """Route, tokenize and open a request's sessions; raises ``MeshError`` with what to say.
        ``class_name``: the class of requests whose rules hold, if any."""
        name = generation.model
        shape = models_served(self.view.snapshot).get(name)
        if shape is None:
            everywhere = {m for n in self.view.snapshot.alive() for m in n.models}
            if name in everywhere:
                raise NoRoute(
                    f"no node serves {name} yet; hold its shards ('mesh up', or 'shards' in an agent's settings)",
                    retry_after_s=2,
                )
            known = ", ".join(sorted(models_served(self.view.snapshot))) or "none"
            raise RequestError(
                f"the model {name!r} does not exist here (served: {known})",
                param="model",
                code="model_not_found",
                status=404,
            )
        rules = self._rules(name, class_name)
        route = self.plan(name, rules=rules).route
        text = await self._text_model(name, shape.ref.digest)
        context = self._context(route, shape.context_max)
        prompts = await self._prompts(text, generation, context)
        orders = self._orders(generation, prompts, context, text, shape.vocabulary)
        envelope = new_envelope(orders[0].session, name, generation.chat)
        choices = [new_choice(i, text, generation.stop) for i in range(len(orders))]
        handles: list[SessionHandle] = []
        cached = 0
        try:
            for i, order in enumerate(orders):
                if generation.echo:
                    choices[i].text.append(
                        b"".join(map(text.bytes_of, order.prompt)).decode("utf-8", "replace")
                    )
                kept = self._kept(generation, shape.ref.digest, order)
                plan = self.plan(name, order, rules, draw=secrets.randbits(62) + 1, kept=kept)
                if kept is not None and plan.resumed:
                    order = replace(order, resume=(kept[0].session, plan.resumed))
                    self.driver.prefixes.take(kept[0].session)
                    cached += plan.resumed
                replan = partial(self._replan, name, rules)
                handles.append(self.driver.start(order, plan, str(shape.ref), replan))
        except MeshError:
            for handle in handles:
                handle.stop()
            raise
        return Job(generation, envelope, choices, handles, sum(map(len, prompts)), cached)

    def _kept(
        self, generation: Generation, model: Digest, order: SessionOrder
    ) -> tuple[KeptSession, int] | None:
        """A finished session that this one may go on from, and for how many positions."""
        told = self.config.prefix_cache
        fixed = generation.seeded or order.sampling.temperature == 0
        if told == "off" or (told == "auto" and fixed):
            return None
        return self.driver.prefixes.longest(model, order.prompt)

    def _rules(self, model: str, class_name: str) -> tuple[ClassPolicy, ...]:
        """What the policy says of a model and of a class of requests; raises ``RequestError``."""
        policy = self.policies.policy
        rules: list[ClassPolicy] = []
        if model in policy.models:
            rules.append(policy.models[model])
        if class_name:
            if class_name not in policy.classes:
                known = ", ".join(sorted(policy.classes)) or "none"
                raise RequestError(
                    f"X-Mesh-Class is {class_name!r}; the policy has these classes: {known}",
                    param="X-Mesh-Class",
                )
            rules.append(policy.classes[class_name])
        return tuple(rules)

    def _replan(
        self,
        model: str,
        rules: tuple[ClassPolicy, ...],
        session: Session,
        before: RoutePlan,
        avoid: frozenset[NodeId],
    ) -> RoutePlan:
        """Another route for a session that runs: of the same model, runtime and quantization (rule R7), and
        where it pays with the stages that hold its KV cache."""
        return self.plan(
            model,
            session.order,
            rules,
            draw=secrets.randbits(62) + 1,
            avoid=avoid,
            pin=before.group,
            runs=session,
        )

    def plan(
        self,
        model: str,
        order: SessionOrder | None = None,
        rules: tuple[ClassPolicy, ...] = (),
        draw: int = 0,
        percentile: str = "p50",
        avoid: frozenset[NodeId] = frozenset(),
        pin: Group | None = None,
        kept: tuple[KeptSession, int] | None = None,
        runs: Session | None = None,
    ) -> RoutePlan:
        """The route of a request on our latest snapshot, or of a session that ``runs`` from here on; raises
        ``NoRoute``."""
        done = len(runs.generated) if runs else 0
        percentile = max(percentile, *(r.percentile for r in rules)) if rules else percentile
        request = RouteRequest(
            model,
            self.node_id,
            percentile=Percentile[percentile.upper()],
            rules=rules,
            avoid=avoid,
            pin=pin,
            kept=Kept(kept[0].route, kept[1]) if kept else None,
            learned=self.driver.learner.learned,
            tokens=min(order.tokens_max, _TOKENS_SOON if done else _TOKENS_EXPECTED) if order else 1,
            prompt=len(order.prompt) + done if order else 0,
            steps=done if order and order.exact else 0,
            holding=frozenset((s.node, s.shard) for s in runs.route.stages) if done and runs else frozenset(),
            chunk=self.config.chunk,
            own=self.driver.own_sessions(),
            ours_told=self.driver.ours_told,
            positions=len(order.prompt) + order.tokens_max if order else 0,
            draw=draw,
            alternatives=_ALTERNATIVES,
        )
        return self._router.plan(self.view.snapshot, request)

    def explain(self, model: str, percentile: str, class_name: str = "") -> dict[str, Any]:
        """``/mesh/v1/route``: the route that a request would take now, with every term of its cost."""
        if model not in models_served(self.view.snapshot):
            known = ", ".join(sorted(models_served(self.view.snapshot))) or "none"
            raise RequestError(
                f"the model {model!r} does not exist here (served: {known})",
                param="model",
                code="model_not_found",
                status=404,
            )
        if percentile not in ("p50", "p99"):
            raise RequestError(f"percentile is {percentile!r}; use p50 or p99", param="percentile")
        names = {n.id: n.name for n in self.view.snapshot.nodes.values()}
        rules = self._rules(model, class_name)
        return route_report(self.plan(model, rules=rules, percentile=percentile), names)

    def _context(self, route: LayeredRoute, model_context: int) -> int:
        """Positions that every stage of the route has room for."""
        wanted = {(s.node, s.shard) for s in route.stages}
        rooms = [
            r.context_max
            for n in self.view.snapshot.alive()
            for r in n.replicas
            if (n.id, r.shard.digest) in wanted and r.context_max
        ]
        return min([model_context, *rooms])

    async def _prompts(self, text: TextModel, generation: Generation, context: int) -> list[tuple[int, ...]]:
        """Token ids of a request's prompts; a text that cannot fit is not even tokenized."""
        where = "messages" if generation.chat else "prompt"
        given = generation.prompts
        if generation.chat:
            given = (text.render(generation.messages),)
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                _check_length("at least ", len(prompt) // text.card.token_letters_max, context, where)
                prompt = tuple(
                    text.encode(prompt)
                    if len(prompt) < _LONG_TEXT
                    else await asyncio.to_thread(text.encode, prompt)
                )
            _check_length("", len(prompt), context, where)
            if not prompt:
                raise RequestError("the prompt is empty", param=where)
            prompts.append(prompt)
        return prompts

    def _orders(
        self,
        generation: Generation,
        prompts: list[tuple[int, ...]],
        context: int,
        text: TextModel,
        vocabulary: int,
    ) -> list[SessionOrder]:
        config, orders = self.config, []
        deadline = time.monotonic_ns() + int(config.request_timeout * 1e9)
        seed = generation.sampling.seed if generation.seeded else secrets.randbits(64)
        if any(token >= vocabulary for token, _ in generation.sampling.logit_bias):
            raise RequestError(
                f"logit_bias names a token beyond the vocabulary of {vocabulary}", param="logit_bias"
            )
        fixed = generation.seeded or generation.sampling.temperature == 0
        for prompt in prompts:
            where = "messages" if generation.chat else "prompt"
            if not all(0 <= token < vocabulary for token in prompt):
                raise RequestError(f"the prompt has token ids outside 0 to {vocabulary - 1}", param=where)
            room = context - len(prompt)
            for choice in range(generation.choices):
                orders.append(
                    SessionOrder(
                        session=SessionId(secrets.token_hex(16)),
                        prompt=prompt,
                        sampling=replace(generation.sampling, seed=seed, choice=choice),
                        tokens_max=min(generation.tokens_max or room, room),
                        stop_tokens=frozenset(text.card.stop_tokens),
                        positions_max=context,
                        deadline_ns=deadline,
                        chunk=config.chunk,
                        window=config.window,
                        step_timeout_ns=int(config.step_timeout * 1e9),
                        recovery_timeout_ns=int(config.recovery_timeout * 1e9),
                        keep=config.prefix_cache != "off",
                        exact=config.replay == "exact" or (config.replay == "auto" and fixed),
                    )
                )
        return orders

    async def _text_model(self, name: str, digest: str) -> TextModel:
        known = self._texts.get(name)
        if known is None or known.card.digest != digest:
            try:
                known = await asyncio.to_thread(self._load_text, name)
            except (InputError, OSError) as error:
                raise NoRoute(f"this agent cannot read the tokenizer of {name}: {error}") from error
            self._texts[name] = known
        if known.card.digest != digest:
            raise NoRoute(
                f"this agent has {name}@{known.card.digest[:12]}, the replicas serve {name}@{digest[:12]}; pull the same file"
            )
        return known

    def _load_text(self, name: str) -> TextModel:
        return TextModel(self.store.card(name), self.store.tokenizer_json(name))


def _check_length(about: str, count: int, context: int, where: str) -> None:
    if count >= context:
        raise RequestError(
            f"the prompt has {about}{count} tokens; the context is {context} tokens, answer included",
            param=where,
            code="context_length_exceeded",
        )


async def _run(config: AgentConfig, ready_fd: int | None, tied: bool) -> None:
    agent = Agent(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, agent.stop)
    if tied:
        # Whoever started us holds the other end: when they are gone, so are we.
        loop.add_reader(sys.stdin.fileno(), lambda: _parent_spoke(agent))

    def ready(where: Ready) -> None:
        if ready_fd is not None:
            line = json.dumps({f: getattr(where, f) for f in Ready.__slots__}) + "\n"
            os.write(ready_fd, line.encode())
            os.close(ready_fd)

    await agent.run(ready)


def _parent_spoke(agent: Agent) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        agent.stop()


def run_agent(config: AgentConfig, ready_fd: int | None = None, tied: bool = False) -> int:
    """Run one agent until a signal (or, when ``tied``, the end of standard input)."""
    # The compute thread needs the interpreter for microseconds a step, and needs it now: with
    # the default of 5 ms it would wait for whatever the event loop happens to be doing.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        asyncio.run(_run(config, ready_fd, tied))
    except MeshError as error:
        print(f"mesh agent: {error}", file=sys.stderr)
        return 2
    return 0
