"""Membership's packets and views to bytes and back. What a peer sends is checked here, once."""

from __future__ import annotations

import re
import zlib
from typing import Any

from google.protobuf.message import DecodeError

from mesh.coordinates import Coordinate
from mesh.errors import PeerError
from mesh.gossip import (
    Ack,
    Body,
    Fact,
    MemberState,
    Nack,
    Packet,
    Ping,
    PingRequest,
    Train,
    TrainSeen,
    Twin,
)
from mesh.membership import MEMBERS_MAX
from mesh.membership_events import RegionSummary
from mesh.messages import WIRE_VERSION
from mesh.types import Address, NodeId
from protos.gen import membership_pb2 as pb

DATAGRAM_MAX = 1400
"""Below every usual MTU, so that no datagram is fragmented."""
_NEWS_MAX = 64
_TRAIN_MAX = 64
_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%a-z]{2,60}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")
_PORT_MAX = 65535
_REGION_MAX = 64
_INSTANCE_MAX = 1 << 62


def cluster_mark(cluster: str) -> int:
    """What stands for the cluster's name in datagrams."""
    return zlib.crc32(cluster.encode())


def valid_node(text: str) -> bool:
    """Whether this can be a node id."""
    return _NODE.fullmatch(text) is not None


def valid_address(text: str) -> bool:
    """Whether this is ``host:port``."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) <= _PORT_MAX


def fact_to_pb(fact: Fact) -> pb.Fact:
    """A fact for the wire."""
    return pb.Fact(
        node=fact.node,
        address=fact.address,
        instance=fact.instance,
        incarnation=fact.incarnation,
        state=fact.state.value,  # type: ignore[arg-type]
        region=fact.region,
        by=fact.by,
    )


def read_fact(record: pb.Fact) -> Fact:
    """Raises ``PeerError`` on ids, addresses and numbers that make no sense."""
    if not valid_node(record.node):
        raise PeerError(f"{record.node[:80]!r} is no node id")
    if not valid_address(record.address):
        raise PeerError(f"{record.address[:80]!r} is no host:port")
    if record.by and not valid_node(record.by):
        raise PeerError(f"{record.by[:80]!r} is no node id")
    if record.instance >= _INSTANCE_MAX or record.incarnation >= (1 << 32) - 1:
        raise PeerError(f"{record.node} claims instance {record.instance}, incarnation {record.incarnation}")
    if len(record.region) > _REGION_MAX:
        raise PeerError(f"{record.node} claims a region of {len(record.region)} characters")
    if not 0 <= record.state <= MemberState.LEFT.value:
        raise PeerError(f"{record.node} has the unknown state {record.state}")
    return Fact(
        NodeId(record.node),
        Address(record.address),
        record.instance,
        record.incarnation,
        MemberState(record.state),
        record.region,
        NodeId(record.by),
    )


def encode_packet(packet: Packet, mark: int) -> bytes:
    """A datagram. News that would make it too large is left out; it is told again."""
    message = pb.Datagram(cluster=mark, sender=fact_to_pb(packet.sender))
    _write_body(message, packet.body)
    size = message.ByteSize()
    for fact in packet.news:
        record = fact_to_pb(fact)
        size += record.ByteSize() + 3
        if size > DATAGRAM_MAX:
            break
        message.news.append(record)
    return message.SerializeToString()


def _write_body(message: pb.Datagram, body: Body) -> None:
    match body:
        case Ping(seq, target, instance, count):
            message.ping.CopyFrom(pb.Ping(seq=seq, target=target, instance=instance, count=count))
        case Ack(seq, held, seen, count, coordinate):
            ack = pb.PingAck(seq=seq, held_us=min(held // 1000, 1 << 31), seen=seen, count=count)
            if coordinate is not None:
                ack.vector.extend(coordinate.vector)
                ack.height, ack.adjustment = coordinate.height, coordinate.adjustment
                ack.error = coordinate.error
            message.ack.CopyFrom(ack)
        case PingRequest(seq, fact):
            message.ping_request.CopyFrom(pb.PingRequest(seq=seq, target=fact_to_pb(fact)))
        case Nack(seq):
            message.nack.CopyFrom(pb.Nack(seq=seq))
        case Train(train, index, total, size):
            padding = bytes(max(0, size - message.ByteSize() - 24))
            message.train.CopyFrom(pb.Train(train=train, index=index, total=total, padding=padding))
        case TrainSeen(train, speed):
            message.train_seen.CopyFrom(pb.TrainSeen(train=train, bits_per_second=speed))
        case Twin(address):
            message.twin.CopyFrom(pb.Twin(address=address))
        case None:
            pass


def decode_packet(data: bytes, mark: int) -> Packet | None:
    """The packet of a datagram; ``None`` if it is another cluster's. Raises ``PeerError`` on garbage."""
    message = pb.Datagram()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise PeerError(f"a datagram of {len(data)} bytes is no membership packet") from None
    if message.cluster != mark:
        return None
    if len(message.news) > _NEWS_MAX:
        raise PeerError(f"a datagram with {len(message.news)} news; at most {_NEWS_MAX} are allowed")
    news = tuple(map(read_fact, message.news))
    return Packet(read_fact(message.sender), _read_body(message, len(data)), news)


def _read_body(message: pb.Datagram, size: int) -> Body:
    body: Any
    match message.WhichOneof("body"):
        case "ping":
            body = message.ping
            return Ping(body.seq, NodeId(body.target), body.instance, body.count)
        case "ack":
            body = message.ack
            coordinate = None
            if body.vector:
                place = Coordinate(tuple(body.vector), body.height, body.adjustment, body.error)
                coordinate = place if place.valid() else None
            return Ack(body.seq, body.held_us * 1000, body.seen, body.count, coordinate)
        case "ping_request":
            return PingRequest(message.ping_request.seq, read_fact(message.ping_request.target))
        case "nack":
            return Nack(message.nack.seq)
        case "train":
            body = message.train
            if not 1 < body.total <= _TRAIN_MAX:
                raise PeerError(f"a train of {body.total} packets; at most {_TRAIN_MAX} are allowed")
            return Train(body.train, body.index, body.total, size)
        case "train_seen":
            return TrainSeen(message.train_seen.train, message.train_seen.bits_per_second)
        case "twin":
            if not valid_address(message.twin.address):
                raise PeerError(f"{message.twin.address[:80]!r} is no host:port")
            return Twin(Address(message.twin.address))
        case _:
            return None  # news only, or a body of a later version


def view_to_pb(
    cluster: str, me: Fact, facts: tuple[Fact, ...], regions: tuple[RegionSummary, ...]
) -> pb.View:
    """A whole view for the wire."""
    return pb.View(
        cluster=cluster,
        wire_version=WIRE_VERSION,
        sender=fact_to_pb(me),
        facts=map(fact_to_pb, facts),
        regions=[pb.RegionSummary(region=r.region, alive=r.alive, gateways=r.gateways) for r in regions],
    )


def read_view(view: pb.View, cluster: str) -> tuple[Fact, tuple[Fact, ...], tuple[RegionSummary, ...]]:
    """Sender, facts and regions; raises ``PeerError`` on a stranger's or a senseless view."""
    if view.cluster != cluster:
        raise PeerError(f"it belongs to cluster {view.cluster[:64]!r}, not {cluster!r}")
    if view.wire_version != WIRE_VERSION:
        raise PeerError(f"it speaks wire version {view.wire_version}, we {WIRE_VERSION}")
    if len(view.facts) > MEMBERS_MAX + 1:
        raise PeerError(f"it sent {len(view.facts)} members; at most {MEMBERS_MAX} are allowed")
    regions = tuple(
        RegionSummary(
            r.region[:_REGION_MAX], r.alive, tuple(Address(g) for g in r.gateways[:8] if valid_address(g))
        )
        for r in view.regions[:MEMBERS_MAX]
    )
    return read_fact(view.sender), tuple(map(read_fact, view.facts)), regions
