"""Values to packets and back. The only file that knows both sides; numpy rows are wrapped, not walked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import zip_longest
from math import isnan, nan
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mesh.errors import PeerError
from mesh.messages import (
    Ack,
    Beacon,
    Cause,
    Close,
    Frame,
    HopLost,
    Message,
    Open,
    Opened,
    Refused,
    Sampled,
    Witness,
)
from mesh.types import (
    Address,
    Digest,
    EnsembleRoute,
    Epoch,
    LayeredRoute,
    LayerRange,
    NodeId,
    Route,
    Sampling,
    SessionId,
    Stage,
    Standbys,
    Token,
    TokenLogprob,
)
from protos.gen import mesh_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAYLOAD_MAX = 192 * 1024
"""Larger activations are sent in fragments: WebRTC data channels end at 256 KiB."""
FRAGMENTS_MAX = 1024
HEADS_MAX = 1024
_SESSION_BYTES = 16
_ACTIVATION_DIMENSIONS = 2
_POSITIONS_MAX = 1 << 24


def encode(message: Message) -> Iterator[pb.Packet]:
    """The packets of a message: one, or several fragments of large frames."""
    if isinstance(message, list):
        yield from _encode_list(message)
        return
    match message:
        case Open():
            yield pb.Packet(open=_open(message))
        case Opened():
            yield pb.Packet(
                opened=pb.Opened(
                    session=_session(message.session),
                    epoch=_epoch(message.epoch),
                    stage=message.stage,
                    position=message.position,
                    short=message.short,
                    replayed=message.replayed,
                )
            )
        case Refused():
            yield pb.Packet(
                refused=pb.Refused(
                    session=_session(message.session),
                    epoch=_epoch(message.epoch),
                    stage=message.stage,
                    cause=_cause(message.cause),
                    reason=message.reason,
                    retry_after_ms=message.retry_after_ms,
                )
            )
        case Witness():
            yield pb.Packet(
                witness=pb.Witness(
                    session=_session(message.session),
                    epoch=_epoch(message.epoch),
                    position=message.position,
                    tokens=[t.token for t in message.tokens],
                    logprobs=[nan if t.logprob is None else t.logprob for t in message.tokens],
                    expires_unix_ms=message.expires_ms,
                    prompt=message.prompt,
                    request=message.request,
                )
            )
        case Beacon():
            yield pb.Packet(beacon=pb.Beacon(runs=message.runs, queued=message.queued))
        case Close():
            yield pb.Packet(
                close=pb.Close(
                    session=_session(message.session),
                    epoch=_epoch(message.epoch),
                    reason=message.reason[:1000],
                    stage=message.stage,
                    keep=message.keep,
                    alone=message.alone,
                    waits=message.waits,
                )
            )
        case HopLost():
            yield pb.Packet(
                hop_lost=pb.HopLost(
                    session=_session(message.session),
                    epoch=_epoch(message.epoch),
                    stage=message.stage,
                    cause=_cause(message.cause),
                    detail=message.detail[:1000],
                    position=message.position,
                )
            )
        case _:
            raise TypeError(f"{type(message).__name__} is no message")


def _encode_list(items: list[Frame] | list[Sampled] | list[Ack]) -> Iterator[pb.Packet]:
    kind = type(items[0]) if items else None
    if kind is Frame:
        yield from _encode_frames(cast("list[Frame]", items))
    elif kind is Sampled:
        yield pb.Packet(tokens=pb.Tokens(items=[_token(s) for s in cast("list[Sampled]", items)]))
    elif kind is Ack:
        yield pb.Packet(acks=pb.Acks(items=[_ack(a) for a in cast("list[Ack]", items)]))


def _session(session: SessionId) -> bytes:
    return bytes.fromhex(session)


def _epoch(epoch: Epoch) -> pb.Epoch:
    return pb.Epoch(counter=epoch.counter, owner=epoch.owner)


def _cause(cause: Cause) -> Any:
    return cause.value


def _encode_frames(frames: list[Frame]) -> Iterator[pb.Packet]:
    heads = []
    rows: list[NDArray[np.float32]] = []
    for frame in frames:
        head = pb.FrameHead(
            session=bytes.fromhex(frame.session),
            epoch=frame.epoch.counter,
            owner=frame.epoch.owner,
            position=frame.position,
            length=frame.length,
            sample=frame.sample,
            stage=frame.stage,
            times=frame.times,
            drafts=frame.drafts,
            steps=frame.steps,
        )
        if frame.payload.ndim == _ACTIVATION_DIMENSIONS:
            rows.append(frame.payload)
        else:
            head.tokens.extend(frame.payload.tolist())
        heads.append(head)
    payload = rows[0].tobytes() if len(rows) == 1 else b"".join(row.data for row in rows)
    if len(payload) <= PAYLOAD_MAX:
        yield pb.Packet(frames=pb.Frames(heads=heads, activations=payload))
        return
    count = -(-len(payload) // PAYLOAD_MAX)
    for i in range(count):
        piece = payload[i * PAYLOAD_MAX : (i + 1) * PAYLOAD_MAX]
        yield pb.Packet(
            frames=pb.Frames(heads=heads if i == 0 else (), activations=piece, fragment=i, fragments=count)
        )


def _token(sampled: Sampled) -> pb.TokenItem:
    token = sampled.token
    return pb.TokenItem(
        session=bytes.fromhex(sampled.session),
        epoch=sampled.epoch.counter,
        owner=sampled.epoch.owner,
        position=token.position,
        token=token.token,
        logprob=token.logprob,
        top=[pb.Logprob(token=t.token, logprob=t.logprob) for t in token.top],
        times=token.times,
    )


def _ack(ack: Ack) -> pb.Ack:
    return pb.Ack(
        session=bytes.fromhex(ack.session),
        epoch=ack.epoch.counter,
        owner=ack.epoch.owner,
        position=ack.position,
        stage=ack.stage,
        held_us=ack.held_us,
    )


def _stage(stage: Stage) -> pb.Stage:
    return pb.Stage(
        node=stage.node,
        address=stage.address,
        layer_start=stage.layers.start,
        layer_end=stage.layers.end,
        shard=bytes.fromhex(stage.shard),
    )


def _layered(route: LayeredRoute) -> pb.LayeredRoute:
    return pb.LayeredRoute(stages=[_stage(s) for s in route.stages])


def _route(route: Route) -> pb.Route:
    if isinstance(route, LayeredRoute):
        return pb.Route(layered=_layered(route))
    members = [_layered(m) for m in route.members]
    return pb.Route(ensemble=pb.EnsembleRoute(members=members, combine=route.combine))


def _open(order: Open) -> pb.Open:
    how = order.sampling
    return pb.Open(
        session=_session(order.session),
        epoch=_epoch(order.epoch),
        position=order.position,
        route=_route(order.route),
        stage=order.stage,
        owner_address=order.owner_address,
        positions=order.positions,
        window=order.window,
        deadline_ms=min(order.deadline_ms, 2**32 - 1),
        prompt=order.prompt,
        generated=order.generated,
        sampling=pb.Sampling(
            seed=how.seed,
            choice=how.choice,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            frequency_penalty=how.frequency_penalty,
            presence_penalty=how.presence_penalty,
            logit_bias=dict(how.logit_bias),
            logprobs=how.logprobs,
        ),
        exact=order.exact,
        resume=_session(order.resume) if order.resume else b"",
        request=order.request,
        expires_unix_ms=order.expires_ms,
        standbys=[pb.Stage() if s is None else _stage(s) for s in order.standbys],
        steps=order.steps,
        standby=order.standby,
    )


def read_session(data: bytes) -> SessionId:
    if len(data) != _SESSION_BYTES:
        raise PeerError(f"a session id has {len(data)} bytes, it must have {_SESSION_BYTES}")
    return SessionId(data.hex())


@lru_cache(maxsize=1024)
def _epoch_of(counter: int, owner: str) -> Epoch:
    return Epoch(counter, NodeId(owner))


def _read_epoch(epoch: pb.Epoch) -> Epoch:
    return _epoch_of(epoch.counter, epoch.owner)


def _read_cause(cause: int) -> Cause:
    try:
        return Cause(cause)
    except ValueError:
        return Cause.RUNTIME  # a newer peer's cause


class Decoder:
    """Packets of one stream back to values; puts fragments together. Raises ``PeerError``."""

    def __init__(self) -> None:
        self._parts: list[pb.Frames] = []

    def decode(self, packet: pb.Packet) -> Message | None:
        """The message; ``None`` for a fragment that is not the last and for kinds we do not know."""
        kind = packet.WhichOneof("kind")
        if kind == "frames":
            return self._frames(packet.frames)
        if self._parts:
            raise PeerError(f"a packet of kind {kind} came between fragments of frames")
        match kind:
            case "tokens":
                return [_read_token(item) for item in packet.tokens.items]
            case "acks":
                return [
                    Ack(
                        read_session(a.session),
                        _epoch_of(a.epoch, a.owner),
                        a.position,
                        a.stage,
                        a.held_us,
                    )
                    for a in packet.acks.items
                ]
            case "beacon":
                return Beacon(packet.beacon.runs, packet.beacon.queued)
            case "open":
                return _read_open(packet.open)
            case "opened":
                o = packet.opened
                return Opened(
                    read_session(o.session), _read_epoch(o.epoch), o.stage, o.position, o.short, o.replayed
                )
            case "refused":
                r = packet.refused
                return Refused(
                    read_session(r.session),
                    _read_epoch(r.epoch),
                    r.stage,
                    _read_cause(r.cause),
                    r.reason,
                    r.retry_after_ms,
                )
            case "close":
                c = packet.close
                return Close(
                    read_session(c.session), _read_epoch(c.epoch), c.reason, c.stage, c.keep, c.alone, c.waits
                )
            case "witness":
                w = packet.witness
                return Witness(
                    read_session(w.session),
                    _read_epoch(w.epoch),
                    w.position,
                    read_tokens(w.position, w.tokens, w.logprobs),
                    w.expires_unix_ms,
                    tuple(w.prompt),
                    w.request,
                )
            case "hop_lost":
                h = packet.hop_lost
                return HopLost(
                    read_session(h.session),
                    _read_epoch(h.epoch),
                    h.stage,
                    _read_cause(h.cause),
                    h.detail,
                    h.position,
                )
        return None

    def _frames(self, frames: pb.Frames) -> list[Frame] | None:
        if frames.fragments > 1:
            if frames.fragments > FRAGMENTS_MAX or frames.fragment != len(self._parts):
                raise PeerError(f"fragment {frames.fragment} of {frames.fragments} is out of order")
            self._parts.append(frames)
            if len(self._parts) < frames.fragments:
                return None
            parts, self._parts = self._parts, []
            return read_frames(parts[0].heads, b"".join(p.activations for p in parts))
        if self._parts:
            raise PeerError("frames came between the fragments of others")
        return read_frames(frames.heads, frames.activations)


def read_frames(heads: Any, activations: bytes) -> list[Frame]:
    """Frames over one payload: activations float32 ``[length, width]``, or tokens int64 ``[length]``.

    A packet has activations for all of its frames, as views into ``activations``, or for none.
    Raises ``PeerError`` when lengths and payload disagree.
    """
    if not 0 < len(heads) <= HEADS_MAX:
        raise PeerError(f"a packet has {len(heads)} frames, allowed are 1 to {HEADS_MAX}")
    if not activations:
        return [_frame(head, _tokens_of(head)) for head in heads]
    total = sum(head.length for head in heads)
    if not 0 < total <= _POSITIONS_MAX or len(activations) % (4 * total):
        raise PeerError(f"{len(activations)} bytes of activations do not divide into {total} rows")
    values = np.frombuffer(activations, dtype="<f4").reshape(total, -1)
    if len(heads) == 1:
        return [_frame(heads[0], values)]
    frames, at = [], 0
    for head in heads:
        frames.append(_frame(head, values[at : at + head.length]))
        at += head.length
    return frames


def _tokens_of(head: pb.FrameHead) -> NDArray[np.int64]:
    if not 0 < len(head.tokens) == head.length:
        raise PeerError(f"a frame of length {head.length} carries {len(head.tokens)} tokens")
    return np.array(head.tokens, dtype=np.int64)


def _frame(head: pb.FrameHead, payload: NDArray[Any]) -> Frame:
    if head.length < 1:
        raise PeerError("a frame is empty")
    return Frame(
        read_session(head.session),
        _epoch_of(head.epoch, head.owner),
        head.position,
        head.length,
        head.sample,
        payload,
        head.stage,
        tuple(head.times),
        tuple(head.drafts),
        head.steps,
    )


def read_tokens(position: int, tokens: Iterable[int], logprobs: Iterable[float]) -> tuple[Token, ...]:
    """Tokens from a position on; a log-probability of NaN is none."""
    pairs = zip_longest(tokens, logprobs, fillvalue=nan)
    return tuple(
        Token(position + i, int(token), None if isnan(logprob) else logprob)
        for i, (token, logprob) in enumerate(pairs)
        if not isnan(token)
    )


def _read_token(item: pb.TokenItem) -> Sampled:
    return Sampled(
        read_session(item.session),
        _epoch_of(item.epoch, item.owner),
        Token(
            item.position,
            item.token,
            item.logprob if item.HasField("logprob") else None,
            tuple(TokenLogprob(t.token, t.logprob) for t in item.top),
            tuple(item.times),
        ),
    )


def _read_stage(s: pb.Stage) -> Stage:
    try:
        layers = LayerRange(s.layer_start, s.layer_end)
    except ValueError as error:
        raise PeerError(f"a route is wrong: {error}") from None
    return Stage(NodeId(s.node), Address(s.address), layers, Digest(s.shard.hex()))


def _read_standbys(stages: Iterable[pb.Stage]) -> Standbys:
    return tuple(_read_stage(s) if s.node else None for s in stages)


def _read_layered(route: pb.LayeredRoute) -> LayeredRoute:
    return LayeredRoute(tuple(_read_stage(s) for s in route.stages))


def _read_open(order: pb.Open) -> Open:
    route: Route
    if order.route.WhichOneof("kind") == "ensemble":
        ensemble = order.route.ensemble
        route = EnsembleRoute(tuple(_read_layered(m) for m in ensemble.members), ensemble.combine)
    else:
        route = _read_layered(order.route.layered)
        if not 0 <= order.stage < len(route.stages):
            raise PeerError(f"stage {order.stage} is not in a route of {len(route.stages)}")
    if not 0 < order.window <= HEADS_MAX:
        raise PeerError(f"a window of {order.window} frames; allowed are 1 to {HEADS_MAX}")
    how = order.sampling
    return Open(
        session=read_session(order.session),
        epoch=_read_epoch(order.epoch),
        position=order.position,
        route=route,
        stage=order.stage,
        owner_address=Address(order.owner_address),
        positions=order.positions,
        window=order.window,
        deadline_ms=order.deadline_ms,
        prompt=tuple(order.prompt),
        generated=tuple(order.generated),
        sampling=Sampling(
            seed=how.seed,
            choice=how.choice,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            frequency_penalty=how.frequency_penalty,
            presence_penalty=how.presence_penalty,
            logit_bias=tuple(sorted(how.logit_bias.items())),
            logprobs=how.logprobs,
        ),
        exact=order.exact,
        resume=read_session(order.resume) if order.resume else None,
        request=order.request,
        expires_ms=order.expires_unix_ms,
        standbys=_read_standbys(order.standbys),
        steps=order.steps,
        standby=order.standby,
    )
