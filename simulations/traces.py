"""Traces of when nodes were up: CSV or Parquet with the columns ``node``, ``up`` and ``down``, seconds from the start."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable
from math import isfinite

from mesh.errors import ConfigError

Interval = tuple[str, float, float]
_COLUMNS = ("node", "up", "down")


def read_trace(content: bytes, name: str) -> tuple[Interval, ...]:
    """Intervals by node and time; raises ``ConfigError`` that names file and line."""
    rows = _parquet(content, name) if content[:4] == b"PAR1" else _csv(content, name)
    found: list[Interval] = []
    last: dict[str, tuple[int, Interval]] = {}
    for line, node, up, down in rows:
        where = f"{name}:{line}"
        try:
            interval = (str(node), float(up), float(down))
            if not (isfinite(interval[1]) and isfinite(interval[2])):
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}: up is {up!r} and down {down!r}; both are seconds, for example 12.5"
            ) from None
        if interval[1] < 0:
            raise ConfigError(f"{where}: {node} comes up at {up}; a trace begins at 0")
        if not interval[2] > interval[1]:
            raise ConfigError(f"{where}: {node} goes down at {down}, which is not after {up}")
        before = last.get(interval[0])
        if before is not None and interval[1] < before[1][1]:
            raise ConfigError(
                f"{where}: {node} comes up at {up}, before line {before[0]}; sort each node's by time"
            )
        if before is not None and interval[1] < before[1][2]:
            raise ConfigError(
                f"{where}: {node} comes up at {up} while it is up until {before[1][2]:g} (line {before[0]}); "
                "join the two"
            )
        last[interval[0]] = (line, interval)
        found.append(interval)
    if not found:
        raise ConfigError(f"{name} has no rows; write node,up,down and a row for each time a node was up")
    return tuple(found)


def _csv(content: bytes, name: str) -> Iterable[tuple[int, str, str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode()))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no text: {error}") from None
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise ConfigError(f"{name}:1: the first line must name the columns node,up,down")
    for row in reader:
        yield reader.line_num, row["node"], row["up"], row["down"]


def _parquet(content: bytes, name: str) -> Iterable[tuple[int, str, str, str]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{name} is Parquet, which needs a package: pip install pyarrow, or write CSV"
        ) from None
    try:
        table = parquet.read_table(io.BytesIO(content)).to_pydict()
    except Exception as error:  # pyarrow raises many kinds
        raise ConfigError(f"{name} is no whole Parquet file: {error}") from None
    if not set(_COLUMNS) <= set(table):
        raise ConfigError(f"{name} has the columns {', '.join(table)}; it needs node, up and down")
    rows = zip(*(table[c] for c in _COLUMNS), strict=True)
    return [(i + 1, *row) for i, row in enumerate(rows)]
