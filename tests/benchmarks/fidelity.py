"""Whether the simulator tells the truth: kills on real processes, and the same kills in virtual time.

    python -m tests.benchmarks.fidelity --json

Both run the same trials: a prompt, and a stage killed at a token drawn beforehand. Before each of them the real fleet
answers another prompt undisturbed: what its stages took for a layer and a position, and what was left for a hop, is all
that the simulator is given, with what a shard takes that computes step after step. Compared are medians of the time per token, and of the stall against what its replay has to compute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from node_agent.adapters.model_store import ModelStore
from node_agent.ports import Runtime
from simulations.run import Run
from simulations.scenario import Scenario, read_scenario
from simulations.virtual_time import VirtualLoop
from simulations.world import Request
from tests.benchmarks.common import load, prompt_ids, the_store
from tests.chaos.client import ask
from tests.chaos.faults import break_, mend, victims
from tests.chaos.fleet import LAYERS, REPLICAS, Fleet, cuts, fleet

CALM = 100
"""Prompt of the undisturbed answers, one chunk: what is told of a stage's first run is of the whole prompt."""
LATE = 500
"""A position far into a text: steps there take longer."""
PROMPTS = (60, 150, 300, 520)
ANSWER, AFTER = 120, 20
VICTIMS = ("first", "middle", "last")
FORM = ("onnx", "int8")
STAGES = 3


@dataclass(frozen=True)
class Plan:
    """One trial, of both."""

    prompt: int
    at: int
    victim: str


@dataclass
class Seen:
    """What a reader saw of a trial, milliseconds."""

    plan: Plan
    tpot_ms: float
    stall_ms: float
    rung: str


def drawn(trials: int, seed: int) -> list[Plan]:
    """The trials."""
    rng = Random(seed)
    return [
        Plan(rng.choice(PROMPTS), rng.randrange(8, ANSWER - AFTER), VICTIMS[i % len(VICTIMS)])
        for i in range(trials)
    ]


def gaps_of(times: Sequence[float], since: float) -> tuple[float, float]:
    """Median gap between tokens, and the longest gap after ``since`` less that."""
    gaps = [b - a for a, b in pairwise(times) if b > a]
    late = [b - a for a, b in pairwise(times) if b >= since]
    usual = median(gaps)
    return usual, max(late, default=0.0) - usual


# -- real ----------------------------------------------------------------------------------------


def calm(running: Fleet, text: list[int]) -> dict[str, float]:
    """Microseconds of a model at speed 1, and of one way over a hop, from an undisturbed answer."""
    layers = [end - start for start, end in cuts(STAGES)]
    seen = ask(running.agents["exact"].api, text[:CALM], ANSWER)
    told = running.session("exact", seen.session)
    compute = [1000 * s["compute_ms"] for s in told["stages"]]
    layer_us = sum(compute[:-1]) / sum(layers[:-1])
    first = [1000 * s["first_compute_ms"] for s in told["stages"]]
    return {
        "layer_us": layer_us,
        "head_us": max(1.0, compute[-1] - layers[-1] * layer_us),
        "prefill_us": sum(first[:-1]) / sum(layers[:-1]) / CALM,
        "hop_us": (1000 * told["tpot_ms"] - sum(compute)) / (STAGES + 1),
    }


def bare_us(shard: Runtime, position: int, positions: int = 1) -> float:
    """Of a layer and a position, of a run right after another one, microseconds."""
    rows = np.zeros((positions, shard.info.model.width), dtype=np.float32)
    times = []
    for _ in range(30 if positions == 1 else 6):
        begin = time.perf_counter()
        shard.prefill(0, position, rows)
        times.append(time.perf_counter() - begin)
    return 1e6 * median(times) / len(shard.info.layers) / positions


def rates_of(running: Fleet, bare: Runtime, text: list[int]) -> dict[str, float]:
    """All that the simulator is given, as it is now."""
    found, middle = calm(running, text), CALM + ANSWER // 2
    first, usual, late = (bare_us(bare, at) for at in (1, middle, LATE))
    found["again"] = min(1.0, usual / found["layer_us"])
    found["context_us"] = max(0.0, (late - first) / LATE)
    early, deep = (bare_us(bare, at, CALM) for at in (0, LATE))
    found["prefill_context_us"] = max(0.0, (deep - early) / LATE)
    found["layer_us"] = max(1.0, found["layer_us"] - middle * found["context_us"])
    return found


def real(
    store: ModelStore, running: Fleet, text: list[int], plans: Sequence[Plan]
) -> tuple[list[Seen], dict[str, float]]:
    """The trials on processes, and what is measured between them: the machine is not as fast at all times."""
    done, rates, bare = [], list[dict[str, float]](), load(store, STAGES, "int8")[1]
    for number, plan in enumerate(plans, 1):
        broken: list[str] = []

        def fault(session: str, plan: Plan = plan, broken: list[str] = broken) -> None:
            broken.extend(victims(running, "exact", session, plan.victim))
            break_(running, "kill", broken)

        rates.append(rates_of(running, bare, text))
        seen = ask(running.agents["exact"].api, text[: plan.prompt], ANSWER, plan.at, fault)
        if seen.error:
            raise SystemExit(f"a trial failed: {seen.error}")
        rungs = [r["rung"] for r in running.session("exact", seen.session)["recoveries"]]
        usual, stall = gaps_of(seen.times, seen.fault_at)
        done.append(Seen(plan, usual * 1000, stall * 1000, "/".join(rungs)))
        sys.stderr.write(f"{number}/{len(plans)} {done[-1]}\n")
        mend(running, "kill", broken)
    return done, {k: median(r[k] for r in rates) for k in rates[0]}


# -- simulated -----------------------------------------------------------------------------------


def scenario_of(rates: dict[str, float]) -> Scenario:
    """The fleet as a scenario; nobody asks by himself."""
    hop_us = max(1, int(rates["hop_us"]))
    return read_scenario(
        f"""
name = "fidelity"
time = "10h"
[model]
cuts = [{", ".join(str(start) for start, _ in cuts(STAGES)[1:])}]
layer_us = {rates["layer_us"]}
head_us = {rates["head_us"]}
prefill_us = {rates["prefill_us"]}
context_us = {rates["context_us"]}
prefill_context_us = {rates["prefill_context_us"]}
again = {rates["again"]}
[radio]
latency = "{hop_us}us"
jitter = "0ns"
[[nodes]]
kind = "gateway"
hosts = false
[[nodes]]
kind = "host"
count = {STAGES * REPLICAS}
ingress = false
""",
        "fidelity",
    )


def simulated(rates: dict[str, float], plans: Sequence[Plan]) -> list[Seen]:
    """The same trials in virtual time."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        made = Run(scenario_of(rates), 1, loop, lambda share: None, quiet=False)
        found = loop.run_until_complete(_trials(made, plans))
        loop.wind_up()
        return found
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _trials(made: Run, plans: Sequence[Plan]) -> list[Seen]:
    world, rng = made.world, Random(1)
    for name in made.kinds:
        world.start(name)
    await asyncio.sleep(10)
    done = []
    for plan in plans:
        prompt = tuple(rng.randrange(1, world.shape.vocabulary) for _ in range(plan.prompt))
        request = world.ask("gateway-1", prompt, ANSWER)
        while len(request.seen) < plan.at:
            await asyncio.sleep(0.0005)
        fault_ns, name = world.loop.now_ns, _victim(made, plan.victim)
        world.crash(name)
        while not (request.finished or request.error):
            await asyncio.sleep(0.01)
        done.append(_seen(plan, request, fault_ns))
        await asyncio.sleep(3)
        world.start(name)
        await asyncio.sleep(5)
    return done


def _victim(made: Run, victim: str) -> str:
    row = made.world.nodes["gateway-1"].driver.report()[-1]["route"]
    place = {"first": 0, "middle": (len(row) - 1) // 2, "last": len(row) - 1}[victim]
    return str(row[place]["node"])


def _seen(plan: Plan, request: Request, fault_ns: int) -> Seen:
    if request.error:
        raise SystemExit(f"a simulated trial failed: {request.error}")
    usual, stall = gaps_of([at / 1e6 for _, at in request.seen], fault_ns / 1e6)
    return Seen(plan, usual, stall, "/".join(rung for rung, _ in request.rungs))


# -- both ----------------------------------------------------------------------------------------


def summary(ours: Sequence[Seen], theirs: Sequence[Seen]) -> dict[str, Any]:
    """Relative errors of the simulated medians, stalls by rung; the worst rung with at least three trials counts."""
    tpot = median(s.tpot_ms for s in theirs) / median(s.tpot_ms for s in ours) - 1
    by_rung: dict[str, float] = {}
    for rung, count in Counter(s.rung for s in ours).items():
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.rung == b.rung == rung]
        if count >= 3 and pairs:
            by_rung[rung] = median(b.stall_ms for _, b in pairs) / median(a.stall_ms for a, _ in pairs) - 1
    return {
        "trials": len(ours),
        "tpot_ms_real": round(median(s.tpot_ms for s in ours), 2),
        "tpot_ms_simulated": round(median(s.tpot_ms for s in theirs), 2),
        "stall_ms_real": round(median(s.stall_ms for s in ours), 1),
        "stall_ms_simulated": round(median(s.stall_ms for s in theirs), 1),
        "same_rung": round(sum(a.rung == b.rung for a, b in zip(ours, theirs, strict=True)) / len(ours), 3),
        "tpot_error": round(abs(tpot), 4),
        "stall_error_by_rung": {k: round(v, 4) for k, v in sorted(by_rung.items())},
        "stall_error": round(max((abs(v) for v in by_rung.values()), default=1.0), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fidelity", description=__doc__)
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=3)
    said = parser.parse_args()
    store, plans = the_store(), drawn(said.trials, said.seed)
    text = prompt_ids(store, max(PROMPTS))
    with tempfile.TemporaryDirectory() as folder, fleet(store, Path(folder), STAGES, FORM, {}) as running:
        ours, rates = real(store, running, text, plans)
    print("measured:", {k: round(v, 2) for k, v in rates.items()}, f"({LAYERS} layers)")
    theirs = simulated(rates, plans)
    print(f"{'prompt':>6} {'at':>4} {'victim':7} {'real ms':>9} {'simulated':>9}  rungs")
    for a, b in zip(ours, theirs, strict=True):
        p = a.plan
        print(f"{p.prompt:6} {p.at:4} {p.victim:7} {a.stall_ms:9.0f} {b.stall_ms:9.0f}  {a.rung} | {b.rung}")
    result = summary(ours, theirs)
    print(json.dumps(result) if said.json else "\n".join(f"{k:22} {v}" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
