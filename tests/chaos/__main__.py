"""Trials: a fault in mid-answer, and what the reader of the stream saw of it.

Every trial streams a completion whose undisturbed text is known, and breaks an agent of its route when a
token drawn at random has come. The stall is the longest gap that the reader saw less the median gap.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from mesh.forms import parse_form
from tests.benchmarks.common import prompt_ids, quantile, the_store
from tests.chaos.client import Stream, ask, resume
from tests.chaos.faults import KINDS, NEED_A_LAN, VICTIMS, break_, mend, victims
from tests.chaos.fleet import INGRESSES, Fleet, fleet

PROMPTS = (60, 150, 300, 520, 680)
ANSWER = 220
AFTER = 24
"""Tokens that come after a fault, at least."""
FORM = "litert-int8"
"""Of the shards: where thirteen agents share two cores, LiteRT's threads get in each other's way less than ONNX Runtime's, and a
step takes half the time. A replay that need not be exact is prefill, at which ``int8`` is twice as quick as ``int4``."""
LOAD_TOKENS = 60
LOADED_EVERY = 4
"""One trial of so many runs beside other sessions, where there are to be any. Those and the others go through all cells of
mode, fault and victim, each on their own."""
SATURATING = 8
PROGRESS_S = 30
SETTLE_S = 12.0
"""Links that the last fault left half open are found by gRPC's keepalive within this."""
READ_TIMEOUT_S = 2.0
RESUME_WITHIN_S = 30.0


@dataclass
class Trial:
    """One fault and what came of it."""

    mode: str
    kind: str
    victim: str
    prompt: int
    so_far: int
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    failed: str = ""
    identical: bool = False
    stall_ms: float = 0.0
    detect_ms: float = 0.0
    rungs: tuple[str, ...] = ()
    loaded: bool = False

    @property
    def bound_ms(self) -> float:
        """What a kill in this mode may take: detection is no part of it."""
        if self.mode == "hot":
            return 50
        if self.mode == "exact":
            return 60 + self.prompt / 4 + 2.5 * (self.so_far - self.prompt)
        return 60 + self.so_far / 4


def judge(trial: Trial, seen: Stream, calm: list[str], mode: str) -> None:
    """Hold what came against the undisturbed text."""
    trial.failed = seen.error
    shown = int(trial.so_far - trial.prompt)
    trial.lost = max(0, len(calm) - len(seen.tokens)) if not seen.error else 0
    trial.repeated = max(0, len(seen.tokens) - len(calm))
    # What was shown before the fault must be what would have been; in an exact replay all of it.
    upto = shown if mode == "fast" else len(calm)
    trial.changed = sum(a != b for a, b in zip(seen.tokens[:upto], calm[:upto], strict=False))
    trial.identical = seen.tokens == calm
    trial.stall_ms = seen.stall_ms()


class Load:
    """Other sessions, one after the other, from a few clients."""

    def __init__(self, fleet: Fleet, clients: int, prompt: list[int]) -> None:
        self._stop = threading.Event()
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(fleet, prompt[: 20 + 10 * i])) for i in range(clients)
        ]

    def _run(self, fleet: Fleet, prompt: list[int]) -> None:
        while not self._stop.is_set():
            seen = ask(fleet.agents["exact"].api, prompt, LOAD_TOKENS)
            if seen.error:
                self.errors.append(seen.error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@dataclass
class Outcome:
    """All trials, and how often a session left its route while nothing was broken."""

    trials: list[Trial]
    false_failovers: int
    form: str


def run(
    trials: int,
    seed: int,
    clients: int,
    only: dict[str, str],
    stages: int = 5,
    keep: Path | None = None,
    saturation_s: float = 0,
    answer: int = ANSWER,
    prompts: tuple[int, ...] = PROMPTS,
    form: str = FORM,
    loaded_every: int = LOADED_EVERY,
    shared: bool = False,
) -> Outcome:
    """All trials, one after the other, on one fleet; ``clients`` others ask during every ``loaded_every``th.
    Then, for a while, as many sessions as there are slots, and no fault. ``form``: of the shards; ``shared``: sessions begin
    with what others computed, which no hop log holds."""
    rng = Random(seed)
    store = the_store()
    text = prompt_ids(store, max(PROMPTS))
    done: list[Trial] = []
    with ExitStack() as stack:
        settings = {"prefix_cache": "auto" if shared else "off"}
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = stack.enter_context(fleet(store, folder, stages, parse_form(form), settings))
        kinds = [k for k in KINDS if running.lan is not None or k not in NEED_A_LAN]
        if running.lan is None:
            sys.stderr.write("no network namespaces: no partitions and no cut streams\n")
        calm = {p: _calm(running, text[:p], answer) for p in prompts}
        plans = [(m, k, v) for m in INGRESSES for k in kinds for v in VICTIMS]
        plans = [
            p
            for p in plans
            if all(only.get(n, x) == x for n, x in zip(("mode", "kind", "victim"), p, strict=True))
        ]
        ahead: dict[bool, list[tuple[str, str, str]]] = {False: [], True: []}
        for i in range(trials):
            loaded = clients > 0 and i % loaded_every == loaded_every - 1
            if not ahead[loaded]:
                ahead[loaded] = rng.sample(plans, len(plans))
            mode, kind, victim = ahead[loaded].pop()
            with Load(running, clients if loaded else 0, text):
                trial = _try(running, mode, kind, victim, text, calm, rng)
            trial.loaded = loaded
            done.append(trial)
            sys.stderr.write(_line(i + 1, trials, trial) + "\n")
        return Outcome(done, _saturate(running, text, saturation_s), form)


def _saturate(running: Fleet, text: list[int], seconds: float) -> int:
    """Failovers while every slot is wanted and nothing is broken."""
    if seconds:
        time.sleep(SETTLE_S)
    before, begin = running.failovers(), time.monotonic()
    with Load(running, SATURATING if seconds else 0, text):
        while (left := seconds - (time.monotonic() - begin)) > 0:
            sys.stderr.write(f"saturated, {left:.0f} s left, {running.failovers() - before} failovers\n")
            time.sleep(min(PROGRESS_S, left))
    return running.failovers() - before


def _calm(running: Fleet, prompt: list[int], answer: int) -> list[str]:
    seen = ask(running.agents["exact"].api, prompt, answer)
    if seen.error or len(seen.tokens) != answer:
        raise SystemExit(f"the undisturbed answer failed: {seen.error or len(seen.tokens)}")
    return seen.tokens


def _try(
    running: Fleet,
    mode: str,
    kind: str,
    victim: str,
    text: list[int],
    calm: dict[int, list[str]],
    rng: Random,
) -> Trial:
    prompt = rng.choice(list(calm))
    answer = len(calm[prompt])
    at = rng.randrange(4, answer - AFTER)
    trial = Trial(mode, kind, victim, prompt, prompt + at)
    broken: list[str] = []

    def fault(session: str) -> None:
        broken.extend(victims(running, mode, session, victim))
        break_(running, kind, broken)

    patience = READ_TIMEOUT_S if victim == "ingress" else 90
    seen = ask(running.agents[mode].api, text[:prompt], answer, at, fault, timeout_s=patience)
    if victim == "ingress":
        # Its reader turns to the other one; a freeze or a pulled cable it has to notice first. That one brings sessions back as
        # it is told itself: a text that is to be exact goes on where they are.
        other = {"exact": "hot", "fast": "exact", "hot": "exact"}[mode]
        until = time.monotonic() + RESUME_WITHIN_S
        while seen.last_id and not seen.finish and time.monotonic() < until:
            resume(running.agents[other].api, seen)
            time.sleep(0.05)
        mode = other if mode != "fast" else mode  # what began in large chunks need not be exact from there on
    judge(trial, seen, calm[prompt], mode)
    if seen.session and victim != "ingress":
        recoveries = running.session(mode, seen.session)["recoveries"]
        trial.rungs = tuple(r["rung"] for r in recoveries)
        trial.detect_ms = max(0.0, trial.stall_ms - sum(r["stalled_ms"] for r in recoveries))
    mend(running, kind, broken)
    return trial


def _line(number: int, count: int, t: Trial) -> str:
    verdict = t.failed or f"lost {t.lost} repeated {t.repeated} changed {t.changed}"
    same = "identical" if t.identical else "differs"
    return (
        f"{number:4}/{count} {t.mode:5} {t.kind:9} {t.victim:6} {t.prompt:4}+{t.so_far - t.prompt:<4} "
        f"stall {t.stall_ms:7.0f} ms (bound {t.bound_ms:4.0f}, seen after {t.detect_ms:4.0f}) "
        f"{'/'.join(t.rungs) or 'untouched':10} {verdict} {same}"
    )


def summary(outcome: Outcome) -> dict[str, Any]:
    """The figures, by the names under which they are asked for."""
    trials = outcome.trials
    kills = [
        t
        for t in trials
        if t.kind == "kill" and t.victim not in ("two", "ingress") and not t.failed and not t.loaded
    ]
    frozen = [t for t in trials if t.kind in ("freeze", "partition") and not t.failed and t.rungs]
    exact = [t for t in trials if t.mode != "fast"]
    hot = [t.stall_ms for t in kills if t.mode == "hot"]

    def over(mode: str, of: Callable[[list[float]], float] = median) -> float | None:
        ratios = [t.stall_ms / t.bound_ms for t in kills if t.mode == mode]
        return round(of(ratios), 3) if ratios else None

    return {
        "trials": len(trials),
        "least_calm_trials_of_a_cell": min(
            Counter((t.mode, t.kind, t.victim) for t in trials if not t.loaded).values(), default=0
        ),
        "tokens_lost": sum(t.lost for t in trials),
        "tokens_repeated": sum(t.repeated for t in trials),
        "tokens_changed": sum(t.changed for t in trials),
        "generations_failed": sum(bool(t.failed) for t in trials),
        "identical_exact": round(sum(t.identical for t in exact) / len(exact), 4) if exact else None,
        "stall_ms_p50_hot": round(median(hot), 1) if hot else None,
        "stall_over_bound_p50_warm_fast": over("fast"),
        "stall_over_bound_p50_warm_exact": over("exact"),
        "stall_over_bound_p95": {mode: over(mode, partial(quantile, percent=95)) for mode in INGRESSES},
        "freeze_detect_ms_p50": round(median(t.detect_ms for t in frozen), 1) if frozen else None,
        "stall_loaded_over_calm_p50": _loaded_over_calm(trials),
        "stall_loaded_over_calm_by_mode": {
            mode: _loaded_over_calm([t for t in trials if t.mode == mode]) for mode in INGRESSES
        },
        "false_failovers": outcome.false_failovers,
        "form": outcome.form,
    }


def _loaded_over_calm(trials: list[Trial]) -> float | None:
    """Stalls beside other sessions over those without, each against its bound and its own group."""
    groups: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for t in trials:
        if not t.failed and t.rungs and t.victim not in ("two", "ingress"):
            groups.setdefault((t.mode, t.kind), ([], []))[t.loaded].append(t.stall_ms / t.bound_ms)
    ratios = [r / median(calm) for calm, loaded in groups.values() if calm for r in loaded]
    return round(median(ratios), 3) if ratios else None


def table(trials: list[Trial]) -> str:
    """Stalls by mode, fault and victim."""
    lines = [f"{'mode':6} {'fault':10} {'victim':7} {'n':>3} {'p50':>7} {'p95':>7} {'max':>7} ms   rungs"]
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for t in trials:
        groups.setdefault((t.mode, t.kind, t.victim), []).append(t)
    for (mode, kind, victim), members in sorted(groups.items()):
        stalls = [t.stall_ms for t in members]
        p95 = quantile(stalls, 95)
        rungs = Counter(r for t in members for r in (t.rungs or ("untouched",)))
        said = ", ".join(f"{k} {v}" for k, v in rungs.most_common())
        lines.append(
            f"{mode:6} {kind:10} {victim:7} {len(members):3} {median(stalls):7.0f} {p95:7.0f} {max(stalls):7.0f}      {said}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--form", default=FORM, help="of the shards, as onnx-int8")
    parser.add_argument("--clients", type=int, default=3, help="others that ask, in one trial of a few")
    parser.add_argument("--loaded-every", type=int, default=LOADED_EVERY, help="of how many")
    parser.add_argument(
        "--saturation", type=float, default=0, help="seconds of full load without a fault, at the end"
    )
    parser.add_argument("--shared", action="store_true", help="sessions begin with what others computed")
    parser.add_argument("--mode", choices=INGRESSES)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--victim", choices=VICTIMS)
    parser.add_argument("--keep", type=Path, help="folder for the agents' data and logs")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    said = parser.parse_args()
    if said.loaded_every < 1:
        parser.error(f"--loaded-every {said.loaded_every}: one of how many is 1 or more")
    only = {n: getattr(said, n) for n in ("mode", "kind", "victim") if getattr(said, n)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the network is taken down as well
    outcome = run(
        said.trials,
        said.seed,
        said.clients,
        only,
        said.stages,
        said.keep,
        said.saturation,
        form=said.form,
        loaded_every=said.loaded_every,
        shared=said.shared,
    )
    print(table(outcome.trials))
    figures = summary(outcome)
    print(json.dumps(figures) if said.json else "\n".join(f"{k:34} {v}" for k, v in figures.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
