"""The little client of our own API that the commands use: standard library, streaming, clear errors."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from mesh.errors import InputError, RequestError, Unavailable

DEFAULT_API = "http://127.0.0.1:8080"
_TIMEOUT_S = 600.0
RESUME_S = 30.0
"""How long a stream that broke off is asked for again."""
_RESUME_EVERY_S = 0.3


def api_base(flag: str | None) -> str:
    """Base URLs from ``--api``, ``MESH_API`` or the default port: one, or several with commas between them."""
    told = flag or os.environ.get("MESH_API") or DEFAULT_API
    return ",".join(_base_url(one.strip()) for one in told.split(","))


def _base_url(base: str) -> str:
    base = base.rstrip("/")
    parts = urllib.parse.urlsplit(base if "//" in base else f"http://{base}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise InputError(f"{base!r} is no address of an agent's API; write http://host:port")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


class _Broken(Exception):
    """A stream ended before its answer."""


class ApiClient:
    """Calls of one agent's API, or of the first of several. Raises ``Unavailable`` when it does not answer."""

    def __init__(self, base: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._bases, self._timeout_s = base.split(","), timeout_s

    def get(self, path: str) -> Any:
        """A JSON document."""
        connection, response = self._request("GET", path, None)
        try:
            return json.loads(response.read())
        finally:
            connection.close()

    def send(self, method: str, path: str, body: Any) -> Any:
        """A JSON document for another."""
        connection, response = self._request(method, path, body)
        try:
            return json.loads(response.read())
        finally:
            connection.close()

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed chat completion; raises the error that the agent sends. Where the agent is lost in
        mid-answer, the stream goes on there or at another of ours, for ``RESUME_S``."""
        asked: tuple[str, str, Any, str] = ("POST", "/v1/chat/completions", {**body, "stream": True}, "")
        last, deadline, others = "", 0.0, cycle(self._bases)
        while True:
            try:
                for event, chunk in self._events(*asked, last):
                    last, deadline = event, 0.0
                    yield chunk
                return
            except _Broken as error:
                deadline = deadline or time.monotonic() + RESUME_S
                if not last or time.monotonic() >= deadline:
                    raise Unavailable(str(error)) from error
            except RequestError as error:
                # Whoever does not know the session has not heard of the loss yet, or has no copy.
                if not deadline or error.status != http.client.NOT_FOUND or time.monotonic() >= deadline:
                    raise
            except Unavailable:
                if not deadline or time.monotonic() >= deadline:
                    raise
            time.sleep(_RESUME_EVERY_S)
            asked = ("GET", f"/mesh/v1/sessions/{last.split(':')[0]}/stream", None, next(others))

    def _events(
        self, method: str, path: str, body: Any, base: str, last: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Event ids and chunks up to the end of a stream; raises ``_Broken`` where it ends before."""
        headers = {"Last-Event-ID": last} if last else {}
        connection, response = self._request(method, path, body, base, headers)
        try:
            for line in response:
                if line.startswith(b"id: "):
                    last = line[4:].decode().strip()
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Unavailable(chunk["error"]["message"])
                yield last, chunk
            raise _Broken("the agent ended the stream before the answer was whole")
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(f"the connection broke: {error}") from error
        finally:
            connection.close()

    def _request(
        self,
        method: str,
        path: str,
        body: Any,
        base: str = "",
        headers: dict[str, str] | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        base = base or self._bases[0]
        parts = urllib.parse.urlsplit(base)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=self._timeout_s)
        data = None if body is None else json.dumps(body)
        try:
            kind_of_body = {"Content-Type": "application/json"}
            connection.request(method, parts.path + path, data, {**kind_of_body, **(headers or {})})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unavailable(
                f"no agent answers at {base} ({error}); start a mesh with 'mesh up', or name one with --api"
            ) from error
        if response.status >= http.client.BAD_REQUEST:
            try:
                message = json.loads(response.read())["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{response.status} {response.reason}"
            connection.close()
            if response.status in (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE):
                raise Unavailable(message)
            raise RequestError(message, status=response.status)
        return connection, response
