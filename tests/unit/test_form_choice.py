"""Which form the scheduler places a model in where its policy leaves that open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.types import Term
from scheduler.cluster import ClusterSnapshot, Node
from scheduler.form_choice import chosen_form
from scheduler.layer_speed import LayerSpeed, probed_layer
from scheduler.policy import ModelPolicy
from tests.builders import SHAPE, cluster, node, shard

ANY = ModelPolicy()


def speed(runtime: str, layer: float) -> LayerSpeed:
    quantization = {"onnx": "int8", "litert": "int4"}[runtime]
    return probed_layer(SHAPE.ref.digest, runtime, quantization, layer, 2 * layer, 1.0)


def measured(name: str, **layer_us: float) -> Node:
    speeds = tuple(speed(r, us) for r, us in layer_us.items())
    return node(name, models=(SHAPE.ref.name,), layer_speeds=speeds)


def chosen(*nodes: Node, policy: ModelPolicy = ANY) -> str:
    return "-".join(chosen_form(cluster(*nodes), SHAPE, policy))


def placed(host: Node, runtime: str) -> Node:
    """With a replica that a scheduler's lease holds."""
    held: dict[str, Any] = {"runtime": runtime, "quantization": {"onnx": "int8", "litert": "int4"}[runtime]}
    replicas = node("x", replace(shard(), **held)).replicas
    return replace(host, replicas=tuple(replace(r, term=Term(1, host.id)) for r in replicas))


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([], "onnx-int8"),
        ([measured("a")], "onnx-int8"),
        ([measured("a", onnx=100, litert=60)], "litert-int4"),
        ([measured("a", onnx=100, litert=90)], "onnx-int8"),
        # One that never measured LiteRT may be one that cannot run it.
        ([measured("a", onnx=100, litert=60), measured("b", onnx=100)], "onnx-int8"),
        ([measured("a", onnx=100, litert=60), measured("b")], "onnx-int8"),
        ([measured("a", litert=60)], "litert-int4"),
        ([measured("a", onnx=10, litert=60), measured("b", litert=60)], "litert-int4"),
        # Slow for one and quick for the other: what they do together decides.
        ([measured("a", onnx=100, litert=40), measured("b", onnx=100, litert=120)], "litert-int4"),
        ([measured("a", onnx=10, litert=40), measured("b", onnx=100, litert=40)], "onnx-int8"),
    ],
)
def test_all_that_may_host_decide_together(nodes: list[Node], wanted: str) -> None:
    assert chosen(*nodes) == wanted


def test_only_those_that_may_host_decide() -> None:
    fast = measured("a", onnx=100, litert=60)
    other = replace(measured("b", onnx=100), models=())
    assert chosen(fast, other) == "litert-int4"
    assert chosen(fast, measured("b", onnx=100), policy=ModelPolicy(deny=("node=b",))) == "litert-int4"


def test_what_is_placed_is_not_exchanged_for_a_little() -> None:
    host = measured("a", onnx=80, litert=100)
    assert chosen(placed(host, "litert")) == "litert-int4"
    assert chosen(placed(measured("a", onnx=70, litert=100), "litert")) == "onnx-int8"
    # A newcomer that measured nothing, or another form only, is no reason either.
    assert chosen(placed(host, "onnx"), measured("b", litert=10)) == "onnx-int8"
    assert chosen(placed(host, "litert"), measured("b")) == "litert-int4"


def test_what_a_policy_names_is_taken() -> None:
    quick = measured("a", onnx=100, litert=10)
    assert chosen(quick, policy=ModelPolicy(runtime="onnx")) == "onnx-int8"
    assert chosen(quick, policy=ModelPolicy(quantization="fp32")) == "onnx-fp32"
    assert chosen(quick, policy=ModelPolicy(quantization="int4")) == "litert-int4"


def test_a_figure_that_cannot_be_counts_as_none() -> None:
    broken = measured("a", onnx=100, litert=0.0)
    snapshot: ClusterSnapshot = cluster(broken)
    assert chosen_form(snapshot, SHAPE, ANY) == ("onnx", "int8")
