"""A hop of the mesh against what carries it: gRPC alone, and plain sockets.

Three processes in a ring compute the same three shards as three agents do, and pass on the same bytes, with nothing else
around them: over a gRPC stream, and over blocking sockets, which is what the kernel takes. A hop is what a token takes
less what was computed for it, by the number of hops; 128 tokens after a prompt of 128, interleaved, 2 threads each. What
was computed stands beside what one process takes for all three shards.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import fmean
from typing import Any

import grpc
import numpy as np

from node_agent.adapters.local_mesh import temporary_mesh
from node_agent.commands.agent import GRPC_EXPERIMENTS
from tests.benchmarks.common import (
    END_OF_TEXT,
    MODEL,
    THREADS,
    arguments,
    bare_decode,
    cut,
    finish,
    load,
    load_one,
    median,
    prompt_ids,
    stream,
    the_store,
    trace_of,
)

CONTEXT = TOKENS = 128
STAGES = HOPS = 3
FORM = "onnx-int8"
HEAD = struct.Struct("<qqq")
"""Position, nanoseconds computed for this token so far, bytes that follow."""
SKIPPED = 2
"""Tokens at the start that are not counted: the prompt's, and one more."""


@dataclass
class Member:
    """One process of a ring: a shard, and of the first what it measured."""

    index: int
    shard: Any = field(init=False)
    hops_ms: list[float] = field(default_factory=list)
    computed_ms: list[float] = field(default_factory=list)
    _sent_ns: int = 0

    def __post_init__(self) -> None:
        self.shard = load_one(the_store(), *cut(STAGES)[self.index], FORM)

    def begin(self) -> bytes:
        """The prompt, computed by the first shard."""
        self.hops_ms, self.computed_ms = [], []
        self._sent_ns = time.perf_counter_ns()
        return self._compute(0, 0, np.array(prompt_ids(the_store(), CONTEXT), dtype=np.int64))

    def take(self, head: bytes, payload: bytes) -> bytes:
        """What goes on to the next process; nothing once the first has all its tokens."""
        position, computed_ns, _ = HEAD.unpack(head)
        if self.index:
            return self._compute(position, computed_ns, np.frombuffer(payload, np.float32).reshape(-1, 576))
        now = time.perf_counter_ns()
        self.hops_ms.append((now - self._sent_ns - computed_ns) / 1e6 / HOPS)
        self.computed_ms.append(computed_ns / 1e6)
        self._sent_ns = now
        if len(self.hops_ms) == TOKENS:
            return b""
        position = CONTEXT + len(self.hops_ms) - 1
        return self._compute(position, 0, np.frombuffer(payload, np.int64))

    def _compute(self, position: int, computed_ns: int, given: Any) -> bytes:
        begin = time.perf_counter_ns()
        if len(given) > 1:
            result = self.shard.prefill(0, position, given).copy()
        else:
            result = self.shard.decode(0, [position], given)
        if self.index == STAGES - 1:
            result[:, END_OF_TEXT] -= 100
            result = np.array([result[0].argmax()], dtype=np.int64)
        computed_ns += time.perf_counter_ns() - begin
        data: bytes = result.tobytes()
        return HEAD.pack(position, computed_ns, len(data)) + data

    @property
    def told(self) -> tuple[float, float]:
        """Milliseconds: a hop (the median), and what was computed for a token (the mean, as a mesh's trace has it)."""
        return median(self.hops_ms[SKIPPED:]), fmean(self.computed_ms[SKIPPED:])


def over_sockets(index: int, control: Connection) -> None:
    """A process of a ring of blocking sockets; for ever."""
    member = Member(index)
    with socket.create_server(("127.0.0.1", 0)) as server:
        control.send(server.getsockname()[1])
        onward = socket.create_connection(("127.0.0.1", control.recv()))
        onward.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before, _ = server.accept()
    control.send("ready")
    while True:
        if index == 0:
            control.recv()
            onward.sendall(member.begin())
        while head := before.recv(HEAD.size, socket.MSG_WAITALL):
            answer = member.take(head, before.recv(HEAD.unpack(head)[2], socket.MSG_WAITALL))
            if not answer:
                break
            onward.sendall(answer)
        control.send(member.told)


def over_grpc(index: int, control: Connection) -> None:
    """A process of a ring of gRPC streams that carry bytes; for ever."""
    asyncio.run(_over_grpc(Member(index), control))


async def _over_grpc(member: Member, control: Connection) -> None:
    done = asyncio.Event()
    onward: Any = None

    async def received(_: Any, context: Any) -> bytes:
        while (message := await context.read()) is not grpc.aio.EOF:
            answer = member.take(message[: HEAD.size], message[HEAD.size :])
            if answer:
                await onward.write(answer)
            else:
                done.set()
        return b""

    handler: dict[str, Any] = {"Pass": grpc.stream_unary_rpc_method_handler(received)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Ring", handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    control.send(port)
    following = await asyncio.to_thread(control.recv)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{following}") as channel:
        onward = channel.stream_unary("/Ring/Pass")()
        await onward.wait_for_connection()
        control.send("ready")
        while True:
            await asyncio.to_thread(control.recv)
            done.clear()
            await onward.write(member.begin())
            await done.wait()
            control.send(member.told)


@contextmanager
def ring(member: Any) -> Iterator[Connection]:
    """Running processes; whoever sends something to the first gets what ``Member.told`` says."""
    spawn = multiprocessing.get_context("spawn")
    ends, processes = [], []
    try:
        for index in range(STAGES):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=member, args=(index, theirs), daemon=True)
            process.start()
            ends.append(ours)
            processes.append(process)
        ports = [end.recv() for end in ends]
        for index, end in enumerate(ends):
            end.send(ports[(index + 1) % STAGES])
        for end in ends:
            end.recv()
        yield ends[0]
    finally:
        for process in processes:
            process.kill()
            process.join()


async def measure(rounds: int) -> dict[str, Any]:
    store = the_store()
    prompt, alone = prompt_ids(store, CONTEXT), load(store, STAGES, FORM)
    hops: dict[str, list[float]] = {"mesh": [], "grpc": [], "sockets": []}
    computed: dict[str, list[float]] = {"alone": [], **{name: [] for name in hops}}
    with ring(over_sockets) as sockets, ring(over_grpc) as streams:
        async with temporary_mesh(
            STAGES, store.root.parent, {"threads": str(THREADS), "prefix_cache": "off"}
        ) as mesh:
            await mesh.serve(MODEL)
            for round_ in range(-1, rounds):
                found: dict[str, tuple[float, float]] = {}
                for name, end in (("sockets", sockets), ("grpc", streams)):
                    end.send("go")
                    found[name] = await asyncio.to_thread(end.recv)
                timing = await asyncio.to_thread(stream, mesh.endpoint, prompt, TOKENS)
                trace = await asyncio.to_thread(trace_of, mesh.endpoint, timing)
                summed = sum(stage["compute_ms"] for stage in trace["stages"])
                found["mesh"] = trace["overhead_ms_p50"] / HOPS, summed
                step_s = bare_decode(alone, prompt, TOKENS)[1]
                if round_ >= 0:  # the first round warms everything up
                    computed["alone"].append(step_s * 1e3)
                    for name, (hop, compute) in found.items():
                        hops[name].append(hop)
                        computed[name].append(compute)
                    print(f"round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
    return report(hops, computed)


def report(hops: dict[str, list[float]], computed: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios of the same rounds."""

    def over(upper: list[float], lower: list[float]) -> float:
        return round(median([a / b for a, b in zip(upper, lower, strict=True)]), 3)

    return {
        **{f"hop_ms_{name}": round(median(found), 3) for name, found in hops.items()},
        **{f"ratio_mesh_{name}": over(hops["mesh"], hops[name]) for name in ("grpc", "sockets")},
        **{f"compute_ms_{name}": round(median(found), 2) for name, found in computed.items()},
        **{f"compute_over_alone_{name}": over(computed[name], computed["alone"]) for name in hops},
        "rounds": len(computed["alone"]),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)  # as agents have it
    keys = asyncio.run(measure(args.rounds))
    rows = [("what", "median", "wanted")] + [(k, str(v), "") for k, v in keys.items()]
    finish(rows, keys, args.json)


if __name__ == "__main__":
    main()
