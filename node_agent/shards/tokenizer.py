"""Tokenizer of a GGUF file as a ``tokenizer.json``, and its tokens as bytes.

Two kinds occur in the Llama family: byte-level BPE (``gpt2``) with a pre-tokenizer named by
``tokenizer.ggml.pre``, and SentencePiece BPE (``llama``), whose merges are implied by scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mesh.errors import ModelFileError

_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPACE = "\u2581"


def _field(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        raise ModelFileError(f"the GGUF file has no usable tokenizer: tokenizer.ggml.{name} is missing")
    return value


def build_tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The tokenizer in the format of the ``tokenizers`` library; raises ``ModelFileError``."""
    from tokenizers import AddedToken

    tokens: list[str] = _field(metadata, "tokens", list)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise ModelFileError("the GGUF file's token list and token types do not match")
    family = _field(metadata, "model", str)
    try:
        if family == "gpt2":
            tokenizer = _byte_level(metadata, tokens)
        elif family == "llama":
            tokenizer = _sentence_piece(metadata, tokens)
        else:
            raise ModelFileError(f"the tokenizer {family!r} is not supported (gpt2 and llama are)")
        added = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
    except ModelFileError:
        raise
    except Exception as error:  # the library raises bare Exception for any inconsistency
        raise ModelFileError(f"the GGUF file's tokenizer is inconsistent: {error}") from error
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ModelFileError("the GGUF file lists a token twice")
    return str(tokenizer.to_str())


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for pair in _field(metadata, "merges", list):
        left, space, right = str(pair).partition(" ")
        if not space:
            raise ModelFileError(f"the GGUF file's tokenizer has the merge {pair!r}, which is no pair")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in ("smollm", "starcoder", "refact", "codeshell"):
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif name in ("gpt-2", "default"):
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif name in ("llama-bpe", "llama3", "llama-v3"):
        steps = [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), byte_level]
    elif name in ("qwen2", "deepseek-r1-qwen"):
        steps = [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), byte_level]
    else:
        raise ModelFileError(f"the pre-tokenizer {name!r} is not supported")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _field(metadata, "scores", list)
    vocabulary = {t: i for i, t in enumerate(tokens)}
    # SentencePiece merges the pair whose product scores highest: every split of a token into two
    # tokens is a merge, ranked by the token's score.
    merges = [
        (scores[i], token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda m: (-m[0], vocabulary[m[1]], vocabulary[m[2]]))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(text: str, family: str, special: bool) -> bytes:
    """The bytes that a token stands for in running text; ``family`` is ``gpt2`` or ``llama``."""
    if special:
        return text.encode("utf-8", "surrogateescape")
    if family == "gpt2":
        table = _bytes_of_letters()
        if all(letter in table for letter in text):
            return bytes(table[letter] for letter in text)
        return text.encode("utf-8", "surrogateescape")
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
