"""One agent with a tiny model, spoken to by a peer of our own making: strangers, garbage, wrong frames."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mesh.adapters import grpc_links
from mesh.adapters.codec import Decoder, encode
from mesh.adapters.grpc_links import HANDSHAKE_TIMEOUTS_S, Identity, LinkPool, LinkServer
from mesh.messages import Ack, Cause, Frame, HopLost, Message, Open, Opened, Refused, Sampled
from mesh.types import Address, Digest, Epoch, LayeredRoute, LayerRange, NodeId, Sampling, SessionId, Stage
from node_agent.adapters.local_mesh import LocalMesh, MeshOptions
from node_agent.adapters.model_pull import pull_model
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from protos.gen import mesh_pb2 as pb
from protos.gen import mesh_pb2_grpc as rpc
from tests.builders import write_gguf

OWNER = NodeId("n-test")
EPOCH = Epoch(1, OWNER)
SESSION = SessionId("cd" * 16)
WAIT_S = 10


class Peer:
    """An owner of sessions: listens for what the agent reports, and has a link to it."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Message] = asyncio.Queue()
        self.address = Address("")
        self.stage: Stage
        self.call: Any = None

    async def send(self, message: Message) -> None:
        for packet in encode(message):
            await self.call.write(packet)

    async def hear(self) -> Message:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)

    def opening(self, shard: Digest | None = None) -> Open:
        stage = (
            self.stage
            if shard is None
            else Stage(self.stage.node, self.stage.address, self.stage.layers, shard)
        )
        return Open(
            session=SESSION,
            epoch=EPOCH,
            position=0,
            route=LayeredRoute((stage,)),
            stage=0,
            owner_address=self.address,
            positions=32,
            window=4,
            deadline_ms=20_000,
            prompt=(1, 2, 3),
            generated=(),
            sampling=Sampling(seed=1),
        )


def frame(payload: Any, position: int = 0, length: int | None = None) -> list[Frame]:
    return [Frame(SESSION, EPOCH, position, length or len(payload), True, payload)]


@asynccontextmanager
async def agent(folder: Path) -> AsyncIterator[tuple[Peer, LocalMesh]]:
    """An agent that holds a whole tiny model, and a peer with an open link to it."""
    store = ModelStore(folder)
    pull_model(store, "tiny", source=str(write_gguf(folder / "tiny.gguf")))
    digest = store.manifest(make_shard(store, "tiny", 0, 3)).digest
    peer = Peer()
    server = grpc.aio.server()
    listening = LinkServer(
        Identity("local", OWNER), lambda _, message: peer.heard.put_nowait(message), lambda _: None
    )
    rpc.add_PeerServicer_to_server(listening, server)
    peer.address = Address(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    settings = {"context": "64", "log": "off"}
    try:
        async with LocalMesh(MeshOptions(1, folder, folder / "run", settings=settings)) as mesh:
            await mesh.serve("tiny")
            here = mesh.agents[0]
            peer.stage = Stage(here.node, Address(here.address), LayerRange(0, 3), digest)
            async with grpc.aio.insecure_channel(here.address) as channel:
                peer.call = rpc.PeerStub(channel).Link()
                hello = pb.Hello(cluster="local", wire_version=1, node=OWNER)
                await peer.call.write(pb.Packet(hello=hello))
                assert (await peer.call.read()).welcome.accepted
                yield peer, mesh
    finally:
        await server.stop(None)


Story = Callable[[Peer, LocalMesh], Awaitable[None]]


def run(folder: Path, story: Story) -> None:
    async def whole() -> None:
        async with agent(folder) as (peer, mesh):
            await story(peer, mesh)

    asyncio.run(whole())


def test_a_session_by_hand(tmp_path: Path) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        await peer.send(peer.opening())
        await peer.send(frame(np.array([1, 2, 3], dtype=np.int64)))
        assert await peer.hear() == Opened(SESSION, EPOCH, 0, 0)
        tokens = await peer.hear()
        assert isinstance(tokens, list)
        first = tokens[0]
        assert isinstance(first, Sampled)
        assert first.token.position == 3
        # The acknowledgement comes back up the stream that the frame came down.
        acks: Message | None = None
        while not isinstance(acks, list):  # a beacon may come first, while the run lasts
            acks = Decoder().decode(await asyncio.wait_for(peer.call.read(), WAIT_S))
        assert isinstance(acks[0], Ack)
        assert acks[0].position == 3
        # A duplicate is dropped; the next position goes on.
        await peer.send(frame(np.array([1, 2, 3], dtype=np.int64)))
        await peer.send(frame(np.array([first.token.token], dtype=np.int64), 3))
        again = await peer.hear()
        assert isinstance(again, list)
        assert isinstance(again[0], Sampled)
        assert again[0].token.position == 4

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("payload", "length", "words"),
    [
        (np.array([1, 999_999], dtype=np.int64), 2, "outside the vocabulary"),
        (np.full((1, 64), np.nan, dtype=np.float32), 1, "takes tokens"),
        (np.arange(40, dtype=np.int64), 40, "reserved positions"),
    ],
)
def test_a_wrong_frame_is_reported_and_frees_the_session(
    tmp_path: Path, payload: Any, length: int, words: str
) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        await peer.send(peer.opening())
        await peer.hear()
        await peer.send(frame(payload, 0, length))
        lost = await peer.hear()
        assert isinstance(lost, HopLost)
        assert (lost.cause, lost.stage) == (Cause.BAD_FRAME, 0)
        assert words in lost.detail
        # The slot is free: the same session may open again.
        await peer.send(peer.opening())
        assert isinstance(await peer.hear(), Opened)

    run(tmp_path, story)


def test_r7_another_shard_is_refused(tmp_path: Path) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        await peer.send(peer.opening(Digest("f" * 64)))
        refused = await peer.hear()
        assert isinstance(refused, Refused)
        assert refused.cause is Cause.NO_SHARD

    run(tmp_path, story)


def test_strangers_are_refused_with_the_reason(tmp_path: Path) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        for hello, words in (
            (pb.Packet(hello=pb.Hello(cluster="other", wire_version=1)), "this is cluster 'local'"),
            (pb.Packet(hello=pb.Hello(cluster="local", wire_version=9)), "wire version 1, not 9"),
            (pb.Packet(beacon=pb.Beacon()), "no hello"),
        ):
            async with grpc.aio.insecure_channel(mesh.agents[0].address) as channel:
                call = rpc.PeerStub(channel).Link()
                await call.write(hello)
                answer: Any = await call.read()
                welcome = answer.welcome
                assert not welcome.accepted
                assert words in welcome.reason

    run(tmp_path, story)


def test_garbage_on_the_wire_ends_that_link_and_no_other(tmp_path: Path) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        host, port = mesh.agents[0].address.split(":")
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(data)
        async with grpc.aio.insecure_channel(mesh.agents[0].address) as channel:
            call = rpc.PeerStub(channel).Link()
            await call.write(pb.Packet(hello=pb.Hello(cluster="local", wire_version=1, node="bad")))
            await call.read()
            await call.write(
                pb.Packet(frames=pb.Frames(heads=[pb.FrameHead(session=b"short", length=1, tokens=[1])]))
            )
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "session id" in await call.details()
        await peer.send(peer.opening())
        assert isinstance(await peer.hear(), Opened)

    run(tmp_path, story)


class HalfOpen(LinkServer):
    """Says nothing on its first stream."""

    streams = 0

    async def Link(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.streams += 1
        if self.streams == 1:
            await asyncio.Event().wait()
        await super().Link(request_iterator, context)


@asynccontextmanager
async def half_open() -> AsyncIterator[tuple[HalfOpen, Address, asyncio.Queue[Message]]]:
    """It, where it listens, and what it hears."""
    heard: asyncio.Queue[Message] = asyncio.Queue()
    server = grpc.aio.server()
    peer = HalfOpen(Identity("local", OWNER), lambda _, message: heard.put_nowait(message), lambda _: None)
    rpc.add_PeerServicer_to_server(peer, server)
    address = Address(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    yield peer, address, heard
    await server.stop(None)


def test_what_waits_on_a_half_open_stream_is_sent_on_a_new_one() -> None:
    async def story() -> None:
        async with half_open() as (peer, address, heard):
            lost: list[str] = []
            us = Identity("local", NodeId("n-us"))
            pool = LinkPool(us, lambda *_: None, lambda _, reason: lost.append(reason))
            report = HopLost(SESSION, EPOCH, 0, Cause.STREAM_BROKEN, "cut")
            pool.send(address, report)
            assert await asyncio.wait_for(heard.get(), sum(HANDSHAKE_TIMEOUTS_S)) == report
            assert (peer.streams, lost) == (2, [])
            await pool.close()

    asyncio.run(story())


def test_what_was_dialled_while_a_peer_was_away_is_dialled_anew_when_it_is_back() -> None:
    async def story() -> None:
        async with half_open() as (peer, address, heard):
            pool = LinkPool(Identity("local", NodeId("n-us")), lambda *_: None, lambda *_: None)
            report = HopLost(SESSION, EPOCH, 0, Cause.STREAM_BROKEN, "cut")
            pool.send(address, report)
            async with asyncio.timeout(WAIT_S):
                while peer.streams == 0:
                    await asyncio.sleep(0.01)
            pool.dial_again()
            assert await asyncio.wait_for(heard.get(), HANDSHAKE_TIMEOUTS_S[0] / 2) == report
            pool.dial_again()  # a link that is up stays as it is
            pool.send(address, report)
            assert await asyncio.wait_for(heard.get(), HANDSHAKE_TIMEOUTS_S[0] / 2) == report
            assert peer.streams == 2
            await pool.close()

    asyncio.run(story())


def test_a_peer_that_is_gone_is_reported_however_many_others_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_links, "HANDSHAKE_TIMEOUTS_S", (0.1, 0.2))

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            address = Address(f"127.0.0.1:{mute.getsockname()[1]}")
            lost: asyncio.Queue[str] = asyncio.Queue()
            pool = LinkPool(
                Identity("local", NodeId("n-us")), lambda *_: None, lambda _, why: lost.put_nowait(why)
            )
            pool.dial(address)

            async def others() -> None:
                while True:
                    await asyncio.sleep(0.02)
                    pool.dial_again()

            returning = asyncio.create_task(others())
            assert await asyncio.wait_for(lost.get(), 2) == "no answer within 0.2 s"
            returning.cancel()
            await pool.close()

    asyncio.run(story())


def test_a_peer_that_goes_takes_its_sessions_along(tmp_path: Path) -> None:
    async def story(peer: Peer, mesh: LocalMesh) -> None:
        await peer.send(peer.opening())
        await peer.hear()
        assert await sessions(mesh) == 1
        peer.call.cancel()
        async with asyncio.timeout(WAIT_S):
            while await sessions(mesh):
                await asyncio.sleep(0.02)

    run(tmp_path, story)


async def sessions(mesh: LocalMesh) -> int:
    async for snapshot in mesh.watch(0.01):
        return sum(r["sessions"] for n in snapshot["nodes"] for r in n["replicas"])
    return 0


def test_a_shard_made_from_another_file_is_not_held(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    pull_model(store, "tiny", source=str(write_gguf(tmp_path / "a.gguf", seed=1)))
    folder = make_shard(store, "tiny", 0, 3)
    keep = tmp_path / "kept"
    folder.rename(keep)
    shutil.rmtree(store.folder("tiny"))
    pull_model(store, "tiny", source=str(write_gguf(tmp_path / "b.gguf", seed=2)))
    folder.parent.mkdir(parents=True)
    keep.rename(folder)

    command = [
        sys.executable,
        "-m",
        "mesh",
        "agent",
        "--home",
        str(tmp_path),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    command += ["--port", "0", "--api-port", "0", "--shards", "tiny:0-3/int8", "--context", "64"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert "was made from another file than the tiny that is here" in answer.stderr
    assert "Traceback" not in answer.stderr
