"""Real Consul servers on loopback for the tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_S = 30.0


def consul_binary() -> str | None:
    """From the PATH, or where ``make test`` unpacked it."""
    home = Path(os.environ.get("MESH_HOME", Path(__file__).parents[1] / ".mesh"))
    unpacked = home / "tools" / "consul" / "usr" / "bin" / "consul"
    return shutil.which("consul") or (str(unpacked) if unpacked.exists() else None)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, for TCP and UDP."""
    sockets = []
    for _ in range(count):
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sockets.append(sock)
    ports = [s.getsockname()[1] for s in sockets]
    for sock in sockets:
        sock.close()
    return ports


class ConsulServer:
    """One process; ``stop`` is SIGKILL, ``start`` again keeps ports and data."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, dev: bool = True) -> None:
        self.folder, self.dev = folder, dev
        names = ["http", "server", "serf_lan", "serf_wan"]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.config: dict[str, Any] = {
            "node_name": folder.name,
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "disable_update_check": True,
            "disable_host_node_id": True,
            "data_dir": str(folder / "data"),
            "ports": {**self.ports, "dns": -1, "grpc": -1},
            **(config or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def serf(self) -> str:
        return f"127.0.0.1:{self.ports['serf_lan']}"

    def start(self) -> None:
        binary = consul_binary()
        assert binary is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.json"
        file.write_text(json.dumps(self.config))
        command = [binary, "agent", f"-config-file={file}", *(["-dev"] if self.dev else [])]
        if self.dev:
            self.config.pop("data_dir", None)
            file.write_text(json.dumps(self.config))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def get(self, path: str, token: str = "", method: str = "GET", data: bytes | None = None) -> Any:
        headers = {"X-Consul-Token": token} if token else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=8) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def wait_for_leader(self) -> str:
        """Its leader's address, once it takes writes."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                leader = self.get("/v1/status/leader")
                if leader:
                    return str(leader)
            except (OSError, urllib.error.URLError, ValueError):
                pass
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.05)
        log = (self.folder / "log").read_text(errors="replace")[-2000:]
        raise AssertionError(f"this Consul has no leader:\n{log}")

    def services(self, name: str = "inference-mesh", token: str = "") -> list[dict[str, Any]]:
        """Catalogue entries of a service."""
        found: list[dict[str, Any]] = self.get(f"/v1/catalog/service/{name}", token)
        return found


def cluster_of_three(folder: Path) -> list[ConsulServer]:
    """Three servers that elected a leader."""
    servers = [
        ConsulServer(folder / f"server-{i}", {"server": True, "bootstrap_expect": 3}, dev=False)
        for i in range(3)
    ]
    for server in servers:
        server.config["retry_join"] = [s.serf for s in servers if s is not server]
        server.config["retry_interval"] = "1s"
        server.config["performance"] = {"raft_multiplier": 1}
        server.start()
    for server in servers:
        server.wait_for_leader()
    return servers
