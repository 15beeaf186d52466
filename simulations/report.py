"""What a run comes to: figures, series over time and the worst minute, as plain values."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from simulations.plots import Line, Plot
from simulations.run import Outcome
from simulations.scenario import time_ns
from simulations.world import Request, World

S, MS = 1_000_000_000, 1_000_000
_BUCKETS = 60
_WORST_NS = 60 * S
_STORY_MAX = 60


def figures(outcome: Outcome) -> dict[str, Any]:
    """The figures of a run by name; times in milliseconds. The same seed gives the same object."""
    world, requests = outcome.world, outcome.world.requests
    done = [r for r in requests if r.finished]
    stalls = sorted(us / 1000 for _, us in world.stalls_us())
    return {
        "scenario": outcome.scenario.name,
        "seed": outcome.seed,
        "seconds": round(world.loop.now_ns / S, 3),
        "nodes": len(world.specs),
        "requests": len(requests),
        "availability": round(len(done) / len(requests), 6) if requests else None,
        "tokens": sum(len(r.seen) for r in requests),
        "tokens_lost": sum(max(0, r.tokens - len(r.seen)) for r in done),
        "tokens_repeated": sum(max(0, len(r.seen) - r.tokens) for r in requests),
        "tokens_changed": sum(r.changed for r in requests),
        "ttft_ms_p50": _quantile([_ttft(r) for r in requests if r.seen], 50),
        "ttft_ms_p95": _quantile([_ttft(r) for r in requests if r.seen], 95),
        "tpot_ms_p50": _quantile([_tpot(r) for r in done if len(r.seen) > 1], 50),
        "tpot_ms_p95": _quantile([_tpot(r) for r in done if len(r.seen) > 1], 95),
        "stall_ms_p50": _quantile(stalls, 50),
        "stall_ms_p95": _quantile(stalls, 95),
        "stall_ms_max": round(stalls[-1], 3) if stalls else None,
        "failovers": dict(sorted(Counter(rung for rung, _ in world.stalls_us()).items())),
        "causes": dict(sorted(Counter(c for r in requests for c in r.causes).items())),
        "opened_elsewhere": sum(r.openings for r in requests),
        "resumed_elsewhere": sum(bool(r.resumed) for r in requests),
        "faults": dict(sorted(world.faults.items())),
        "failed": dict(Counter(_kind(r.error) for r in requests if r.error).most_common()),
        "moved_mib": round(world.network.bytes / (1 << 20), 1),
        "battery_wh": round(world.energy_wh, 2),
        "events": outcome.events,
        "event_log": event_log_digest(world),
        "violations": [f"{v.at_ns / S:.3f} s: {v.what}" for v in world.violations],
    }


def event_log(world: World) -> str:
    """Everything that happened, a line each: the same for the same seed, byte for byte."""
    lines = [f"{at} {what}" for at, what in world.events]
    for r in world.requests:
        lines.append(f"request {r.number} at {r.asked_ns} on {r.ingress}: {r.seen} {r.rungs} {r.error}")
    return "\n".join(lines) + "\n"


def event_log_digest(world: World) -> str:
    """SHA-256 of the event log."""
    return hashlib.sha256(event_log(world).encode()).hexdigest()


def series(outcome: Outcome) -> dict[str, Any]:
    """Over time, in buckets by when a request was asked, and in samples: instants in seconds."""
    world = outcome.world
    end = max(1, world.loop.now_ns)
    width = end / _BUCKETS
    buckets: list[list[Request]] = [[] for _ in range(_BUCKETS)]
    for r in world.requests:
        buckets[min(_BUCKETS - 1, int(r.asked_ns / width))].append(r)
    samples = world.samples
    return {
        "at_s": [round(width * (i + 0.5) / S, 3) for i in range(_BUCKETS)],
        "asked": [len(b) for b in buckets],
        "availability": [round(100 * sum(r.finished for r in b) / len(b), 3) if b else None for b in buckets],
        "ttft_ms_p95": [_quantile([_ttft(r) for r in b if r.seen], 95) for b in buckets],
        "tpot_ms_p95": [_quantile([_tpot(r) for r in b if len(r.seen) > 1], 95) for b in buckets],
        "failovers": [sum(len(r.rungs) for r in b) for b in buckets],
        "stall_ms_max": [max((us // 1000 for r in b for _, us in r.rungs), default=0) for b in buckets],
        "samples": {
            "at_s": [s.at_ns / S for s in samples],
            "nodes": [s.nodes for s in samples],
            "replicas": [s.replicas for s in samples],
            "running": [s.running for s in samples],
            "charge": [round(s.charge, 1) for s in samples],
            "drawn_wh": [round(s.energy_wh, 3) for s in samples],
            "moved_mib": [round(s.bytes / (1 << 20), 2) for s in samples],
        },
    }


def worst_minute(world: World) -> list[str]:
    """The story of the minute with the most trouble."""
    if not world.events:
        return []
    weights = [(at, 10 if "failed" in what or "VIOLATION" in what else 1) for at, what in world.events]
    best, begin, total, first = 0, weights[0][0], 0, 0
    for i, (at, weight) in enumerate(weights):
        total += weight
        while weights[first][0] < at - _WORST_NS:
            total -= weights[first][1]
            first += 1
        if total > best:
            best, begin = total, weights[first][0]
        del i
    told = [f"{at / S:10.3f} s  {what}" for at, what in world.events if begin <= at <= begin + _WORST_NS]
    return told[:_STORY_MAX]


def table(found: dict[str, Any]) -> str:
    """Figures for people."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        elif isinstance(value, list):
            value = "none" if not value else "\n" + "\n".join(f"    {v}" for v in value)
        lines.append(f"{key:18} {'-' if value is None else value}")
    return "\n".join(lines)


def comparison(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Figures of several runs side by side."""
    keys = [k for k, v in runs[0][1].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    head = f"{'':18}" + "".join(f"{name[-22:]:>24}" for name, _ in runs)
    rows = [f"{k:18}" + "".join(f"{_shown(found.get(k)):>24}" for _, found in runs) for k in keys]
    return "\n".join([head, *rows])


def sweep_plots(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[Plot]:
    """Availability and stalls over the last axis, a line for each value of the others."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{a} {row[a]}" for a in axes[:-1])
        lines.setdefault(name, []).append(row)

    def plot(title: str, key: str, factor: float, top: float) -> Plot:
        drawn = []
        for name, members in lines.items():
            values = [None if m[key] is None else m[key] * factor for m in members]
            drawn.append(Line(name, [_number(m[axes[-1]], i) for i, m in enumerate(members)], values))
        return Plot(title, tuple(drawn), top, axes[-1])

    return [
        plot("answered in full, % of requests", "availability", 100, 100),
        plot("stall of a recovery, p95, ms", "stall_ms_p95", 1, 0),
    ]


def sweep_answer(rows: Sequence[dict[str, Any]], axes: Sequence[str], wanted: float = 0.9995) -> str:
    """How far the last axis may go before less than ``wanted`` of the requests are answered, for each of the others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{a} {row[a]}" for a in axes[:-1]), []).append(row)
    said = []
    for name, members in groups.items():
        holds = [m[axes[-1]] for m in members if (m["availability"] or 0) >= wanted]
        which = f" with {name}" if name else ""
        what = f"{axes[-1]} {', '.join(holds)}" if holds else f"no {axes[-1]} tried"
        said.append(f"{100 * wanted:g} % hold{which} at {what}.")
    return " ".join(said)


def _number(text: str, place: int) -> float:
    """A value of an axis: a number or a time in seconds, else its place."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return time_ns(text) / S
    except ValueError:
        return float(place)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _ttft(r: Request) -> float:
    return (r.seen[0][1] - r.asked_ns) / MS


def _tpot(r: Request) -> float:
    return (r.seen[-1][1] - r.seen[0][1]) / (len(r.seen) - 1) / MS


def _kind(error: str) -> str:
    return error.split(":")[0].split(";")[0][:80]


def _quantile(values: list[float], percent: int) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)], 3)
