"""Event ids, and what is kept of a request."""

from __future__ import annotations

import pytest

from mesh.errors import RequestError
from mesh.types import Digest, Token
from node_agent.ingress.resumption import (
    SessionRecord,
    check_seen,
    event_id,
    parse_event_id,
    read_record,
    write_record,
)
from node_agent.ingress.schema import parse_chat
from tests.builders import GREEDY

SESSION = "ab" * 16


def test_event_ids_come_back_as_they_went() -> None:
    assert parse_event_id(event_id(SESSION, 12)) == (SESSION, 12)
    assert parse_event_id(f"chatcmpl-{SESSION}:3") == (SESSION, 3)
    assert parse_event_id(f" cmpl-{SESSION} ") == (SESSION, 0)


@pytest.mark.parametrize(
    "text", ["", "junk", SESSION + ":-1", SESSION + ":x", SESSION[:-1], SESSION + ":" + "9" * 12]
)
def test_what_is_no_event_id_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match="no event id"):
        parse_event_id(text)


def test_a_client_cannot_be_ahead_of_the_log() -> None:
    check_seen(SESSION, 1, (Token(5, 7),))
    with pytest.raises(RequestError, match="has 1 tokens in the log, 2 were named"):
        check_seen(SESSION, 2, (Token(5, 7),))


def test_a_record_holds_what_it_takes_and_no_text() -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "secret"}], "stop": ["x"], "logit_bias": {"3": 1}}'
    generation = parse_chat(body)
    record = SessionRecord(generation, "urgent", GREEDY, 10, 512, (Digest("0" * 64), "onnx", "int8"), 1700)
    data = write_record(record)
    assert b"secret" not in data
    again = read_record(data)
    assert again.generation.stop == ("x",)
    assert again.group == record.group
    assert (again.class_name, again.tokens_max, again.positions_max) == ("urgent", 10, 512)
    with pytest.raises(RequestError, match="cannot be read"):
        read_record(b"{}")
