"""Where a session can stand, and how it gets from one state to another: the whole table.

::

                 prompt sent               first token
      start  ->  PREFILL ───────────────▶  DECODE ──▶ DONE
                    │                        ▲ │
                    ├── hop lost, refused ───┼─┤
                    ▼                        │ ▼
                 REROUTING ──▶ REPLAYING ────┘     ──▶ FAILED: deadline, or no route in time
                    ▲              │
                    └─ lost again ─┘
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """Where a session stands."""

    PREFILL = "prefill"
    """The prompt is going through the stages; no token yet."""
    DECODE = "decode"
    """Tokens are coming, one step at a time."""
    REROUTING = "rerouting"
    """A stage is lost; waiting for a route without it."""
    REPLAYING = "replaying"
    """A new epoch is open; its stages are given what they lack."""
    DONE = "done"
    """Ended as asked: stop token, length, or the client had enough."""
    FAILED = "failed"
    """Ended with an error."""


class Rung(enum.Enum):
    """How a session came back: by what its stages still had."""

    HOT = "hot"
    """Every stage of the new route had everything."""
    WARM = "warm"
    """The stage before replayed its hop log to one that was new."""
    UPSTREAM = "upstream"
    """Several stages were new; a hop log before them was replayed."""
    INGRESS = "ingress"
    """The owner sent the tokens again."""


TRANSITIONS: Mapping[State, Mapping[State, str]] = {
    State.PREFILL: {
        State.DECODE: "the first token came",
        State.REROUTING: "a stage was lost, or refused the session",
        State.DONE: "the client left",
        State.FAILED: "another ingress took the session over, a peer broke the contract, or the deadline passed",
    },
    State.DECODE: {
        State.REROUTING: "a stage was lost, or nothing came for the step's time-out",
        State.REPLAYING: "it leaves a node that drains: another route is open in a new epoch",
        State.DONE: "the last token came, or the client has enough",
        State.FAILED: "another ingress took the session over, a peer broke the contract, or the deadline passed",
    },
    State.REROUTING: {
        State.REPLAYING: "another route is open in a new epoch",
        State.DONE: "the last token came after all, or the client left",
        State.FAILED: "no route in time, or another ingress took the session over",
    },
    State.REPLAYING: {
        State.DECODE: "a token came along the new route",
        State.REROUTING: "a stage was lost again, or refused the session",
        State.DONE: "the client left, or a session that was taken over turned out to be complete",
        State.FAILED: "another ingress took the session over, a peer broke the contract, or the deadline passed",
    },
    State.DONE: {},
    State.FAILED: {},
}
"""From, to, and when. There are no others: the session checks every step against it."""
