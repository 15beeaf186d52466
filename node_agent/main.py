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
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from mesh.adapters.grpc_links import QUIET_CHANNEL_OPTIONS, SERVER_OPTIONS, Identity, LinkPool, LinkServer
from mesh.adapters.logs import set_up_logs
from mesh.adapters.membership_driver import MembershipDriver, open_socket
from mesh.discovery import Discovery
from mesh.errors import ConfigError, MeshError, RequestError, Unavailable
from mesh.forms import AUTO, form_of
from mesh.gossip import MemberState
from mesh.membership import Membership
from mesh.profiles import PROFILES
from mesh.types import Address, SessionId
from node_agent.adapters.agent_rpc import AgentService
from node_agent.adapters.cold_loads import ColdLoads
from node_agent.adapters.control_loop import ControlLoop
from node_agent.adapters.discovery_setup import discovery_of, leader_lock
from node_agent.adapters.form_times import chosen_form, probed_speeds
from node_agent.adapters.frame_store import RocksFrames
from node_agent.adapters.generator import Generator
from node_agent.adapters.http_api import HttpApi
from node_agent.adapters.huge_pages import HugePages
from node_agent.adapters.identity import node_identity
from node_agent.adapters.lease_streams import LeaseStreams
from node_agent.adapters.memory_store import MemoryTokenLog
from node_agent.adapters.metrics import AgentMetrics
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.own_record import OwnRecord
from node_agent.adapters.peers import ClusterView
from node_agent.adapters.planner import RoutePlanner
from node_agent.adapters.policy_book import PolicyBook, PolicyOnDisk
from node_agent.adapters.record_streams import RecordStreams
from node_agent.adapters.replicas import ReplicaManager
from node_agent.adapters.rocksdb_store import RocksTokenLog
from node_agent.adapters.session_driver import SessionDriver
from node_agent.adapters.shard_loader import ShardLoader
from node_agent.adapters.stage_host import StageHost
from node_agent.adapters.takeover import AskByRpc, Takeovers
from node_agent.config import AgentConfig, join_address, parse_shard
from node_agent.hop_log import HopLog
from node_agent.hysteresis import below_floor
from node_agent.nodes_report import nodes_report
from node_agent.paths import default_home
from node_agent.ports import Orchestrator, TokenLog
from protos.gen import agent_pb2, agent_pb2_grpc, membership_pb2_grpc, mesh_pb2_grpc
from scheduler.cluster import Node, NodeSeen
from scheduler.demand import ModelDemand
from scheduler.routing import models_served

log = logging.getLogger(__name__)

SERVICE = "inference_mesh"
"""Name of this agent in the standard gRPC health service."""
SERVING = HealthCheckResponse.SERVING
_LOAD_S = 0.5
_PROBE_S = 2.0
_PORT_TRIES = 8
_DISCOVERY_RETRY_S = 10.0
_ALONE_S = 3.0
_SPEED_AFTER_S = 4.0
"""Shards are loaded by then, and the first answer is not held up by our measuring."""
_FIRST_LINKS_S = 3.0
_MEMORY_AFTER_S, _MEMORY_S = 5.0, 15.0
"""What is new is moved to huge pages (``huge_pages``); at the start there is the most of it, and the first answer goes before."""
_GRACE_S = 0.5
_RPC_S = 5.0
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
        self._models_here: tuple[str, ...] = ()
        self._started_monotonic = time.monotonic_ns()
        self._told: Node | None = None
        self._twin: Address | None = None
        self._drained = self._battery_low = False
        self._discovery: list[Discovery] = []
        self._discovering: list[asyncio.Task[None]] = []

    async def run(self, ready: Callable[[Ready], None]) -> None:
        """Start, call ``ready`` once everything listens, serve until stopped."""
        config = self.config
        try:
            self.identity = node_identity(self.data_dir)
        except OSError as error:
            raise ConfigError(
                f"the data directory {self.data_dir} cannot be written ({error.strerror}); give a folder of "
                "this agent's own with --data-dir"
            ) from error
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
            self.generator,
            self.planner,
            self.drain_node,
            self.list_models,
            self.list_nodes,
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
            await self._until_drained()
            await self.view.leave()
        finally:
            self.driver.stop_all("the agent stopped")
            await self.cold.close()
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
            token_log,
            lambda address: self.pool.drop(address),
            dial=lambda address: self.pool.dial(address),
        )
        self.pool = LinkPool(identity, self.host.replied, self._link_lost)
        self.driver = SessionDriver(
            self.host, token_log, self.metrics, config.sessions, config.keep, lambda: self.view.snapshot
        )
        self.host.owner = self.driver
        profile = PROFILES[config.profile]
        machine = Membership(self.own.fact(), profile, random.Random(), time.monotonic_ns())
        self.membership = MembershipDriver(config.cluster, machine, sock)
        self.view = ClusterView(self.membership, RecordStreams(config.cluster, profile))
        self.view.on_twin = self._told_of_twin
        self.view.on_record = self.driver.note_record
        self.view.on_return = self.pool.dial_again
        self.view.on_suspicion = self.metrics.suspicions.labels(self.node_id).inc
        source = ShardLoader(config, self.store, lambda: self.own.capabilities, self.data_dir)
        self.replicas = ReplicaManager(
            config, source, self.host, self.metrics, self._announce, lambda: self.own.capabilities
        )
        self.policies = PolicyBook(PolicyOnDisk(self.data_dir), self.node_id)
        self.takeovers = Takeovers(
            self.node_id, token_log, lambda: self.view.snapshot, self.host.fence, AskByRpc(config.cluster)
        )
        peers = LeaseStreams(config.cluster, self.node_id)
        self.cold = ColdLoads(
            lambda: self.view.snapshot,
            peers,
            lambda node, shard: self.driver.own_sessions()[node, shard],
            self.policies,
            config.context,
        )
        self.planner = RoutePlanner(
            config,
            self.node_id,
            lambda: self.view.snapshot,
            self.driver,
            lambda: self.policies.policy,
            lambda: secrets.randbits(62) + 1,
            self.cold,
        )
        self.generator = Generator(
            config, self.node_id, self.store, self.view, self.driver, self.planner, self.takeovers
        )
        self.control = ControlLoop(
            config,
            self.node_id,
            self.view,
            self._demand,
            self.policies,
            peers,
            leader_lock(config, self.node_id),
            orchestrator=_orchestrator(config),
        )
        self.service = AgentService(
            config.cluster,
            self.view.know,
            self.replicas,
            lambda: (self.policies.version, self.policies.text),
            self.takeovers,
            self.drain,
        )
        self.health = HealthServicer()
        self._discovery = discovery_of(config)
        self.links = LinkServer(identity, self.host.received, self.host.upstream_lost)
        mesh_pb2_grpc.add_PeerServicer_to_server(self.links, server)
        agent_pb2_grpc.add_AgentServicer_to_server(self.service, server)
        membership_pb2_grpc.add_MembershipServicer_to_server(self.membership, server)
        add_HealthServicer_to_server(self.health, server)
        self.api_port = config.api_port

    def _demand(self, model: str, runtime: str, quantization: str) -> ModelDemand:
        from node_agent.adapters.shard_maker import demand_of

        return demand_of(self.store, model, quantization, runtime, self.config.context)

    def _link_lost(self, address: Address, reason: str) -> None:
        self.host.downstream_lost(address, reason)
        self.driver.link_lost(address, reason)

    async def _until_drained(self) -> None:
        """Our parts work until the last session is handed over: whoever drains still answers, beats and holds."""
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
            for task in self._discovering:  # takes our adverts back
                task.cancel()
            await self._drain()
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
        key = parse_shard(text)
        if key.runtime == AUTO:
            runtime, quantization = await asyncio.to_thread(self._fastest_form, key.model)
            key = replace(key, runtime=runtime, quantization=quantization)
            self.replicas.expect(await asyncio.to_thread(probed_speeds, self.store))
        async for _ in self.replicas.hold(key, "settings"):
            pass

    def _fastest_form(self, model: str) -> tuple[str, str]:
        """Measured the first time; the default where that cannot be."""
        try:
            return chosen_form(self.store, model, "", "")
        except (MeshError, OSError) as error:
            log.warning("which runtime is fastest for %s was not measured: %s", model, error)
            return form_of("")

    def drain(self, on: bool) -> tuple[int, int]:
        """Hand the sessions at our replicas over and take no new ones, or serve again; how many stages of
        sessions are still here, and how many sessions we own."""
        if on != self._drained:
            self._drained = on
            log.warning("this node is drained" if on else "this node serves again")
            self._announce()
        return self.host.stages, len(self.driver)

    async def drain_node(self, wanted: str, on: bool) -> dict[str, Any]:
        """Drain a node of the mesh, which may be this one, by id or name."""
        nodes = [n for n in self.view.snapshot.alive() if wanted in (n.id, n.name)]
        if len(nodes) != 1:
            known = ", ".join(sorted(n.name for n in self.view.snapshot.alive()))
            what = "no node that is alive" if not nodes else f"the name of {len(nodes)} nodes, use an id"
            raise RequestError(f"{wanted!r} is {what} (alive: {known})", param="node", status=404)
        request = agent_pb2.DrainRequest(cluster=self.config.cluster, undo=not on)
        try:
            async with grpc.aio.insecure_channel(nodes[0].address, QUIET_CHANNEL_OPTIONS) as channel:
                reply = await agent_pb2_grpc.AgentStub(channel).Drain(request, timeout=_RPC_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"{wanted} does not answer: {error.details()}", retry_after_s=1) from error
        told = {"node": nodes[0].id, "drained": on, "stages": reply.stages, "sessions": reply.sessions}
        return told

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
            self.driver.draining or self._drained or self._battery_low,
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
            self.service.tell(record)

    async def _refresh(self) -> None:
        """Tell of sessions and memory within ``_LOAD_S``, of the machine within ``_PROBE_S``, and of links
        as rarely as views are exchanged: a radio has room for few bytes. Our memory is looked after beside that."""
        self.replicas.expect(await asyncio.to_thread(probed_speeds, self.store))
        machine, memory = self.view.membership, HugePages()
        now = time.monotonic()
        due = {"machine": now, "links": now + _FIRST_LINKS_S, "speeds": now + _SPEED_AFTER_S}
        due["memory"] = now + _MEMORY_AFTER_S
        alone_at = now + _ALONE_S
        while True:
            now = time.monotonic()
            if now >= due["links"]:
                due["links"] = now + machine.profile.sync_interval / 6e9
                self.own.look_at_links(machine)
            if now >= due["speeds"]:
                due["speeds"], due["machine"] = float("inf"), now
                await asyncio.to_thread(self.own.measure_speeds)
            if now >= due["memory"]:
                due["memory"] = now + _MEMORY_S
                await asyncio.to_thread(memory.look)
            if memory.waiting:
                await asyncio.to_thread(memory.move)
            if now >= due["machine"]:
                due["machine"] = now + _PROBE_S
                if self.own.look_at_machine():
                    for discovery in self._discovery:
                        discovery.update(self.own.advert())
                self._spare_battery()
            if machine.members:
                alone_at = float("inf")
            elif now >= alone_at:
                alone_at = float("inf")
                log.info("waiting for peers: %s", self.list_nodes()["waiting_for"])
            self._announce()
            await asyncio.sleep(_LOAD_S)

    def _spare_battery(self) -> None:
        battery, floor = self.own.capabilities.battery, self.config.battery_floor
        low = below_floor(self._battery_low, battery, floor)
        if low != self._battery_low:
            self._battery_low = low
            charge = f"{battery.percent} %" if battery else "gone"
            log.warning(
                "the battery is at %s, the floor is %d %%: %s",
                charge,
                floor,
                "this node is drained" if low else "this node serves again",
            )

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
        driver = self.membership
        for direction, total in (("sent", driver.bytes_sent), ("received", driver.bytes_received)):
            metrics.membership_bytes.labels(self.node_id, direction).set(total)
        for address, count in self.pool.bytes_sent().items():
            metrics.wire_bytes.labels(self.node_id, address, "frames").set(count)
        for peer, count in self.links.bytes_sent().items():
            metrics.wire_bytes.labels(self.node_id, peer, "replies").set(count)


def _orchestrator(config: AgentConfig) -> Orchestrator | None:
    address = config.nomad or os.environ.get("NOMAD_ADDR", "")
    if not address:
        return None
    # Here, so that an agent without Nomad does not carry its client.
    from node_agent.adapters.nomad_api import nomad_access
    from node_agent.adapters.nomad_follow import NomadFollower

    return NomadFollower(nomad_access(os.environ, address))


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
