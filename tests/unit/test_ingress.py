"""Requests and answers of the API as values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import Full, NoRoute, PeerError, RequestError
from node_agent.ingress.answer import error_of
from node_agent.ingress.schema import parse_chat, parse_completion
from node_agent.ingress.text import TextAssembler

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**changes: Any) -> Any:
    return parse_chat(json.dumps(CHAT | changes).encode())


def completion(**changes: Any) -> Any:
    return parse_completion(json.dumps(COMPLETION | changes).encode())


def test_openais_names_and_defaults() -> None:
    plain = chat()
    assert (plain.tokens_max, plain.choices, plain.stream, plain.seeded) == (None, 1, False, False)
    assert plain.sampling.temperature == 1.0
    assert chat(max_tokens=5).tokens_max == 5
    assert chat(max_tokens=5, max_completion_tokens=7).tokens_max == 7
    assert completion().tokens_max == 16
    assert chat(stop="x").stop == ("x",)
    assert chat(seed=-1).sampling.seed == 2**64 - 1
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
    assert completion(logprobs=0).sampling.logprobs == 0
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]).messages == (
        {"role": "user", "content": "aa"},
    )


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts_come_in_four_forms(prompt: Any, wanted: Any) -> None:
    assert completion(prompt=prompt).prompts == wanted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", -5),
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", 10**12),
        ("max_tokens", 1.5),
        ("n", 0),
        ("n", 1000),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 1000}),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("seed", "s"),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 5),
        ("messages", []),
        ("messages", "hi"),
        ("top_logprobs", 5),
        ("tools", [{}]),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert (caught.value.param or "").startswith(field)
    assert caught.value.status == 400


def test_missing_fields_and_images_are_named() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(b'{"model": "m"}')
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match="image_url"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(RequestError, match="mixes"):
        completion(prompt=["a", 1])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":"\xff"}', b"[" * 100_000]
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(RequestError):
            parse(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*CHAT, *COMPLETION, "n", "stop", "seed", "logit_bias", "logprobs", "stream", "top_k"]
)


@given(st.dictionaries(FIELDS, JSON, max_size=4))
@settings(max_examples=300)
def test_any_json_is_a_generation_or_a_request_error(changes: dict[str, Any]) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, COMPLETION)):
        try:
            parse(json.dumps(base | changes).encode())
        except RequestError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Full("full", retry_after_s=3), 429, "rate_limit_error"),
        (NoRoute("none"), 503, "server_error"),
        (PeerError("bad"), 500, "server_error"),
        (RequestError("no", param="n", status=404), 404, "invalid_request_error"),
    ],
)
def test_errors_have_openais_shape(error: Any, status: int, kind: str) -> None:
    got, body, retry = error_of(error)
    assert (got, body["error"]["type"]) == (status, kind)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (retry is not None) == (status in (429, 503))


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    out, at = [], 0
    for size in sizes:
        out.append(data[at : at + size])
        at += size
    return [*out, data[at:]]


@given(st.text(max_size=60), st.lists(st.integers(0, 5), max_size=20))
def test_text_does_not_depend_on_how_its_bytes_come(text: str, sizes: list[int]) -> None:
    assembler = TextAssembler()
    got = "".join(assembler.push(p) for p in pieces(text.encode(), sizes)) + assembler.flush()
    assert got == text


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), max_size=20),
)
def test_nothing_of_a_stop_string_is_shown(text: str, stops: list[str], sizes: list[int]) -> None:
    assembler = TextAssembler(tuple(stops))
    shown = ""
    for piece in pieces(text.encode(), sizes):
        shown += assembler.push(piece)
        if assembler.stopped:
            break
    shown += assembler.flush()
    assert assembler.stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not assembler.stopped:
        assert shown == text


def test_broken_utf8_becomes_a_replacement_character() -> None:
    assembler = TextAssembler()
    assert assembler.push(b"a\xf0\x9f") == "a"
    assert assembler.flush() == "\ufffd"
