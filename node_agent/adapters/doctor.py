"""Checks of a machine and its surroundings, each with what to do about it. Every check has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mesh.adapters.membership_driver import open_socket, probe_agent
from mesh.discovery import Advert, Sighting
from mesh.errors import ConfigError, MeshError, PeerError
from mesh.types import Address, NodeId
from node_agent.adapters.discovery_setup import consul_wanted
from node_agent.adapters.fingerprint.machine import probe_machine
from node_agent.adapters.fingerprint.memory import probe_memory
from node_agent.adapters.model_store import ModelStore
from node_agent.config import AgentConfig, join_address
from node_agent.paths import default_home

DEADLINE_S = 8.0
_BROWSE_S = 3.0
_DISK_LOW = 1 << 30
_MEMORY_LOW = 256 << 20
_CLOCK_OFF_S = 5.0
_CLOCK_BUILT = 1_750_000_000  # mid-2025: no machine that runs this lives before
_EVERYWHERE = ("0.0.0.0", "::", "")


class Verdict(Enum):
    """How a check came out."""

    FINE = "ok"
    NOTE = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was checked, what was found, what to do (empty when all is well)."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


Check = Callable[[AgentConfig], Awaitable[list[Finding]]]


async def examine(config: AgentConfig) -> list[Finding]:
    """All checks, side by side; one that hangs or fails is a finding itself."""

    async def bounded(name: str, check: Check) -> list[Finding]:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await check(config)
        except TimeoutError:
            return [Finding(name, Verdict.BAD, f"no result within {DEADLINE_S:g} s")]
        except (MeshError, OSError) as error:
            return [Finding(name, Verdict.BAD, str(error))]

    results = await asyncio.gather(*(bounded(n, c) for n, c in _CHECKS.items()))
    return [finding for findings in results for finding in findings]


async def _ports(config: AgentConfig) -> list[Finding]:
    found = []
    running = await _running_agent(config)
    for name, port, kinds in (
        ("peer port", config.port, (socket.SOCK_STREAM, socket.SOCK_DGRAM)),
        ("API port", config.api_port, (socket.SOCK_STREAM,)),
    ):
        host = config.host if name == "peer port" else config.api_host
        errors = [e for e in (_bind(host, port, kind) for kind in kinds) if e]
        if not errors:
            found.append(Finding(name, Verdict.FINE, f"{join_address(host, port)} is free"))
        elif running:
            found.append(Finding(name, Verdict.FINE, f"{join_address(host, port)} is held by {running}"))
        else:
            setting = "--port" if name == "peer port" else "--api-port"
            advice = f"find who holds it with 'ss -lntup', or choose another with {setting}"
            found.append(Finding(name, Verdict.BAD, "; ".join(errors), advice))
    host = config.advertise or config.host
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            advice = "for a mesh of several machines start the agent with --host and this machine's address"
            found.append(
                Finding("reachable", Verdict.NOTE, f"{host}: only this machine can reach the agent", advice)
            )
    return found


def _bind(host: str, port: int, kind: int) -> str:
    if port == 0:
        return ""
    try:
        if kind == socket.SOCK_DGRAM:
            open_socket(host, port).close()
            return ""
        family = socket.getaddrinfo(host, port, type=kind)[0][0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as error:
        transport = "UDP" if kind == socket.SOCK_DGRAM else "TCP"
        return f"{transport} {join_address(host, port)}: {error.strerror or error}"
    return ""


async def _running_agent(config: AgentConfig) -> str:
    """The agent that answers at our own peer port, if one does."""
    host = "127.0.0.1" if config.host in _EVERYWHERE else config.host
    with contextlib.suppress(PeerError):
        node, _ = await probe_agent(config.cluster, Address(join_address(host, config.port)), 2.0)
        return f"the agent {node}"
    return ""


async def _peers(config: AgentConfig) -> list[Finding]:
    """Agents that can be found, and their clocks."""
    seen: dict[Address, str] = {Address(p): "settings" for p in config.peers}
    found = []
    if config.mdns == "on":
        sightings, status = await _browse(config)
        for sighting in sightings:
            seen.update(dict.fromkeys(sighting.addresses, "mdns"))
        good = status.startswith("on ")
        advice = (
            ""
            if good
            else "connect a network that carries multicast, or name agents with --peers or use Consul"
        )
        found.append(Finding("multicast", Verdict.FINE if good else Verdict.BAD, f"mDNS {status}", advice))
    if not seen:
        advice = "start one with 'mesh agent' on another machine, or name one with --peers"
        return [*found, Finding("other agents", Verdict.NOTE, "none in sight", advice)]
    for address, source in sorted(seen.items()):
        try:
            node, ahead = await probe_agent(config.cluster, address, 3.0)
        except PeerError as error:
            advice = "is it running, and does a firewall pass TCP and UDP to that port?"
            found.append(Finding("other agents", Verdict.BAD, f"{error} (by {source})", advice))
            continue
        found.append(Finding("other agents", Verdict.FINE, f"{node} answers at {address} (by {source})"))
        off = abs(ahead) > _CLOCK_OFF_S
        advice = "set the clock of one of the two (systemd-timesyncd or chrony): logs and TLS need it"
        if off:
            way = "ahead of" if ahead > 0 else "behind"
            found.append(
                Finding("clocks", Verdict.NOTE, f"{node} is {abs(ahead):.0f} s {way} this machine", advice)
            )
    return found


async def _browse(config: AgentConfig) -> tuple[list[Sighting], str]:
    """What mDNS shows in some seconds; advertises nothing."""
    from mesh.adapters.discovery.mdns import MdnsDiscovery

    seen: list[Sighting] = []
    looker = MdnsDiscovery(config.cluster, config.host)
    nobody = Advert(config.cluster, NodeId("doctor"), "", Address("127.0.0.1:9"), 0)
    task = asyncio.create_task(
        looker.run(nobody, lambda _, s: seen.append(s), lambda _, s: None, advertise=False)
    )
    await asyncio.sleep(_BROWSE_S)
    status = looker.status()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return seen, status


async def _clock(config: AgentConfig) -> list[Finding]:
    now = time.time()
    if now < _CLOCK_BUILT:
        advice = "set it (timedatectl set-ntp true); certificates and logs need it, the mesh itself does not"
        return [Finding("clocks", Verdict.BAD, f"this machine lives in {time.gmtime(now).tm_year}", advice)]
    return [
        Finding("clocks", Verdict.FINE, f"this machine says {time.strftime('%F %T UTC', time.gmtime(now))}")
    ]


async def _consul(config: AgentConfig) -> list[Finding]:
    if not consul_wanted(config, os.environ):
        return [Finding("Consul", Verdict.FINE, "not used (set --consul or CONSUL_HTTP_ADDR to use it)")]
    from mesh.adapters.consul_client import CONSUL_ERRORS, ConsulClient, ConsulStore
    from node_agent.adapters.consul_setup import consul_access

    access = consul_access(config, os.environ)
    advice = (
        "is a Consul agent running there ('consul members'), and may our token write the service "
        f"{config.consul_service!r} and the keys under {config.consul_prefix!r}, and read nodes?"
    )
    try:
        async with ConsulClient(access) as client:
            leader = await client.status.leader()
            if not leader:
                return [
                    Finding(
                        "Consul",
                        Verdict.BAD,
                        f"{access.url} has no leader",
                        "bring a majority of its servers up",
                    )
                ]
            await client.agent.services()
            _, entries = await client.health.service(config.consul_service, passing=True)
            store, key = ConsulStore(client, config.consul_prefix), f"doctor-{os.getpid()}"
            await store.put(key, b"may we write?")
            await store.delete(key)
    except CONSUL_ERRORS as error:
        return [Finding("Consul", Verdict.BAD, access.describe(error), advice)]
    return [Finding("Consul", Verdict.FINE, f"{access.url}, leader {leader}, {len(entries)} agents listed")]


async def _runtimes(config: AgentConfig) -> list[Finding]:
    found = [f for f in (_onnx(config), _litert()) if f is not None]
    if found:
        return found
    advice = "pip install 'inference-mesh[onnx]' (or [litert]) to host shards; an ingress alone does without"
    return [Finding("runtimes", Verdict.NOTE, "no runtime: this node hosts no shards", advice)]


def _litert() -> Finding | None:
    try:
        installed = version("ai-edge-litert")
    except PackageNotFoundError:
        return _tflite()
    try:
        from node_agent.adapters.litert_library import bound, unbound
        from node_agent.adapters.pages import pages

        memory = pages((1, 1))
        unbound(bound(memory))
    except (ConfigError, ImportError) as error:
        advice = "pip install 'inference-mesh[litert]'"
        return Finding("runtimes", Verdict.BAD, f"LiteRT {installed}: {error}", advice)
    return Finding("runtimes", Verdict.FINE, f"LiteRT {installed} with XNNPACK")


def _tflite() -> Finding | None:
    try:
        installed = version("tflite-runtime")
    except PackageNotFoundError:
        return None
    said = f"tflite-runtime {installed}: LiteRT shards in fp32 only, slower than with LiteRT"
    return Finding(
        "runtimes", Verdict.NOTE, said, "pip install 'inference-mesh[litert]' where there is a wheel"
    )


def _onnx(config: AgentConfig) -> Finding | None:
    try:
        installed = version("onnxruntime")
    except PackageNotFoundError:
        return None
    import onnxruntime

    have = onnxruntime.get_available_providers()
    missing = [p for p in config.providers if p not in have]
    if missing == list(config.providers):
        advice = f"name one of {', '.join(have)} in 'providers', or install a build that has it"
        said = f"ONNX Runtime {installed} lacks {', '.join(missing)}"
        return Finding("runtimes", Verdict.BAD, said, advice)
    said = f"ONNX Runtime {installed} with {', '.join(have)}"
    if missing:
        return Finding("runtimes", Verdict.NOTE, f"{said}; without {', '.join(missing)}", "it falls back")
    return Finding("runtimes", Verdict.FINE, said)


async def _machine(config: AgentConfig) -> list[Finding]:
    home = Path(config.home) if config.home else default_home()
    data_dir = Path(config.data_dir) if config.data_dir else home / "agent"
    have, memory = probe_machine(data_dir), probe_memory()
    found = []
    low = have.disk.free < _DISK_LOW
    advice = f"free some: models and logs are in {home} and {data_dir}" if low else ""
    found.append(
        Finding(
            "disk", Verdict.BAD if low else Verdict.FINE, f"{have.disk.free / 2**30:.1f} GiB free", advice
        )
    )
    low = memory.free < _MEMORY_LOW
    advice = "stop something, or host smaller shards" if low else ""
    found.append(
        Finding(
            "memory",
            Verdict.BAD if low else Verdict.FINE,
            f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            advice,
        )
    )
    for folder in {home, data_dir}:
        error = _writable(folder)
        if error:
            advice = "choose another with --home or --data-dir, or give us the right to write there"
            found.append(Finding("folders", Verdict.BAD, error, advice))
    models = ModelStore(home).names()
    advice = "" if models else "mesh model pull smollm2-135m"
    found.append(
        Finding("models", Verdict.FINE if models else Verdict.NOTE, ", ".join(models) or "none here", advice)
    )
    if have.thermal and have.thermal.throttled:
        found.append(
            Finding(
                "thermal",
                Verdict.NOTE,
                f"{have.thermal.zone} at {have.thermal.celsius} °C is throttled",
                "cool it",
            )
        )
    return found


def _writable(folder: Path) -> str:
    """Why nothing can be written there; empty if it can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".mesh-doctor-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    shutil.rmtree(probe, ignore_errors=True)
    return ""


_CHECKS: dict[str, Check] = {
    "ports": _ports,
    "machine": _machine,
    "clocks": _clock,
    "runtimes": _runtimes,
    "peers": _peers,
    "Consul": _consul,
}
