"""Answers of the OpenAI API, whole and in chunks, and its errors. Pure: ids and times come in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.errors import Full, MeshError, RequestError, Unavailable
from mesh.types import Token
from node_agent.ingress.chat import TextModel
from node_agent.ingress.text import TextAssembler


@dataclass(slots=True)
class Choice:
    """One choice as it grows: text, log-probabilities, the end."""

    index: int
    model: TextModel
    assembler: TextAssembler
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None
    pending: list[Token] = field(default_factory=list)
    """Tokens whose text is not out yet."""
    offset: int = 0

    def push(self, token: Token) -> tuple[str, bool]:
        """Text that this token makes certain, and whether a stop string was completed."""
        self.tokens += 1
        self.pending.append(token)
        return self._out(self.assembler.push(self.model.bytes_of(token.token)))

    def flush(self) -> tuple[str, bool]:
        """Text that was held back, and whether it completed a stop string."""
        return self._out(self.assembler.flush())

    def _out(self, text: str) -> tuple[str, bool]:
        self.text.append(text)
        return text, self.assembler.stopped

    def skip(self) -> None:
        """The client has the tokens since the last chunk already."""
        self.offset += sum(
            len(self.model.name_of(t.token).decode("utf-8", "replace")) for t in self.take_pending()
        )

    def take_pending(self) -> list[Token]:
        """Tokens since the last chunk."""
        taken, self.pending = self.pending, []
        return taken


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    chat: bool

    def chunk(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """An object of a stream; ``usage`` is left out unless the client asked for it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        body = self._body(kind, choices)
        if usage is not None:
            body["usage"] = usage or None
        return body

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        return self._body("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def delta(
        self, choice: Choice, text: str | None, finish: str | None, logprobs: bool, role: bool = False
    ) -> dict[str, Any]:
        """One choice of a chunk."""
        tokens = choice.take_pending() if logprobs else []
        out: dict[str, Any] = {"index": choice.index, "finish_reason": finish}
        if self.chat:
            delta: dict[str, str] = {"role": "assistant"} if role else {}
            if text or role:
                delta["content"] = text or ""
            out["delta"] = delta
            out["logprobs"] = {"content": chat_logprobs(choice.model, tokens)} if tokens else None
        else:
            out["text"] = text or ""
            out["logprobs"] = completion_logprobs(choice, tokens) if tokens else None
        return out

    def message(self, choice: Choice, logprobs: bool) -> dict[str, Any]:
        """One choice of a whole answer."""
        tokens = choice.take_pending() if logprobs else []
        text = "".join(choice.text)
        out: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
        if self.chat:
            out["message"] = {"role": "assistant", "content": text, "refusal": None}
            out["logprobs"] = {"content": chat_logprobs(choice.model, tokens)} if logprobs else None
        else:
            out["text"] = text
            out["logprobs"] = completion_logprobs(choice, tokens) if logprobs else None
        return out


def usage_of(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, guesses: int = 0, right: int = 0
) -> dict[str, Any]:
    """OpenAI's usage object; ``cached_tokens`` of the prompt needed no prefill, ``right`` of the ``guesses`` came true."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": right,
            "rejected_prediction_tokens": guesses - right,
        },
    }


def _logprob(model: TextModel, token: int, logprob: float) -> dict[str, Any]:
    raw = model.name_of(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def chat_logprobs(model: TextModel, tokens: list[Token]) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat choice."""
    return [
        _logprob(model, t.token, t.logprob or 0.0)
        | {"top_logprobs": [_logprob(model, a.token, a.logprob) for a in t.top]}
        for t in tokens
    ]


def completion_logprobs(choice: Choice, tokens: list[Token]) -> dict[str, Any]:
    """``logprobs`` of a completion choice; offsets are in characters of the text."""
    model = choice.model
    names = [model.name_of(t.token).decode("utf-8", "replace") for t in tokens]
    offsets = []
    for name in names:
        offsets.append(choice.offset)
        choice.offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [
            {model.name_of(a.token).decode("utf-8", "replace"): a.logprob for a in t.top} for t in tokens
        ],
        "text_offset": offsets,
    }


def error_of(error: MeshError) -> tuple[int, dict[str, Any], float | None]:
    """HTTP status, body in OpenAI's shape, and seconds for ``Retry-After`` (or ``None``)."""
    status, kind, code, param, retry = 500, "server_error", None, None, None
    if isinstance(error, RequestError):
        status, kind, code, param = error.status, "invalid_request_error", error.code, error.param
    elif isinstance(error, Unavailable):
        full = isinstance(error, Full)
        status = 429 if full else 503
        kind, code = ("rate_limit_error", "mesh_full") if full else ("server_error", "unavailable")
        retry = error.retry_after_s
    return status, error_body(str(error), kind, code, param), retry


def error_body(message: str, kind: str, code: str | None, param: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
