"""Consul over py-consul's asyncio client: access, key-value store, leader lock.

py-consul is taken with three of its defaults mended: a token that was given wins over the
environment's, every request has a deadline, and TLS verifies with the CA that was named.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import consul
import consul.aio
import consul.base

from mesh.discovery import LOCK_DELAY_S, LOCK_TTL_S
from mesh.errors import ConfigError

log = logging.getLogger(__name__)

WAIT_S = 10
"""Of a blocking query."""
_SLACK_S = 10.0
_CONNECT_S = 3.0
_REQUEST_S = 8.0
VALUE_BYTES_MAX = 512 * 1024
CONSUL_ERRORS = (
    consul.ConsulException,
    aiohttp.ClientError,
    TimeoutError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
)
"""What a Consul that is away, answers 500, HTML or another shape than Consul's makes its client raise."""


@dataclass(frozen=True, slots=True)
class ConsulAccess:
    """Where Consul is and how it is entered."""

    url: str
    token: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    datacenter: str = ""
    namespace: str = ""

    @property
    def scheme(self) -> str:
        return "https" if self.url.startswith("https://") else "http"

    def host_and_port(self) -> tuple[str, int]:
        """Raises ``ConfigError`` when the URL has none."""
        text = self.url if "//" in self.url else f"//{self.url}"
        try:
            parts = urllib.parse.urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host:
            raise ConfigError(f"consul is {self.url!r}; write it as http://127.0.0.1:8500")
        return host, port or (8501 if self.scheme == "https" else 8500)

    def tls(self) -> ssl.SSLContext | bool:
        """What verifies HTTPS; raises ``ConfigError`` when the files cannot be read."""
        if self.scheme != "https":
            return True
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            raise ConfigError(
                f"Consul's certificates ({self.ca or 'system CAs'}, {self.cert}) cannot be read: {error}"
            ) from None
        return context

    def describe(self, error: BaseException) -> str:
        """An error of the client for people: which Consul, what it said, in one line."""
        said = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        if isinstance(error, consul.ACLPermissionDenied | consul.ACLDisabled):
            return f"{self.url} refuses our ACL token: {said or kind}"
        if isinstance(error, TimeoutError):
            return f"{self.url} does not answer"
        return f"{self.url}: {said or kind}"


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]
    """The transport, with deadlines and our TLS."""

    def __init__(self, access: ConsulAccess, host: str, port: int) -> None:
        bracketed = f"[{host}]" if ":" in host else host
        consul.base.HTTPClient.__init__(self, bracketed, port, access.scheme)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=access.tls(), limit=16))
        self._namespace = access.namespace

    async def _request(
        self,
        callback: Callable[[Any], Any],
        method: str,
        uri: str,
        headers: dict[str, str] | None,
        data: Any = None,
        connections_timeout: float | None = None,
        raw: bool = False,
    ) -> Any:
        total = WAIT_S + _SLACK_S if "wait=" in uri else _REQUEST_S
        timeout = aiohttp.ClientTimeout(total=connections_timeout or total, sock_connect=_CONNECT_S)
        headers = dict(headers or {})
        if self._namespace:
            headers["X-Consul-Namespace"] = self._namespace
        async with self._session.request(
            method, uri, headers=headers, data=data or None, timeout=timeout
        ) as answer:
            body = await answer.read()
        text = body if raw else body.decode("utf-8", "replace")
        return callback(consul.base.Response(answer.status, answer.headers, text))


class ConsulClient(consul.aio.Consul):  # type: ignore[misc]
    """Use as ``async with ConsulClient(access) as client``; must be made on the event loop."""

    def __init__(self, access: ConsulAccess) -> None:
        self.access = access
        host, port = access.host_and_port()
        super().__init__(host=host, port=port, scheme=access.scheme, dc=access.datacenter or None)
        self.token = access.token or None

    def http_connect(
        self, host: str, port: int, scheme: str, verify: bool | str = True, cert: Any = None
    ) -> _Http:
        return _Http(self.access, host, port)


class ConsulStore:
    """The part of Consul's key-value store under ``prefix``. Errors are ``CONSUL_ERRORS``."""

    def __init__(self, client: ConsulClient, prefix: str) -> None:
        self._client, self._prefix = client, prefix.strip("/")

    def path(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and the version to compare with in ``put``; ``None`` if there is none."""
        _, found = await self._client.kv.get(self.path(key))
        return (found["Value"] or b"", int(found["ModifyIndex"])) if found else None

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        """Write; with ``version``, only if it is still that (0: only if there is none). Raises
        ``ValueError`` for a value that Consul does not take."""
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"{key} has {len(value)} bytes; Consul takes {VALUE_BYTES_MAX}")
        return bool(await self._client.kv.put(self.path(key), value, cas=version))

    async def delete(self, key: str) -> None:
        await self._client.kv.delete(self.path(key))

    async def watch(self, key: str) -> AsyncIterator[tuple[bytes, int] | None]:
        """The value now and on every change. Ends by ``CONSUL_ERRORS``."""
        index, last = None, object()
        while True:
            found_index, found = await self._client.kv.get(self.path(key), index=index, wait=f"{WAIT_S}s")
            index = next_index(index, found_index)
            value = (found["Value"] or b"", int(found["ModifyIndex"])) if found else None
            if value != last:
                last = value
                yield value


def next_index(known: str | None, found: str) -> str | None:
    """The index to wait from: anew when it went backwards (the server was restored) or makes no sense."""
    number = int(found)
    return None if number < 1 or (known is not None and number < int(known)) else found


class LeaderLock:
    """One leader among those who run this with the same key, by a Consul session.

    ``gained(term)`` and ``lost(reason)`` are called on the loop. ``term`` grows with each new
    leader (the lock's index). We stop leading by our own clock before Consul could give the lock
    away: a leader that cannot renew is none.
    """

    def __init__(
        self,
        client: ConsulClient,
        store: ConsulStore,
        key: str,
        who: str,
        gained: Callable[[int], None],
        lost: Callable[[str], None],
    ) -> None:
        self._client, self._path, self._who = client, store.path(key), who
        self._gained, self._lost = gained, lost

    async def run(self) -> None:
        """Compete, lead, compete again; until cancelled, which gives the lock back."""
        while True:
            try:
                await self._compete()
            except CONSUL_ERRORS as error:
                log.warning("leader lock: %s", self._client.access.describe(error))
            await asyncio.sleep(1.0)

    async def _compete(self) -> None:
        value = json.dumps({"leader": self._who}).encode()
        session = await self._client.session.create(
            name=f"inference-mesh {self._who}", lock_delay=LOCK_DELAY_S, ttl=LOCK_TTL_S
        )
        renewed = time.monotonic()
        try:
            while not await self._client.kv.put(self._path, value, acquire=session):
                await self._wait_for_release()
                await self._client.session.renew(session)
                renewed = time.monotonic()
            _, found = await self._client.kv.get(self._path)
            if not found or found.get("Session") != session:
                return
            self._gained(int(found["LockIndex"]))
            reason = "we stopped"
            try:
                reason = await self._lead(session, renewed)
            finally:
                self._lost(reason)
        finally:
            await asyncio.shield(self._give_back(session))

    async def _wait_for_release(self) -> None:
        """Until the lock's record changes, at most a third of our session's life."""
        index, found = await self._client.kv.get(self._path)
        if found and found.get("Session"):
            await self._client.kv.get(self._path, index=index, wait=f"{LOCK_TTL_S // 3}s")
        else:
            await asyncio.sleep(0.5)  # the lock-delay after a leader that was lost

    async def _lead(self, session: str, renewed: float) -> str:
        while True:
            await asyncio.sleep(LOCK_TTL_S / 4)
            try:
                async with asyncio.timeout(max(0.01, renewed + LOCK_TTL_S * 0.8 - time.monotonic())):
                    await self._client.session.renew(session)
                    _, found = await self._client.kv.get(self._path)
                renewed = time.monotonic()
                if not found or found.get("Session") != session:
                    return "somebody took the lock away"
            except consul.NotFound:
                return "our session expired"
            except CONSUL_ERRORS as error:
                if time.monotonic() - renewed > LOCK_TTL_S * 0.8:
                    return f"the lock could not be renewed: {self._client.access.describe(error)}"

    async def _give_back(self, session: str) -> None:
        try:
            async with asyncio.timeout(2.0):
                await self._client.session.destroy(session)
        except CONSUL_ERRORS as error:
            log.debug("leader lock: session not destroyed: %s", error)
