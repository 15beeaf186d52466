"""A server that answers as a real Nomad 1.1.2 was recorded to, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

CASSETTES = Path(__file__).parent / "cassettes" / "nomad"


def cassette(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((CASSETTES / f"{name}.json").read_text())
    return read


def recorded(name: str) -> Any:
    """The recorded answer."""
    return cassette(name)["response"]["body"]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


@dataclass
class Replay:
    """``answers`` by method and path: status, headers and body."""

    answers: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def put(self, name: str, path: str = "") -> None:
        """Answer as recorded; ``path`` where our job has another name."""
        exchange = cassette(name)
        request, response = exchange["request"], exchange["response"]
        if "body_ndjson" in response:
            body = b"".join(json.dumps(line).encode() + b"\n" for line in response["body_ndjson"])
        elif isinstance(response["body"], str):
            body = response["body"].encode()
        else:
            body = json.dumps(response["body"]).encode()
        kept = {k: v for k, v in response["headers"].items() if k.startswith("X-") or k == "Content-Type"}
        self.answers[request["method"], path or request["path"]] = (response["status"], kept, body)

    def say(self, method: str, path: str, status: int, text: str, kind: str = "text/plain") -> None:
        self.answers[method, path] = (status, {"Content-Type": kind}, text.encode())


@contextmanager
def replay(*names: str) -> Iterator[Replay]:
    book = Replay()
    for name in names:
        book.put(name)

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            parts = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else None
            headers = {k.lower(): v for k, v in self.headers.items()}
            book.asked.append(Asked(self.command, parts.path, parse_qs(parts.query), headers, body))
            missing = (404, {"Content-Type": "text/plain"}, b"nothing was recorded for this")
            status, kept, answer = book.answers.get((self.command, parts.path), missing)
            self.send_response(status)
            for key, value in kept.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_DELETE = _any  # noqa: N815 (the library's names)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    book.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield book
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
