"""Keep a local mesh running: N agents on this machine, a model placed evenly over them.

Prints the endpoint and a live table of nodes and shards. Ctrl-C drains and stops everything; a second
one does not wait for answers that still run.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

SUMMARY = "run a mesh of N agents on this machine"
SECTION = "Try it"

if TYPE_CHECKING:
    import asyncio

    from node_agent.adapters.local_mesh import LocalMesh


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="agents (default 3)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--runtime", default="", help="onnx, litert or onnxstd [what is measured to be fastest here, once]"
    )
    parser.add_argument("--quantization", default="", help="int8, fp32 or int4 [the runtime's default]")
    parser.add_argument(
        "--api-port",
        type=int,
        default=8080,
        help="API port of the first agent; the others count up from it. 0: any free ones",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="peer port of the first agent (default: any free ones)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every agent, e.g. threads=2",
    )
    parser.add_argument("--home", help="where models are kept [MESH_HOME]")


def run(args: argparse.Namespace) -> int:
    """Start, show, wait, stop."""
    import asyncio

    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    import asyncio

    from mesh.errors import InputError
    from node_agent.adapters.local_mesh import LocalMesh, MeshOptions, temporary_data
    from node_agent.commands.show import progress_bars
    from node_agent.paths import default_home

    stop = asyncio.Event()
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if running is None:
            # While starting there is nothing to drain: the start itself is cancelled.
            if task is not None:
                task.cancel()
        elif stop.is_set():
            running.kill()  # asked twice: what still runs is not waited for
        else:
            stop.set()

    running: LocalMesh | None = None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    settings = {}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} must be NAME=VALUE")
        settings[name.replace("-", "_")] = value
    home = Path(args.home) if args.home else default_home()
    # Nodes keep their identity from one start to the next, one set of them a port.
    kept = contextlib.nullcontext(home / "run" / f"up-{args.api_port}")
    try:
        with kept if args.api_port else temporary_data(home) as work:
            options = MeshOptions(args.nodes, home, work, args.api_port, args.port, settings=settings)
            async with LocalMesh(options) as mesh:
                with progress_bars() as progress:
                    placement = await mesh.serve(args.model, args.runtime, args.quantization, progress)
                running = mesh
                for node, reason in placement.idle:
                    print(f"{node} holds nothing: {reason}")
                print(f"endpoint  {mesh.endpoint}/v1   model {args.model}   Ctrl-C stops\n", flush=True)
                await _show(mesh, stop)
                print("\ndraining ...", file=sys.stderr, flush=True)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    return 0


async def _show(mesh: LocalMesh, stop: asyncio.Event) -> None:
    """A live table on a terminal; elsewhere a table whenever nodes or replicas change state."""
    import asyncio

    from rich.live import Live
    from rich.text import Text

    from node_agent.commands.nodes import nodes_table

    async def live() -> None:
        with Live(refresh_per_second=4) as screen:
            async for snapshot in mesh.watch(0.5):
                screen.update(Text(nodes_table(snapshot)))

    async def plain() -> None:
        shown: object = None
        async for snapshot in mesh.watch(0.5):
            states = [
                (n["id"], n["state"], [(r["shard"], r["state"]) for r in n["replicas"]])
                for n in snapshot["nodes"]
            ]
            if states != shown:
                shown = states
                print(nodes_table(snapshot) + "\n", flush=True)

    task = asyncio.create_task(live() if sys.stdout.isatty() else plain())
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, waiting):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await each
