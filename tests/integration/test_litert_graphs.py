"""Graphs of a LiteRT shard: when each is compiled, and what they share."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from node_agent.adapters.litert_compiled import CompiledEngine, _compiled, _mapped, pack
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import RuntimeOptions
from node_agent.shards.manifest import LITERT_GRAPH_FILE
from node_agent.shards.tflite_part import graph_names
from tests.agents import until
from tests.integration.test_litert_shards import graphs_coming, text
from tests.integration.test_tiny_models import pulled

NEVER = 1e9
SMALLEST = {"head", "head_8", "run_1_256", "run_16_256", "run_64_256", "steps_16_256", "batch_4_256"}
SMALLEST |= {"batch_8_256"}


def many_graphs(folder: Path, context: int = 1024) -> tuple[Path, Path]:
    """A shard's graphs, and their packed weights."""
    store = pulled(folder, context=context)
    graph = make_shard(store, "tiny", 0, 3, "int8", runtime="litert", context=context) / LITERT_GRAPH_FILE
    packed = folder / "weights.xnnpack"
    pack(graph, 1, packed)
    return graph, packed


def at_rest(engine: CompiledEngine) -> None:
    """Nothing is compiled any more, but for what it has no time for."""
    until(
        lambda: (
            not engine._soon and not engine._compiling and (engine.quiet_s >= NEVER or not engine._rest())
        ),
        30,
    )


def test_graphs_come_when_they_are_wanted_and_their_buckets_others_when_nothing_is_computed(
    tmp_path: Path,
) -> None:
    graph, packed = many_graphs(tmp_path)
    engine, others = CompiledEngine(graph, 1, packed), ("_384", "_640", "_768")
    engine.quiet_s = NEVER
    assert engine.loaded == {"run_1_256", "head"}  # a shard that is known here is known again by them
    engine.prepare(["run_16_256", "run_64_256", "run_16_300"], ["run_1_512"])
    until(lambda: "run_64_256" in engine.loaded, 30)
    time.sleep(0.2)
    assert engine.loaded == {"run_1_256", "head", "run_16_256", "run_64_256"}
    engine.quiet_s = 0.2
    engine.prepare([])  # looks at it again
    assert "new_k.0" in engine.ends("steps_16_256").outputs  # the others do not keep it waiting
    at_rest(engine)
    assert engine.loaded == {n for n in engine.names if n in SMALLEST or n.endswith("_512")}
    assert "new_k.0" in engine.ends("run_16_1024").outputs  # nobody said that it would be wanted
    at_rest(engine)
    assert engine.loaded == {n for n in engine.names if not n.endswith(others)}
    engine.ends("head")
    assert len(engine._models) == 3  # one of each bucket
    engine.spare_bytes = 1 << 60
    engine.prepare([], ["run_1_384", "run_1_640", "run_1_768"])
    until(lambda: not engine._at_work, 30)
    assert engine.loaded == {n for n in engine.names if not n.endswith(others)}
    for other in others:
        engine.ends(f"run_1{other}")
    at_rest(engine)
    assert engine.loaded == {*engine.names}
    engine.close()


def test_nothing_is_compiled_for_later_while_a_shard_computes(tmp_path: Path) -> None:
    shard = packed_shard(tmp_path)
    shard.engine.quiet_s = 0.4
    begin = time.monotonic()
    shard.prepare()
    while time.monotonic() - begin < 1:
        shard.decode(0, [0], np.array([5]))
    assert not {"batch_4_256", "run_1_512"} & shard.engine.loaded
    until(lambda: {"batch_4_256", "run_1_512"} <= shard.engine.loaded, 30)
    shard.close()


def test_a_session_finds_the_next_buckets_graph_compiled(tmp_path: Path) -> None:
    """As it comes near the end of its bucket, by steps, chunks, or beside others."""
    shard = packed_shard(tmp_path)
    shard.engine.quiet_s = NEVER
    shard.prefill(0, 0, text(191))
    at_rest(shard.engine)
    assert "run_64_384" not in shard.engine.loaded
    shard.prefill(1, 0, text(192))
    until(lambda: "run_64_384" in shard.engine.loaded, 30)
    shard.decode(0, [238], np.array([5]))
    at_rest(shard.engine)
    assert "run_1_384" not in shard.engine.loaded
    shard.decode(0, [239], np.array([5]))
    until(lambda: "run_1_384" in shard.engine.loaded, 30)
    shard.decode(0, [239] * 4, np.array([5] * 4))
    until(lambda: "batch_4_384" in shard.engine.loaded, 30)
    assert shard.engine.loaded.isdisjoint(["run_16_384", "batch_8_384", "run_1_640"])
    shard.prefill(2, 0, text(600))
    until(lambda: "run_1_640" in shard.engine.loaded, 30)  # what follows a prompt
    shard.close()


def packed_shard(folder: Path) -> Any:
    """With packed weights."""
    store = pulled(folder, context=1024)
    made = make_shard(store, "tiny", 0, 3, "int8", runtime="litert", context=1024)
    options = RuntimeOptions(threads=1, cache=str(folder / "packed"))
    load_shard(made, store.manifest(made), slots=1, capacity=1025, options=options).close()
    return load_shard(made, store.manifest(made), slots=8, capacity=1025, options=options)


def test_without_packed_weights_there_is_one_model(tmp_path: Path) -> None:
    graph, _ = many_graphs(tmp_path)
    engine = CompiledEngine(graph, 1)
    assert engine.loaded == SMALLEST
    engine.prepare(["run_16_256"], ["run_1_512"])
    at_rest(engine)
    assert engine.loaded == SMALLEST
    assert "new_k.0" in engine.ends("run_1_512").outputs
    assert [set(model.signatures) for model in engine._models] == [set(engine.names)]
    engine.close()


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
def test_one_buckets_packed_weights_are_those_of_all(tmp_path: Path, quantization: str) -> None:
    """What is not in the file would be packed at every load, once a graph."""
    store = pulled(tmp_path, context=512)
    made = make_shard(store, "tiny", 0, 3, quantization, runtime="litert", context=512)
    every, few = tmp_path / "every.xnnpack", tmp_path / "few.xnnpack"
    with _mapped(made / LITERT_GRAPH_FILE) as data:
        names = graph_names(data)
    _compiled(made / LITERT_GRAPH_FILE, names, 1, every).close()
    pack(made / LITERT_GRAPH_FILE, 1, few)
    assert few.read_bytes() == every.read_bytes()


def test_graphs_that_are_wanted_as_the_last_ones_come_are_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, packed = many_graphs(tmp_path)
    engine, compiled = CompiledEngine(graph, 1, packed), list[str]()
    engine.quiet_s = NEVER

    def compile_(names: Any) -> Any:
        time.sleep(0.1)
        compiled.extend(names)
        return SimpleNamespace(signatures=dict.fromkeys(names), close=lambda: None)

    class Held(threading.Condition):
        """Whoever compiles loses the processor just after it has said that nothing more is wanted."""

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if threading.current_thread().name == "graphs":
                time.sleep(0.05)

    monkeypatch.setattr(engine, "_compile", compile_)
    monkeypatch.setattr(engine, "_changed", Held())
    wanted = ["run_16_256", "run_64_256", "run_1_512", "run_16_512"]
    for name in wanted:
        engine.prepare([name])
        at_rest(engine)
    engine.close()
    assert compiled == wanted


def test_the_graph_that_somebody_waits_for_comes_before_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, packed = many_graphs(tmp_path, context=256)
    engine, order = CompiledEngine(graph, 1, packed), list[str]()
    compiled, begun, waited_for = engine._compile, threading.Event(), threading.Event()

    def compile_(names: Any) -> Any:
        order.extend(names)
        begun.set()
        waited_for.wait(10)
        return compiled(names)

    monkeypatch.setattr(engine, "_compile", compile_)
    engine.prepare(["run_16_256", "run_64_256", "batch_8_256"])
    assert begun.wait(10)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine.ends, "batch_8_256")
        until(lambda: engine._soon[0] == "batch_8_256", 10)
        waited_for.set()
        assert "new_k.0" in found.result(30).outputs
    at_rest(engine)
    assert order[:3] == ["run_16_256", "batch_8_256", "run_64_256"]
    assert set(order[3:]) == set(engine.names)
    engine.close()


def test_an_engine_is_closed_while_graphs_are_on_their_way(tmp_path: Path) -> None:
    graph, packed = many_graphs(tmp_path)
    engine = CompiledEngine(graph, 1, packed)
    engine.prepare(["run_16_256", "run_64_256"], ["run_1_512"])
    engine.close()
    assert not graphs_coming()
    engine = CompiledEngine(graph, 1, packed)
    engine.quiet_s = NEVER
    engine.prepare([], ["run_1_512"])  # which waits for its time
    engine.close()
    assert not graphs_coming()


def test_graphs_that_fail_to_come_are_tried_again_by_who_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, for one; nobody waits for what does not come."""
    graph, packed = many_graphs(tmp_path)
    engine, compiled = CompiledEngine(graph, 1, packed), list[str]()
    engine.quiet_s = NEVER

    def fails(names: Any) -> Any:
        compiled.extend(names)
        raise OSError(28, "No space left on device")

    compile_ = engine._compile
    monkeypatch.setattr(engine, "_compile", fails)
    engine.prepare(["run_64_512"])
    at_rest(engine)
    assert "No space left" in caplog.text
    engine.prepare(["run_64_512"])  # a guess does not try it again
    at_rest(engine)
    assert compiled == ["run_64_512"]
    with pytest.raises(OSError, match="No space left"):
        engine.ends("run_64_512")
    assert compiled == ["run_64_512"] * 2
    monkeypatch.setattr(engine, "_compile", compile_)
    assert "new_k.0" in engine.ends("run_64_512").outputs
    monkeypatch.setattr(engine, "_compile", fails)
    engine.quiet_s = 0
    engine.prepare([])
    at_rest(engine)  # it gives up
    engine.close()
