"""Discovery by Consul: one service an agent, with a gRPC health check; blocking queries to find others.

Registration is checked every few seconds and made again when it is gone (Consul restarted, its data
lost). Consul's silence changes nothing of what is known: liveness is membership's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from typing import Any

import consul

from mesh.adapters.consul_client import CONSUL_ERRORS, WAIT_S, ConsulAccess, ConsulClient, next_index
from mesh.adapters.membership_codec import valid_address
from mesh.discovery import Advert, Sighting, read_advert
from mesh.errors import PeerError

log = logging.getLogger(__name__)

HEALTH_SERVICE = "inference_mesh"
"""Name under which an agent answers the standard gRPC health protocol."""
_CHECK_INTERVAL = "5s"
_CHECK_TIMEOUT = "2s"
_REAP_AFTER = "1m"
"""Consul itself removes what is critical for so long (its least)."""
_VERIFY_S = 5.0
_RETRY_S = (1.0, 15.0)
_GATHER_S = 0.5
"""Changes that come together are read together."""
_KNOCK_S = 1.0
_GOODBYE_S = 2.0


class ConsulDiscovery:
    """Registers this agent and watches for others of its cluster."""

    name = "consul"

    def __init__(self, access: ConsulAccess, service: str, cluster: str) -> None:
        access.host_and_port(), access.tls()  # a wrong setting is said now, not in the middle of the night
        self._access, self._service, self._cluster = access, service, cluster
        self._tag = f"cluster-{cluster}"
        self._advert: Advert | None = None
        self._changed = asyncio.Event()
        self._registered = self._watched = "starting"
        self._known: dict[str, Sighting] = {}
        self._rejected: set[str] = set()

    def status(self) -> str:
        if self._registered == self._watched:
            return self._registered
        return f"{self._registered}; {self._watched}"

    def update(self, advert: Advert) -> None:
        self._advert = advert
        self._changed.set()

    async def run(
        self,
        advert: Advert,
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
    ) -> None:
        self._advert = advert
        host = advert.address.rpartition(":")[0].strip("[]")
        if host == "localhost" or _is_loopback(host):
            log.warning("Consul is told the loopback address %s: agents elsewhere cannot use it", host)
        async with ConsulClient(self._access) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_registered(client))
            tasks.create_task(self._watch(client, found, gone))

    # -- registration --------------------------------------------------------------------------

    def _service_id(self, advert: Advert) -> str:
        return f"{self._service}-{advert.node}-{advert.instance:x}"

    async def _keep_registered(self, client: ConsulClient) -> None:
        wait_s, reaped = _RETRY_S[0], False
        assert self._advert is not None
        try:
            while True:
                try:
                    if self._changed.is_set() or not await self._is_registered(client):
                        self._changed.clear()
                        await self._register(client)
                    if not reaped:
                        await self._reap(client)
                        reaped = True
                    self._registered, wait_s = f"registered at {self._access.url}", _RETRY_S[0]
                    pause = _VERIFY_S
                except CONSUL_ERRORS as error:
                    status = self._access.describe(error)
                    if status != self._registered:
                        log.warning("Consul registration: %s", status)
                    self._registered, pause, reaped = status, wait_s, False
                    wait_s = min(wait_s * 2, _RETRY_S[1])
                    self._changed.set()
                    await asyncio.sleep(pause)
                    continue
                try:
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            await asyncio.shield(self._deregister(client))

    async def _is_registered(self, client: ConsulClient) -> bool:
        assert self._advert is not None
        wanted = self._service_id(self._advert)
        mine = await client.agent.services(filter_expr=f'ID == "{wanted}"')
        return wanted in mine

    async def _register(self, client: ConsulClient) -> None:
        advert = self._advert
        assert advert is not None
        host, _, port = advert.address.rpartition(":")
        check = consul.Check.grpc(
            f"{advert.address}/{HEALTH_SERVICE}",
            _CHECK_INTERVAL,
            timeout=_CHECK_TIMEOUT,
            deregister=_REAP_AFTER,
        )
        # We are up, or we would not be here: do not be listed as critical until the first check.
        check["status"] = "passing"
        tags = [self._tag] + ([f"region-{advert.region}"] if advert.region else [])
        await client.agent.service.register(
            self._service,
            service_id=self._service_id(advert),
            address=host.strip("[]"),
            port=int(port),
            tags=tags,
            meta=advert.items(),
            check=check,
        )

    async def _deregister(self, client: ConsulClient) -> None:
        assert self._advert is not None
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await client.agent.service.deregister(self._service_id(self._advert))
        except CONSUL_ERRORS as error:
            log.debug("Consul: not deregistered: %s", error)

    async def _reap(self, client: ConsulClient) -> None:
        """Remove what earlier processes of this node left behind."""
        advert = self._advert
        assert advert is not None
        _, entries = await client.catalog.service(self._service)
        ours = [
            e
            for e in entries or []
            if (e.get("ServiceMeta") or {}).get("node") == advert.node
            and (e.get("ServiceMeta") or {}).get("cluster") == self._cluster
            and e.get("ServiceID") != self._service_id(advert)
        ]
        local = await client.agent.services() if ours else {}
        for entry in ours:
            address = (entry.get("ServiceMeta") or {}).get("address", "")
            if address != advert.address and await _answers(address):
                continue  # somebody lives there: membership will tell the two apart
            if entry["ServiceID"] in local:
                await client.agent.service.deregister(entry["ServiceID"])
            else:
                await client.catalog.deregister(entry["Node"], service_id=entry["ServiceID"])
            log.info("removed the registration %s, left by an earlier process of ours", entry["ServiceID"])

    # -- watching ------------------------------------------------------------------------------

    async def _watch(
        self,
        client: ConsulClient,
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
    ) -> None:
        index, wait_s = None, _RETRY_S[0]
        while True:
            try:
                new_index, entries = await client.health.service(
                    self._service, index=index, wait=f"{WAIT_S}s", passing=True, tag=self._tag
                )
                index = next_index(index, new_index)
                self._fold(entries or [], found, gone)
                self._watched, wait_s = f"registered at {self._access.url}", _RETRY_S[0]
                await asyncio.sleep(_GATHER_S)
            except CONSUL_ERRORS as error:
                # What is known stays known.
                self._watched, index = self._access.describe(error), None
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _RETRY_S[1])

    def _fold(
        self,
        entries: list[dict[str, Any]],
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
    ) -> None:
        listed: dict[str, Sighting] = {}
        for entry in entries:
            service = entry.get("Service") or {}
            try:
                sighting = read_service(service, self._cluster)
            except PeerError as error:
                name = str(service.get("ID"))[:100]
                if name not in self._rejected:
                    self._rejected.add(name)
                    log.warning("Consul: the service %s is ignored: %s", name, error)
                continue
            if sighting is not None:
                listed[str(service.get("ID"))] = sighting
        for service_id, sighting in listed.items():
            if self._known.get(service_id) != sighting:
                found(self.name, sighting)
        for service_id, sighting in self._known.items():
            if service_id not in listed:
                gone(self.name, sighting)
        self._known = listed


def read_service(service: dict[str, Any], cluster: str) -> Sighting | None:
    """The sighting in a catalogue entry; ``None`` for another cluster's. Raises ``PeerError``."""
    meta = service.get("Meta") or {}
    advert = read_advert({str(k): str(v) for k, v in meta.items()}, cluster)
    if advert is None:
        return None
    if not valid_address(advert.address):
        raise PeerError(f"its address is {advert.address[:80]!r}")
    return Sighting(advert.node, (advert.address,), advert.digest, advert.instance)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _answers(address: str) -> bool:
    if not valid_address(address):
        return False
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_KNOCK_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
