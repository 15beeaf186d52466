"""The little client of our own API that the commands use: standard library, streaming, clear errors."""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Iterator
from typing import Any

from mesh.errors import InputError, RequestError, Unavailable

DEFAULT_API = "http://127.0.0.1:8080"
_TIMEOUT_S = 600.0


def api_base(flag: str | None) -> str:
    """Base URL from ``--api``, ``MESH_API`` or the default port."""
    base = (flag or os.environ.get("MESH_API") or DEFAULT_API).rstrip("/")
    parts = urllib.parse.urlsplit(base if "//" in base else f"http://{base}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise InputError(f"{base!r} is no address of an agent's API; write http://host:port")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


class ApiClient:
    """Calls of one agent's API. Raises ``Unavailable`` when it does not answer."""

    def __init__(self, base: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._base, self._timeout_s = base, timeout_s

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
        """Chunks of a streamed chat completion; raises the error that the agent sends."""
        connection, response = self._request("POST", "/v1/chat/completions", {**body, "stream": True})
        try:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Unavailable(chunk["error"]["message"])
                yield chunk
            raise Unavailable(f"{self._base} ended the stream before the answer was whole")
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the connection to {self._base} broke: {error}") from error
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urllib.parse.urlsplit(self._base)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=self._timeout_s)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, parts.path + path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unavailable(
                f"no agent answers at {self._base} ({error}); start a mesh with 'mesh up', or name one with --api"
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
