"""mDNS on loopback: hostile and foreign adverts beside an honest one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import pytest
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from mesh.adapters.discovery.mdns import TYPE, MdnsDiscovery
from mesh.discovery import Advert, Sighting
from mesh.types import Address, NodeId

pytestmark = pytest.mark.waits

HOST = "127.0.0.1"


def service(name: str, properties: dict[bytes, bytes]) -> AsyncServiceInfo:
    return AsyncServiceInfo(
        TYPE, f"{name}.{TYPE}", port=7, addresses=[socket.inet_aton(HOST)], properties=properties
    )


def advert(name: str, cluster: str = "c", digest: str = "0" * 16) -> Advert:
    return Advert(cluster, NodeId(name), name, Address("127.0.0.1:7070"), 5, digest)


def test_only_honest_adverts_of_our_cluster_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    honest = {k.encode(): v.encode() for k, v in advert("n-good").items().items()}
    hostile = [
        service("garbage", {b"\xff\xfe": b"\xff" * 200, b"cluster": b"c", b"v": b"1"}),
        service("oversize", {**honest, **{f"x{i}".encode(): b"y" * 240 for i in range(8)}}),
        service("path", {**honest, b"node": b"../../etc/passwd"}),
        service("nowhere", {**honest, b"node": b"n-nowhere", b"address": b"\x00;rm -rf"}),
        service("empty", {}),
        service("stranger", {k: (b"other" if k == b"cluster" else v) for k, v in honest.items()}),
    ]
    seen: dict[str, Sighting] = {}
    gone: list[str] = []

    async def story() -> None:
        looker = MdnsDiscovery("c", HOST)
        task = asyncio.create_task(
            looker.run(
                advert("n-looker"),
                lambda _, s: seen.__setitem__(s.node, s),
                lambda _, s: gone.append(s.node),
            )
        )
        wire = AsyncZeroconf(interfaces=[HOST], ip_version=IPVersion.V4Only)
        try:
            good = service("good", honest)
            for info in (*hostile, good):
                await (await wire.async_register_service(info))
            async with asyncio.timeout(20):
                while "n-good" not in seen or "n-looker" not in seen:
                    await asyncio.sleep(0.05)
                looker.update(advert("n-looker", digest="f" * 16))
                while seen["n-looker"].digest != "f" * 16:
                    await asyncio.sleep(0.05)
                await wire.async_unregister_service(good)
                while "n-good" not in gone:
                    await asyncio.sleep(0.05)
        finally:
            await wire.async_close()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    # An address that makes no sense is replaced by where the service was resolved to.
    assert seen.keys() - {"n-nowhere"} == {"n-good", "n-looker"}
    assert seen["n-good"].addresses == ("127.0.0.1:7070",)
    said = caplog.text
    for name in ("garbage", "oversize", "path"):
        assert f"mDNS: {name}." in said, name


def test_an_address_that_is_not_ours_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        looker = MdnsDiscovery("c", "203.0.113.9")
        task = asyncio.create_task(looker.run(advert("n-x"), lambda _, s: None, lambda _, s: None))
        await asyncio.sleep(0.3)
        assert looker.status() == "no interface with the address 203.0.113.9"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(story())
