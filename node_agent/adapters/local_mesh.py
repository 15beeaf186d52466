"""Several agents on this machine as one mesh: what ``mesh up`` and ``mesh ask --nodes`` run.

The agents are processes tied to ours: they end with our end of their standard input, whatever
happens to us. Shards are placed evenly and held by leases of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc

from mesh.adapters.grpc_links import CHANNEL_OPTIONS
from mesh.errors import InputError, NoRoute, Unavailable
from mesh.forms import DEFAULT_RUNTIME
from mesh.types import NodeId
from node_agent.adapters.form_times import chosen_form
from node_agent.adapters.model_pull import CATALOGUE, pull_model
from node_agent.adapters.model_store import ModelStore, Progress, make_folder
from node_agent.adapters.shard_maker import demand_of, make_shard
from node_agent.adapters.temporary_folder import temporary_folder
from node_agent.config import AgentConfig, variable
from node_agent.lease import ShardKey
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.demand import ModelDemand
from scheduler.even_split import DoesNotFit, EvenSplit, NodeRoom, split_evenly

START_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
_LOG_TAIL = 2000


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """What a local mesh is made of. ``api_port`` and ``port`` 0 mean any free ones."""

    nodes: int
    home: Path
    work: Path
    """Folder for the agents' data and logs."""
    api_port: int = 0
    port: int = 0
    cluster: str = "local"
    settings: dict[str, str] = field(default_factory=dict)
    """Further settings of every agent, by name."""


@dataclass(slots=True)
class LocalAgent:
    """One agent process."""

    index: int
    process: asyncio.subprocess.Process
    log: Path
    node: NodeId = field(default_factory=lambda: NodeId(""))
    address: str = ""
    api_address: str = ""
    memory_free: int = 0

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class LocalMesh:
    """Use as ``async with LocalMesh(options) as mesh``; ``serve`` places a model on it."""

    def __init__(self, options: MeshOptions) -> None:
        if options.nodes < 1:
            raise InputError(f"a mesh of {options.nodes} nodes cannot be; use 1 or more")
        self.options = options
        self.agents: list[LocalAgent] = []
        self._leases: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LocalMesh:
        try:
            started = await asyncio.gather(*(self.start_agent(i) for i in range(self.options.nodes)))
            self.agents = list(started)  # by index, not in the order in which they came up
            first = self.agents[0].address
            await asyncio.gather(*(self.join(a, first) for a in self.agents[1:]))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def endpoint(self) -> str:
        """Base URL of the first agent's API."""
        return f"http://{self.agents[0].api_address}"

    async def start_agent(self, index: int) -> LocalAgent:
        """Start one more agent; it knows nobody until ``join``."""
        options = self.options
        folder = options.work / f"node-{index + 1}"
        make_folder(folder)
        log = folder / "agent.log"
        reading, writing = os.pipe()
        flags = {
            "home": str(options.home),
            "data-dir": str(folder),
            "name": f"node-{index + 1}",
            "cluster": options.cluster,
            # These agents are introduced to each other; those of another local mesh are not ours.
            "mdns": "off",
            "port": str(options.port + index if options.port else 0),
            "api-port": str(options.api_port + index if options.api_port else 0),
            **{k.replace("_", "-"): v for k, v in options.settings.items()},
        }
        command = [sys.executable, "-m", "mesh", "agent", "--tied", "--ready-fd", str(writing)]
        for name, value in flags.items():
            command.append(f"--{name}={value}")
        environment = {k: v for k, v in os.environ.items() if k not in map(variable, _named_settings())}
        try:
            with log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writing,),
                    env=environment,
                    # Ctrl-C is ours to handle: we tell the agents when to stop.
                    start_new_session=True,
                )
        finally:
            os.close(writing)
        agent = LocalAgent(index, process, log)
        self.agents.append(agent)
        line = await _read_line(reading, START_TIMEOUT_S)
        if not line:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 2)
            tail = log.read_text(errors="replace")[-_LOG_TAIL:].strip().splitlines()
            raise Unavailable(
                f"node {index + 1} did not start: {tail[-1] if tail else 'no answer'} (log: {log})"
            )
        ready = json.loads(line)
        agent.node, agent.address = NodeId(ready["node"]), ready["address"]
        agent.api_address = ready["api_address"]
        return agent

    async def join(self, agent: LocalAgent, peer: str) -> None:
        """Tell an agent of another."""
        async with grpc.aio.insecure_channel(agent.address, CHANNEL_OPTIONS) as channel:
            request = pb.JoinRequest(cluster=self.options.cluster, addresses=[peer])
            await rpc.AgentStub(channel).Join(request, timeout=10)

    async def serve(
        self,
        model: str,
        runtime: str = DEFAULT_RUNTIME,
        quantization: str = "",
        progress: Progress = lambda what, done, total: None,
    ) -> EvenSplit:
        """Pull and shard a model if need be, place it evenly, load it, and wait until it serves. Where neither ``runtime`` nor
        ``quantization`` is named, it is what this machine computes fastest."""
        store = ModelStore(self.options.home)
        if model in CATALOGUE:
            await asyncio.to_thread(pull_model, store, model, progress=progress)
        runtime, quantization = await asyncio.to_thread(
            chosen_form, store, model, runtime, quantization, progress
        )
        make = partial(
            make_shard, store, model, quantization=quantization, progress=progress, runtime=runtime
        )
        await asyncio.to_thread(prepare, store, model, make, self.options.nodes)
        placement = self._place(demand_of(store, model, quantization, runtime), await self._records())
        for _, layers in placement.shards:
            await asyncio.to_thread(make, layers.start, layers.end)
        by_id = {a.node: a for a in self.agents}
        loaded = [asyncio.get_running_loop().create_future() for _ in placement.shards]
        for (node, layers), future in zip(placement.shards, loaded, strict=True):
            key = ShardKey(model, layers.start, layers.end, runtime, quantization)
            lease = self._hold(by_id[node], key, future)
            self._leases.append(asyncio.create_task(lease, name=f"lease {layers}"))
        progress("loading shards", 0, len(loaded))
        for i, done in enumerate(asyncio.as_completed(loaded, timeout=LOAD_TIMEOUT_S)):
            await done
            progress("loading shards", i + 1, len(loaded))
        await self._until_routed(placement)
        return placement

    async def _records(self) -> dict[NodeId, pb.NodeRecord]:
        """One record of every agent."""

        async def record(agent: LocalAgent) -> pb.NodeRecord:
            async with grpc.aio.insecure_channel(agent.address, CHANNEL_OPTIONS) as channel:
                stream = rpc.AgentStub(channel).Watch(
                    pb.WatchRequest(cluster=self.options.cluster), timeout=10
                )
                answer = await stream.read()
                stream.cancel()
                if answer is grpc.aio.EOF:
                    raise Unavailable(f"{agent.address} ended its record")
                return cast("pb.NodeRecord", answer)

        records = await asyncio.gather(*map(record, self.agents))
        return {NodeId(r.node): r for r in records}

    def _place(self, demand: ModelDemand, records: dict[NodeId, pb.NodeRecord]) -> EvenSplit:
        context = min(
            int(self.options.settings.get("context", AgentConfig().context)), demand.shape.context_max
        )
        share = len(self.agents)  # they all look at the same memory
        limited = "memory" in self.options.settings
        rooms = [
            NodeRoom(a.node, records[a.node].memory_free_bytes // (1 if limited else share))
            for a in self.agents
        ]
        # KV memory may take half of what is free: one full context must fit in that half.
        answer = split_evenly(demand, 2 * context, rooms)
        if isinstance(answer, DoesNotFit):
            raise NoRoute(f"{demand.shape.ref.name} does not fit: {answer.reason}")
        return answer

    async def _hold(
        self,
        agent: LocalAgent,
        key: ShardKey,
        loaded: asyncio.Future[None],
    ) -> None:
        request = pb.HoldShardRequest(
            cluster=self.options.cluster,
            model=key.model,
            layer_start=key.start,
            layer_end=key.end,
            runtime=key.runtime,
            quantization=key.quantization,
            holder=f"mesh up, process {os.getpid()}",
        )
        try:
            async with grpc.aio.insecure_channel(agent.address, CHANNEL_OPTIONS) as channel:
                async for status in rpc.AgentStub(channel).HoldShard(request):
                    if status.state == pb.REPLICA_STATE_SERVING and not loaded.done():
                        loaded.set_result(None)
                    if status.state == pb.REPLICA_STATE_FAILED and not loaded.done():
                        loaded.set_exception(Unavailable(status.reason))
        except grpc.aio.AioRpcError as error:
            if not loaded.done():
                loaded.set_exception(Unavailable(f"layers {key.start}-{key.end}: {error.details()}"))

    async def _until_routed(self, placement: EvenSplit) -> None:
        """Wait until every agent sees every replica serving."""
        import aiohttp

        wanted = len(placement.shards)
        async with aiohttp.ClientSession() as session, asyncio.timeout(LOAD_TIMEOUT_S):
            for agent in self.agents:
                while True:
                    async with session.get(f"http://{agent.api_address}/mesh/v1/nodes") as answer:
                        nodes = (await answer.json())["nodes"]
                    serving = [r for n in nodes for r in n["replicas"] if r["state"] == "serving"]
                    if len(serving) >= wanted:
                        break
                    await asyncio.sleep(0.02)

    def kill(self) -> None:
        """Stop the agents at once, answers or not."""
        for agent in self.agents:
            if agent.alive:
                agent.process.kill()

    async def close(self) -> None:
        """End leases, then agents: politely, and by force where that takes too long."""
        for lease in self._leases:
            lease.cancel()
        await asyncio.gather(*self._leases, return_exceptions=True)
        await asyncio.gather(*(_stop(a) for a in self.agents))

    async def watch(self, interval_s: float) -> AsyncIterator[dict[str, Any]]:
        """``/mesh/v1/nodes`` of the first agent that answers, again and again."""
        import aiohttp

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2)) as session:
            while True:
                for agent in self.agents:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with session.get(f"http://{agent.api_address}/mesh/v1/nodes") as answer:
                            yield await answer.json()
                        break
                await asyncio.sleep(interval_s)


def _named_settings() -> Sequence[str]:
    """Settings that ``LocalMesh`` gives every agent itself: the environment must not change them."""
    return ("data_dir", "name", "port", "api_port", "peers", "shards", "cluster", "advertise", "host")


def prepare(store: ModelStore, model: str, make: Callable[[int, int], object], parts: int) -> None:
    """Make the shards of an even split."""
    layers = store.card(model).architecture.layers
    parts = min(parts, layers)
    for i in range(parts):
        make(layers * i // parts, layers * (i + 1) // parts)


async def _stop(agent: LocalAgent) -> None:
    process = agent.process
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def _read_line(descriptor: int, timeout_s: float) -> bytes:
    """The first line from a pipe; empty when it ends or stays silent."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    with os.fdopen(descriptor, "rb", 0) as pipe:
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            async with asyncio.timeout(timeout_s):
                return await reader.readline()
        except TimeoutError:
            return b""
        finally:
            transport.close()


@contextlib.asynccontextmanager
async def temporary_mesh(
    nodes: int, home: Path, settings: dict[str, str] | None = None
) -> AsyncIterator[LocalMesh]:
    """A mesh whose data goes away with it."""
    with temporary_data(home) as work:
        async with LocalMesh(MeshOptions(nodes, home, work, settings=settings or {})) as mesh:
            yield mesh


def temporary_data(home: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder for the data of such a mesh."""
    return temporary_folder(home / "run", "mesh")
