"""Discovery, store and leader lock on real Consul servers: one, three, with ACLs, with TLS, and without."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from mesh.adapters.consul_client import CONSUL_ERRORS, ConsulAccess, ConsulClient, ConsulStore, LeaderLock
from mesh.adapters.discovery.consul import HEALTH_SERVICE, ConsulDiscovery
from mesh.discovery import Advert, Sighting
from mesh.errors import ConfigError
from mesh.types import Address, NodeId
from tests.agents import agent, until
from tests.consul_server import ConsulServer, cluster_of_three, consul_binary

pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(
        consul_binary() is None,
        reason="no Consul: none on the PATH, and tests/fetch_consul.sh could not fetch it",
    ),
]
SERVICE = "inference-mesh"
HEALTH: dict[str, HealthServicer] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    one = ConsulServer(tmp_path_factory.mktemp("consul") / "dev")
    one.start()
    try:
        one.wait_for_leader()
        yield one
    finally:
        one.kill()


@contextlib.asynccontextmanager
async def healthy_port() -> AsyncIterator[Address]:
    """A gRPC server that answers the health protocol as an agent does."""
    grpc_server = grpc.aio.server()
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    health = HealthServicer()
    HEALTH[f"127.0.0.1:{port}"] = health
    add_HealthServicer_to_server(health, grpc_server)
    await grpc_server.start()
    await health.set(HEALTH_SERVICE, HealthCheckResponse.SERVING)
    try:
        yield Address(f"127.0.0.1:{port}")
    finally:
        await grpc_server.stop(0)


class Directory:
    """A ``ConsulDiscovery`` at work, and what it told."""

    def __init__(self, access: ConsulAccess, advert: Advert) -> None:
        self.discovery = ConsulDiscovery(access, SERVICE, advert.cluster)
        self.advert = advert
        self.seen: dict[NodeId, Sighting] = {}

    def _found(self, source: str, sighting: Sighting) -> None:
        assert source == "consul"
        self.seen[sighting.node] = sighting

    def _gone(self, source: str, sighting: Sighting) -> None:
        self.seen.pop(sighting.node, None)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Directory]:
        task = asyncio.create_task(self.discovery.run(self.advert, self._found, self._gone))
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def advert(name: str, address: str, cluster: str = "c", instance: int = 7) -> Advert:
    return Advert(cluster, NodeId(name), name, Address(address), instance, "0" * 16)


async def soon(what: Callable[[], bool | Awaitable[bool]], limit_s: float = 15.0) -> float:
    begin = time.monotonic()
    while time.monotonic() - begin < limit_s:
        result = what()
        if await result if isinstance(result, Awaitable) else result:
            return time.monotonic() - begin
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {limit_s} s")


def fresh() -> str:
    return f"c-{uuid.uuid4().hex[:8]}"


def test_agents_find_each_other_and_leave(server: ConsulServer) -> None:
    async def story() -> None:
        access, cluster = ConsulAccess(server.url), fresh()
        async with healthy_port() as here, healthy_port() as there:
            one = Directory(access, advert("n-one", here, cluster))
            stranger = Directory(access, advert("n-stranger", there, fresh()))
            async with one.running(), stranger.running():
                two = Directory(access, advert("n-two", there, cluster))
                async with two.running():
                    await soon(lambda: "n-two" in one.seen and "n-one" in two.seen)
                    assert one.seen[NodeId("n-two")] == Sighting(NodeId("n-two"), (there,), "0" * 16, 7)
                    assert "n-stranger" not in one.seen
                    two.discovery.update(Advert(cluster, NodeId("n-two"), "two", Address(there), 7, "f" * 16))
                    await soon(lambda: one.seen[NodeId("n-two")].digest == "f" * 16)
                    entry = next(e for e in server.services() if e["ServiceMeta"]["node"] == "n-two")
                    assert entry["ServiceTags"] == [f"cluster-{cluster}"]
                    # The standard gRPC health check is asked, not only our first word believed.
                    await HEALTH[there].set(HEALTH_SERVICE, HealthCheckResponse.NOT_SERVING)
                    await soon(lambda: "n-two" not in one.seen)
                    await HEALTH[there].set(HEALTH_SERVICE, HealthCheckResponse.SERVING)
                    await soon(lambda: "n-two" in one.seen)
                await soon(lambda: "n-two" not in one.seen)
                assert one.discovery.status() == f"registered at {server.url}"

    asyncio.run(story())


def test_a_consul_that_comes_back_empty_is_told_again(tmp_path: Path) -> None:
    async def story() -> None:
        consul = ConsulServer(tmp_path / "dev")
        try:
            async with healthy_port() as here:
                one = Directory(ConsulAccess(consul.url), advert("n-one", here))
                async with one.running():
                    # It is not even there when we boot.
                    await soon(lambda: "127.0.0.1" in one.discovery.status())
                    assert one.seen == {}
                    for _ in range(2):
                        consul.start()
                        await asyncio.to_thread(consul.wait_for_leader)
                        await soon(lambda: len(consul.services()) == 1, 20)
                        await soon(lambda: "n-one" in one.seen, 20)
                        await asyncio.to_thread(consul.kill)
                        await soon(lambda: "registered" not in one.discovery.status(), 20)
                        assert "n-one" in one.seen  # what was known stays known
        finally:
            consul.kill()

    asyncio.run(story())


def test_ghosts_of_our_own_are_reaped_and_living_twins_are_not(server: ConsulServer) -> None:
    async def story() -> None:
        cluster = fresh()

        def register(service_id: str, address: str) -> None:
            host, port = address.split(":")
            meta = advert("n-ghost", address, cluster, instance=3).items()
            body = {"ID": service_id, "Name": SERVICE, "Address": host, "Port": int(port), "Meta": meta}
            server.get("/v1/agent/service/register", method="PUT", data=json.dumps(body).encode())

        async with healthy_port() as here, healthy_port() as there:
            register("ghost-dead", "127.0.0.1:9")
            register("ghost-same-port", here)
            register("living-twin", there)
            # One that another Consul agent left behind when its machine burned.
            body = {
                "Node": "burned",
                "Address": "127.0.0.9",
                "Service": {
                    "ID": "ghost-burned",
                    "Service": SERVICE,
                    "Meta": advert("n-ghost", "127.0.0.9:9", cluster, instance=2).items(),
                },
            }
            server.get("/v1/catalog/register", method="PUT", data=json.dumps(body).encode())
            one = Directory(ConsulAccess(server.url), advert("n-ghost", here, cluster))

            def left() -> set[str]:
                return {
                    e["ServiceID"] for e in server.services() if e["ServiceMeta"].get("cluster") == cluster
                }

            async with one.running():
                await soon(lambda: left() == {"inference-mesh-n-ghost-7", "living-twin"})
        server.get("/v1/agent/service/deregister/living-twin", method="PUT")

    asyncio.run(story())


def test_ten_thousand_registrations_stall_nothing(server: ConsulServer) -> None:
    async def story() -> None:
        cluster = fresh()
        for i in range(0, 10_000, 64):
            operations = []
            for k in range(i, min(i + 64, 10_000)):
                meta = advert(f"n-{k}", f"10.0.{k // 250}.{k % 250}:7070", cluster).items()
                service = {
                    "ID": f"many-{k}",
                    "Service": SERVICE,
                    "Tags": [f"cluster-{cluster}"],
                    "Meta": meta,
                }
                operations.append(
                    {"Service": {"Verb": "set", "Node": server.config["node_name"], "Service": service}}
                )
            server.get("/v1/txn", method="PUT", data=json.dumps(operations).encode())
        slowest = 0.0

        async def pulse() -> None:
            nonlocal slowest
            while True:
                begin = time.monotonic()
                await asyncio.sleep(0.01)
                slowest = max(slowest, time.monotonic() - begin)

        async with healthy_port() as here:
            one = Directory(ConsulAccess(server.url), advert("n-one", here, cluster))
            beat = asyncio.create_task(pulse())
            async with one.running():
                # Our own registration makes Consul's anti-entropy remove what its agent never had.
                await soon(lambda: len(one.seen) >= 5_000, 30)
            beat.cancel()
        assert slowest < 2.0, f"the event loop stood still for {slowest:.1f} s"

    asyncio.run(story())


def test_three_servers_survive_their_leader(tmp_path: Path) -> None:
    async def story() -> None:
        servers = await asyncio.to_thread(cluster_of_three, tmp_path)
        try:
            leader = servers[0].get("/v1/status/leader")
            following = [s for s in servers if f"127.0.0.1:{s.ports['server']}" != leader]
            async with healthy_port() as here, healthy_port() as there:
                one = Directory(ConsulAccess(following[0].url), advert("n-one", here))
                two = Directory(ConsulAccess(following[1].url), advert("n-two", there))
                async with one.running():
                    await soon(lambda: "n-one" in one.seen)
                    for server in servers:
                        if server not in following:
                            server.kill()
                    async with two.running():
                        await soon(lambda: "n-two" in one.seen and "n-one" in two.seen, 40)
                        # No quorum: nothing is forgotten, and it is said.
                        following[1].kill()
                        await soon(lambda: "500" in one.discovery.status(), 60)
                        assert {"n-one", "n-two"} <= one.seen.keys()
        finally:
            for server in servers:
                server.kill()

    asyncio.run(story())


ACL = {"acl": {"enabled": True, "default_policy": "deny", "tokens": {"master": "root-token"}}}


def test_acl_deny_wants_a_token_and_says_so(tmp_path: Path) -> None:
    consul = ConsulServer(tmp_path / "acl", ACL)
    consul.start()

    def acl(path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        return consul.get(path, "root-token", "PUT", data)

    async def story() -> None:
        await asyncio.to_thread(consul.wait_for_leader)
        rules = (
            'service_prefix "inference-mesh" { policy = "write" } node_prefix "" { policy = "read" } '
            'key_prefix "inference-mesh" { policy = "write" } session_prefix "" { policy = "write" } '
            'agent_prefix "" { policy = "read" }'
        )
        await soon(lambda: bool(_tried(lambda: acl("/v1/acl/policy", {"Name": "mesh", "Rules": rules}))))
        token = acl("/v1/acl/token", {"Policies": [{"Name": "mesh"}]})
        async with healthy_port() as here:
            bare = Directory(ConsulAccess(consul.url), advert("n-bare", here))
            async with bare.running():
                await soon(lambda: "refuses our ACL token" in bare.discovery.status())
                assert consul.url in bare.discovery.status()
            one = Directory(ConsulAccess(consul.url, token=token["SecretID"]), advert("n-one", here))
            async with one.running():
                await soon(lambda: "n-one" in one.seen)
                async with ConsulClient(ConsulAccess(consul.url, token=token["SecretID"])) as client:
                    store = ConsulStore(client, "inference-mesh")
                    assert await store.put("plan", b"1")
                # The token expires under us.
                consul.get(f"/v1/acl/token/{token['AccessorID']}", "root-token", "DELETE")
                await soon(lambda: "refuses our ACL token" in one.discovery.status(), 60)
                assert "n-one" in one.seen

    try:
        asyncio.run(story())
    finally:
        consul.kill()


def _tried(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except OSError:
        return None


def test_tls_both_ways(tmp_path: Path) -> None:
    authority, keys = _certificates(tmp_path)
    consul = ConsulServer(
        tmp_path / "tls",
        {
            "ca_file": authority,
            "cert_file": keys["server"][0],
            "key_file": keys["server"][1],
            "verify_incoming_https": True,
        },
    )
    secure = consul.ports["https"] = consul.ports["http"] + 1
    consul.config["ports"]["https"] = secure
    consul.start()
    url = f"https://127.0.0.1:{secure}"

    async def story() -> None:
        await asyncio.to_thread(consul.wait_for_leader)
        access = ConsulAccess(url, ca=authority, cert=keys["client"][0], key=keys["client"][1])
        async with healthy_port() as here:
            one = Directory(access, advert("n-one", here))
            async with one.running():
                await soon(lambda: "n-one" in one.seen)
            for wrong in (ConsulAccess(url), ConsulAccess(url, ca=authority)):
                unknown = Directory(wrong, advert("n-two", here))
                async with unknown.running():
                    await soon(lambda status=unknown.discovery.status: "https://" in status())  # type: ignore[misc]
                    assert "registered" not in unknown.discovery.status()
        with pytest.raises(ConfigError, match="certificates"):
            ConsulDiscovery(ConsulAccess(url, ca=str(tmp_path / "missing.pem")), SERVICE, "c")

    try:
        asyncio.run(story())
    finally:
        consul.kill()


def _certificates(folder: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """A CA file, and certificate and key files by name."""
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )

    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = builder("test CA", ca_key, True).sign(ca_key, hashes.SHA256())
    authority = folder / "ca.pem"
    authority.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files = {}
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        )
        signed = builder(who, key, False).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
        cert_file, key_file = folder / f"{who}.pem", folder / f"{who}.key"
        cert_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        files[who] = (str(cert_file), str(key_file))
    return str(authority), files


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, "rpc error: No cluster leader"),
        (200, "<html><body>captive portal</body></html>"),
        (200, '{"not": "a list"}'),
        (200, "null"),
        (200, "[1, 2]"),
        (403, "Permission denied"),
        (200, "[" * 5000),
    ],
)
def test_answers_that_are_not_consuls(status: int, body: str) -> None:
    async def story() -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=status, text=body, headers={"X-Consul-Index": "5"})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        one = Directory(ConsulAccess(f"http://127.0.0.1:{port}"), advert("n-one", "127.0.0.1:9"))
        try:
            async with one.running():
                await soon(lambda: "starting" not in one.discovery.status())
                await asyncio.sleep(0.2)
                assert one.seen == {}
        finally:
            await runner.cleanup()

    asyncio.run(story())


def test_store_compares_watches_and_limits(server: ConsulServer) -> None:
    async def story() -> None:
        async with ConsulClient(ConsulAccess(server.url)) as client:
            store = ConsulStore(client, f"inference-mesh/{fresh()}")
            assert await store.get("plan") is None
            assert await store.put("plan", b"one", version=0)
            assert not await store.put("plan", b"two", version=0)
            found = await store.get("plan")
            assert found is not None
            assert found[0] == b"one"
            changes = store.watch("plan")
            assert await anext(changes) == found
            waiting = asyncio.ensure_future(anext(changes))
            assert await store.put("plan", b"two", version=found[1])
            changed = await asyncio.wait_for(waiting, 5)
            assert changed is not None
            assert changed[0] == b"two"
            await changes.aclose()  # type: ignore[attr-defined]
            with pytest.raises(ValueError, match="524288"):
                await store.put("plan", b"x" * 600_000)
            await store.delete("plan")
            assert await store.get("plan") is None
        async with ConsulClient(ConsulAccess("http://127.0.0.1:9")) as nobody:
            with pytest.raises(CONSUL_ERRORS):
                await ConsulStore(nobody, "x").get("plan")

    asyncio.run(story())


def test_one_leader_at_a_time_with_growing_terms(server: ConsulServer) -> None:
    async def story() -> None:
        terms: list[tuple[str, int]] = []
        leading: set[str] = set()
        prefix = fresh()

        async def contender(name: str) -> None:
            async with ConsulClient(ConsulAccess(server.url)) as client:

                def gained(term: int) -> None:
                    assert not leading, f"{name} leads beside {leading}"
                    leading.add(name)
                    terms.append((name, term))

                lock = LeaderLock(
                    client,
                    ConsulStore(client, prefix),
                    "leader",
                    name,
                    gained,
                    lambda reason: leading.discard(name),
                )
                await lock.run()

        tasks = {n: asyncio.create_task(contender(n)) for n in ("a", "b")}
        await soon(lambda: bool(leading))
        first = next(iter(leading))
        tasks[first].cancel()
        await soon(lambda: bool(leading - {first}), 25)
        assert terms[1][1] > terms[0][1]
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert leading == set()

    asyncio.run(story())


def test_agents_by_consul_alone_and_on_without_it(tmp_path: Path) -> None:
    consul = ConsulServer(tmp_path / "dev")
    consul.start()
    try:
        consul.wait_for_leader()
        with (
            agent(tmp_path / "a", consul=consul.url) as one,
            agent(tmp_path / "b", environment={"CONSUL_HTTP_ADDR": consul.url}) as two,
        ):
            until(lambda: one.states() == {two.node: "alive"} and two.states() == {one.node: "alive"})
            until(
                lambda: "consul" in next(n["sources"] for n in one.report()["nodes"] if n["id"] == two.node)
            )
            consul.kill()
            time.sleep(1.0)
            assert one.states() == {two.node: "alive"}
            until(lambda: "registered" not in one.report()["discovery"]["consul"], 20)
            consul.start()
            consul.wait_for_leader()
            until(lambda: len(consul.services()) == 2, 30)
            # A ghost in Consul is no member: kill -9 is out at once whatever Consul lists.
            two.sends(9)
            assert until(lambda: one.states()[two.node] != "alive", 2) < 2
            assert len(consul.services()) == 2
            with agent(tmp_path / "b", consul=consul.url) as again:
                assert again.node == two.node
                until(lambda: one.states() == {again.node: "alive"})
                until(lambda: len(consul.services()) == 2)
    finally:
        consul.kill()
