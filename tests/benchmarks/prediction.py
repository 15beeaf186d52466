"""Predictions against what came, on real agents with unequal processors and delayed links.

Four agents in network namespaces on a switch that delays each direction of each pair by itself; their
processors are limited to unequal shares by cgroups. At least twelve placements are loaded in turn: the five that the cost model holds for best, and others drawn at random. Each request's prediction is
made by the agent that answers, before the request runs, and read back with the outcome. The first request
after each loading is not counted; those of the first round are reported apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean, median, stdev
from typing import Any, cast

import grpc

from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.records import read_node
from node_agent.adapters.shard_maker import demand_of, make_shard
from protos.gen import agent_pb2 as pb
from protos.gen import agent_pb2_grpc as rpc
from scheduler.chain import Chain, ChainProblem
from scheduler.cluster import ClusterSnapshot, NodeSeen
from scheduler.copy_search import CopySearch
from scheduler.demand import ModelDemand
from scheduler.feasibility import hosts_of
from scheduler.placement import place
from scheduler.plan import Plan
from scheduler.policy import ModelPolicy
from tests.agents import AgentProcess, start_agent
from tests.benchmarks.common import LAYERS, MODEL, arguments, finish, prompt_ids, the_store
from tests.delayed_lan import DelayedLan, refused

SHARES = (0.6, 0.5, 0.4, 0.3)
"""Of a core, by node."""
CORES = (0, 1, 1, 0)
"""Where each runs: no core is wanted twice, and no part of a quota lies idle on the core that a thread was on before."""
QUOTA_US = 1000
"""In each period: the least that the kernel takes, so that a limited node is slow evenly and not in bursts."""
DELAYS_MS = {
    (1, 2): 0.4, (2, 1): 0.4,
    (1, 3): 1.0, (3, 1): 1.5,
    (1, 4): 2.0, (4, 1): 0.5,
    (2, 3): 0.8, (3, 2): 0.8,
    (2, 4): 3.0, (4, 2): 1.0,
    (3, 4): 0.3, (4, 3): 0.6,
}  # fmt: skip
QUANTIZATION = "fp32"
"""A quota gives a node that was idle its next millisecond free (2 ms of work take 3.4 at a share of 0.3, and 16 take 50), which no
slow processor does. Steps of single floats are long enough for that to be little."""
MEMORY_MIB = 470
"""24 of 30 layers, and what they keep."""
REQUESTS = 1
"""Counted ones of a placement in a round, after one that is not. Two in a row meet the same machine, which is a tenth slower in one minute than
in the next: an interval of the mean may not take them for two."""
PROMPT = 832
"""Tokens, thirteen chunks: a first token takes some seconds (with seven chunks equal ones were 15 % apart at the 95th
percentile). What takes half a second differs by a quarter from one time to the
next on a shared machine."""
TOKENS = 96
"""Some seconds as well: a quota comes in pieces of a millisecond, which are even over many steps only."""
CONTEXT = PROMPT + TOKENS
LOAD_S = 60.0
TOLD_S = 1.5
"""Until records tell what changed."""
LINKS_TOLD_S = 12.0
"""Links are told as rarely as views are exchanged."""
REPLANS = 4
"""At most, before what is predicted counts."""
T_95 = {2: 12.7, 3: 4.3, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t for a 95 % interval of the mean of so many."""


@contextlib.contextmanager
def quota(share: float, name: str) -> Iterator[Path]:
    """A cgroup (version 1) whose processes get so much of a core."""
    folder = Path(f"/sys/fs/cgroup/cpu/{name}")
    folder.mkdir()
    if share < 1:
        (folder / "cpu.cfs_period_us").write_text(str(int(QUOTA_US / share)))
        (folder / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
    try:
        yield folder
    finally:
        _remove(folder)


Named = list[tuple[str, int, int]]
"""A chain by node id."""


def _remove(folder: Path) -> None:
    """Once its processes are gone."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


@dataclass
class Mesh:
    """Running agents; requests go to the first."""

    agents: list[AgentProcess]
    prompt: list[int]

    @property
    def api(self) -> str:
        return f"http://{self.agents[0].api}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.api + path, timeout=30) as answer:
            return json.load(answer)

    def ask(self) -> dict[str, Any]:
        """One request; its trace, prediction included."""
        body = {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logit_bias": {"2": -100, "0": -100},
        }
        request = urllib.request.Request(
            f"{self.api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            session = json.load(answer)["id"]
        trace: dict[str, Any] = self.get(f"/mesh/v1/sessions/{session}")
        return trace


@contextlib.contextmanager
def running(work: Path, home: Path) -> Iterator[Mesh]:
    """The agents, limited and delayed, knowing each other."""
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(DelayedLan(f"mbp{os.getpid()}", len(SHARES), DELAYS_MS))
        agents: list[AgentProcess] = []
        for i, share in enumerate(SHARES, 1):
            group = stack.enter_context(quota(share, f"mesh-bench-{os.getpid()}-{i}"))
            host = lan.address(i)
            peers = {"peers": agents[0].address} if agents else {}
            settings = {"host": host, "api_host": host, "threads": "1", "memory": str(MEMORY_MIB)}
            prefix = (*lan.prefix(i), "taskset", "-c", str(CORES[i - 1]))
            made = start_agent(
                work / f"n{i}", prefix, None, home=str(home), scheduler="off", **settings, **peers
            )
            stack.callback(made.end)
            (group / "cgroup.procs").write_text(str(made.process.pid))
            agents.append(made)
        mesh = Mesh(agents, prompt_ids(ModelStore(home), PROMPT))
        until = time.monotonic() + 60
        # Links are measured and told: every node has figures of every other.
        while time.monotonic() < until:
            nodes = mesh.get("/mesh/v1/nodes")["nodes"]
            if len(nodes) == len(SHARES) and sum(n["link"] is not None for n in nodes) == len(SHARES) - 1:
                break
            time.sleep(0.5)
        yield mesh


async def snapshot_of(mesh: Mesh) -> ClusterSnapshot:
    """As a scheduler would see it: every agent's own record."""
    snapshot = ClusterSnapshot()
    for one in mesh.agents:
        async with grpc.aio.insecure_channel(one.address) as channel:
            stream = rpc.AgentStub(channel).Watch(pb.WatchRequest(cluster="test"), timeout=10)
            record = cast("pb.NodeRecord", await stream.read())
            stream.cancel()
        snapshot = snapshot.apply(NodeSeen(read_node(record)))
    return snapshot


async def _serving(lease: Any, what: str) -> None:
    """Wait for a replica. Raises ``SystemExit`` where it does not come."""
    reason = f"nothing within {LOAD_S:.0f} s"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOAD_S):
            while (told := cast("pb.ReplicaRecord", await lease.read())).state != pb.REPLICA_STATE_FAILED:
                if told.state == pb.REPLICA_STATE_SERVING:
                    return
            reason = told.reason
    raise SystemExit(f"{what}: {reason}")


@contextlib.asynccontextmanager
async def placed(mesh: Mesh, chain: Named) -> AsyncIterator[None]:
    """A placement, loaded, for as long as this lasts."""
    by_id = {a.node: a for a in mesh.agents}
    async with contextlib.AsyncExitStack() as stack:
        for node, start, end in chain:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(by_id[node].address))
            request = pb.HoldShardRequest(
                cluster="test", model=MODEL, layer_start=start, layer_end=end, holder="benchmark",
                sessions=1, context=CONTEXT, quantization=QUANTIZATION,
            )  # fmt: skip
            stream = rpc.AgentStub(channel).HoldShard(request)
            stack.callback(stream.cancel)
            await _serving(stream, f"layers {start}-{end} on {node}")
        wanted = sorted((n, s, e) for n, s, e in chain)
        for _ in range(200):
            report = await asyncio.to_thread(mesh.get, "/mesh/v1/nodes")
            there = sorted(
                (n["id"], *r["layers"])
                for n in report["nodes"]
                for r in n["replicas"]
                if r["state"] == "serving"
            )
            if there == wanted:
                break
            await asyncio.sleep(0.05)
        yield
    for _ in range(200):
        report = await asyncio.to_thread(mesh.get, "/mesh/v1/nodes")
        if not any(n["replicas"] for n in report["nodes"]):
            return
        await asyncio.sleep(0.05)


def candidates(problem: ChainProblem, rng: Random) -> Iterator[Chain]:
    """All chains of one or two nodes, and many of three, with cuts of every other layer."""
    for size in (1, 2, 3):
        orders = list(itertools.permutations(range(problem.nodes), size))
        for order in orders:
            cuts = list(itertools.combinations(range(1, problem.layers), size - 1))
            for cut in rng.sample(cuts, min(len(cuts), 60)):
                edges = (0, *cut, problem.layers)
                yield tuple((n, edges[i], edges[i + 1]) for i, n in enumerate(order))


def problem_of(
    snapshot: ClusterSnapshot, demand: ModelDemand, policy: ModelPolicy
) -> tuple[ChainProblem, list[str]]:
    hosts, left_out = hosts_of(snapshot, demand, policy)
    assert len(hosts) == len(SHARES), left_out
    search = CopySearch(snapshot, hosts, demand, policy)
    return search.over(range(len(hosts)), []).problem, [str(h.node.id) for h in hosts]


def choose(
    snapshot: ClusterSnapshot, demand: ModelDemand, policy: ModelPolicy, count: int, rng: Random
) -> list[Named]:
    """The plan, the next best that differ in who hosts, and others at random."""
    chosen = [planned(snapshot, demand, policy)]
    problem, names = problem_of(snapshot, demand, policy)
    scored = sorted((problem.cost(c), c) for c in candidates(problem, rng))
    feasible = [c for cost, c in scored if cost < float("inf")]
    best: list[Named] = []
    for chain in feasible:
        named = [(names[n], a, b) for n, a, b in chain]
        far = all(not _alike(named, other) for other in [*chosen, *best])
        if far and len(best) < 4:
            best.append(named)
    chosen += best
    rest = [[(names[n], a, b) for n, a, b in c] for c in feasible]
    while len(chosen) < count and rest:
        named = rest.pop(rng.randrange(len(rest)))
        if all(not _alike(named, other) for other in chosen):
            chosen.append(named)
    return chosen


def _alike(one: Named, other: Named) -> bool:
    """The same nodes in the same order with cuts within two layers."""
    if [n for n, _, _ in one] != [n for n, _, _ in other]:
        return False
    return all(abs(a[2] - b[2]) <= 2 for a, b in zip(one, other, strict=True))


async def _settled(mesh: Mesh, demand: ModelDemand, policy: ModelPolicy) -> ClusterSnapshot:
    """What a mesh knows that has served for a while: every node has hosted half of the model, first and last, then a third
    and two thirds of it, and the plan was made again with what its own placement was measured at, until it stood. A few layers
    would tell less: in short steps nodes of 0.3 and of 0.6 of a core look alike."""
    one, two, three, four = (a.node for a in mesh.agents)
    for cut in (LAYERS // 2, LAYERS // 3):
        for first, last in ((one, two), (three, four), (two, one), (four, three)):
            await _tried(mesh, [(first, 0, cut), (last, cut, LAYERS)])
    await asyncio.sleep(LINKS_TOLD_S)
    tried: list[Named] = []
    while True:
        snapshot = await snapshot_of(mesh)
        best = planned(snapshot, demand, policy)
        if len(tried) == REPLANS or any(_alike(best, other) for other in tried):
            return snapshot
        tried.append(best)
        await _tried(mesh, best)


async def _tried(mesh: Mesh, chain: Named) -> None:
    """Measure the nodes of a placement by serving with it; records with their speeds have reached the others after that."""
    print("\rmeasuring the nodes", end="", file=sys.stderr)
    async with placed(mesh, chain):
        for _ in range(2):
            await asyncio.to_thread(mesh.ask)
        await asyncio.sleep(TOLD_S)
    await asyncio.sleep(TOLD_S)  # else whose memory was just taken may be left out of the plan


def planned(snapshot: ClusterSnapshot, demand: ModelDemand, policy: ModelPolicy) -> Named:
    plan = place(snapshot, demand, policy)
    assert isinstance(plan, Plan), plan
    return [(str(s.node), s.layers.start, s.layers.end) for s in plan.stages]


async def measure(
    mesh: Mesh, placements: int, rounds: int, seed: int
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    rng, store = Random(seed), the_store()
    demand = await asyncio.to_thread(demand_of, store, MODEL, QUANTIZATION)
    policy = ModelPolicy(sessions=1, context=CONTEXT, ingress=("node=n1",))
    names = {str(a.node): a.log.parent.name for a in mesh.agents}
    snapshot = await _settled(mesh, demand, policy)
    chains = choose(snapshot, demand, policy, placements, rng)
    problem, hosts = problem_of(snapshot, demand, policy)
    for chain in chains:
        for _, start, end in chain:
            await asyncio.to_thread(make_shard, store, MODEL, start, end, QUANTIZATION)
    expected = [problem.cost(tuple((hosts.index(n), a, b) for n, a, b in c)) / 1000 for c in chains]
    by_round: list[list[list[float]]] = []
    errors: dict[str, list[float]] = {"tpot": [], "ttft": []}
    came: dict[str, list[list[float]]] = {what: [[] for _ in chains] for what in errors}
    first: list[float] = []
    # Round by round, in an order drawn anew: the machine is faster at one time than at another.
    for turn in range(rounds):
        by_round.append([[] for _ in chains])
        drawn = list(range(len(chains)))
        rng.shuffle(drawn)
        for done, i in enumerate(drawn):
            print(f"\rround {turn + 1} of {rounds}: {done} of {len(drawn)}  ", end="", file=sys.stderr)
            async with placed(mesh, chains[i]):
                warm = await asyncio.to_thread(mesh.ask)
                if turn == 0:
                    first.append(_off(warm, "tpot"))
                await asyncio.sleep(1.0)  # records with measured speeds reach the ingress
                counted = [await asyncio.to_thread(mesh.ask) for _ in range(REQUESTS)]
            by_round[-1][i] = [t["tpot_ms"] for t in counted]
            for what in errors:
                errors[what] += [_off(t, what) for t in counted]
                came[what][i] += [t[f"{what}_ms"] for t in counted]
    print(file=sys.stderr)
    tpots = without_drift(by_round)
    rows: list[tuple[str, ...]] = [("placement", "planned ms", "measured ms", "95 % +-")]
    for i, (chain, times) in enumerate(zip(chains, tpots, strict=True)):
        label = " ".join(f"{names[n]}[{a}-{b}]" for n, a, b in chain) + ("  <- chosen" if i == 0 else "")
        rows.append((label, f"{expected[i]:.2f}", f"{mean(times):.2f}", f"{_half(times):.2f}"))
    fastest = min(tpots, key=mean)
    spread = {what: [off for times in came[what] for off in _spread(times)] for what in came}
    keys = {
        "tpot_error_p50": round(median(errors["tpot"]), 4),
        "tpot_error_p95": round(_p95(errors["tpot"]), 4),
        "ttft_error_p50": round(median(errors["ttft"]), 4),
        "ttft_error_p95": round(_p95(errors["ttft"]), 4),
        **{f"{what}_spread_p50": round(median(spread[what]), 4) for what in spread},
        **{f"{what}_spread_p95": round(_p95(spread[what]), 4) for what in spread},
        "first_tpot_error_p50": round(median(first), 4),
        "chosen_is_best": mean(tpots[0]) <= mean(fastest) + _half(fastest),
        "chosen_over_fastest": round(mean(tpots[0]) / mean(fastest), 3),
        "plan_error_p50": round(
            median(abs(p / mean(t) - 1) for p, t in zip(expected, tpots, strict=True)), 4
        ),
        "requests": sum(map(len, tpots)),
        "placements": len(chains),
    }
    return keys, rows


def without_drift(by_round: list[list[list[float]]]) -> list[list[float]]:
    """Times by placement, all rounds together, each round scaled to the mean of all: a block design, so that a
    round in which the machine was slow does not count against whom it met."""
    means = [mean([t for times in one for t in times]) for one in by_round]
    overall = mean(means)
    return [
        [t * overall / m for one, m in zip(by_round, means, strict=True) for t in one[i]]
        for i in range(len(by_round[0]))
    ]


def _off(trace: dict[str, Any], what: str) -> float:
    said, was = trace[f"predicted_{what}_ms"], trace[f"{what}_ms"]
    return float(abs(said - was) / was)


def _spread(times: list[float]) -> list[float]:
    """How far equal requests are from their own median: who knew that beforehand would still miss by so much."""
    return [abs(median(times) - t) / t for t in times]


def _p95(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]


def _half(values: list[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return T_95.get(len(values), 2.2) * stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--placements", type=int, default=12)
    parser.add_argument(
        "--rounds", type=int, default=8, help="times that each placement is loaded and measured"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    why = refused() or (
        "" if Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists() else "no cgroup v1 of the cpu"
    )
    if why:
        raise SystemExit(f"this benchmark needs network namespaces and processor quotas: {why}")
    store = the_store()
    with tempfile.TemporaryDirectory() as work, running(Path(work), store.root.parent) as mesh:
        keys, table = asyncio.run(measure(mesh, args.placements, args.rounds, args.seed))
    wanted = {"tpot_error_p50": "<= 0.05", "tpot_error_p95": "<= 0.15", "chosen_is_best": "true"}
    for row in table:
        print(f"{row[0]:<60}" + "".join(f"{cell:>14}" for cell in row[1:]))
    print()
    rows = [("what", "value", "wanted")]
    rows += [(k, str(v), wanted.get(k, "")) for k, v in keys.items()]
    finish(rows, keys, args.json)


if __name__ == "__main__":
    main()
