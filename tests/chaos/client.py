"""A streamed completion as its reader sees it: tokens, and when they came."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL = "smollm2-135m"
NO_END = {"0": -100, "2": -100}
"""Tokens that would end the text early."""


@dataclass
class Stream:
    """What one request brought."""

    tokens: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    session: str = ""
    last_id: str = ""
    error: str = ""
    finish: str = ""
    fault_at: float = 0.0

    @property
    def gap_ms(self) -> float:
        """Median between tokens."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False) if b > a]
        return statistics.median(gaps) * 1000 if gaps else 0.0

    def stall_ms(self) -> float:
        """The longest gap that ends after the fault, less the median gap."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False) if b >= self.fault_at]
        return max(0.0, max(gaps, default=0.0) * 1000 - self.gap_ms)


def ask(
    api: str,
    prompt: Sequence[int],
    tokens: int,
    at: int = -1,
    fault: Callable[[str], None] = lambda session: None,
    stop: threading.Event | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 90,
    **more: Any,
) -> Stream:
    """Stream a completion; ``fault(session)`` is called in a thread of its own when token ``at`` has come."""
    body = {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logprobs": 0,
        "logit_bias": NO_END,
        **more,
    }
    seen = Stream()
    _read(api, "POST", "/v1/completions", body, headers or {}, seen, at, fault, stop, timeout_s)
    return seen


def resume(api: str, seen: Stream) -> None:
    """Read on where a stream broke off."""
    seen.error = ""
    path = f"/mesh/v1/sessions/{seen.last_id.split(':')[0]}/stream"
    _read(api, "GET", path, None, {"Last-Event-ID": seen.last_id}, seen)


def _read(
    api: str,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    seen: Stream,
    at: int = -1,
    fault: Callable[[str], None] = lambda session: None,
    stop: threading.Event | None = None,
    timeout_s: float = 90,
) -> None:
    host, port = api.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=90)
    breaker: threading.Thread | None = None
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            seen.error = answer.read().decode()
            return
        while (line := answer.readline()) and not (stop and stop.is_set()):
            if line.startswith(b"id: "):
                seen.last_id = line[4:].decode().strip()
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = json.dumps(event["error"])
                continue
            now = time.monotonic()
            if not seen.session and connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            seen.session = event["id"]
            for choice in event["choices"]:
                new = (choice.get("logprobs") or {}).get("tokens", [])
                seen.tokens.extend(new)
                seen.times.extend([now] * len(new))
                seen.finish = choice["finish_reason"] or seen.finish
            if at >= 0 and len(seen.tokens) >= at and breaker is None:
                seen.fault_at = now
                breaker = threading.Thread(target=fault, args=(seen.session,))
                breaker.start()
    except (OSError, http.client.HTTPException) as error:
        seen.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
        if breaker is not None:
            breaker.join()
