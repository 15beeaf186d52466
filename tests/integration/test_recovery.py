"""The real model on two replicas of every layer: stages die, freeze and drain in mid-answer; no token is lost."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mesh.forms import parse_form
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.shard_maker import make_shard
from tests.agents import AgentProcess, agent, until
from tests.conftest import MODEL

TOKENS = 120


@pytest.fixture
def mesh_of_five(
    store: ModelStore, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[AgentProcess, list[AgentProcess]]]:
    """An ingress that hosts nothing, and two agents for each half of the model, in the form that is asked for."""
    form = getattr(request, "param", "int8")
    runtime, quantization = parse_form(form)
    for start, end in ((0, 15), (15, 30)):
        make_shard(store, MODEL, start, end, quantization, runtime=runtime)
    home = str(store.root.parent)
    from contextlib import ExitStack

    with ExitStack() as stack:
        ingress = stack.enter_context(agent(tmp_path / "ingress", home=home))
        hosts = [
            stack.enter_context(
                agent(
                    tmp_path / f"h{i}",
                    home=home,
                    peers=ingress.address,
                    shards=f"{MODEL}:{'0-15' if i < 2 else '15-30'}/{form}",
                    threads="1",
                    slots="4",
                    context="512",
                )
            )
            for i in range(4)
        ]
        until(lambda: serving(ingress) == 4, 40, "not everything serves")
        yield ingress, hosts


def serving(observer: AgentProcess) -> int:
    nodes = observer.report()["nodes"]
    return sum(r["state"] == "serving" for n in nodes if n["state"] == "alive" for r in n["replicas"])


class Answer:
    """A streamed answer; ``interrupt`` is called once, when some tokens have come."""

    def __init__(
        self, ingress: AgentProcess, interrupt: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.texts: list[str] = []
        self.gaps: list[float] = []
        with openai.OpenAI(
            base_url=f"http://{ingress.api}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:
            stream = client.completions.create(
                model=MODEL,
                prompt="The history of the sea begins with",
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                logit_bias={"2": -100, "0": -100},
            )
            last = time.monotonic()
            self.usage: Any = None
            for chunk in stream:
                self.id = chunk.id
                self.usage = chunk.usage or self.usage
                for choice in chunk.choices:
                    now = time.monotonic()
                    self.gaps.append(now - last)
                    last = now
                    self.texts.append(choice.text)
                if len(self.texts) == 30 and interrupt is not None:
                    interrupt(report(ingress, self.id))
                    interrupt = None
        self.text = "".join(self.texts)
        self.report = report(ingress, self.id)


def report(ingress: AgentProcess, session: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{ingress.api}/mesh/v1/sessions/{session}", timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def whole(answer: Answer) -> None:
    """Every token came, once."""
    assert answer.usage.completion_tokens == TOKENS
    assert answer.report["outcome"] == "length"
    assert answer.report["tokens"] == TOKENS


def victim(hosts: list[AgentProcess], told: dict[str, Any], stage: int) -> AgentProcess:
    return next(h for h in hosts if h.node == told["stages"][stage]["node"])


@pytest.mark.parametrize(
    ("mesh_of_five", "stage"),
    [("int8", 0), ("int8", 1), ("litert-int4", 0)],
    indirect=["mesh_of_five"],
)
def test_a_stage_killed_in_mid_answer_costs_no_token(
    mesh_of_five: tuple[AgentProcess, list[AgentProcess]], stage: int
) -> None:
    ingress, hosts = mesh_of_five
    calm = Answer(ingress)
    whole(calm)
    assert calm.report["recoveries"] == []
    hit = Answer(ingress, lambda told: victim(hosts, told, stage).process.kill())
    whole(hit)
    (recovery,) = hit.report["recoveries"]
    assert recovery["cause"].startswith("stream_broken")
    assert 0 < recovery["stalled_ms"] < 3000
    assert recovery["after_tokens"] >= 25
    # Replayed step by step on the same shard, runtime and threads: the text is what it would have been.
    assert hit.text == calm.text


@pytest.mark.parametrize(
    ("mesh_of_five", "after"), [("int8", 20), ("litert-int4", 1)], indirect=["mesh_of_five"]
)
def test_what_began_with_anothers_cache_goes_on_when_a_stage_is_killed(
    mesh_of_five: tuple[AgentProcess, list[AgentProcess]], after: int
) -> None:
    ingress, hosts = mesh_of_five
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": "The tide came in over the long grey beach, and the old men carried their boats up. " * 9,
        "max_tokens": 60,
        "logit_bias": {"2": -100, "0": -100},
        "temperature": 0,
    }
    with openai.OpenAI(
        base_url=f"http://{ingress.api}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        calm = client.completions.create(**request).choices[0].text
        told, text = dict[str, Any](), ""
        # Routes that look quicker are tried out as well: those that have nothing.
        for _ in range(10):
            text, pieces = "", 0
            for chunk in client.completions.create(stream=True, **request):
                for choice in chunk.choices:
                    text, pieces = text + choice.text, pieces + 1
                if pieces == after:
                    told = report(ingress, chunk.id)
                    if told["cached_tokens"]:
                        victim(hosts, told, 1).process.kill()
            assert text == calm
            if told["cached_tokens"]:
                break
        told = report(ingress, chunk.id)
    assert told["cached_tokens"] == 128
    assert len(told["recoveries"]) == 1


def test_choices_of_one_prompt_lose_no_token_when_a_stage_is_killed(
    mesh_of_five: tuple[AgentProcess, list[AgentProcess]],
) -> None:
    ingress, hosts = mesh_of_five
    with openai.OpenAI(
        base_url=f"http://{ingress.api}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        killed = False
        for chunk in client.completions.create(
            model=MODEL,
            prompt="The tide came in over the long grey beach, and the old men carried their boats up. " * 9,
            max_tokens=60,
            n=4,
            logit_bias={"2": -100, "0": -100},
            stream=True,
            stream_options={"include_usage": True},
        ):
            if not killed:
                killed = True
                victim(hosts, report(ingress, chunk.id), 1).process.kill()
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 240


def test_a_frozen_stage_is_left_when_membership_notices(
    mesh_of_five: tuple[AgentProcess, list[AgentProcess]],
) -> None:
    ingress, hosts = mesh_of_five
    frozen: list[AgentProcess] = []

    def freeze(told: dict[str, Any]) -> None:
        frozen.append(victim(hosts, told, 1))
        frozen[0].sends(signal.SIGSTOP)

    try:
        hit = Answer(ingress, freeze)
    finally:
        for each in frozen:
            each.sends(signal.SIGCONT)
    whole(hit)
    (recovery,) = hit.report["recoveries"]
    assert recovery["cause"].startswith("silent")
    assert recovery["stalled_ms"] < 6000


def test_a_draining_node_hands_its_sessions_over(
    mesh_of_five: tuple[AgentProcess, list[AgentProcess]],
) -> None:
    ingress, hosts = mesh_of_five
    drained: list[AgentProcess] = []

    def drain(told: dict[str, Any]) -> None:
        drained.append(victim(hosts, told, 0))
        drained[0].sends(signal.SIGTERM)

    hit = Answer(ingress, drain)
    whole(hit)
    (recovery,) = hit.report["recoveries"]
    assert recovery["cause"] == "draining: its node drains"
    assert recovery["stalled_ms"] < 2000
    until(lambda: drained[0].process.poll() is not None, 10, "the drained agent did not end")


def test_the_only_replica_is_loaded_elsewhere_when_it_dies(store: ModelStore, tmp_path: Path) -> None:
    """No replica is left and no policy asks for one: the agent that can do it soonest loads the shard (rung cold)."""
    make_shard(store, MODEL, 0, 30, "int8")
    home = str(store.root.parent)
    told: dict[str, Any] = {"home": home, "threads": "1", "slots": "4", "context": "512"}
    with agent(tmp_path / "ingress", **told, memory="64") as ingress:
        peers = ingress.address
        with (
            agent(tmp_path / "only", **told, peers=peers, shards=f"{MODEL}:0-30/int8") as only,
            agent(tmp_path / "idle", **told, peers=peers) as idle,
        ):
            until(lambda: serving(ingress) == 1, 40, "the shard is not served")
            until(lambda: len(ingress.states()) == 2, 20)
            undisturbed = Answer(ingress)
            answer = Answer(ingress, lambda told: only.process.kill())
            whole(answer)
            assert answer.text == undisturbed.text
            assert [r["rung"] for r in answer.report["recoveries"]] == ["cold"]
            assert answer.report["stages"][0]["node"] == idle.node
            # It is not kept for ever: leases end when no session needs them.
            holders = [
                r["leases"] for n in ingress.report()["nodes"] for r in n["replicas"] if n["id"] == idle.node
            ]
            assert holders == [1]
