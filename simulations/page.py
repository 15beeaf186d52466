"""A run as one HTML page that needs nothing else: figures, plots drawn as SVG, the worst minute."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from simulations.report import figures, series, worst_minute
from simulations.run import Outcome

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 150, 52, 22
_COLOURS = ("#1f6f8b", "#c8553d")
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1em;color:#222}"
    "h1{font-size:1.5em;margin:0}h2{font-size:1.05em;margin:1.4em 0 .3em}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(640px,1fr));gap:0 2em}"
    "table{border-collapse:collapse}td{padding:.1em 1.2em .1em 0;vertical-align:top}"
    "td:first-child{color:#666}pre{background:#f5f5f2;padding:1em;overflow:auto;font-size:13px}"
    ".big{display:flex;gap:3em;margin:1em 0}.big b{display:block;font-size:1.9em;font-weight:600}"
    ".bad{color:#b3261e}svg text{font:11px system-ui,sans-serif;fill:#666}"
)


def page(outcome: Outcome) -> str:
    """The whole page."""
    found, over = figures(outcome), series(outcome)
    samples, at = over["samples"], over["at_s"]
    share = [
        100.0 * w / a if a else None for w, a in zip(over["answered_in_full"], over["asked"], strict=True)
    ]
    plots = [
        plot("answered in full, % of requests", at, [("", share)], 100),
        plot("requests asked", at, [("", over["asked"])]),
        plot("nodes up", samples["at_s"], [("", samples["nodes"])], len(outcome.world.specs)),
        plot("sessions running", samples["at_s"], [("", samples["running"])]),
        plot("failovers", at, [("", over["failovers"])]),
        plot("longest stall of a recovery, ms", at, [("", over["stall_ms_max"])]),
        plot("moved over the network, MiB", samples["at_s"], [("", samples["moved_mib"])]),
    ]
    if any(c < 100 for c in samples["charge"]):
        plots.append(plot("mean charge, %", samples["at_s"], [("", samples["charge"])], 100))
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{_cell(v)}</td></tr>" for k, v in found.items())
    story = "\n".join(worst_minute(outcome.world))
    available = found["availability"]
    bad = ' class="bad"' if found["violations"] else ""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(found['scenario'])}</title>"
        f"<style>{_STYLE}</style><h1>{escape(found['scenario'])}, seed {found['seed']}</h1>"
        f"<p>{escape(outcome.scenario.about)}</p><div class='big'>"
        f"<div><b>{'-' if available is None else f'{100 * available:.3f} %'}</b>answered in full</div>"
        f"<div><b>{found['tokens_lost']} / {found['tokens_repeated']} / {found['tokens_changed']}</b>"
        "tokens lost, repeated, changed</div>"
        f"<div><b>{sum(found['failovers'].values())}</b>failovers</div>"
        f"<div><b{bad}>{len(found['violations'])}</b>violations</div></div>"
        f"<div class='plots'>{''.join(plots)}</div><h2>The worst minute</h2><pre>{escape(story)}</pre>"
        f"<h2>Figures</h2><table>{rows}</table></html>\n"
    )


def plot(
    title: str, at: Sequence[float], lines: Sequence[tuple[str, Sequence[float | None]]], top: float = 0.0
) -> str:
    """A line plot; ``None`` is a gap. ``top``: the least that the axis reaches."""
    most = max([top, *(v for _, values in lines for v in values if v is not None)], default=0.0) or 1.0
    end = max(at, default=1.0) or 1.0
    drawn = []
    for number, (name, values) in enumerate(lines):
        points = [
            f"{_x(t, end):.1f},{_y(v, most):.1f}" for t, v in zip(at, values, strict=True) if v is not None
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        drawn.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{' '.join(points)}'>"
            f"<title>{escape(name)}</title></polyline>"
        )
    base = _HEIGHT - _BOTTOM
    axis = (
        f"<path d='M{_LEFT} 8V{base}H{_WIDTH}' fill='none' stroke='#ccc'/>"
        f"<text x='{_LEFT - 6}' y='14' text-anchor='end'>{most:g}</text>"
        f"<text x='{_LEFT - 6}' y='{base}' text-anchor='end'>0</text>"
        f"<text x='{_LEFT}' y='{_HEIGHT - 6}'>0</text>"
        f"<text x='{_WIDTH}' y='{_HEIGHT - 6}' text-anchor='end'>{end:.0f} s</text>"
    )
    return (
        f"<div><h2>{escape(title)}</h2><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img' "
        f"aria-label='{escape(title)}'>{axis}{''.join(drawn)}</svg></div>"
    )


def _x(t: float, end: float) -> float:
    return _LEFT + (_WIDTH - _LEFT) * t / end


def _y(value: float, most: float) -> float:
    base = _HEIGHT - _BOTTOM
    return base - (base - 8) * value / most


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{k} {v}" for k, v in value.items()) or "none")
    if isinstance(value, list):
        return escape("; ".join(map(str, value)) or "none")
    return escape("-" if value is None else str(value))
