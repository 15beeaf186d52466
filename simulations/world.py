"""A whole mesh in virtual time: nodes that come and go, clients that ask, and what became of every request.

Checks are always on: every token a client sees must be the one that an undisturbed run gives, at its position, once, in
order. What else must hold is in ``checks``; and once faults have stopped, everything that can be served is served.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePath
from random import Random
from zlib import crc32

from mesh.errors import MeshError, PeerError, RequestError, Unavailable
from mesh.types import Address, ModelShape, SessionId
from node_agent.adapters.session_driver import SessionHandle
from scheduler.route import Group
from simulations import consul, nomad
from simulations.checks import TermChecks, check_end, check_node
from simulations.compute import expected
from simulations.network import Network, Path
from simulations.node import NodeSpec, SimNode
from simulations.quiet import Quiet
from simulations.virtual_time import Machine, Power, VirtualLoop, this_machine

S = 1_000_000_000
_SEEDS_TOLD = 3
_RETRY_S, _NOTICE_S, _READ_TIMEOUT_S = 0.5, 0.1, 10.0
_SETTLE_S = 3.0
_HANDED_OVER_NS = 30 * S
"""An agent that is told to end waits for its sessions no longer."""
_NEVER = frozenset({"bad_frame", "runtime"})
"""Causes of a loss that only a bug can bring about."""


@dataclass(slots=True)
class Request:
    """What a client asked for and what it saw; instants in virtual nanoseconds."""

    number: int
    ingress: str
    prompt: tuple[int, ...]
    tokens: int
    asked_ns: int
    seen: list[tuple[int, int]] = field(default_factory=list)
    """Token and when it came."""
    rungs: list[tuple[str, int]] = field(default_factory=list)
    """Of its recoveries, and how long each stalled it, microseconds."""
    causes: list[str] = field(default_factory=list)
    """Of the same recoveries."""
    openings: int = 0
    """How often a stage refused it before its first token, and another took it."""
    asked: int = 0
    """Each time it is asked, nothing having been seen, it is another session."""
    resumed: int = 0
    finished: bool = False
    changed: int = 0
    """Tokens that are not what an undisturbed run gives."""
    cached_tokens: int = 0
    """Of the prompt, those that came from another session."""
    error: str = ""
    group: Group | None = None

    @property
    def session(self) -> SessionId:
        return SessionId(f"{self.number:024x}{self.asked:08x}")


@dataclass(frozen=True, slots=True)
class Sample:
    """The mesh at one moment."""

    at_ns: int
    nodes: int
    running: int
    """Sessions, over all ingresses."""
    charge: float
    """Percent, mean of all batteries; 100 without."""
    bytes: int
    replicas: int
    """That serve."""
    energy_wh: float
    """Drawn from batteries so far."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never happen."""

    at_ns: int
    what: str


class World:
    """Everything of one run."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        shape: ModelShape,
        path: Callable[[Address, Address], Path],
        patience_s: float,
        still: bool = False,
    ) -> None:
        """``still``: membership may pause where nothing could come of it."""
        self.loop, self.seed, self.shape = loop, seed, shape
        loop.failed = self._task_failed
        self.network = Network(loop, self.random("network"), path)
        self.network.broken = self.violated
        self.patience_s = patience_s
        self.consul, self.nomad = consul.SimConsul(self.network), nomad.SimNomad(self.network)
        self.terms, self.quiet = TermChecks(self), Quiet(self, still)
        self.specs: dict[str, NodeSpec] = {}
        self.nodes: dict[str, SimNode] = {}
        """Those that run now."""
        self.regions: defaultdict[str, dict[str, SimNode]] = defaultdict(dict)
        """The same by region."""
        self.requests: list[Request] = []
        self.violations: list[Violation] = []
        self.events: list[tuple[int, str]] = []
        """The story: what was done to nodes, what sessions went through."""
        self.samples: list[Sample] = []
        self.calm_ns = -1
        """From here on everything can be served; -1: not yet."""
        self.energy_wh = 0.0
        """Drawn from batteries."""
        self.faults: Counter[str] = Counter()
        self.lives: Counter[str] = Counter()
        self._clients: set[asyncio.Task[None]] = set()

    def random(self, what: str) -> Random:
        """A stream of its own for each purpose, so that a change of one leaves the others as they were."""
        return Random(crc32(what.encode()) ^ (self.seed * 0x9E3779B1))

    def tell(self, what: str) -> None:
        """Add to the story."""
        self.events.append((self.loop.now_ns, what))

    def _task_failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, MeshError):
            machine = this_machine()
            who = machine.name if machine else "the simulation"
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{PurePath(last.filename).name}:{last.lineno}"
            self.violated(f"{who}: {name} failed at {at}: {type(error).__name__}: {error}")

    def violated(self, what: str) -> None:
        self.violations.append(Violation(self.loop.now_ns, what))
        self.tell(f"VIOLATION {what}")

    # -- nodes ---------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Boot a node, or boot it again with the disk it had."""
        spec = self.specs[name]
        self.lives[name] += 1
        life = f"{name} {self.lives[name]}"
        rngs = self.random(f"{life} membership"), self.random(life)
        others = self._seeds(spec)
        node = SimNode(self.loop, self.network, spec, rngs, others, self.terms, self.quiet)
        self.nodes[name] = self.regions[spec.config.region][name] = node
        self.quiet.started(node)
        self.tell(f"{name} starts")

    def _seeds(self, spec: NodeSpec) -> list[Address]:
        """Whom a node is told of: a few of its region. Regions that nobody joins stay meshes of their own."""
        near = self.regions[spec.config.region].values()
        return [node.address for node in islice(near, _SEEDS_TOLD)]

    def crash(self, name: str, silently: bool = False, wipe: bool = False) -> None:
        """End a node's life; ``wipe``: its disk is lost as well."""
        node = self.nodes.pop(name, None)
        if node is None:
            return
        del self.regions[node.config.region][name]
        check_node(self, node)
        node.disturbed()
        node.crash(silently)
        self.quiet.ended(node)
        if wipe:
            spec = self.specs[name]
            spec.tokens, spec.policy = type(spec.tokens)(), type(spec.policy)()
        self.faults["power loss" if silently else "crash"] += 1
        self.tell(f"{name} {'loses power' if silently else 'crashes'}{', its disk is lost' if wipe else ''}")

    def freeze(self, name: str, seconds: float) -> None:
        """Stop a node, as SIGSTOP does, and let it go on later."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.disturbed()
        node.machine.freeze()
        self.faults["freeze"] += 1
        self.tell(f"{name} freezes for {seconds:g} s")
        self.loop.call_later(seconds, self._thaw, node)

    def _thaw(self, node: SimNode) -> None:
        node.machine.thaw()
        self.tell(f"{node.spec.name} goes on")

    def part(self, names: list[str], seconds: float, one_way: bool = False) -> None:
        """Cut some nodes off from the others; ``one_way``: what they send still arrives."""
        inside = {self.specs[n].address for n in names}
        outside = {consul.SERVER, nomad.SERVER, *(s.address for s in self.specs.values())} - inside
        pairs = {(a, b) for a in sorted(outside) for b in sorted(inside)}
        if not one_way:
            pairs |= {(b, a) for a, b in pairs}
        self.quiet.disturb()
        self.network.cut(pairs)
        self.faults["partition"] += 1
        self.tell(f"{', '.join(names)} cut off for {seconds:g} s{' (inbound)' if one_way else ''}")
        self.loop.call_later(seconds, self._heal, names, pairs)

    def _heal(self, names: list[str], pairs: set[tuple[Address, Address]]) -> None:
        self.network.heal(pairs)
        self.tell(f"{', '.join(names)} reachable again")

    def reset(self, name: str, seconds: float) -> None:
        """Break the streams that lead to a node, and after a while those that were dialled meanwhile."""
        self.quiet.disturb()
        self.faults["streams reset"] += 1
        self.tell(f"streams to {name} are reset")
        self.network.reset(self.specs[name].address)
        self.loop.call_later(seconds, self.network.reset, self.specs[name].address)

    def slow(self, name: str, factor: float, seconds: float) -> None:
        """Make a node's runs take longer for a while."""
        spec = self.specs[name]
        spec.slowness *= factor
        self.faults["slow"] += 1
        self.tell(f"{name} is slower by {factor:g} for {seconds:g} s")
        self.loop.call_later(seconds, self._at_speed, spec, factor)

    def _at_speed(self, spec: NodeSpec, factor: float) -> None:
        spec.slowness /= factor

    def slow_disk(self, name: str, write_s: float, seconds: float) -> None:
        """Make each write of a node take so long for a while."""
        spec = self.specs[name]
        self.quiet.disturb(spec.config.region)
        spec.disk_s += write_s
        self.faults["slow disk"] += 1
        self.tell(f"{name} takes {write_s * 1000:g} ms a write for {seconds:g} s")
        self.loop.call_later(seconds, self._disk_again, spec, write_s)

    def _disk_again(self, spec: NodeSpec, write_s: float) -> None:
        spec.disk_s = max(0.0, spec.disk_s - write_s)

    def corrupt(self, name: str, seconds: float) -> None:
        """Make a node's activations come out wrong for a while."""
        spec = self.specs[name]
        spec.corrupt += 1
        self.faults["corrupt frames"] += 1
        self.tell(f"{name} sends NaN for {seconds:g} s")
        self.loop.call_later(seconds, self._right_again, spec)

    def _right_again(self, spec: NodeSpec) -> None:
        spec.corrupt -= 1

    def set_clock(self, name: str, by_s: float) -> None:
        """Set a node's wall clock, until it restarts."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.clock.wall_s += by_s
        self.faults["clock set"] += 1
        self.tell(f"the clock of {name} jumps by {by_s:g} s")

    def lose_consul(self, seconds: float) -> None:
        """Consul answers nobody for a while."""
        self.consul.lose(seconds)
        self.faults["consul away"] += 1
        self.tell(f"Consul is away for {seconds:g} s")

    def lose_nomad(self, seconds: float) -> None:
        """Nomad answers nobody for a while."""
        self.nomad.lose(seconds)
        self.faults["nomad away"] += 1
        self.tell(f"Nomad is away for {seconds:g} s")

    def drain(self, name: str) -> None:
        """An operator has Nomad drain a client."""
        self.nomad.drain(name, True)
        self.faults["drain"] += 1
        self.tell(f"Nomad drains {name}")

    async def reboot(self, name: str, down_s: float) -> None:
        """End a drained client's agent as SIGTERM does, and have both back after a while."""
        node = self.nodes.get(name)
        if node is not None:
            node.draining = True
            until_ns = self.loop.now_ns + _HANDED_OVER_NS
            while node.replicas_busy() and self.loop.now_ns < until_ns:
                await asyncio.sleep(_NOTICE_S)
            if self.nodes.get(name) is node:
                self.crash(name)
            await asyncio.sleep(down_s)
        if name not in self.nodes:
            self.start(name)
        self.nomad.drain(name, False)

    # -- clients -------------------------------------------------------------------------------

    def ask(self, ingress: str, prompt: tuple[int, ...], tokens: int) -> Request:
        """A client on a node asks; what it sees is written into the request."""
        request = Request(len(self.requests) + 1, ingress, prompt, tokens, self.loop.now_ns)
        self.requests.append(request)
        task = self.loop.create_task(self._client(request))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        return request

    async def _client(self, request: Request) -> None:
        """As an application does: ask the agent on this device; if it is gone, read on at another one."""
        deadline = self.loop.now_ns + int(self.patience_s * S)
        choose = self.random(f"client {request.number}")
        while not request.finished and not request.error:
            node = self.nodes.get(request.ingress)
            if node is None or node.machine.power.value != "on":
                up = sorted(n for n, s in self.nodes.items() if s.machine.power.value == "on")
                node = self.nodes[choose.choice(up)] if up else None
            before = len(request.seen)
            retry_s = _RETRY_S if node is None else await self._read(node, request)
            if len(request.seen) > before:
                deadline = self.loop.now_ns + int(self.patience_s * S)
            if not request.finished and not request.error:
                if self.loop.now_ns > deadline:
                    request.error = f"nothing came for {self.patience_s:g} s"
                    break
                await asyncio.sleep(retry_s)
        self._judge(request)

    async def _read(self, node: SimNode, request: Request) -> float:
        """Read a stream until it ends or breaks off; seconds to wait before the next try."""
        ended: asyncio.Future[float] = self.loop.create_future()
        progress = asyncio.Event()
        handles: list[SessionHandle] = []

        async def stream() -> None:
            try:
                handle = await self._open(node, request)
                handles.append(handle)
                skip = len(request.seen) if request.resumed else 0
                async for token in handle.tokens():
                    if ended.done():
                        return  # the client has hung up
                    if skip:
                        skip -= 1
                        if token.token != request.seen[-1 - skip][0]:
                            self.violated(f"request {request.number}: position {token.position} changed")
                        continue
                    request.seen.append((token.token, self.loop.now_ns))
                    progress.set()
                if ended.done():
                    return
                lost = [r for r in handle.trace.recoveries if not r.opening]
                request.rungs += [(r.rung, r.stalled_us) for r in lost]
                request.causes += [r.cause.split(":")[0] for r in lost]
                request.openings += len(handle.trace.recoveries) - len(lost)
                for cause in self._never.intersection(request.causes):
                    self.violated(f"request {request.number}: {cause}, among agents that keep the contract")
                request.finished = True
                outcome = 0.0
            except RequestError as error:
                # As 'mesh ask' does: whoever does not know it may not have heard of the loss yet. A client that has
                # seen nothing asks anew.
                if error.code != "not_found":
                    request.error = str(error)
                elif not request.seen:
                    request.resumed = 0
                outcome = _RETRY_S
            except Unavailable as error:
                outcome = max(_NOTICE_S, min(error.retry_after_s or _RETRY_S, 2.0))
            except MeshError as error:
                request.error, outcome = str(error), 0.0
                if isinstance(error, PeerError):
                    self.violated(f"request {request.number}: {error}")
            if not ended.done():
                ended.set_result(outcome)

        def hang_up() -> None:
            for handle in handles:
                handle.stop()

        node.machine.run(self.loop.create_task, stream())
        while not ended.done():
            progress.clear()
            waiter = self.loop.create_task(progress.wait())
            done = await self._first(ended, waiter, _READ_TIMEOUT_S, node.machine)
            waiter.cancel()
            if not done:
                ended.set_result(_NOTICE_S)
                node.machine.run(self.loop.call_soon, hang_up)  # the API does so when the connection is gone
                request.resumed += 1
        if ended.result() and (request.seen or request.resumed):
            request.resumed += 1
        return float(ended.result())

    async def _first(
        self, ended: asyncio.Future[float], news: asyncio.Task[bool], timeout_s: float, machine: Machine
    ) -> bool:
        """Wait for either; false when nothing came for too long, or the connection was reset."""
        until = self.loop.now_ns + int(timeout_s * S)
        while not ended.done() and not news.done():
            if machine.power.value == "off" or self.loop.now_ns >= until:
                return False
            await asyncio.sleep(_NOTICE_S / 2)
        return True

    async def _open(self, node: SimNode, request: Request) -> SessionHandle:
        name = self.shape.ref.name
        if request.resumed:
            return await node.resume(name, request.session, request.tokens, request.group, len(request.seen))
        request.asked += 1
        handle, request.group = node.begin(name, request.session, request.prompt, request.tokens)
        request.cached_tokens = handle.trace.cached_tokens
        return handle

    def _judge(self, request: Request) -> None:
        got = [token for token, _ in request.seen]
        right = expected(
            request.prompt, max(len(got), request.tokens), self.shape.layers, self.shape.vocabulary
        )
        wrong = [i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b]
        request.changed = len(wrong)
        if wrong:
            self.violated(f"request {request.number}: token {wrong[0]} of {len(got)} is not what it must be")
        if len(got) > request.tokens:
            self.violated(f"request {request.number}: {len(got)} tokens of {request.tokens}")
        if request.finished and len(got) < request.tokens:
            self.violated(
                f"request {request.number}: {len(got)} tokens of {request.tokens}, and told as complete"
            )
        if request.error:
            self.tell(f"request {request.number} failed: {request.error}")
            if 0 <= self.calm_ns <= request.asked_ns:
                self.violated(f"request {request.number} failed although nothing was broken: {request.error}")
        elif request.rungs or request.resumed:
            how = " ".join(rung for rung, _ in request.rungs)
            self.tell(f"request {request.number} came through: {how}{' resumed' if request.resumed else ''}")

    @property
    def _never(self) -> frozenset[str]:
        return _NEVER - {"bad_frame"} if self.faults["corrupt frames"] else _NEVER

    # -- checks --------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Let clients come to their end, and look whether anything is left behind."""
        while self._clients:
            await asyncio.sleep(_NOTICE_S)
        await asyncio.sleep(_SETTLE_S)
        check_end(self)

    def whole(self) -> bool:
        """Every node is up, at work and reachable."""
        up = [n for n in self.nodes.values() if n.machine.power is Power.ON]
        return len(up) == len(self.specs) and not self.network.cuts

    def sample(self) -> None:
        """Note how things stand."""
        self.quiet.look()
        for node in self.quiet.awake:
            check_node(self, node)
        charges = [s.battery.percent for s in self.specs.values() if s.battery]
        charge = sum(charges) / len(charges) if charges else 100.0
        running = sum(len(n.driver) for n in self.quiet.awake)
        replicas = self.quiet.resting_replicas + sum(len(n.host.replicas) for n in self.quiet.awake)
        self.samples.append(
            Sample(
                self.loop.now_ns,
                len(self.nodes),
                running,
                charge,
                self.network.bytes,
                replicas,
                self.energy_wh,
            )
        )

    def stalls_us(self) -> Iterator[tuple[str, int]]:
        """Of all recoveries, by rung."""
        for request in self.requests:
            yield from request.rungs
