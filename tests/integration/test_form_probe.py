"""Which runtime a machine takes where none was named: measured once, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.errors import InputError
from mesh.forms import choices, fastest
from node_agent.adapters import form_times
from node_agent.adapters.form_times import FILE, FormTime, chosen_form, probe_forms, probed_speeds
from node_agent.shards.manifest import CARD_FILE, LITERT_GRAPH_FILE
from tests.integration.test_tiny_models import pulled


@pytest.mark.parametrize(
    ("token_us", "wanted"),
    [
        ({}, "onnx"),
        ({"litert": 10.0}, "litert"),
        ({"onnx": 100.0, "litert": 101.0}, "onnx"),
        ({"onnx": 100.0, "litert": 90.0}, "onnx"),
        ({"onnx": 100.0, "litert": 60.0}, "litert"),
    ],
)
def test_another_runtime_is_taken_only_where_it_is_clearly_faster(
    token_us: dict[str, float], wanted: str
) -> None:
    assert fastest(token_us) == wanted


def test_what_is_usual_stays_where_another_is_hardly_faster() -> None:
    assert fastest({"onnx": 80.0, "litert": 100.0}, usual="litert") == "litert"
    assert fastest({"onnx": 70.0, "litert": 100.0}, usual="litert") == "onnx"


@pytest.mark.parametrize(
    ("runtime", "quantization", "wanted"),
    [
        ("auto", "", {"onnx": "int8", "litert": "int4"}),
        ("auto", "fp32", {"onnx": "fp32"}),
        ("auto", "int4", {"litert": "int4"}),
        ("litert", "", {"litert": "int4"}),
    ],
)
def test_what_there_is_to_choose_among(runtime: str, quantization: str, wanted: dict[str, str]) -> None:
    assert choices(runtime, quantization) == wanted


def test_runtimes_are_measured_once_and_what_was_damaged_anew(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    layers = store.card("tiny").architecture.layers
    assert probed_speeds(store) == []
    found = probe_forms(store, "tiny")
    assert set(found) == {"onnx", "litert"}
    assert all(t.layer > 0 and t.prefill > 0 for t in found.values())
    assert chosen_form(store, "tiny", "", "")[0] == fastest({r: t.token_us(layers) for r, t in found.items()})
    path = store.root.parent / FILE
    written = path.stat().st_mtime_ns
    assert probe_forms(store, "tiny") == found
    assert path.stat().st_mtime_ns == written
    kept = json.loads(path.read_text())
    slow = {"layer": 10.0, "head": 20.0, "prefill": 3.0}
    kept[next(iter(kept))] = {"onnx": slow, "litert": slow | {"layer": 1.0, "head": 2.0}}
    whole_file = json.dumps(kept)
    path.write_text(whole_file)
    assert chosen_form(store, "tiny", "", "") == ("litert", "int4")
    told = {(s.runtime, s.quantization): (s.layer, s.head, s.prefill) for s in probed_speeds(store)}
    assert told == {("onnx", "int8"): (10.0, 20.0, 3.0), ("litert", "int4"): (1.0, 2.0, 3.0)}
    card = store.folder("tiny") / CARD_FILE
    whole = card.read_bytes()
    card.write_text("{half")
    assert probed_speeds(store) == []
    card.write_bytes(whole)
    negative = whole_file.replace("10.0", "-10.0")
    for damaged in ("{half", '{"x": {"onnx": 3.0}}', negative):
        path.write_text(damaged)
        assert probed_speeds(store) == []
    assert set(probe_forms(store, "tiny")) == {"onnx", "litert"}


def test_what_was_asked_for_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pulled(tmp_path)
    monkeypatch.setattr(form_times, "probe_forms", None)
    assert chosen_form(store, "tiny", "litert", "") == ("litert", "int4")
    assert chosen_form(store, "tiny", "", "fp32") == ("onnx", "fp32")
    with pytest.raises(InputError, match="'tpu' is unknown"):
        chosen_form(store, "tiny", "tpu", "")


def test_a_runtime_that_fails_is_no_choice_and_ends_nothing(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    probe_forms(store, "tiny")
    (store.root.parent / FILE).unlink()
    for graph in store.root.rglob(LITERT_GRAPH_FILE):
        graph.write_bytes(b"damaged")
    assert set(probe_forms(store, "tiny")) == {"onnx"}


@pytest.mark.parametrize(("installed", "wanted"), [("onnx", "onnx"), ("litert", "litert"), ("", "onnx")])
def test_where_there_is_one_runtime_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, wanted: str
) -> None:
    store = pulled(tmp_path)
    measured: list[str] = []

    def measure(_: object, model: str) -> dict[str, FormTime]:
        measured.append(model)
        return {installed: FormTime(1.0, 1.0, 1.0)}

    monkeypatch.setattr(form_times, "_installed", lambda: {installed: "1.0"} if installed else {})
    monkeypatch.setattr(form_times, "_measured", measure)
    assert chosen_form(store, "tiny", "", "")[0] == wanted
    assert bool(measured) == (installed == "litert")
