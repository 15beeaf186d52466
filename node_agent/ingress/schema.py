"""Requests of the OpenAI API: strict about types and ranges, silent about fields nobody acts on.

``parse_chat`` and ``parse_completion`` turn a body into one ``Generation``; every refusal is a
``RequestError`` that names the parameter as OpenAI does. What would change the answer and is not
supported (tools, JSON mode) is refused rather than ignored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh.errors import RequestError
from mesh.types import Sampling
from node_agent.sampling import LOGPROBS_MAX

CHOICES_MAX = 16
STOPS_MAX = 4
STOP_LENGTH_MAX = 256
PROMPTS_MAX = 16
_COMPLETION_TOKENS_DEFAULT = 16
_SEED_MASK = (1 << 64) - 1


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class Part(msgspec.Struct):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None


class _Common(msgspec.Struct, kw_only=True):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    speculation: bool | None = None


class ChatBody(_Common, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class CompletionBody(_Common, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate, whichever endpoint asked. A prompt is text or token ids.

    ``tokens_max`` is ``None`` for "as many as fit"; ``sampling.seed`` is meaningful only when
    ``seeded``, else the ingress draws one.
    """

    model: str
    chat: bool
    messages: tuple[dict[str, str], ...]
    prompts: tuple[str | tuple[int, ...], ...]
    tokens_max: int | None
    sampling: Sampling
    seeded: bool
    stop: tuple[str, ...]
    choices: int
    stream: bool
    include_usage: bool
    echo: bool
    speculation: bool | None = None
    """Not OpenAI's: whether tokens may be guessed; ``None``: as the agent is set."""


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        where = re.search(r"`\$\.?([^`]*)`", message)
        missing = re.search(r"missing required field `([^`]+)`", message)
        param = missing[1] if missing else (where[1] if where and where[1] else None)
        raise RequestError(f"the request is not valid: {message}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is not valid JSON: it is nested too deeply") from None


def _within(name: str, value: float | None, low: float, high: float, default: float) -> float:
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value:g}; it must be from {low:g} to {high:g}", param=name)
    return value


def _count(name: str, value: int | None, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must be from {low} to {high}", param=name)
    return value


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX:
        raise RequestError(f"stop has {len(stops)} strings; at most {STOPS_MAX} are allowed", param="stop")
    for text in stops:
        if not 0 < len(text) <= STOP_LENGTH_MAX:
            raise RequestError(
                f"a stop string has {len(text)} characters; 1 to {STOP_LENGTH_MAX} are allowed", param="stop"
            )
    return stops


def _bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    pairs = []
    for token, value in (bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise RequestError(f"logit_bias names {token[:40]!r}, which is no token id", param="logit_bias")
        pairs.append((int(token), _within("logit_bias", value, -100, 100, 0.0)))
    return tuple(sorted(pairs))


def _generation(
    body: ChatBody | CompletionBody,
    *,
    messages: tuple[dict[str, str], ...] = (),
    prompts: tuple[str | tuple[int, ...], ...] = (),
    tokens_max: int | None,
    tokens_param: str,
    logprobs: int,
    echo: bool = False,
) -> Generation:
    if tokens_max is not None:
        _count(tokens_param, tokens_max, 1, 2**31 - 1, 0)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
    return Generation(
        model=body.model,
        chat=isinstance(body, ChatBody),
        messages=messages,
        prompts=prompts,
        tokens_max=tokens_max,
        sampling=Sampling(
            seed=(body.seed or 0) & _SEED_MASK,
            temperature=_within("temperature", body.temperature, 0, 2, 1.0),
            top_p=_within("top_p", body.top_p, 0, 1, 1.0),
            top_k=max(0, _count("top_k", body.top_k, -1, 2**31 - 1, 0)),
            frequency_penalty=_within("frequency_penalty", body.frequency_penalty, -2, 2, 0.0),
            presence_penalty=_within("presence_penalty", body.presence_penalty, -2, 2, 0.0),
            logit_bias=_bias(body.logit_bias),
            logprobs=logprobs,
        ),
        seeded=body.seed is not None,
        stop=_stops(body.stop),
        choices=_count("n", body.n, 1, CHOICES_MAX, 1),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        echo=echo,
        speculation=body.speculation,
    )


def _refuse_unsupported(**fields: Any) -> None:
    for name, value in fields.items():
        if value:
            raise RequestError(
                f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter"
            )


def parse_chat(body: bytes) -> Generation:
    """``POST /v1/chat/completions``."""
    request: ChatBody = _decode(body, ChatBody)
    wants_json = (request.response_format or {}).get("type", "text") != "text"
    _refuse_unsupported(tools=request.tools, functions=request.functions, response_format=wants_json)
    if not request.messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    messages = tuple(
        {"role": m.role, "content": _content(m, f"messages[{i}].content")}
        for i, m in enumerate(request.messages)
    )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    top = _count("top_logprobs", request.top_logprobs, 0, LOGPROBS_MAX, 0)
    named = request.max_completion_tokens is not None
    return _generation(
        request,
        messages=messages,
        tokens_max=request.max_completion_tokens if named else request.max_tokens,
        tokens_param="max_completion_tokens" if named else "max_tokens",
        logprobs=top if request.logprobs else -1,
    )


def _content(message: ChatMessage, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content or ():
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"a content part of type {part.type!r} is not supported; send text", param=where
            )
        texts.append(part.text)
    return "".join(texts)


def parse_completion(body: bytes) -> Generation:
    """``POST /v1/completions``."""
    request: CompletionBody = _decode(body, CompletionBody)
    _refuse_unsupported(suffix=request.suffix, best_of=(request.best_of or 1) > 1)
    prompts = _prompts(request.prompt)
    if len(prompts) > PROMPTS_MAX:
        raise RequestError(f"{len(prompts)} prompts in one request; at most {PROMPTS_MAX}", param="prompt")
    logprobs = request.logprobs
    generation = _generation(
        request,
        prompts=prompts,
        tokens_max=_COMPLETION_TOKENS_DEFAULT if request.max_tokens is None else request.max_tokens,
        tokens_param="max_tokens",
        logprobs=-1 if logprobs is None else _count("logprobs", logprobs, 0, LOGPROBS_MAX, 0),
        echo=bool(request.echo),
    )
    if len(prompts) * generation.choices > CHOICES_MAX:
        raise RequestError(f"prompts times n is over {CHOICES_MAX}", param="n")
    return generation


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, token ids, or lists of them; not a mixture of texts or lists and bare ids."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise RequestError("prompt is empty", param="prompt")
    ids = tuple(p for p in prompt if isinstance(p, int))
    if len(ids) == len(prompt):
        return (ids,)
    if ids:
        raise RequestError("prompt mixes token ids with texts; send one or the other", param="prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt if not isinstance(p, int))
