"""Hold a shard on an agent for as long as this runs: what a Nomad job's task does for a model.

mesh lease smollm2-135m:0-10                        on the agent of this machine
mesh lease smollm2-135m@6de5cab5fa05:0-10           that version of the model and no other
mesh lease smollm2-135m:0-10 --sessions 4 --context 2048 --health 9000

The agent loads the shard with the first lease on it and unloads it with the last; it hands its sessions over first.
Something listens on the health port while the shard serves, and only then: a TCP check sees whether it does.
Ends with status 2 and the reason when the agent cannot hold the shard; an agent that restarts is asked again.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from typing import TYPE_CHECKING

SUMMARY = "hold a shard on an agent for as long as this runs (Nomad's task)"
SECTION = "Run it"

if TYPE_CHECKING:
    from node_agent.adapters.lease_holder import LeaseHolder, LeaseOrder

_SHARD = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:@([0-9a-f]{2,64}))?:([0-9]{1,4})-([0-9]{1,4})")


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("shard", help="MODEL[@DIGEST]:START-END, for example smollm2-135m:0-10")
    parser.add_argument(
        "--agent", metavar="HOST:PORT", help="of its gRPC port [MESH_AGENT; default 127.0.0.1:7070]"
    )
    parser.add_argument("--cluster", help="of the agent [MESH_CLUSTER; default: default]")
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--quantization", default="", help="[the runtime's default]")
    parser.add_argument(
        "--sessions", type=int, default=0, metavar="N", help="reserve KV memory for so many [the agent's]"
    )
    parser.add_argument(
        "--context", type=int, default=0, metavar="N", help="of so many positions each [the agent's]"
    )
    parser.add_argument(
        "--health", default="", metavar="[HOST:]PORT", help="listen there while the shard serves"
    )
    parser.add_argument(
        "--patience", type=float, default=30.0, metavar="S", help="the agent may be away so long [30]"
    )
    parser.add_argument(
        "--load-timeout", type=float, default=600.0, metavar="S", help="loading may take so long [600]"
    )


def run(args: argparse.Namespace) -> int:
    """Hold it until SIGINT or SIGTERM."""
    import asyncio

    from mesh.types import NodeId
    from node_agent.adapters.lease_holder import LeaseHolder
    from node_agent.adapters.lease_streams import LeaseStreams

    order = order_of(args)
    cluster = args.cluster or os.environ.get("MESH_CLUSTER") or "default"
    streams = LeaseStreams(cluster, NodeId(order.holder))
    asyncio.run(_until_told(LeaseHolder(order, streams, lambda line: print(line, flush=True))))
    return 0


def order_of(args: argparse.Namespace) -> LeaseOrder:
    """Raises ``InputError``."""
    from mesh.errors import InputError
    from mesh.forms import form_of
    from mesh.types import Address
    from node_agent.adapters.lease_holder import LeaseOrder
    from node_agent.lease import Promise, ShardKey

    match = _SHARD.fullmatch(args.shard)
    if not match or int(match[3]) >= int(match[4]):
        raise InputError(
            f"{args.shard!r} is no shard; write MODEL:START-END or MODEL@DIGEST:START-END, layers rising"
        )
    digest = match[2] or ""
    if len(digest) % 2:
        raise InputError(f"the digest {digest!r} has an odd number of digits; give an even number of them")
    if bool(args.sessions) != bool(args.context) or min(args.sessions, args.context) < 0:
        raise InputError("--sessions and --context go together, both above 0: they reserve KV memory")
    for flag, value in (("--patience", args.patience), ("--load-timeout", args.load_timeout)):
        if not 0 < value <= 86_400:
            raise InputError(f"{flag} is {value:g}; it must be above 0, in seconds")
    agent = args.agent or os.environ.get("MESH_AGENT") or "127.0.0.1:7070"
    _port_of(agent, "--agent")
    host, _, health = args.health.rpartition(":")
    port = _port_of(f":{health}", "--health") if health else 0
    allocation = os.environ.get("NOMAD_ALLOC_ID", "")
    holder = f"allocation {allocation[:8]}" if allocation else f"{socket.gethostname()} pid {os.getpid()}"
    promise = Promise(args.sessions, args.context) if args.sessions else None
    key = ShardKey(match[1], int(match[3]), int(match[4]), *form_of(args.runtime, args.quantization))
    return LeaseOrder(
        Address(agent),
        key,
        digest,
        promise,
        holder,
        args.patience,
        args.load_timeout,
        host or "0.0.0.0",
        port,
    )


def _port_of(address: str, flag: str) -> int:
    from mesh.errors import InputError

    _, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"{flag} is {address.lstrip(':')!r}; it needs a port from 1 to 65535, as HOST:PORT")
    return int(port)


async def _until_told(holder: LeaseHolder) -> None:
    import asyncio
    import signal

    task = asyncio.create_task(holder.run(), name="lease")
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return
