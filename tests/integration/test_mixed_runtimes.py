"""Agents whose shards are of different runtimes answer together, and one chooses its own."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node_agent.adapters.form_probe import FILE
from node_agent.adapters.model_store import ModelStore
from tests.agents import AgentProcess, agent
from tests.conftest import MODEL


def served(one: AgentProcess) -> dict[str, str]:
    """Form by layers of what serves anywhere."""
    return {
        f"{r['layers'][0]}-{r['layers'][1]}": f"{r['runtime']}-{r['quantization']}"
        for n in one.report()["nodes"]
        for r in n["replicas"]
        if r["state"] == "serving"
    }


def eventually(true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.1)


def ask(one: AgentProcess) -> tuple[str, dict[str, Any]]:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "temperature": 0,
        "max_tokens": 24,
    }
    request = urllib.request.Request(
        f"http://{one.api}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        given = json.load(answer)
    with urllib.request.urlopen(f"http://{one.api}/mesh/v1/sessions/{given['id']}", timeout=10) as answer:
        return given["choices"][0]["message"]["content"], json.load(answer)


@pytest.mark.timeout(200)
def test_a_route_over_two_runtimes_answers_and_gives_way_to_one_of_one(
    store: ModelStore, tmp_path: Path
) -> None:
    home = str(store.root.parent)
    with (
        agent(tmp_path / "a", shards=f"{MODEL}:0-15/int8", home=home, scheduler="off", threads="1") as first,
        agent(
            tmp_path / "b",
            shards=f"{MODEL}:15-30/litert-int4",
            peers=first.address,
            home=home,
            scheduler="off",
            threads="1",
        ),
    ):
        eventually(lambda: len(served(first)) == 2)
        answer, trace = ask(first)
        assert "Paris" in answer
        assert trace["mixed"]
        with agent(
            tmp_path / "c",
            shards=f"{MODEL}:15-30/int8",
            peers=first.address,
            home=home,
            scheduler="off",
            threads="1",
        ) as third:
            eventually(lambda: third.node in ask(first)[1]["stages"][1]["node"])
            answer, trace = ask(first)
            assert "Paris" in answer
            assert not trace["mixed"]
        eventually(lambda: _answers_mixed(first))


def _answers_mixed(one: AgentProcess) -> bool:
    """Once it is seen that the third is gone."""
    try:
        answer, trace = ask(one)
    except urllib.error.HTTPError:
        return False
    return "Paris" in answer and bool(trace["mixed"])


@pytest.mark.timeout(200)
def test_an_agent_measures_which_form_to_hold(store: ModelStore, tmp_path: Path) -> None:
    home, data = str(store.root.parent), tmp_path / "data"
    with agent(
        tmp_path / "a", shards=f"{MODEL}:0-30/auto", home=home, scheduler="off", data_dir=str(data)
    ) as one:
        eventually(lambda: set(served(one).values()) <= {"onnx-int8", "litert-int4"} and bool(served(one)))
        assert "Paris" in ask(one)[0]
    measured = json.loads((data / FILE).read_text())
    assert set(next(iter(measured.values()))) == {"onnx", "litert"}
