"""Policy files: what they say, and errors that point to the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from scheduler.policy import (
    ClassPolicy,
    ModelPolicy,
    duration_us,
    forbidden,
    matches,
    model_policy,
    parse_policy,
    policy_table,
    policy_text,
    price_us,
)
from tests.unit.test_placement import host

GOOD = """
[models.tiny]
replicas = 2            # two nodes a layer
max_tpot = "30ms"
availability = 0.999
allow = ["tier=onboard", "tier=gateway"]

[models.tiny.price]
"tier=gateway" = "0.2ms"

[classes.private]
allow = ["tier=onboard"]
percentile = "p99"
"""


def test_a_policy_is_read_and_written_alike() -> None:
    policy = parse_policy(GOOD, "mesh.toml")
    tiny = policy.models["tiny"]
    assert (tiny.replicas, tiny.max_tpot, tiny.availability) == (2, 30_000.0, 0.999)
    assert tiny.price == (("tier=gateway", 200.0),)
    assert policy.classes["private"] == ClassPolicy(allow=("tier=onboard",), percentile="p99")
    assert parse_policy(policy_text(policy), "again") == policy


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("x = 1", "line 1: there is no section 'x'"),
        ("[models.tiny]\nreplicas = 0", "line 2: replicas is 0; it must be a whole number from 1 to 64"),
        ("[models.tiny]\n\nreplica = 2", "line 3: there is no 'replica'; there are allow"),
        ("[models.tiny]\nmax_tpot = 30", "line 2: max_tpot is 30; it must be a time with its unit"),
        ("[models.tiny]\navailability = 1.0", "line 2: availability is 1.0; it must be a share"),
        ("[models.tiny]\nallow = ['onboard']", "line 2: allow is ['onboard']; it must be a list of labels"),
        ("[models.tiny]\nallow = ['a=b']\ndeny = ['a=b']", "line 3: a=b is both allowed and denied"),
        ("[models.tiny]\n[models.tiny.price]\n'tier' = '1ms'", "line 2: price is"),
        ("[classes.a]\nreplicas = 2", "line 2: there is no 'replicas'"),
        ("[models]\ntiny = 3", "line 2: models must be tables"),
        ("[models.tiny\n", "is no TOML"),
        (
            "[models.tiny]\nquantization = 'int3'",
            "line 2: quantization is 'int3'; it must be one of int4, int8, fp32",
        ),
        ("[models.tiny]\nsessions = true", "line 2: sessions is True"),
        ("a = " + "[" * 5000 + "]" * 5000, "is no TOML"),
        ("#" + "x" * 70_000, "a policy has at most"),
    ],
)
def test_errors_point_to_the_line(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_policy(text, "mesh.toml")
    assert what in str(error.value)


def test_the_readme_documents_every_key() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for kind in (ModelPolicy, ClassPolicy):
        assert policy_table(kind) in readme, f"put policy_table({kind.__name__}) into the README"


def test_durations_have_units() -> None:
    assert [duration_us(t) for t in ("5us", "1.5ms", "2 s", "1min", "1h")] == [5, 1500, 2e6, 60e6, 3600e6]
    for wrong in ("", "5", "-5ms", "5 days", 5, None):
        with pytest.raises(ValueError, match="a time with its unit"):
            duration_us(wrong)


def test_labels_of_every_node_and_any_value() -> None:
    drone = host("drone", labels=(("tier", "onboard"), ("cost", "3.5")), region="north")
    assert matches(drone, "node=drone")
    assert matches(drone, "region=north")
    assert matches(drone, "tier=*")
    assert not matches(drone, "gpu=*")
    assert forbidden(drone, ClassPolicy(allow=("tier=cloud", "node=drone"))) is None
    assert forbidden(drone, ClassPolicy(deny=("region=*",))) == "the policy denies region=*"
    assert price_us(drone, ClassPolicy(money=10, price=(("tier=onboard", 5.0),))) == 40.0
    odd = host("odd", labels=(("cost", "free"),))
    assert price_us(odd, ClassPolicy(money=10)) == 0


def test_a_models_flags() -> None:
    assert model_policy({"replicas": 3, "max_tpot": "25ms"}) == ModelPolicy(replicas=3, max_tpot=25_000)
    with pytest.raises(ConfigError, match="the request: replicas is 'x'"):
        model_policy({"replicas": "x"})
