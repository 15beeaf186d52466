"""Stories of failures: what happens to a session, and what it does about it, to be read.

A transcript gives the events (lines with ``@``, milliseconds); the rest is what the session machine answers, and is
compared letter by letter. ``UPDATE_TRANSCRIPTS=1`` writes it anew, for a person to read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.messages import Ack, Cause, HopLost, Opened, Refused, Sampled
from mesh.session import Session
from mesh.session_events import (
    Cancelled,
    ClientBusy,
    ClientReady,
    Effect,
    EmitToken,
    Ended,
    Event,
    KeepToken,
    NeedRoute,
    Rerouted,
    SendClose,
    SendFrame,
    SendOpen,
    Tick,
)
from mesh.session_states import TRANSITIONS, State
from mesh.types import Address, Epoch, LayeredRoute, LayerRange, NodeId, Stage, Token
from tests.builders import ADDRESS, OWNER, SESSION, order, shard

FOLDER = Path(__file__).parent.parent / "transcripts"
STORIES = sorted(FOLDER.glob("*.txt"))
MS = 1_000_000
LAYERS = 2


def route(names: list[str]) -> LayeredRoute:
    """A stage of two layers on each of the nodes named."""
    stages = []
    for i, name in enumerate(names):
        layers = LayerRange(LAYERS * i, LAYERS * (i + 1))
        digest = shard(layers.start, layers.end).digest
        stages.append(Stage(NodeId(name), Address(name), layers, digest))
    return LayeredRoute(tuple(stages))


def event_of(words: list[str], at: Epoch) -> Event:
    """What one line tells, of epoch ``at``."""
    match words:
        case ["acked", position]:
            return Ack(SESSION, at, int(position))
        case ["token", token]:
            position, value = token.split("=")
            return Sampled(SESSION, at, Token(int(position), int(value)))
        case ["lost", stage, cause]:
            return HopLost(SESSION, at, int(stage), Cause[cause.upper()], "as told")
        case ["refused", stage, cause]:
            return Refused(SESSION, at, int(stage), Cause[cause.upper()], "as told")
        case ["opened", position, "short", short, "replayed", replayed]:
            return Opened(SESSION, at, 0, int(position), int(short), int(replayed))
        case ["route", *names]:
            return Rerouted(route(names))
        case ["client", "busy"]:
            return ClientBusy()
        case ["client", "ready"]:
            return ClientReady()
        case ["client", "left"]:
            return Cancelled()
        case ["tick"]:
            return Tick()
    raise ValueError(f"no event: {' '.join(words)}")


def told(effects: list[Effect]) -> Iterator[str]:
    """Effects in words."""
    for effect in effects:
        match effect:
            case SendOpen(opening):
                names = " ".join(s.node for s in opening.route.stages)  # type: ignore[union-attr]
                spare = " ".join(s.node if s else "-" for s in opening.standbys)
                beside = f", standbys {spare}" if spare else ""
                asked = ", who are asked where they stand" if opening.asks else ""
                yield f"opens epoch {opening.epoch.counter} at {opening.position} along {names}{beside}{asked}"
            case SendFrame(position, tokens, sample):
                end = position + len(tokens) - 1
                span = f"{position}" if end == position else f"{position} to {end}"
                yield f"feeds {span}{', the last is sampled' if sample else ''}"
            case KeepToken(token):
                yield f"logs token {token.position}={token.token}"
            case EmitToken(token):
                yield f"shows token {token.position}={token.token}"
            case SendClose(close, address):
                beyond = "" if close.alone else " and all behind it"
                yield f"closes epoch {close.epoch.counter} at {address}{beyond}: {close.reason}"
            case NeedRoute(avoid):
                yield f"needs a route without {' '.join(sorted(avoid)) or 'anybody in particular'}"
            case Ended(finish, error):
                yield f"ended: {finish.value if finish else error}"


def begin(words: list[str]) -> Session:
    """``given prompt 10 tokens 5 chunk 4 window 2 route a b c [standbys - d -]``"""
    text = " ".join(words)
    names = text.split(" route ")[1].split(" standbys ")
    told = dict(zip(*[iter(text.split(" route ")[0].split())] * 2, strict=True))
    asked: dict[str, Any] = {
        "prompt": tuple(range(int(told["prompt"]))),
        "tokens_max": int(told["tokens"]),
        "chunk": int(told["chunk"]),
        "window": int(told["window"]),
        "recovery_timeout_ns": 2000 * MS,
        "step_timeout_ns": 1000 * MS,
        "deadline_ns": 60_000 * MS,
        "exact": told.get("replay", "exact") == "exact",
        "stop_tokens": frozenset(),
    }
    spare = names[1].split() if len(names) > 1 else []
    standbys = tuple(None if n == "-" else s for n, s in zip(spare, route(spare).stages, strict=True))
    return Session(order(**asked), route(names[0].split()), OWNER, ADDRESS, 0, None, standbys)


def play(text: str) -> tuple[str, set[tuple[State, State]]]:
    """The transcript with the machine's answers, and the transitions it saw."""
    lines: list[str] = []
    seen: set[tuple[State, State]] = set()
    session: Session | None = None
    for line in text.splitlines():
        if line.startswith("given "):
            session = begin(line.split()[1:])
            lines.append(line)
            effects = session.start(0)
        elif line.startswith("@"):
            assert session is not None, "a story begins with 'given'"
            when, *words = line[1:].split("[")[0].split()
            counter = session.epoch.counter
            if "epoch" in words:
                counter = int(words[words.index("epoch") + 1])
                del words[words.index("epoch") :]
            before = session.state
            at = Epoch(counter, OWNER)
            effects = session.handle(event_of(words, at), int(when) * MS)
            seen.add((before, session.state))
            moved = f" -> {session.state.value}" if session.state is not before else ""
            lines.append(f"{line.split('[')[0].rstrip():44} [{before.value}{moved}]")
        elif line.startswith("    ") and session is not None:
            continue  # an answer: given anew
        else:
            lines.append(line)
            continue
        lines.extend(f"    {answer}" for answer in told(effects))
    return "\n".join(lines) + "\n", seen


@pytest.mark.parametrize("path", STORIES, ids=[p.stem for p in STORIES])
def test_the_story_goes_as_it_is_told(path: Path) -> None:
    text = path.read_text()
    played, _ = play(text)
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        path.write_text(played)
    assert played == path.read_text()


def test_the_stories_use_the_whole_table() -> None:
    seen = set[tuple[State, State]]()
    for path in STORIES:
        seen |= play(path.read_text())[1]
    table = {(a, b) for a, others in TRANSITIONS.items() for b in others}
    assert not table - seen, f"no story goes {table - seen}"
