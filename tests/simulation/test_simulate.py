"""The simulator: the same seed gives the same run, bad scenarios are told, planted bugs are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.gossip import Fact, MemberState
from mesh.member import Member
from mesh.membership import Membership
from mesh.messages import Frame, Opened
from mesh.session import Session
from mesh.types import Digest, SessionId, Term
from node_agent.adapters.replicas import ReplicaManager
from node_agent.hop_log import HopLog
from node_agent.stage import StageBook
from scheduler.reconcile import Reconciler, Settling, Wanted
from simulations.command import SCENARIOS
from simulations.page import page
from simulations.report import figures
from simulations.run import simulate
from simulations.scenario import Scenario, draw, names_of, read_scenario
from simulations.search import Found, breaks, search, shrink, with_setting

SHIPPED = sorted(SCENARIOS.glob("*.toml"))
LEAST = 'name = "x"\n[[nodes]]\nkind = "n"\ncount = 3\n'
SEEDS = 5
"""A planted bug is found within so many."""


def simulate_in_a_process(*words: str, hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "mesh", "simulate", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=True)
    return done.stdout


def test_the_same_seed_gives_the_same_run_under_any_hash_seed(tmp_path: Path) -> None:
    logs = []
    for hash_seed in ("1", "2"):
        path = tmp_path / f"{hash_seed}.log"
        words = ("kiosk", "--seed", "3", "--time", "70s", "--json", "--log", str(path))
        told = simulate_in_a_process(*words, hash_seed=hash_seed)
        logs.append((told, path.read_bytes()))
    assert logs[0] == logs[1]
    found = json.loads(logs[0][0])
    assert (found["availability"], found["tokens_lost"], found["tokens_repeated"]) == (1.0, 0, 0)
    assert found["violations"] == []


def test_another_seed_gives_another_run() -> None:
    scenario = with_setting(read_scenario(LEAST, "x"), "time", "25s")
    assert figures(simulate(scenario, 1))["event_log"] != figures(simulate(scenario, 2))["event_log"]


@pytest.mark.parametrize("path", SHIPPED, ids=[p.stem for p in SHIPPED])
def test_shipped_scenarios_are_read_and_say_what_they_are(path: Path) -> None:
    scenario = read_scenario(path.read_text(), path.name)
    assert scenario.name == path.stem
    assert scenario.about
    assert names_of(scenario)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (LEAST + "speeed = 2\n", 5, "unknown key 'speeed'"),
        (LEAST + 'up = "weibull(0.7)"\n', 5, "none of"),
        (LEAST + 'up = "-5s"\n', 5, "no time"),
        (LEAST + 'up = "pareto(0, 5s)"\n', 5, "number above 0"),
        (LEAST + 'up = "uniform(5s, 1s)"\n', 5, "smaller time first"),
        (LEAST + "slots = 0\n", 5, ">= 1"),
        (LEAST + "silent = 1.5\n", 5, "<= 1"),
        ('name = "x"\n[model]\ncuts = [20, 10]\n[[nodes]]\nkind = "n"\ncount = 3\n', 3, "cuts must rise"),
        ('name = "x"\n[[nodes]]\nkind = "n"\ncount = 2\n', 1, "3 ranges of layers need as many"),
        (LEAST + '[[faults]]\nwhat = "crash"\n', 6, "either at or every"),
        (LEAST + '[[faults]]\nwhat = "crash"\nat = "5s"\nwho = "m"\n', 8, "there are the kinds n"),
        (LEAST + '[[faults]]\nwhat = "flood"\nat = "5s"\n', 6, "'flood' is none of crash, power"),
        ('name = "x"\ntime = "10s"\n' + LEAST[11:], 2, "longer than quiet"),
        (LEAST + "[load]\nprompt = [9, 2]\n", 6, "least and most"),
        ("name = \n", 1, "Invalid value"),
    ],
)
def test_a_bad_scenario_is_told_with_file_and_line(text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_scenario(text, "x.toml")
    message = str(raised.value)
    assert said in message
    assert message.startswith("x.toml")
    if "Invalid value" not in said:
        assert f"x.toml:{line}:" in message


def test_draws_follow_their_distribution() -> None:
    from random import Random

    rng = Random(1)
    for text, mean_s in (("exponential(10s)", 10), ("uniform(1s, 5s)", 3), ("weibull(1, 4s)", 4), ("2s", 2)):
        how = draw(text)
        drawn = [how.ns(rng) for _ in range(4000)]
        assert sum(drawn) / len(drawn) / 1e9 == pytest.approx(mean_s, rel=0.1)


def test_the_page_needs_nothing_else_and_shows_the_figures() -> None:
    outcome = simulate(with_setting(read_scenario(LEAST, "x"), "time", "25s"), 1)
    text = page(outcome)
    assert text.startswith("<!doctype html>")
    assert "<svg" in text
    assert "http" not in text
    assert str(figures(outcome)["requests"]) in text


SMALL = """
name = "small"
time = "40s"
quiet = "10s"
replay = "fast"
[load]
each = "exponential(2s)"
[[nodes]]
kind = "n"
count = 6
[[faults]]
what = "freeze"
every = "exponential(3s)"
duration = "2s"
[[faults]]
what = "slow"
every = "exponential(10s)"
"""


def shipped(name: str) -> Scenario:
    return read_scenario((SCENARIOS / f"{name}.toml").read_text(), name)


def accept_stale_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    true = StageBook.accept

    def accept(self: StageBook, frame: Frame) -> Any:
        session = self.sessions.get(frame.session)
        if session is not None:
            frame.epoch = session.order.epoch
        return true(self, frame)

    monkeypatch.setattr(StageBook, "accept", accept)


def forget_a_hop_log_record(monkeypatch: pytest.MonkeyPatch) -> None:
    true = HopLog.frame

    def frame(self: HopLog, session: SessionId, shard: Digest, position: int) -> Any:
        found = true(self, session, shard, position)
        if found is not None and position % 7 == 3:
            found = found.copy()
            found[:] = 0  # what was there before
        return found

    monkeypatch.setattr(HopLog, "frame", frame)


def replay_from_one_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Session._opened

    def opened(self: Session, event: Opened, now: int) -> Any:
        known = self._sent
        if self._asking and 0 < event.position + 1 < known:
            event = replace(event, position=event.position + 1)
        return true(self, event, now)

    monkeypatch.setattr(Session, "_opened", opened)


def keep_wrong_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HopLog, "_cut", lambda self, key, log, position: setattr(log, "end", position))


def never_unsuspect(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Membership._news

    def news(self: Membership, member: Member, fact: Fact) -> None:
        if (member.fact.state, fact.state) != (MemberState.SUSPECT, MemberState.ALIVE):
            true(self, member, fact)

    monkeypatch.setattr(Membership, "_news", news)


def hold_for_any_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    def heed(self: ReplicaManager, term: Term) -> None:
        self.term = term

    monkeypatch.setattr(ReplicaManager, "_heed", heed)


def reconcile_without_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Settling, wanted: frozenset[Wanted], urgent: bool, now_s: float) -> frozenset[Wanted]:
        self.current = wanted
        return wanted

    true = Reconciler.__init__
    monkeypatch.setattr(Settling, "look", look)
    monkeypatch.setattr(Reconciler, "__init__", lambda self, moves: true(self, 1_000_000))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (accept_stale_epochs, "flicker"),
        (forget_a_hop_log_record, "storm"),
        (replay_from_one_too_far, "storm"),
        (keep_wrong_guesses, "far-sites"),
        (never_unsuspect, "flicker"),
        (hold_for_any_leader, "split"),
        (reconcile_without_damping, "split"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found, tried = search(lambda seed: shipped(scenario), iter(range(1, 1 + SEEDS)), lambda seed: None)
    assert found is not None, f"{tried} seeds and nothing found"


@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        # A stage went on over a new link, in the same epoch, after frames that the old one had swallowed.
        ("flicker", 9),
        ("flicker", 12),
        # A plan gave a node's memory away twice; nodes that all had come and gone were held off for ever.
        ("split", 1),
    ],
)
def test_what_was_broken_once_holds(scenario: str, seed: int) -> None:
    assert breaks(shipped(scenario), seed) is None


@pytest.mark.timeout(300)
def test_what_breaks_something_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_a_hop_log_record(monkeypatch)
    scenario = read_scenario(SMALL, "small")
    found, _ = search(lambda seed: scenario, iter(range(1, 1 + SEEDS)), lambda seed: None)
    assert found is not None
    smaller = shrink(Found(scenario, found.seed, found.what), lambda what: None)
    assert len(smaller.scenario.faults) < len(scenario.faults)
    assert breaks(smaller.scenario, smaller.seed) == smaller.what


def test_the_example_of_the_readme_is_a_scenario() -> None:
    text = (SCENARIOS.parent / "README.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    assert read_scenario(example, "README.md").name == "shop"
