"""Pages that need nothing else: a run, several runs side by side, a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from simulations.plots import Plot, plots_of, svg
from simulations.report import figures, series, worst_minute
from simulations.run import Outcome

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1em;color:#222}"
    "h1{font-size:1.5em;margin:0}h2{font-size:1.05em;margin:1.4em 0 .3em}h2 span{margin-left:1em;font-weight:400}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(640px,1fr));gap:0 2em}"
    "table{border-collapse:collapse}td,th{padding:.1em 1.2em .1em 0;vertical-align:top;text-align:left}"
    "td:first-child{color:#666}pre{background:#f5f5f2;padding:1em;overflow:auto;font-size:13px}"
    ".big{display:flex;gap:3em;margin:1em 0}.big b{display:block;font-size:1.9em;font-weight:600}"
    ".bad{color:#b3261e}svg text{font:11px system-ui,sans-serif;fill:#666}"
)


def page(outcome: Outcome) -> str:
    """One run: figures, plots, the worst minute."""
    found = figures(outcome)
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{_cell(v)}</td></tr>" for k, v in found.items())
    story = "\n".join(worst_minute(outcome.world))
    available = found["availability"]
    bad = ' class="bad"' if found["violations"] else ""
    return _whole(
        f"{found['scenario']}, seed {found['seed']}",
        f"<p>{escape(outcome.scenario.about)}</p><div class='big'>"
        f"<div><b>{'-' if available is None else f'{100 * available:.3f} %'}</b>answered in full</div>"
        f"<div><b>{found['tokens_lost']} / {found['tokens_repeated']} / {found['tokens_changed']}</b>"
        "tokens lost, repeated, changed</div>"
        f"<div><b>{sum(found['failovers'].values())}</b>failovers</div>"
        f"<div><b{bad}>{len(found['violations'])}</b>violations</div></div>"
        f"{_drawn(plots_of([('', series(outcome))]))}<h2>The worst minute</h2><pre>{escape(story)}</pre>"
        f"<h2>Figures</h2><table>{rows}</table>",
    )


def comparison_page(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Several runs in the same plots; each is what ``mesh simulate --json`` printed."""
    names = [name for name, _ in runs]
    keys = [k for k in runs[0][1] if k not in ("over_time", "event_log")]
    rows = [[k, *(_cell(found.get(k)) for _, found in runs)] for k in keys]
    plots = plots_of([(n, f["over_time"]) for n, f in runs])
    return _whole(" against ".join(names), f"{_drawn(plots)}<h2>Figures</h2>{_table(['', *names], rows)}")


def sweep_page(title: str, rows: Sequence[dict[str, Any]], plots: Sequence[Plot], answer: str) -> str:
    """The table and the plots that one takes to a meeting, and what they say in a sentence."""
    table = _table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])
    return _whole(title, f"<p>{escape(answer)}</p>{_drawn(plots)}<h2>Figures</h2>{table}")


def _whole(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{body}</html>\n"
    )


def _drawn(plots: Sequence[Plot]) -> str:
    return f"<div class='plots'>{''.join(map(svg, plots))}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(h)}</th>" for h in head)
    rest = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{rest}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{k} {v}" for k, v in value.items()) or "none")
    if isinstance(value, list):
        return escape("; ".join(map(str, value)) or "none")
    return escape("-" if value is None else str(value))
