"""Some graphs of a LiteRT model, by shorter lists in its file."""

from __future__ import annotations

import flatbuffers
import pytest
from ai_edge_litert import schema_py_generated as fb
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ShardError
from node_agent.shards.static_names import by_bucket
from node_agent.shards.tflite_part import graph_names, keep_graphs

NAMES = ("run_1_256", "batch_4_256", "run_1_512", "run_64_512", "head")


def model(names: tuple[str, ...] = NAMES) -> bytes:
    """A file of empty graphs; each signature runs the graph of its name."""
    made = fb.ModelT()
    made.version, made.subgraphs, made.signatureDefs = 3, [], []
    for i, name in enumerate(names):
        graph, signature = fb.SubGraphT(), fb.SignatureDefT()
        graph.name, signature.signatureKey, signature.subgraphIndex = name, name, i
        made.subgraphs.append(graph)
        made.signatureDefs.append(signature)
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def listed(data: bytearray) -> dict[str, str]:
    """Graph by signature, as the format's own reader has it."""
    read = fb.ModelT.InitFromPackedBuf(data, 0)
    graphs = [g.name.decode() for g in read.subgraphs]
    found = {s.signatureKey.decode(): graphs[s.subgraphIndex] for s in read.signatureDefs}
    assert len(graphs) == len(found)
    return found


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_what_is_kept_runs_what_it_ran(names: set[str]) -> None:
    data = bytearray(model())
    assert graph_names(data) == NAMES
    keep_graphs(data, names)
    assert listed(data) == {name: name for name in names}
    assert set(graph_names(data)) == names


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    whole = model()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        keep_graphs(damaged, {"run_1_256", "head"})
    except ShardError as error:
        assert "cannot be read" in str(error) or "lists no graphs" in str(error)


def test_a_model_without_signatures_is_refused() -> None:
    with pytest.raises(ShardError, match="it lists no graphs"):
        graph_names(bytearray(model(())))


def test_the_head_comes_with_the_smallest_bucket() -> None:
    assert by_bucket(["run_1_512", "run_1_256", "run_16_512", "head"]) == [
        ["run_1_256", "head"],
        ["run_1_512", "run_16_512"],
    ]
