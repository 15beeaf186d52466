"""Checks whose surroundings are made here: a peer with a wrong clock, folders that cannot be written."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc

from mesh.adapters.membership_codec import fact_to_pb
from mesh.gossip import Fact
from mesh.types import Address, NodeId
from node_agent.adapters import doctor
from node_agent.adapters.doctor import Finding, Verdict
from node_agent.config import AgentConfig
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc as rpc


class WrongClock(rpc.MembershipServicer):
    """An agent whose clock is off."""

    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    async def Exchange(self, request: pb.View, context: Any) -> pb.View:  # noqa: N802
        return pb.View()

    async def Probe(self, request: pb.ProbeRequest, context: Any) -> pb.ProbeReply:  # noqa: N802
        me = Fact(NodeId("n-off"), Address("127.0.0.1:1"), 1)
        return pb.ProbeReply(sender=fact_to_pb(me), clock_ms=int((time.time() + self.ahead_s) * 1000))


def findings_with_peer(ahead_s: float) -> list[Finding]:
    async def story() -> list[Finding]:
        server = grpc.aio.server()
        rpc.add_MembershipServicer_to_server(WrongClock(ahead_s), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        config = AgentConfig(mdns="off", peers=(f"127.0.0.1:{port}",), port=0, api_port=0)
        found = await doctor.examine(config)
        await server.stop(0)
        return found

    return asyncio.run(story())


def test_a_clock_that_is_an_hour_off_is_named() -> None:
    for ahead, words in ((3600, "3600 s ahead of"), (-3600, "3600 s behind")):
        clocks = [f for f in findings_with_peer(ahead) if f.check == "clocks"]
        assert any(f"n-off is {words} this machine" in f.found and f.advice for f in clocks)
    assert all(f.verdict is Verdict.FINE for f in findings_with_peer(0.5) if f.check == "clocks")


def test_a_check_that_hangs_or_fails_is_a_finding(monkeypatch: Any) -> None:
    async def hangs(config: AgentConfig) -> list[Finding]:
        await asyncio.sleep(60)
        return []

    async def fails(config: AgentConfig) -> list[Finding]:
        raise OSError("broken")

    monkeypatch.setattr(doctor, "_CHECKS", {"slow": hangs, "bad": fails})
    monkeypatch.setattr(doctor, "DEADLINE_S", 0.05)
    found = asyncio.run(doctor.examine(AgentConfig()))
    assert [(f.check, f.verdict, f.found) for f in found] == [
        ("slow", Verdict.BAD, "no result within 0.05 s"),
        ("bad", Verdict.BAD, "broken"),
    ]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = AgentConfig(home=str(tmp_path / "file" / "home"), mdns="off", port=0, api_port=0)
    found = asyncio.run(doctor.examine(config))
    assert any(f.check == "folders" and f.verdict is Verdict.BAD and f.advice for f in found)
