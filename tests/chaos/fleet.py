"""A few stages, two replicas of each, and ingresses that host nothing; on a network whose cables can be pulled."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from tests.agents import AgentProcess, start_agent, until
from tests.chaos.ballast import Ballast
from tests.chaos.client import MODEL
from tests.lan import Lan, refused

LAYERS = 30
REPLICAS = 2
INGRESSES = ("exact", "fast", "hot")
"""How a session that came in there is brought back."""
PORT, API = "7070", "7080"
CONTEXT = "1152"
_BACK_S = 60.0


def cuts(stages: int) -> list[tuple[int, int]]:
    """Layer ranges of about equal length."""
    return [(LAYERS * i // stages, LAYERS * (i + 1) // stages) for i in range(stages)]


@dataclass
class Fleet:
    """Agents by name: ``exact``, ``fast`` and ``hot`` are ingresses, ``s0a`` is the first replica of stage 0."""

    folder: Path
    home: str
    lan: Lan | None
    stages: int
    form: tuple[str, str]
    """Runtime and quantization of the shards."""
    threads: str = "2"
    settings: dict[str, str] = field(default_factory=dict)
    agents: dict[str, AgentProcess] = field(default_factory=dict)
    ballast: Ballast = field(default_factory=Ballast)

    @property
    def names(self) -> list[str]:
        hosts = [f"s{i}{'ab'[r]}" for r in range(REPLICAS) for i in range(self.stages)]
        return [*INGRESSES, *hosts]

    def place(self, name: str) -> int:
        return self.names.index(name) + 1

    def start(self, name: str) -> AgentProcess:
        """Start an agent, or start it again on the same data directory."""
        settings = {"home": self.home, "log_level": "info", **self.settings}
        if name[0] == "s":
            start, end = cuts(self.stages)[int(name[1])]
            settings |= {
                "shards": f"{MODEL}:{start}-{end}/{'-'.join(self.form)}",
                "threads": self.threads,
                "slots": "6",
            }
            settings |= {"context": CONTEXT}
        else:
            settings |= {"replay": "fast" if name == "fast" else "exact"}
            settings |= {"recovery": "hot" if name == "hot" else "warm"}
        if self.lan is not None:
            host = self.lan.v4(self.place(name))
            settings |= {"host": host, "port": PORT, "api_host": host, "api_port": API}
        first = self.agents.get("exact")
        if first is not None and name != "exact":
            settings["peers"] = first.address
        elif name == "exact" and "fast" in self.agents:
            settings["peers"] = self.agents["fast"].address
        prefix = self.lan.prefix(self.place(name)) if self.lan is not None else ()
        started = start_agent(self.folder / name, prefix, None, **settings)
        started.prefix = ()  # this process is on the same network
        self.agents[name] = started
        return started

    def by_node(self, node: str) -> str:
        return next(name for name, agent in self.agents.items() if agent.node == node)

    def session(self, ingress: str, session: str) -> dict[str, Any]:
        """The trace of a session."""
        url = f"http://{self.agents[ingress].api}/mesh/v1/sessions/{session}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def failovers(self) -> int:
        """Sessions of any ingress that left a stage which they took for lost, so far. (Handed over from what drains they are not.)"""
        total = 0.0
        for ingress in INGRESSES:
            with urllib.request.urlopen(f"http://{self.agents[ingress].api}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            told = [x for x in lines if x.startswith("mesh_failovers_total") and 'cause="draining"' not in x]
            total += sum(float(x.rsplit(" ", 1)[1]) for x in told)
        return int(total)

    def missing(self) -> str:
        """Empty when all ingresses see every replica serving on a node that answers; else who sees what."""
        wanted, told = self.stages * REPLICAS, []
        for ingress in INGRESSES:
            try:
                nodes = self.agents[ingress].report()["nodes"]
            except OSError as error:
                told.append(f"{ingress} does not answer ({error})")
                continue
            alive = [n for n in nodes if n["state"] == "alive" and n.get("reachable", True)]
            serving = sum(r["state"] == "serving" for n in alive for r in n["replicas"])
            if serving != wanted:
                told.append(f"{ingress} sees {serving} replicas of {wanted} serving")
        return "; ".join(told)

    def whole(self) -> bool:
        return not self.missing()

    def wait_whole(self) -> None:
        try:
            until(self.whole, _BACK_S)
        except AssertionError as late:
            raise AssertionError(f"the fleet is not whole after {_BACK_S:g} s: {self.missing()}") from late
        time.sleep(0.3)


@contextmanager
def fleet(
    store: ModelStore, folder: Path, stages: int, form: tuple[str, str], settings: dict[str, str]
) -> Iterator[Fleet]:
    """A running fleet; on loopback, without cables, where no namespaces can be had."""
    runtime, quantization = form
    for start, end in cuts(stages):
        make_shard(store, MODEL, start, end, quantization, runtime=runtime)
    lan = None if refused() else Lan(f"mesh{os.getpid()}c", len(INGRESSES) + stages * REPLICAS, us=True)
    made = Fleet(folder, str(store.root.parent), lan, stages, form, settings=settings)
    try:
        if lan is not None:
            lan.build()
        for name in made.names:
            made.start(name)
        made.wait_whole()
        yield made
    finally:
        made.ballast.free()
        for agent in made.agents.values():
            with suppress(ProcessLookupError):
                agent.process.send_signal(signal.SIGCONT)
                agent.process.terminate()
        for agent in made.agents.values():
            agent.end()
        if lan is not None:
            lan.remove()
