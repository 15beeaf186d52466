"""The owner's machine: what it asks for, and in which order."""

from __future__ import annotations

import pytest

from mesh.errors import Full, NoRoute, PeerError, StageLost
from mesh.messages import Ack, Cause, Close, HopLost, Refused, Sampled
from mesh.session import (
    Cancelled,
    ClientBusy,
    ClientReady,
    EmitToken,
    Ended,
    Finish,
    KeepToken,
    SendClose,
    SendFrame,
    SendOpen,
    Session,
    State,
    Tick,
)
from mesh.types import Epoch, NodeId, Token
from tests.builders import ADDRESS, OWNER, SESSION, order, route

EPOCH = Epoch(1, OWNER)


def begin(**changes: object) -> tuple[Session, list[object]]:
    session = Session(order(**changes), route(2, 4), OWNER, ADDRESS, now=0)
    return session, list(session.start(0))


def sampled(position: int, token: int = 7, epoch: Epoch = EPOCH) -> Sampled:
    return Sampled(SESSION, epoch, Token(position, token))


def decoding(**changes: object) -> Session:
    session, _ = begin(**changes)
    session.handle(Ack(SESSION, EPOCH, 8), 1)
    session.handle(sampled(10), 2)
    return session


def test_the_prompt_goes_out_in_chunks_within_the_window() -> None:
    session, effects = begin()
    assert isinstance(effects[0], SendOpen)
    assert effects[1:] == [SendFrame(0, (0, 1, 2, 3), False), SendFrame(4, (4, 5, 6, 7), False)]
    assert session.handle(Ack(SESSION, EPOCH, 4), 1) == [SendFrame(8, (8, 9), True)]


def test_r8_opening_reserves_prompt_and_answer_and_states_window_and_deadline() -> None:
    _, effects = begin()
    opening = effects[0]
    assert isinstance(opening, SendOpen)
    assert (opening.order.positions, opening.order.window, opening.order.deadline_ms) == (15, 2, 1000)


def test_r6_the_last_stage_gets_prompt_and_sampling() -> None:
    _, effects = begin()
    opening = effects[0]
    assert isinstance(opening, SendOpen)
    assert opening.order.prompt == tuple(range(10))
    assert opening.order.sampling == order().sampling


def test_r6_a_token_is_fed_then_kept_then_shown() -> None:
    session, _ = begin()
    session.handle(Ack(SESSION, EPOCH, 8), 1)
    token = Token(10, 7)
    assert session.handle(Sampled(SESSION, EPOCH, token), 2) == [
        SendFrame(10, (7,), True),
        KeepToken(token),
        EmitToken(token),
    ]
    assert session.state is State.DECODE


def test_a_token_before_the_prompt_is_out_is_the_peers_fault() -> None:
    session, _ = begin()
    effects = session.handle(sampled(10), 1)
    assert isinstance(effects[-1], Ended)
    assert isinstance(effects[-1].error, PeerError)


def test_each_position_is_shown_once() -> None:
    session = decoding()
    assert session.handle(sampled(10), 3) == []
    assert session.generated == [7]


def test_a_gap_is_the_peers_fault() -> None:
    session = decoding()
    effects = session.handle(sampled(12), 3)
    assert isinstance(effects[-1], Ended)
    assert isinstance(effects[-1].error, PeerError)


def test_r1_another_epoch_changes_nothing() -> None:
    session = decoding()
    for epoch in (Epoch(0, OWNER), Epoch(1, NodeId("n-other")), Epoch(2, OWNER)):
        assert session.handle(sampled(11, epoch=epoch), 3) == []


@pytest.mark.parametrize(
    ("changes", "finish"), [({"tokens_max": 2}, Finish.LENGTH), ({"positions_max": 12}, Finish.LENGTH)]
)
def test_length_ends_the_session(changes: dict[str, int], finish: Finish) -> None:
    session = decoding(**changes)
    effects = session.handle(sampled(11), 3)
    assert [type(e) for e in effects] == [KeepToken, EmitToken, SendClose, Ended]
    assert session.finish is finish


def test_a_stop_token_ends_the_session() -> None:
    session = decoding()
    effects = session.handle(sampled(11, token=99), 3)
    assert effects[-1] == Ended(finish=Finish.STOP)
    assert SendClose(Close(SESSION, EPOCH, "stop")) in effects


def test_r8_a_slow_client_pauses_its_session_and_no_deadline_but_the_last_runs() -> None:
    session = decoding()
    session.handle(ClientBusy(), 3)
    effects = session.handle(sampled(11), 4)
    assert [type(e) for e in effects] == [KeepToken, EmitToken]
    assert session.next_deadline() == 1_000_000_000
    assert session.handle(ClientReady(), 900_000_000) == [SendFrame(11, (7,), True)]


def test_cancelling_closes_the_route_and_later_events_change_nothing() -> None:
    session = decoding()
    effects = session.handle(Cancelled(), 3)
    assert effects == [SendClose(Close(SESSION, EPOCH, "cancelled")), Ended(finish=Finish.CANCELLED)]
    assert session.handle(sampled(11), 4) == []
    assert session.next_deadline() is None


def test_no_progress_fails_the_session_in_time() -> None:
    session = decoding()
    due = session.next_deadline()
    assert due == 2 + 100_000_000
    assert session.handle(Tick(), due - 1) == []
    effects = session.handle(Tick(), due)
    assert isinstance(effects[-1], Ended)
    assert isinstance(effects[-1].error, StageLost)


def test_the_deadline_ends_it_even_with_progress() -> None:
    session = decoding(step_timeout_ns=10**12)
    effects = session.handle(Tick(), 1_000_000_000)
    assert "deadline" in str(effects[-1])


@pytest.mark.parametrize(
    ("cause", "kind"), [(Cause.FULL, Full), (Cause.NO_SHARD, NoRoute), (Cause.DRAINING, NoRoute)]
)
def test_a_refusal_says_which_stage_and_why(cause: Cause, kind: type[Exception]) -> None:
    session, _ = begin()
    effects = session.handle(Refused(SESSION, EPOCH, 1, cause, "no slot"), 1)
    error = effects[-1]
    assert isinstance(error, Ended)
    assert isinstance(error.error, kind)
    assert "stage 1 (layers 2-4 on n1)" in str(error.error)


def test_a_lost_hop_says_what_was_lost() -> None:
    session = decoding()
    effects = session.handle(HopLost(SESSION, EPOCH, 2, Cause.STREAM_BROKEN, "reset"), 3)
    assert "stage 2 (layers 4-6 on n2) was lost: stream_broken: reset" in str(effects[-1])
