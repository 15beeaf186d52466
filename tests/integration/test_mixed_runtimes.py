"""Agents whose shards are of different runtimes answer together, and one chooses its own."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import MeshError
from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.form_times import FILE, probe_forms
from node_agent.adapters.model_store import ModelStore
from tests.agents import AgentProcess, agent, until
from tests.conftest import MODEL

LOADED_S = 60


def served(one: AgentProcess) -> dict[str, str]:
    """Form by layers of what serves anywhere."""
    return {
        f"{r['layers'][0]}-{r['layers'][1]}": f"{r['runtime']}-{r['quantization']}"
        for n in one.report()["nodes"]
        for r in n["replicas"]
        if r["state"] == "serving"
    }


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
    client = ApiClient(f"http://{one.api}")
    chunks = list(client.chat(body))
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    return text, client.get(f"/mesh/v1/sessions/{chunks[0]['id']}")


def holding(
    folder: Path, shards: str, store: ModelStore, peers: str = ""
) -> AbstractContextManager[AgentProcess]:
    home = str(store.root.parent)
    return agent(folder, shards=f"{MODEL}:{shards}", home=home, scheduler="off", threads="1", peers=peers)


@pytest.mark.timeout(200)
def test_a_route_over_two_runtimes_answers_and_gives_way_to_one_of_one(
    store: ModelStore, tmp_path: Path
) -> None:
    with (
        holding(tmp_path / "a", "0-15/int8", store) as first,
        holding(tmp_path / "b", "15-30/litert-int4", store, first.address),
    ):
        until(lambda: len(served(first)) == 2, LOADED_S)
        answer, trace = ask(first)
        assert "Paris" in answer
        assert trace["mixed"]
        with holding(tmp_path / "c", "15-30/int8", store, first.address) as third:
            until(lambda: ask(first)[1]["stages"][1]["node"] == third.node, LOADED_S)
            answer, trace = ask(first)
            assert "Paris" in answer
            assert not trace["mixed"]
        until(lambda: answers_mixed(first), LOADED_S)


def answers_mixed(one: AgentProcess) -> bool:
    """Once it is seen that the third is gone."""
    try:
        answer, trace = ask(one)
    except MeshError:
        return False
    return "Paris" in answer and bool(trace["mixed"])


def unmeasured(folder: Path, store: ModelStore) -> ModelStore:
    """The model in a home of its own, where no runtime was measured yet."""
    (folder / "models").mkdir(parents=True)
    (folder / "models" / MODEL).symlink_to(store.folder(MODEL))
    return ModelStore(folder)


@pytest.mark.timeout(200)
def test_the_scheduler_places_what_its_nodes_measured_to_be_faster(store: ModelStore, tmp_path: Path) -> None:
    home = unmeasured(tmp_path / "home", store)
    probe_forms(home, MODEL)
    path = tmp_path / "home" / FILE
    (key, found) = next(iter(json.loads(path.read_text()).items()))
    path.write_text(json.dumps({key: found | {"litert": {k: v / 9 for k, v in found["onnx"].items()}}}))
    with agent(tmp_path / "a", home=str(tmp_path / "home"), threads="1") as one:
        client = ApiClient(f"http://{one.api}")
        policy = {"policy": f"[models.{MODEL}]\nsessions = 1\ncontext = 512\n", "name": "test"}
        client.send("PUT", "/mesh/v1/policy", policy)
        until(lambda: set(served(one).values()) == {"litert-int4"}, LOADED_S)
        assert "Paris" in ask(one)[0]


@pytest.mark.timeout(200)
def test_an_agent_measures_which_form_to_hold_and_says_so(store: ModelStore, tmp_path: Path) -> None:
    with holding(tmp_path / "a", "0-30", unmeasured(tmp_path / "home", store)) as one:
        until(lambda: bool(served(one)), LOADED_S)
        assert set(served(one).values()) <= {"onnx-int8", "litert-int4"}
        assert "Paris" in ask(one)[0]
    measured = json.loads((tmp_path / "home" / FILE).read_text())
    assert set(next(iter(measured.values()))) == {"onnx", "litert"}
