"""The owner's machine: what it asks for, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.errors import Full, NoRoute, PeerError, StageLost, Unavailable
from mesh.messages import Ack, Cause, Close, HopLost, Opened, Refused, Sampled
from mesh.session import Session
from mesh.session_events import (
    Cancelled,
    ClientBusy,
    ClientReady,
    EmitToken,
    Ended,
    Finish,
    KeepToken,
    NeedRoute,
    Rerouted,
    SendClose,
    SendFrame,
    SendOpen,
    Tick,
)
from mesh.session_states import Rung, State
from mesh.types import Address, Epoch, LayeredRoute, NodeId, Token
from tests.builders import ADDRESS, OWNER, SESSION, order, route

EPOCH = Epoch(1, OWNER)
FIRST = route(2, 4).stages[0].address


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
    assert SendClose(Close(SESSION, EPOCH, "stop"), FIRST) in effects


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
    assert effects == [SendClose(Close(SESSION, EPOCH, "cancelled"), FIRST), Ended(finish=Finish.CANCELLED)]
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


# -- recovery --------------------------------------------------------------------------------

PATIENT = {"recovery_timeout_ns": 1_000_000_000, "deadline_ns": 10_000_000_000, "tokens_max": 20}
OTHER = route(3)
SECOND = Epoch(2, OWNER)


def lost(stage: int, epoch: Epoch = EPOCH, cause: Cause = Cause.STREAM_BROKEN) -> HopLost:
    return HopLost(SESSION, epoch, stage, cause, "gone")


def told(position: int, epoch: Epoch = SECOND, short: int = 0, replayed: int = 0) -> Opened:
    """What the first stage of a later epoch answers."""
    return Opened(SESSION, epoch, 0, position, short, replayed)


def test_a_loss_asks_for_a_route_without_the_node_and_closes_only_what_is_left() -> None:
    session = decoding(**PATIENT)
    assert session.handle(lost(1), 5) == [NeedRoute(frozenset({NodeId("n1")}))]
    assert session.state is State.REROUTING
    stages = session.route.stages
    spare = replace(stages[1], node=NodeId("n7"), address=Address("10.0.0.7:7070"))
    opening, *closes = session.handle(Rerouted(LayeredRoute((stages[0], spare, stages[2]))), 6)
    assert isinstance(opening, SendOpen)
    # The others go on with what they have: only the lost stage is told to forget, and nobody behind it.
    assert [(e.address, e.close.stage, e.close.alone, e.close.epoch) for e in closes] == [  # type: ignore[union-attr]
        (stages[1].address, 1, True, EPOCH)
    ]


def test_r2_r5_a_new_epoch_opens_at_the_last_token_and_samples_only_what_was_not_emitted() -> None:
    session = decoding(**PATIENT)
    session.handle(sampled(11, token=8), 3)
    session.handle(lost(1), 5)
    opening, *_ = session.handle(Rerouted(OTHER), 6)
    assert isinstance(opening, SendOpen)
    assert (opening.order.epoch, opening.order.position, opening.order.generated) == (SECOND, 11, (7, 8))
    assert opening.order.route == OTHER
    assert opening.order.asks
    # Nothing is sent before the stages have told where they stand. This one has nothing: prompt and answer are
    # one prefill, within the window.
    assert session.handle(told(0, short=2), 6) == [
        SendFrame(0, (0, 1, 2, 3), False),
        SendFrame(4, (4, 5, 6, 7), False),
    ]
    assert (session.rung, session.replayed) == (Rung.INGRESS, 11)
    assert session.handle(Ack(SESSION, SECOND, 4), 7) == [SendFrame(8, (8, 9, 7, 8), True)]
    # Late news of the old epoch change nothing; the next position is sampled once.
    assert session.handle(sampled(12, token=9), 8) == []
    assert session.handle(lost(0), 8) == []
    effects = session.handle(sampled(12, token=9, epoch=SECOND), 9)
    assert [type(e) for e in effects] == [SendFrame, KeepToken, EmitToken]
    assert session.generated == [7, 8, 9]
    assert session.state is State.DECODE


@pytest.mark.parametrize(
    ("new", "answer", "rung", "replayed"),
    [
        (1, told(10), Rung.HOT, 0),
        (1, told(10, short=1, replayed=10), Rung.WARM, 10),
        (1, told(10, short=2, replayed=10), Rung.UPSTREAM, 10),
        # The first that has nothing answered for itself, before it knew of the other.
        (2, told(10, short=1, replayed=10), Rung.UPSTREAM, 10),
        (3, told(4, short=3, replayed=2), Rung.INGRESS, 6),
    ],
)
def test_the_owner_sends_what_the_first_stage_lacks_and_no_more(
    new: int, answer: Opened, rung: Rung, replayed: int
) -> None:
    session = decoding(**PATIENT)
    stages = session.route.stages
    others = [replace(stage, node=NodeId(f"n7{i}")) for i, stage in enumerate(stages[:new])]
    session.handle(lost(1), 5)
    session.handle(Rerouted(LayeredRoute((*others, *stages[new:]))), 6)
    tokens = (*range(10), 7)
    at = answer.position
    assert session.handle(answer, 7)[0] == SendFrame(at, tokens[at : at + 4], sample=at + 4 > 10)
    assert (session.rung, session.replayed) == (rung, replayed)
    assert session.handle(told(0), 8) == [], "an answer counts once"


def test_a_stage_that_lacks_something_after_all_has_everybody_asked() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 5)
    opening, fed = session.handle(Rerouted(session.route), 6)
    assert isinstance(opening, SendOpen)
    assert fed == SendFrame(10, (7,), True)
    (again,) = session.handle(Refused(SESSION, SECOND, 1, Cause.NO_CACHE, "position 8 is due"), 7)
    assert isinstance(again, SendOpen)
    assert (again.order.epoch, again.order.position, again.order.asks) == (Epoch(3, OWNER), 10, True)
    assert session.handle(told(10, Epoch(3, OWNER), short=1, replayed=2), 8) == [SendFrame(10, (7,), True)]
    assert (session.rung, session.replayed) == (Rung.WARM, 2)


def test_a_stage_that_no_token_came_through_is_asked() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 5)
    session.handle(Rerouted(OTHER), 6)
    session.handle(lost(1, SECOND), 7)
    (opening,) = session.handle(Rerouted(OTHER), 8)
    assert isinstance(opening, SendOpen)
    assert opening.order.asks


def test_a_stage_that_wants_what_was_never_sent_breaks_the_contract() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 5)
    session.handle(Rerouted(OTHER), 6)
    (*_, ended) = session.handle(told(99), 7)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, PeerError)


def test_a_token_that_was_under_way_when_a_stage_was_lost_counts() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(0), 5)
    effects = session.handle(sampled(11, token=8), 6)
    assert [type(e) for e in effects] == [KeepToken, EmitToken]
    opening, *_ = session.handle(Rerouted(OTHER), 7)
    assert isinstance(opening, SendOpen)
    assert (opening.order.position, opening.order.generated) == (11, (7, 8))


def test_a_session_that_ends_without_a_route_closes_every_stage_for_itself() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 5)
    effects = session.handle(Cancelled(), 6)
    closes = [e.close for e in effects if isinstance(e, SendClose)]
    assert [(c.stage, c.alone) for c in closes] == [(0, True), (1, True), (2, True)]


def test_r3_an_exact_replay_runs_the_frames_that_ran_first() -> None:
    session = decoding(**PATIENT, exact=True, window=9)
    session.handle(sampled(11, token=8), 3)
    session.handle(lost(1), 5)
    session.handle(Rerouted(OTHER), 6)
    frames = [e for e in session.handle(told(0, short=2), 6) if isinstance(e, SendFrame)]
    assert [(f.position, len(f.tokens), f.sample) for f in frames] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, False),
        (10, 1, False),
        (11, 1, True),
    ]


def test_r3_steps_go_out_several_a_frame_where_all_agents_know_how_and_the_last_alone() -> None:
    session = decoding(**PATIENT, exact=True, window=9)
    for position in range(11, 29):
        session.handle(sampled(position), 3)
    session.handle(lost(1), 5)
    session.steps = True
    opening, *_ = session.handle(Rerouted(OTHER), 6)
    assert isinstance(opening, SendOpen)
    assert opening.order.steps
    frames = [e for e in session.handle(told(0, short=2), 6) if isinstance(e, SendFrame)]
    assert [(f.position, len(f.tokens), f.steps, f.sample) for f in frames] == [
        (0, 4, False, False),
        (4, 4, False, False),
        (8, 2, False, False),
        (10, 16, True, False),
        (26, 2, True, False),
        (28, 1, False, True),
    ]


def test_no_route_is_asked_for_again_and_given_up_in_time() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 0)
    asked, now = 0, 0
    while not session.ended:
        due = session.next_deadline()
        assert due is not None
        assert due > now
        now = due
        effects = session.handle(Tick(), now)
        asked += sum(isinstance(e, NeedRoute) for e in effects)
    assert now == 1_000_000_000
    assert asked >= 5
    assert isinstance(effects[-1], Ended)
    assert isinstance(effects[-1].error, StageLost)
    assert "stage 1" in str(effects[-1].error)


def test_a_second_loss_while_replaying_avoids_both_nodes() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(1), 5)
    session.handle(Rerouted(OTHER), 6)
    effects = session.handle(lost(0, SECOND), 7)
    assert effects[-1] == NeedRoute(frozenset({NodeId("n0"), NodeId("n1")}))
    session.handle(Rerouted(route(2, 4)), 8)
    assert session.epoch.counter == 3
    # What was lost long ago may be asked again.
    session.handle(lost(2, Epoch(3, OWNER)), 9)
    late = session.handle(Tick(), 900_000_000)
    assert isinstance(late[-1], NeedRoute)


def test_a_refusal_before_the_first_token_goes_elsewhere_or_is_the_answer() -> None:
    full = Refused(SESSION, EPOCH, 1, Cause.FULL, "all slots are taken")
    session, _ = begin(**PATIENT)
    effects = session.handle(full, 1)
    assert effects[-1] == NeedRoute(frozenset({NodeId("n1")}))
    assert isinstance(session.handle(Rerouted(OTHER), 1)[0], SendOpen)
    alone, _ = begin(**PATIENT)
    alone.handle(full, 1)
    (*_, ended) = alone.handle(Tick(), 2)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, Full)


def test_a_session_moves_while_all_is_well() -> None:
    session = decoding(**PATIENT)
    effects = session.handle(Rerouted(OTHER), 5)
    assert [e.close.epoch for e in effects if isinstance(e, SendClose)] == [EPOCH] * 3
    assert session.epoch == SECOND
    assert session.state is State.REPLAYING


def test_a_paused_session_that_moves_is_fed_no_further() -> None:
    session = decoding(**PATIENT)
    session.handle(ClientBusy(), 3)
    session.handle(sampled(11, token=8), 4)
    session.handle(Rerouted(OTHER), 5)
    session.handle(told(11, short=1), 6)
    effects = session.handle(sampled(12, token=9, epoch=SECOND), 7)
    assert [type(e) for e in effects] == [KeepToken, EmitToken]
    assert session.handle(ClientReady(), 8) == [SendFrame(12, (9,), True)]


def test_without_patience_a_loss_is_the_end() -> None:
    session = decoding()
    (*_, ended) = session.handle(lost(1), 5)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, StageLost)


# -- kept caches -----------------------------------------------------------------------------

KEPT = "cd" * 16


def test_a_session_that_goes_on_from_another_sends_only_the_rest_of_its_prompt() -> None:
    _, effects = begin(resume=(KEPT, 7))
    opening = effects[0]
    assert isinstance(opening, SendOpen)
    assert (opening.order.resume, opening.order.position) == (KEPT, 7)
    assert effects[1:] == [SendFrame(7, (7, 8, 9), True)]


def test_a_cache_that_is_gone_means_the_whole_prompt_on_the_same_route() -> None:
    session, _ = begin(resume=(KEPT, 7))
    effects = session.handle(Refused(SESSION, EPOCH, 1, Cause.NO_CACHE, "gone"), 1)
    assert [type(e) for e in effects] == [SendOpen, SendFrame, SendFrame]
    opening = effects[0]
    assert isinstance(opening, SendOpen)
    assert (opening.order.resume, opening.order.position, opening.order.epoch) == (None, 0, SECOND)
    assert effects[1] == SendFrame(0, (0, 1, 2, 3), False)


def test_only_a_natural_end_is_kept() -> None:
    def closes(session: Session, event: object) -> list[bool]:
        return [e.close.keep for e in session.handle(event, 5) if isinstance(e, SendClose)]  # type: ignore[arg-type]

    assert closes(decoding(keep=True), sampled(11, token=99)) == [True]
    assert closes(decoding(keep=True), Cancelled()) == [False]
    assert closes(decoding(keep=True), Cancelled(Finish.STOP)) == [False]
    assert closes(decoding(), sampled(11, token=99)) == [False]


# -- owners and standbys ----------------------------------------------------------------------


def test_r1_whoever_takes_a_session_over_opens_a_later_epoch_at_the_last_token() -> None:
    other = NodeId("n-other")
    taken = (Epoch(4, other), (7, 8))
    session = Session(order(**PATIENT), route(2, 4), other, ADDRESS, 0, taken)
    (opening,) = session.start(0)
    assert isinstance(opening, SendOpen)
    assert (opening.order.epoch, opening.order.position) == (Epoch(4, other), 11)
    answer = Opened(SESSION, Epoch(4, other), 0, 11)
    assert session.handle(answer, 1) == [SendFrame(11, (8,), True)]
    assert session.rung is Rung.HOT


@pytest.mark.parametrize(("tokens", "finish"), [((7, 99), Finish.STOP), ((7, 7, 7, 7, 7), Finish.LENGTH)])
def test_a_session_that_was_done_is_only_read(tokens: tuple[int, ...], finish: Finish) -> None:
    session = Session(order(), route(2, 4), OWNER, ADDRESS, 0, (Epoch(2, OWNER), tokens))
    effects = session.start(0)
    assert effects[-1] == Ended(finish=finish)
    assert not any(isinstance(e, SendOpen) for e in effects)


def test_r1_an_owner_that_was_replaced_ends_and_closes_nothing() -> None:
    session = decoding(**PATIENT)
    (ended,) = session.handle(Refused(SESSION, EPOCH, 2, Cause.TAKEN_OVER, "its owner is n-other"), 5)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, Unavailable)
    assert session.state is State.FAILED


def test_a_session_that_has_nothing_yet_gets_standbys_of_its_new_route() -> None:
    stages = route(2, 4).stages
    spare = tuple(
        replace(s, node=NodeId(f"b{i}"), address=Address(f"10.1.0.{i}:1")) for i, s in enumerate(stages)
    )
    session = Session(order(**PATIENT), route(2, 4), OWNER, ADDRESS, 0, None, spare)
    session.start(0)
    session.handle(lost(0), 1)
    there = LayeredRoute((spare[0], stages[1], spare[2]))
    opening, *rest = session.handle(Rerouted(there, (None, spare[1], stages[2])), 2)
    assert isinstance(opening, SendOpen)
    assert (opening.order.position, opening.order.standbys) == (0, (None, spare[1], stages[2]))
    # The last stage stands by now: it is not told to close.
    assert [e.address for e in rest if isinstance(e, SendClose)] == [stages[0].address]
    assert session.rung is Rung.INGRESS


def test_a_standby_takes_its_stage_and_the_others_stand_by_on() -> None:
    spare = tuple(
        replace(s, node=NodeId(f"b{i}"), address=Address(f"10.1.0.{i}:1"))
        for i, s in enumerate(route(2, 4).stages)
    )
    session = Session(order(**PATIENT), route(2, 4), OWNER, ADDRESS, 0, None, spare)
    first = session.start(0)[0]
    assert isinstance(first, SendOpen)
    assert first.order.standbys == spare
    session.handle(Ack(SESSION, EPOCH, 8), 1)
    session.handle(sampled(10), 2)
    session.handle(lost(1), 3)
    stages = route(2, 4).stages
    opening, fed, *closes = session.handle(Rerouted(LayeredRoute((stages[0], spare[1], stages[2]))), 4)
    assert isinstance(opening, SendOpen)
    assert opening.order.standbys == (spare[0], None, spare[2])
    # All of them have everything: nobody is asked, and the token goes out with the Open.
    assert (opening.order.position, opening.order.asks) == (10, False)
    assert fed == SendFrame(10, (7,), True)
    assert session.rung is Rung.HOT
    assert [e.address for e in closes] == [stages[1].address]  # type: ignore[union-attr]
    # The end closes the standbys too, the first stage's by the owner.
    calm = Session(order(), route(2, 4), OWNER, ADDRESS, 0, None, spare)
    calm.start(0)
    calm.handle(Ack(SESSION, EPOCH, 8), 1)
    calm.handle(sampled(10), 2)
    ends = [e for e in calm.handle(Cancelled(), 3) if isinstance(e, SendClose)]
    assert [(e.address, e.close.alone) for e in ends] == [(FIRST, False), (spare[0].address, True)]
    effects = session.handle(Cancelled(), 5)
    assert {e.address for e in effects if isinstance(e, SendClose)} == {
        stages[0].address,
        spare[1].address,
        stages[2].address,
        spare[0].address,
        spare[2].address,
    }


def test_late_news_of_the_epoch_before_count_when_the_node_is_still_on_the_route() -> None:
    session = decoding(**PATIENT)
    session.handle(lost(0), 5)
    stages = route(2, 4).stages
    spare = replace(stages[0], node=NodeId("n7"), address=Address("10.0.0.7:7070"))
    session.handle(Rerouted(LayeredRoute((spare, *stages[1:]))), 6)
    effects = session.handle(lost(2), 7)
    assert effects == [NeedRoute(frozenset({NodeId("n0"), NodeId("n2")}))]


def guessing() -> Session:
    """After a prompt that repeats itself and one single step: the next tokens are guessed."""
    session, _ = begin(prompt=(1, 2, 3, 4, 5, 6, 7, 1, 2, 3), speculate=True, tokens_max=20, chunk=16)
    session.handle(Ack(SESSION, EPOCH, 10), 1)
    assert session.handle(sampled(10, 4), 2)[0] == SendFrame(10, (4,), True)
    session.handle(Ack(SESSION, EPOCH, 11), 3)
    return session


def test_guesses_go_out_with_the_token_and_those_that_come_true_are_not_fed_again() -> None:
    session = guessing()
    fed = session.handle(sampled(11, 5), 102)[0]
    assert isinstance(fed, SendFrame)
    assert (fed.position, fed.tokens[0], fed.drafts[:2]) == (11, 5, (6, 7))
    assert fed.tokens[1:] == fed.drafts
    assert session.awaits_first_stage
    token = Token(12, 6)
    assert session.handle(sampled(12, 6), 202) == [KeepToken(token), EmitToken(token)], (
        "the next one comes as well"
    )
    again = session.handle(sampled(13, 9), 203)[0]
    assert again == SendFrame(13, (9,), True), "the second guess was wrong: on from there"
    assert session.firm == 14


def test_an_acknowledgement_of_wrong_guesses_is_none_of_what_came_after() -> None:
    session = guessing()
    fed = session.handle(sampled(11, 5), 102)[0]
    assert isinstance(fed, SendFrame)
    session.handle(sampled(12, 9), 202)
    session.handle(Ack(SESSION, EPOCH, 11 + len(fed.tokens)), 203)
    assert session.awaits_first_stage


def test_r2_what_was_guessed_when_a_stage_was_lost_is_forgotten() -> None:
    session = guessing()
    session.order = replace(session.order, recovery_timeout_ns=10**9)
    session.handle(sampled(11, 5), 102)
    session.handle(HopLost(SESSION, EPOCH, 1, Cause.SILENT, "gone"), 103)
    # One of the guesses had come true before the loss; its token was on its way.
    session.handle(sampled(12, 6), 104)
    opening = session.handle(Rerouted(route(2, 4)), 105)[0]
    assert isinstance(opening, SendOpen)
    assert (opening.order.position, opening.order.generated) == (12, (4, 5, 6))


def test_no_guess_reaches_past_the_last_token() -> None:
    session, _ = begin(prompt=(1, 2, 3, 4, 5, 6, 7, 1, 2, 3), speculate=True, tokens_max=4, chunk=16)
    session.handle(sampled(10, 4), 2)
    fed = session.handle(sampled(11, 5), 102)[0]
    assert isinstance(fed, SendFrame)
    assert fed.drafts == (6,), "after it one token is left, and nobody computes that"
