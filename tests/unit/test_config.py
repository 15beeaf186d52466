"""Settings: sources in order, every wrong value named, every setting documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from node_agent.config import (
    AgentConfig,
    fields,
    join_address,
    load_config,
    parse_delegate,
    parse_shard,
    settings_table,
)
from node_agent.lease import ShardKey


def test_later_sources_win() -> None:
    file = 'port = 1\nslots = 2\nname = "file"\npeers = ["a:1"]'
    config = load_config(file, "f", {"MESH_SLOTS": "3", "MESH_NAME": "env", "OTHER": "x"}, {"name": "flag"})
    assert (config.port, config.slots, config.name, config.peers) == (1, 3, "flag", ("a:1",))
    assert load_config(None, "", {}, {}) == AgentConfig()
    assert load_config(None, "", {"MESH_PEERS": "a:1, b:2"}, {}).peers == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("port = ", "is no TOML"),
        ("prot = 1", "no setting 'prot'"),
        ('port = "x"', "port is 'x'; it must be a number"),
        ("port = true", "must be a number"),
        ("port = 70000", "ports end at 65535"),
        ("port = -1", "at least 0"),
        ("slots = 1.5", "whole number"),
        ("slots = 0", "at least 1"),
        ("step_timeout = nan", "at least"),
        ("name = 5", "must be a text"),
        ("peers = [1]", "list of texts"),
        ('peers = ["nowhere"]', "write host:port"),
        ('cluster = "a b"', "use letters"),
        ('log = "maybe"', "one of async, sync, off"),
        ('shards = ["m"]', "names no shard"),
        ("providers = []", "providers is empty"),
        ('delegate = ["lib.so:usb"]', "the option 'usb'"),
        ('delegate = [":device=usb"]', "names no library"),
        ('host = "0.0.0.0"', "say with advertise"),
    ],
)
def test_a_wrong_value_is_named(file: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(file, "f.toml", {}, {})


def test_addresses_of_both_kinds() -> None:
    assert join_address("10.0.0.5", 7070) == "10.0.0.5:7070"
    assert join_address("::1", 7070) == join_address("[::1]", 7070) == "[::1]:7070"


def test_a_delegate_is_a_path_and_options() -> None:
    told = ("libedgetpu.so.1", {"device": "usb", "speed": "2"})
    assert parse_delegate("libedgetpu.so.1:device=usb:speed=2") == told
    assert load_config(None, "", {}, {"delegate": "a.so:b=c,d.so"}).delegate == ("a.so:b=c", "d.so")


def test_shards_by_name() -> None:
    assert parse_shard("m.1-x:0-10") == ShardKey("m.1-x", 0, 10, "auto", "")
    assert parse_shard("m:0-10/int8") == ShardKey("m", 0, 10, "onnx", "int8")
    assert parse_shard("m:3-4/fp32") == ShardKey("m", 3, 4, "onnx", "fp32")
    assert parse_shard("m:3-4/auto") == ShardKey("m", 3, 4, "auto", "")
    assert parse_shard("m:3-4/litert") == ShardKey("m", 3, 4, "litert", "int4")
    assert parse_shard("m:3-4/litert-fp32") == ShardKey("m", 3, 4, "litert", "fp32")
    for bad in ("m", "m:3", "m:4-3", "m:3-3", ":1-2", "m:a-b", "m:3-4/int4", "m:3-4/tpu-int8"):
        with pytest.raises(ConfigError):
            parse_shard(bad)


@given(st.dictionaries(st.sampled_from([f.name for f in fields()]), st.text(max_size=8), max_size=3))
def test_any_text_is_a_setting_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        load_config(None, "", {}, values)
    except ConfigError as error:
        assert str(error)


def test_the_readme_documents_every_setting() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert settings_table() in readme, "run: python -m node_agent.config > and paste the table into README.md"
