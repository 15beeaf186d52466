"""How soon five agents see a new one, a killed one and a frozen one; what watching each other costs.

All five hold a fifth of the model. Routes are asked of every agent's own view, ten times a second
and more. The load: a client streams from each agent without pause, so that both cores are full.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh.profiles import RADIO
from node_agent.adapters.local_mesh import LocalAgent, LocalMesh, temporary_mesh
from tests.benchmarks.common import MODEL, arguments, finish, median, prompt_ids, quantile, stream, the_store

NODES = 5
LIMIT_S = 60.0
_IDLE_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


def states(agent: LocalAgent) -> dict[str, str]:
    """Standing by node id in one agent's view."""
    with urllib.request.urlopen(f"http://{agent.api_address}/mesh/v1/nodes", timeout=10) as answer:
        return {n["id"]: n["state"] for n in json.load(answer)["nodes"]}


def metric(agent: LocalAgent, name: str) -> float:
    with urllib.request.urlopen(f"http://{agent.api_address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(v) for v in re.findall(rf"^{name} (\S+)$", text, re.MULTILINE))


def cpu_s(agent: LocalAgent) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def machine_s() -> tuple[int, int]:
    """Ticks that all cores worked and idled so far."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idling = fields[3] + fields[4]
    return sum(fields) - idling, idling


async def until(what: Callable[[], bool]) -> float:
    begin = time.perf_counter()
    while not await asyncio.to_thread(what):
        if time.perf_counter() - begin > LIMIT_S:
            raise TimeoutError(f"not within {LIMIT_S:g} s")
        await asyncio.sleep(0.005)
    return time.perf_counter() - begin


async def until_routed(agents: list[LocalAgent], node: str, routed: bool) -> float:
    """Seconds until a node is in the routes of all agents, or of none."""
    return await until(lambda: all((states(a).get(node) == "alive") is routed for a in agents))


async def churn(mesh: LocalMesh, rounds: int, seen: dict[str, list[float]]) -> None:
    """A sixth agent joins, freezes, thaws and is killed, again and again."""
    others = mesh.agents[:NODES]
    for round_ in range(rounds):
        extra = await mesh.start_agent(NODES + round_)
        process, node = extra.process, extra.node
        await mesh.join(extra, others[round_ % NODES].address)
        seen["join"].append(await until_routed(others, node, True))
        # Long enough apart that each event finds the probes at another point of their round.
        await asyncio.sleep(1.0 + 0.37 * round_ % 1)
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            seen["frozen"].append(await until_routed(others, node, False))
            await asyncio.sleep(0.5 + 0.41 * round_ % 3)
            process.send_signal(signal.SIGCONT)
            seen["back"].append(await until_routed(others, node, True))
            await asyncio.sleep(0.7 + 0.29 * round_ % 1)
        process.kill()
        seen["killed"].append(await until_routed(others, node, False))
        await process.wait()
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)


async def saturate(mesh: LocalMesh, prompt: list[int], seconds: float) -> dict[str, float]:
    """Every agent answers without pause; how often anybody suspected anybody."""
    agents = mesh.agents[:NODES]
    before = sum(metric(a, r"mesh_suspicions_total\{.*\}") for a in agents)
    busy = machine_s()
    end = time.monotonic() + seconds
    answers = 0

    async def client(agent: LocalAgent) -> None:
        nonlocal answers
        while time.monotonic() < end:
            await asyncio.to_thread(stream, f"http://{agent.api_address}", prompt, 64)
            answers += 1

    # Stages wait for each other; these leave no core idle meanwhile.
    burners = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        await asyncio.gather(*(client(a) for a in agents for _ in range(2)))
    finally:
        for burner in burners:
            burner.kill()
            await burner.wait()
    working, idling = (b - a for a, b in zip(busy, machine_s(), strict=True))
    after = sum(metric(a, r"mesh_suspicions_total\{.*\}") for a in agents)
    return {"suspicions": after - before, "answers": answers, "busy": working / (working + idling)}


def loopback_bytes() -> int:
    """Everything that went over the loopback interface, headers included."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


async def idle(mesh: LocalMesh, seconds: float) -> tuple[float, float]:
    """Bytes a minute that one agent sends to one peer, of whatever kind, and CPU seconds a minute
    that one agent uses, nothing else going on."""
    agents = mesh.agents[:NODES]
    sent, cpu = loopback_bytes(), [cpu_s(a) for a in agents]
    await asyncio.sleep(seconds)
    pairs = NODES * (NODES - 1)
    used = [cpu_s(a) - c for a, c in zip(agents, cpu, strict=True)]
    return (loopback_bytes() - sent) * 60 / seconds / pairs, median(used) * 60 / seconds


async def measure(rounds: int, load_s: float) -> dict[str, Any]:
    store = the_store()
    prompt = prompt_ids(store, 32)
    seen: dict[str, list[float]] = {k: [] for k in ("join", "killed", "frozen", "back")}
    async with temporary_mesh(1, store.root.parent) as alone:
        await asyncio.sleep(3)
        cpu = cpu_s(alone.agents[0])
        await asyncio.sleep(_IDLE_S / 4)
        cpu_alone = (cpu_s(alone.agents[0]) - cpu) * 60 / (_IDLE_S / 4)
    async with temporary_mesh(NODES, store.root.parent) as mesh:
        await mesh.serve(MODEL)
        await churn(mesh, rounds, seen)
        print(f"full load for {load_s:g} s ...", file=sys.stderr, flush=True)
        load = await saturate(mesh, prompt, load_s)
    async with temporary_mesh(NODES, store.root.parent) as mesh:
        await mesh.serve(MODEL)
        await asyncio.sleep(5)
        print(f"idle for {_IDLE_S:g} s ...", file=sys.stderr, flush=True)
        bytes_, cpu_used = await idle(mesh, _IDLE_S)
    async with temporary_mesh(NODES, store.root.parent, {"profile": RADIO.name}) as mesh:
        await asyncio.sleep(10)
        radio_bytes, _ = await idle(mesh, _IDLE_S)
    return {
        "join_seen_by_all_s_p50": round(quantile(seen["join"], 50), 3),
        "join_seen_by_all_s_p99": round(quantile(seen["join"], 99), 3),
        "killed_out_of_routes_s_p50": round(quantile(seen["killed"], 50), 3),
        "killed_out_of_routes_s_p99": round(quantile(seen["killed"], 99), 3),
        "frozen_out_of_routes_s_p50": round(quantile(seen["frozen"], 50), 3),
        "frozen_out_of_routes_s_p99": round(quantile(seen["frozen"], 99), 3),
        "back_in_routes_s_p50": round(quantile(seen["back"], 50), 3),
        "back_in_routes_s_p99": round(quantile(seen["back"], 99), 3),
        "false_suspicions": int(load["suspicions"]),
        "load_s": load_s,
        "load_answers": int(load["answers"]),
        "load_machine_busy": round(load["busy"], 3),
        "bytes_per_minute_per_peer": round(bytes_),
        "bytes_per_minute_per_peer_radio": round(radio_bytes),
        "cpu_s_per_minute_per_peer": round(max(0.0, cpu_used - cpu_alone) / (NODES - 1), 3),
        "rounds": rounds,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--load", type=float, default=300.0, metavar="SECONDS")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        keys = asyncio.run(measure(args.rounds, args.load))
        wanted = {
            "killed_out_of_routes_s_p99": "<= 2",
            "frozen_out_of_routes_s_p99": "<= 2",
            "back_in_routes_s_p99": "<= 2",
            "false_suspicions": "0",
        }
        rows = [("what", "value", "wanted")] + [(k, str(v), wanted.get(k, "")) for k, v in keys.items()]
        finish(rows, keys, args.json)


if __name__ == "__main__":
    main()
