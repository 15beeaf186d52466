"""Line plots as values, and as SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 150, 52, 22
COLOURS = ("#1f6f8b", "#c8553d", "#6a8d2f", "#8a5aa8", "#b8860b", "#555555")


@dataclass(frozen=True, slots=True)
class Line:
    """Values at the instants ``at``; ``None`` is a gap."""

    name: str
    at: Sequence[float]
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """``top``: the least that the axis reaches. ``unit`` of what goes to the right; seconds of virtual time."""

    title: str
    lines: tuple[Line, ...]
    top: float = 0.0
    unit: str = "s"

    @property
    def most(self) -> float:
        """Where the upward axis ends."""
        values = [v for line in self.lines for v in line.values if v is not None]
        return max([self.top, *values], default=0.0) or 1.0

    @property
    def end(self) -> float:
        """Where the axis to the right ends."""
        return max((t for line in self.lines for t in line.at), default=1.0) or 1.0


def plots_of(runs: Sequence[tuple[str, dict[str, Any]]]) -> list[Plot]:
    """What happened over time, of one run or of several in the same plots; each is a ``report.series``."""

    def plot(title: str, key: str, top: float = 0.0) -> Plot:
        return Plot(title, tuple(Line(n, r["at_s"], r[key]) for n, r in runs), top)

    def sampled(title: str, key: str, top: float = 0.0) -> Plot:
        return Plot(title, tuple(Line(n, r["samples"]["at_s"], r["samples"][key]) for n, r in runs), top)

    plots = [
        plot("answered in full, % of requests", "availability", 100),
        plot("requests asked", "asked"),
        plot("time to the first token, p95, ms", "ttft_ms_p95"),
        plot("time per output token, p95, ms", "tpot_ms_p95"),
        plot("failovers", "failovers"),
        plot("longest stall of a recovery, ms", "stall_ms_max"),
        sampled("nodes up", "nodes"),
        sampled("replicas that serve", "replicas"),
        sampled("sessions running", "running"),
        sampled("moved over the network, MiB", "moved_mib"),
    ]
    if any(c < 100 for _, r in runs for c in r["samples"]["charge"]):
        plots += [
            sampled("mean charge, %", "charge", 100),
            sampled("drawn from batteries, Wh", "drawn_wh"),
        ]
    return plots


def svg(plot: Plot) -> str:
    """One plot, with its title."""
    most, end, base = plot.most, plot.end, _HEIGHT - _BOTTOM
    drawn, names = [], []
    for number, line in enumerate(plot.lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [
            f"{_x(t, end):.1f},{_y(v, most):.1f}"
            for t, v in zip(line.at, line.values, strict=True)
            if v is not None
        ]
        drawn.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{' '.join(points)}'>"
            f"<title>{escape(line.name)}</title></polyline>"
        )
        if len(plot.lines) > 1:
            names.append(f"<span style='color:{colour}'>{escape(line.name)}</span>")
    axis = (
        f"<path d='M{_LEFT} 8V{base}H{_WIDTH}' fill='none' stroke='#ccc'/>"
        f"<text x='{_LEFT - 6}' y='14' text-anchor='end'>{most:.4g}</text>"
        f"<text x='{_LEFT - 6}' y='{base}' text-anchor='end'>0</text>"
        f"<text x='{_LEFT}' y='{_HEIGHT - 6}'>0</text>"
        f"<text x='{_WIDTH}' y='{_HEIGHT - 6}' text-anchor='end'>{end:.4g} {escape(plot.unit)}</text>"
    )
    return (
        f"<div><h2>{escape(plot.title)} {' '.join(names)}</h2>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img' "
        f"aria-label='{escape(plot.title)}'>{axis}{''.join(drawn)}</svg></div>"
    )


def _x(t: float, end: float) -> float:
    return _LEFT + (_WIDTH - _LEFT) * t / end


def _y(value: float, most: float) -> float:
    base = _HEIGHT - _BOTTOM
    return base - (base - 8) * value / most
