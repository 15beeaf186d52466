"""How commands show things: progress bars and tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from node_agent.adapters.model_store import Progress

_BIG = 1 << 16


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on a terminal's standard error; a line at start and end of each task elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    if not console.is_terminal:

        def lines(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = TaskID(0)
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield lines
        return

    class Amount(MofNCompleteColumn):
        """Bytes for large totals, counts for small ones."""

        def render(self, task: Any) -> Any:
            return DownloadColumn().render(task) if (task.total or 0) > _BIG else super().render(task)

    with Progress(TextColumn("{task.description:<28}"), BarColumn(), Amount(), console=console) as bars:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "") -> str:
    """Columns padded to their widest cell."""
    if not rows:
        return empty
    widths = [max(len(r[i]) for r in [list(heads), *map(list, rows)]) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [heads, *rows]]
    return "\n".join(lines)
