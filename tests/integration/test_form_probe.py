"""Which runtime a machine takes where none was named: measured once, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.errors import InputError
from mesh.forms import fastest
from node_agent.adapters import form_probe
from node_agent.adapters.form_probe import FILE, chosen_form, probe_forms
from node_agent.shards.manifest import LITERT_GRAPH_FILE
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


def test_runtimes_are_measured_once_and_what_was_damaged_anew(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    found = probe_forms(store, "tiny", tmp_path)
    assert set(found) == {"onnx", "litert"}
    assert all(us > 0 for us in found.values())
    assert chosen_form(store, "tiny", "", "", tmp_path)[0] == fastest(found)
    path = tmp_path / FILE
    written = path.stat().st_mtime_ns
    assert probe_forms(store, "tiny", tmp_path) == found
    assert path.stat().st_mtime_ns == written
    kept = json.loads(path.read_text())
    kept[next(iter(kept))] = {"onnx": 10.0, "litert": 1.0}
    path.write_text(json.dumps(kept))
    assert chosen_form(store, "tiny", "", "", tmp_path) == ("litert", "int4")
    path.write_text("{half")
    assert set(probe_forms(store, "tiny", tmp_path)) == {"onnx", "litert"}


def test_what_was_asked_for_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pulled(tmp_path)
    monkeypatch.setattr(form_probe, "probe_forms", None)
    assert chosen_form(store, "tiny", "litert", "", tmp_path) == ("litert", "int4")
    assert chosen_form(store, "tiny", "", "fp32", tmp_path) == ("onnx", "fp32")
    with pytest.raises(InputError, match="'tpu' is unknown"):
        chosen_form(store, "tiny", "tpu", "", tmp_path)


def test_a_runtime_that_fails_is_no_choice_and_ends_nothing(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    probe_forms(store, "tiny", tmp_path)
    (tmp_path / FILE).unlink()
    for graph in store.root.rglob(LITERT_GRAPH_FILE):
        graph.write_bytes(b"damaged")
    assert set(probe_forms(store, "tiny", tmp_path)) == {"onnx"}
