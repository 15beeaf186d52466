"""Adverts and membership packets from the network: whatever comes, a clear refusal or a value."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.adapters.discovery.consul import read_service as read_consul
from mesh.adapters.discovery.mdns import read_service as read_mdns
from mesh.adapters.membership_codec import (
    DATAGRAM_MAX,
    cluster_mark,
    decode_packet,
    encode_packet,
    fact_to_pb,
    read_view,
    valid_address,
    view_to_pb,
)
from mesh.coordinates import Coordinate, Vivaldi
from mesh.discovery import ADVERT_BYTES_MAX, ITEM_BYTES_MAX, Advert, Sighting, read_advert
from mesh.errors import ConfigError, PeerError
from mesh.gossip import Ack, Body, Fact, MemberState, Nack, Packet, Ping, PingRequest, Train, TrainSeen, Twin
from mesh.links import LinkMeter, quantile, train_speed
from mesh.membership_events import RegionSummary
from mesh.types import Address, NodeId
from node_agent.adapters.identity import node_identity
from protos.gen import membership_pb2 as pb

ADVERT = Advert("c", NodeId("n-1"), "käthe", Address("10.0.0.1:7070"), 99, "0123456789abcdef", "eu", "0.1.0")
SIGHTING = Sighting(NodeId("n-1"), (Address("10.0.0.1:7070"),), "0123456789abcdef", 99)
FACT = Fact(NodeId("n-1"), Address("10.0.0.1:7070"), 99, 3, MemberState.SUSPECT, "eu", NodeId("n-2"))
MARK = cluster_mark("c")


def test_adverts_go_around() -> None:
    assert read_advert(ADVERT.items(), "c") == ADVERT
    assert read_advert(ADVERT.items(), "other") is None
    assert read_advert({**ADVERT.items(), "later": "thing"}, "c") == ADVERT
    assert read_mdns(ADVERT.items(), ["10.0.0.9"], 7070, "c") == SIGHTING
    assert read_consul({"Meta": ADVERT.items()}, "c") == SIGHTING
    assert read_consul({}, "c") is None


def test_adverts_keep_the_limits_of_dns_sd() -> None:
    long = Advert(
        "c" * 63, NodeId("n" * 64), "ü" * 500, Address("h" * 200 + ":1"), 1 << 60, "f" * 16, "r" * 60
    )
    items = long.items()
    assert all(len(k) + 1 + len(v.encode()) <= ITEM_BYTES_MAX for k, v in items.items())
    assert sum(len(k) + len(v.encode()) + 2 for k, v in items.items()) <= ADVERT_BYTES_MAX


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"v": "2"}, "version '2'"),
        ({"node": "../../etc"}, "node is '../../etc'"),
        ({"node": ""}, "node is ''"),
        ({"instance": "-1"}, "instance is '-1'"),
        ({"instance": "9" * 30}, "instance is"),
        ({"digest": "xyz"}, "digest is 'xyz'"),
        ({"region": "a b"}, "region is 'a b'"),
        ({"junk": "x" * 2000}, "bytes; the limit is"),
    ],
)
def test_wrong_adverts_are_named(changes: dict[str, str], words: str) -> None:
    with pytest.raises(PeerError, match=words):
        read_advert({**ADVERT.items(), **changes}, "c")


def test_link_local_addresses_are_taken_from_the_resolver() -> None:
    items = {**ADVERT.items(), "address": "[fe80::1]:7070"}
    found = read_mdns(items, ["fe80::1%eth0"], 7070, "c")
    assert found is not None
    assert found.addresses == ("[fe80::1%eth0]:7070",)
    with pytest.raises(PeerError, match="without a usable address"):
        read_mdns({**items, "address": "nowhere"}, [], 0, "c")
    with pytest.raises(PeerError, match="address is 'nowhere'"):
        read_consul({"Meta": {**items, "address": "nowhere"}}, "c")


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=8), st.booleans())
def test_no_advert_breaks_the_reader(items: dict[str, str], ours: bool) -> None:
    given_items = {**ADVERT.items(), **items} if ours else items
    with contextlib.suppress(PeerError):
        assert read_mdns(given_items, ["10.0.0.1", "::1", "x"], 7, "c") is None or ours
    with contextlib.suppress(PeerError):
        assert read_consul({"Meta": given_items}, "c") is None or ours


BODIES: list[Body] = [
    None,
    Ping(7, NodeId("n-2"), 5, 2),
    Ack(7, 5000, 3, 2, Coordinate((0.5, 0.25, 0.0, 1.0), 0.5, -0.25, 1.5)),
    Ack(7),
    PingRequest(8, FACT),
    Nack(8),
    TrainSeen(9, 12345),
    Twin(Address("10.0.0.2:1")),
]


@pytest.mark.parametrize("body", BODIES)
def test_packets_go_around(body: Body) -> None:
    packet = Packet(FACT, body, (FACT, FACT))
    assert decode_packet(encode_packet(packet, MARK), MARK) == packet
    assert decode_packet(encode_packet(packet, MARK), MARK + 1) is None


def test_trains_have_their_size_and_news_never_outgrow_a_datagram() -> None:
    for size in (600, 1200):
        data = encode_packet(Packet(FACT, Train(1, 2, 8, size)), MARK)
        assert abs(len(data) - size) < 16
        decoded = decode_packet(data, MARK)
        assert decoded is not None
        assert decoded.body == Train(1, 2, 8, len(data))
    crowded = encode_packet(Packet(FACT, None, (FACT,) * 60), MARK)
    assert len(crowded) <= DATAGRAM_MAX
    decoded = decode_packet(crowded, MARK)
    assert decoded is not None
    assert 5 < len(decoded.news) < 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"node": "a b"}, "no node id"),
        ({"node": ""}, "no node id"),
        ({"address": "10.0.0.1"}, "no host:port"),
        ({"address": "x:99999"}, "no host:port"),
        ({"by": "a/b"}, "no node id"),
        ({"instance": 1 << 63}, "claims instance"),
        ({"incarnation": (1 << 32) - 1}, "claims instance"),
        ({"region": "r" * 100}, "region of 100"),
        ({"state": 9}, "unknown state 9"),
    ],
)
def test_facts_that_make_no_sense_are_refused(change: dict[str, object], words: str) -> None:
    record = fact_to_pb(FACT)
    for name, value in change.items():
        setattr(record, name, value)
    data = pb.Datagram(cluster=MARK, sender=record).SerializeToString()
    with pytest.raises(PeerError, match=words):
        decode_packet(data, MARK)


@given(st.binary(max_size=300))
def test_no_datagram_breaks_the_decoder(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        decode_packet(data, MARK)


@given(st.data())
def test_no_flipped_byte_breaks_the_decoder(data: st.DataObject) -> None:
    whole = bytearray(encode_packet(Packet(FACT, data.draw(st.sampled_from(BODIES)), (FACT,)), MARK))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(PeerError):
        decode_packet(bytes(whole), MARK)


def test_views() -> None:
    regions = (RegionSummary("eu", 3, (Address("10.0.0.1:1"),)),)
    view = view_to_pb("c", FACT, (FACT,), regions)
    assert read_view(view, "c") == (FACT, (FACT,), regions)
    with pytest.raises(PeerError, match="belongs to cluster 'c'"):
        read_view(view, "d")
    view.wire_version = 99
    with pytest.raises(PeerError, match="wire version 99"):
        read_view(view, "c")


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("10.0.0.1:7070", True),
        ("[fe80::1%eth0]:1", True),
        ("host-1.lan:65535", True),
        ("host:0", False),
        ("host:65536", False),
        ("::1:7", False),
        ("a b:7", False),
        ("", False),
    ],
)
def test_addresses(text: str, fine: bool) -> None:
    assert valid_address(text) is fine


def test_coordinates_learn_round_trips_that_were_never_measured() -> None:
    """Twenty nodes in three sites; each measures six others, the rest is estimated."""
    rng = Random(5)
    places = [(rng.choice([0, 40, 90]), rng.uniform(0.2, 2.0)) for _ in range(20)]

    def rtt_s(a: int, b: int) -> float:
        return (abs(places[a][0] - places[b][0]) + places[a][1] + places[b][1]) / 1000

    nodes = [Vivaldi(Random(i)) for i in range(20)]
    friends = {a: rng.sample([b for b in range(20) if b != a], 6) for a in range(20)}
    for _ in range(400):
        for a, node in enumerate(nodes):
            b = rng.choice(friends[a])
            node.measured(nodes[b].here, rtt_s(a, b) * rng.uniform(0.95, 1.05))
    errors = sorted(
        abs(nodes[a].here.rtt_to(nodes[b].here) - rtt_s(a, b)) / rtt_s(a, b)
        for a in range(20)
        for b in range(a)
        if b not in friends[a] and a not in friends[b]
    )
    assert errors[len(errors) // 2] < 0.15


def test_coordinates_ignore_nonsense() -> None:
    node = Vivaldi(Random(1))
    before = node.here
    for rtt in (0.0, -1.0, float("nan"), float("inf"), 100.0):
        node.measured(Coordinate(), rtt)
    node.measured(Coordinate((float("nan"), 0.0, 0.0, 0.0)), 0.01)
    node.measured(Coordinate((1.0,)), 0.01)
    assert node.here == before


def test_link_meter() -> None:
    meter = LinkMeter()
    assert meter.estimate().samples == 0
    for i in range(1, 101):
        meter.answered(1000 + i, sent=2 * i, seen=i, answers=i)
    link = meter.estimate()
    assert (link.rtt_p50, link.rtt_p99, link.samples) == (1068, 1100, 64)
    assert (link.loss_out, link.loss_in) == (0.5, 0)
    meter.answered(1000, sent=202, seen=1, answers=1)  # the peer began anew
    assert meter.estimate().loss_out == 0
    assert quantile([], 50) == 0
    assert quantile([1, 2, 3], 0) == 1
    assert train_speed([], 100) == train_speed([5], 100) == 0
    assert train_speed([0, 1_000_000, 2_000_000], 1000) == 8_000_000


def test_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    first = node_identity(tmp_path)
    assert node_identity(tmp_path) == first
    assert first.node.startswith("n-")
    assert len(first.public_key) == 32
    assert (tmp_path / "node-key.pem").stat().st_mode & 0o777 == 0o600
    (tmp_path / "node-id").write_text("kiosk-7\n")
    assert node_identity(tmp_path).node == "kiosk-7"
    (tmp_path / "node-key.pub").write_text("junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        node_identity(tmp_path)
    (tmp_path / "node-key.pub").write_text("ab")
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        node_identity(tmp_path)
