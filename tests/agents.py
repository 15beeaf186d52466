"""Agent processes for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 30


@dataclass
class AgentProcess:
    """One running ``mesh agent``."""

    process: subprocess.Popen[bytes]
    node: str
    address: str
    api: str
    log: Path
    prefix: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """``/mesh/v1/nodes``."""
        if self.prefix:  # its network is not ours
            fetch = f"import urllib.request as u; print(u.urlopen('http://{self.api}/mesh/v1/nodes').read().decode())"
            done = subprocess.run(
                [*self.prefix, sys.executable, "-c", fetch], capture_output=True, timeout=10, check=False
            )
            if done.returncode:
                raise OSError(done.stderr.decode()[-200:])
            inside: dict[str, Any] = json.loads(done.stdout)
            return inside
        with urllib.request.urlopen(f"http://{self.api}/mesh/v1/nodes", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def states(self) -> dict[str, str]:
        """State by node id, ourselves left out."""
        return {n["id"]: n["state"] for n in self.report()["nodes"] if n["id"] != self.node}

    def sends(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """SIGTERM, and the exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdin:
                self.process.stdin.close()


@contextlib.contextmanager
def agent(
    folder: Path,
    prefix: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **settings: str,
) -> Iterator[AgentProcess]:
    """An agent with its data in ``folder``; ``prefix`` is a command to run it under."""
    started = start_agent(folder, prefix, environment, **settings)
    try:
        yield started
    finally:
        started.end()


def start_agent(
    folder: Path,
    prefix: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **settings: str,
) -> AgentProcess:
    folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "data_dir": str(folder),
        "home": str(folder / "home"),
        "name": folder.name,
        "port": "0",
        "api_port": "0",
        "mdns": "off",
        "cluster": "test",
        **settings,
    }
    reading, writing = os.pipe()
    command = [*prefix, sys.executable, "-m", "mesh", "agent", "--tied", "--ready-fd", str(writing)]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MESH_", "CONSUL_", "NOMAD_"))}
    log = folder / "agent.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(writing,),
            env={**kept, **(environment or {})},
        )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        line = pipe.readline()
    if not line:
        process.wait(START_S)
        if process.stdin:
            process.stdin.close()
        raise AssertionError(f"{folder.name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
    ready = json.loads(line)
    return AgentProcess(process, ready["node"], ready["address"], ready["api_address"], log, prefix)


def until(what: Callable[[], bool], limit_s: float = 10.0, why: str = "") -> float:
    """Seconds until ``what`` holds."""
    begin = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if what():
                return time.monotonic() - begin
        if time.monotonic() - begin > limit_s:
            raise AssertionError(f"not within {limit_s} s{': ' + why if why else ''}")
        time.sleep(0.02)
