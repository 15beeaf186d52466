"""Messages to tokens and tokens to bytes, by the model's own template and tokenizer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.errors import RequestError
from node_agent.shards.manifest import ModelCard
from node_agent.shards.tokenizer import token_bytes


class TextModel:
    """Tokenizer and chat template of one model."""

    def __init__(self, card: ModelCard, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self.card = card
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self._template: Any = None
        if card.chat_template:
            self._template = _environment().from_string(card.chat_template)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the chat template makes; raises ``RequestError`` where it refuses."""
        from jinja2 import TemplateError

        if self._template is None:
            raise RequestError(f"{self.card.name} has no chat template; use /v1/completions", param="model")
        try:
            return str(
                self._template.render(
                    messages=list(messages),
                    add_generation_prompt=True,
                    bos_token=self.card.bos,
                    eos_token=self.card.eos,
                    tools=None,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(
                f"the chat template of {self.card.name} refuses these messages: {error}", param="messages"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it count as such."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError:
            raise RequestError("the text holds lone surrogates, which are no characters") from None
        if self.card.add_bos and self.card.bos and not text.startswith(self.card.bos):
            bos = self._tokenizer.token_to_id(self.card.bos)
            ids = [bos, *ids] if bos is not None else ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text: nothing for control tokens."""
        if token in self._special:
            return b""
        return self.name_of(token)

    def name_of(self, token: int) -> bytes:
        """A token's own bytes, control tokens by their name."""
        known = self._bytes.get(token)
        if known is None:
            text = self._tokenizer.id_to_token(token) or ""
            known = token_bytes(text, self.card.tokenizer_family, token in self._special)
            self._bytes[token] = known
        return known


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment
