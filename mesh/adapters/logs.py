"""Logs: JSON to a pipe or journald, readable lines on a terminal. Every record names its node."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed as ``extra``: session, shard, model_version, ..."""
    return {k: v for k, v in vars(record).items() if k not in _STANDARD}


class _JsonFormatter(logging.Formatter):
    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **_extra(record),
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


class _TextFormatter(logging.Formatter):
    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        pairs = {**self._fields, **_extra(record)}
        line = super().format(record)
        head, _, trace = line.partition("\n")
        tail = " ".join(f"{k}={v}" for k, v in pairs.items())
        return f"{head}  {tail}" + (f"\n{trace}" if trace else "")


def set_up_logs(level: str, form: str, fields: dict[str, str], stream: TextIO = sys.stderr) -> None:
    """Send all logs to ``stream``; ``fields`` (node, cluster) stand in every record."""
    readable = form == "text" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter((_TextFormatter if readable else _JsonFormatter)(fields))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))
