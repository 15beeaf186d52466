"""Values survive the wire; bytes from a hostile peer give a ``PeerError`` and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.adapters.codec import PAYLOAD_MAX, Decoder, encode
from mesh.errors import PeerError
from mesh.messages import Ack, Beacon, Cause, Close, Frame, HopLost, Message, Opened, Refused, Sampled
from mesh.types import EnsembleRoute, Epoch, Sampling, Token, TokenLogprob
from protos.gen import mesh_pb2 as pb
from tests.builders import OWNER, SESSION, opening, route

EPOCH = Epoch(3, OWNER)


def there_and_back(message: Message) -> Message | None:
    decoder, result = Decoder(), None
    for packet in encode(message):
        result = decoder.decode(pb.Packet.FromString(packet.SerializeToString()))
    return result


@pytest.mark.parametrize(
    "message",
    [
        opening(sampling=Sampling(2**63, 3, 0.5, 0.25, 40, 1.0, -1.0, ((5, -100.0),), 4)),
        opening(route=EnsembleRoute((route(2), route(4)), "vote")),
        Opened(SESSION, EPOCH, 2, 9),
        Refused(SESSION, EPOCH, 1, Cause.FULL, "no slot", 500),
        [Ack(SESSION, EPOCH, 7, 1, 250)],
        Beacon(12, 3),
        Close(SESSION, EPOCH, "stop", 1),
        HopLost(SESSION, EPOCH, 2, Cause.SILENT, "no beacon", 4),
        [Sampled(SESSION, EPOCH, Token(5, 42, -0.5, (TokenLogprob(7, -1.0),), (1, 2, 3)))],
        [Sampled(SESSION, EPOCH, Token(5, 42))],
    ],
    ids=lambda m: type(m[0] if isinstance(m, list) else m).__name__,
)
def test_every_message_comes_back_as_it_went(message: Message) -> None:
    assert there_and_back(message) == message


def frames_of(*lengths: int, width: int = 8) -> list[Frame]:
    random = np.random.default_rng(0)
    return [
        Frame(SESSION, EPOCH, 4, n, True, random.random((n, width), dtype=np.float32), 1, (9, 8, 7), (4, 5))
        for n in lengths
    ]


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 3), (64, 1)])
def test_activations_come_back_bit_for_bit(lengths: tuple[int, ...]) -> None:
    sent = frames_of(*lengths)
    back = there_and_back(sent)
    assert isinstance(back, list)
    for a, b in zip(sent, back, strict=True):
        assert isinstance(b, Frame)
        assert (a.session, a.epoch, a.position, a.length, a.times, a.stage) == (
            b.session,
            b.epoch,
            b.position,
            b.length,
            b.times,
            b.stage,
        )
        assert a.payload.tobytes() == b.payload.tobytes()


def test_large_frames_go_in_fragments_below_the_limit() -> None:
    sent = frames_of(300, width=576)
    packets = list(encode(sent))
    assert len(packets) == 4
    assert all(len(p.frames.activations) <= PAYLOAD_MAX for p in packets)
    decoder = Decoder()
    results = [decoder.decode(p) for p in packets]
    assert results[:-1] == [None] * 3
    assert isinstance(results[-1], list)
    last = results[-1][0]
    assert isinstance(last, Frame)
    assert last.payload.tobytes() == sent[0].payload.tobytes()


def test_tokens_travel_as_tokens() -> None:
    frame = Frame(SESSION, EPOCH, 0, 3, False, np.array([5, 6, 7], dtype=np.int64))
    back = there_and_back([frame])
    assert isinstance(back, list)
    assert isinstance(back[0], Frame)
    assert back[0].payload.tolist() == [5, 6, 7]


def test_a_token_on_a_hop_weighs_less_than_its_promise() -> None:
    (packet,) = encode(frames_of(1, width=576))
    assert packet.ByteSize() <= 2600


HEAD: dict[str, Any] = {"session": bytes.fromhex(SESSION), "owner": "n", "length": 1}


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (pb.Frames(), "0 frames"),
        (pb.Frames(heads=[pb.FrameHead(**HEAD)]), "length 1 carries 0 tokens"),
        (pb.Frames(heads=[pb.FrameHead(**HEAD)], activations=b"abc"), "do not divide"),
        (pb.Frames(heads=[pb.FrameHead(**(HEAD | {"session": b"x"}))], activations=b"abcd"), "session id"),
        (pb.Frames(heads=[pb.FrameHead(**(HEAD | {"length": 0}))]), "length 0 carries 0 tokens"),
        (pb.Frames(heads=[pb.FrameHead(**HEAD), pb.FrameHead()], activations=b"abcd"), "session id|empty"),
        (pb.Frames(heads=[pb.FrameHead(**HEAD, tokens=[1, 2])]), "carries 2 tokens"),
        (pb.Frames(fragment=1, fragments=2), "out of order"),
        (pb.Frames(fragment=0, fragments=5000), "out of order"),
    ],
)
def test_wrong_frames_are_named(frames: pb.Frames, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        Decoder().decode(pb.Packet(frames=frames))


def test_nothing_may_come_between_fragments() -> None:
    decoder = Decoder()
    packets = list(encode(frames_of(300, width=576)))
    decoder.decode(packets[0])
    with pytest.raises(PeerError, match="between fragments"):
        decoder.decode(pb.Packet(beacon=pb.Beacon()))


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_a_peer_error(data: bytes) -> None:
    try:
        packet = pb.Packet.FromString(data)
    except DecodeError:
        return
    try:
        Decoder().decode(packet)
    except PeerError as error:
        assert str(error)
