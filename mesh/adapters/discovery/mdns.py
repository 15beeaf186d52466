"""Discovery by multicast DNS (DNS-SD, ``_inference-mesh._tcp``) with zeroconf.

Only for finding: an agent that is killed stays listed for a minute and longer, so nothing here says
who is alive. Interfaces that come and go (a radio, a tether) are followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping

import ifaddr
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from mesh.adapters.membership_codec import valid_address
from mesh.discovery import ITEM_BYTES_MAX, Advert, Sighting, read_advert
from mesh.errors import PeerError
from mesh.types import Address

log = logging.getLogger(__name__)

TYPE = "_inference-mesh._tcp.local."
_RESOLVE_MS = 3000
_RESOLVES_MAX = 16
_SEEN_MAX = 4096
_INTERFACES_S = 5.0
_RETRY_S = 10.0
_LABEL_MAX = 63


class MdnsDiscovery:
    """Advertises on the interfaces that ``host`` is on, and browses there."""

    name = "mdns"

    def __init__(self, cluster: str, host: str) -> None:
        self._cluster, self._host = cluster, host
        self._advert: Advert | None = None
        self._zeroconf: AsyncZeroconf | None = None
        self._status = "starting"
        self._seen: dict[str, Sighting] = {}
        self._rejected: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_RESOLVES_MAX)

    def status(self) -> str:
        return self._status

    def update(self, advert: Advert) -> None:
        self._advert = advert
        if self._zeroconf is not None:
            self._spawn(self._re_register(self._zeroconf, advert))

    async def run(
        self,
        advert: Advert,
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
        advertise: bool = True,
    ) -> None:
        """``advertise`` off only looks."""
        self._found, self._gone = found, gone
        self._advert, self._advertise = advert, advertise
        while True:
            wait_s = _RETRY_S
            try:
                interfaces = self._interfaces()
                if not interfaces:
                    self._status = f"no interface with the address {self._host}"
                else:
                    await self._serve(interfaces)
                    wait_s = 0.0
            except OSError as error:
                self._status = f"multicast does not work here: {error}"
                log.warning("mDNS: %s", self._status)
            await asyncio.sleep(wait_s)

    def _interfaces(self) -> tuple[str, ...]:
        """Addresses of ours to serve on, sorted."""
        everywhere = self._host in ("0.0.0.0", "::", "")
        ours = set() if everywhere else {str(a[4][0]) for a in socket.getaddrinfo(self._host, None)}
        found = set()
        for adapter in ifaddr.get_adapters():
            for ip in adapter.ips:
                text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
                if text in ours or (everywhere and not ipaddress.ip_address(text).is_loopback):
                    found.add(text)
        return tuple(sorted(found))

    async def _serve(self, interfaces: tuple[str, ...]) -> None:
        """Serve until the interfaces change."""
        everywhere = self._host in ("0.0.0.0", "::", "")
        v6 = any(":" in i for i in interfaces)
        v4 = any(":" not in i for i in interfaces)
        version = IPVersion.All if v6 and v4 else IPVersion.V6Only if v6 else IPVersion.V4Only
        zeroconf = AsyncZeroconf(
            interfaces=InterfaceChoice.All if everywhere else list(interfaces), ip_version=version
        )
        try:
            await zeroconf.zeroconf.async_wait_for_start()
            browser = AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[self._event])
            if self._advertise and self._advert is not None:
                await (await zeroconf.async_register_service(self._info(self._advert)))
                self._zeroconf = zeroconf
            self._status = f"on {', '.join(interfaces)}"
            while self._interfaces() == interfaces:
                await asyncio.sleep(_INTERFACES_S)
            log.info("mDNS: the interfaces changed, starting anew")
            await browser.async_cancel()
        finally:
            self._zeroconf = None
            for task in list(self._tasks):
                task.cancel()
            # Says goodbye: peers hear of a clean end at once.
            await asyncio.shield(zeroconf.async_close())

    def _info(self, advert: Advert) -> AsyncServiceInfo:
        host, _, port = advert.address.rpartition(":")
        try:
            places = [ipaddress.ip_address(host.strip("[]").partition("%")[0])]
        except ValueError:  # a name is advertised: where it is served stands for it
            places = [ipaddress.ip_address(i.partition("%")[0]) for i in self._interfaces()]
        label = f"{advert.node[: _LABEL_MAX - 14]}-{advert.instance:x}"
        return AsyncServiceInfo(
            TYPE,
            f"{label}.{TYPE}",
            port=int(port),
            addresses=[place.packed for place in places],
            properties={k: v for k, v in advert.items().items() if len(k) + len(v) + 1 <= ITEM_BYTES_MAX},
            server=f"{label}.local.",
        )

    async def _re_register(self, zeroconf: AsyncZeroconf, advert: Advert) -> None:
        try:
            await (await zeroconf.async_update_service(self._info(advert)))
        except Exception as error:
            log.warning("mDNS: the advert was not updated: %s", error)

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _event(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._rejected.discard(name)
            known = self._seen.pop(name, None)
            if known is not None:
                self._gone(self.name, known)
        elif len(self._tasks) < _SEEN_MAX:
            self._spawn(self._resolve(zeroconf, name))

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        async with self._slots:
            info = AsyncServiceInfo(TYPE, name)
            if not await info.async_request(zeroconf, _RESOLVE_MS):
                return
        try:
            sighting = read_service(
                info.decoded_properties,
                info.parsed_scoped_addresses(),
                info.port or 0,
                self._cluster,
            )
        except PeerError as error:
            if name not in self._rejected and len(self._rejected) < _SEEN_MAX:
                self._rejected.add(name)
                log.warning("mDNS: %s is ignored: %s", name[:100], error)
            return
        if sighting is None or (len(self._seen) >= _SEEN_MAX and name not in self._seen):
            return
        self._seen[name] = sighting
        self._found(self.name, sighting)


def read_service(
    properties: Mapping[str, str | None], addresses: list[str], port: int, cluster: str
) -> Sighting | None:
    """The sighting in a resolved service; ``None`` for another cluster's. Raises ``PeerError``."""
    advert = read_advert({k: v or "" for k, v in properties.items()}, cluster)
    if advert is None:
        return None
    host = advert.address.rpartition(":")[0].strip("[]")
    try:
        # A link-local address means something else on each machine; the resolver knows our side's scope.
        usable = not ipaddress.ip_address(host.partition("%")[0]).is_link_local
    except ValueError:
        usable = True
    if usable and valid_address(advert.address):
        places: tuple[Address, ...] = (advert.address,)
    else:
        joined = [f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in addresses[:4]]
        places = tuple(Address(a) for a in joined if valid_address(a))
    if not places:
        raise PeerError(f"an advert of {advert.node} without a usable address ({advert.address[:80]!r})")
    return Sighting(advert.node, places, advert.digest, advert.instance)
