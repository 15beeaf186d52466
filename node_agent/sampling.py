"""Logits to a token. The only randomness is ``uniform(seed, choice, position)`` (rule R5).

The order is vLLM's and OpenAI's: bias, penalties over the generated tokens, temperature, top-k,
top-p. Log-probabilities are of the model's own distribution, before temperature.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import MeshError
from mesh.types import Sampling, TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGPROBS_MAX = 20
_FIRST_DEPTH, _DEEPER = 4.0, 1.25
_WEIGHTLESS = 746.0
"""A float64's exponential is zero below minus this."""
_SUMS_DIFFER = 1e-9
"""More than sums of a vocabulary's weights in different orders do."""


class WrongResult(MeshError):
    """The runtime returned logits that are no numbers."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, on every machine and version."""
    data = struct.pack("<QIQ", seed & (2**64 - 1), choice & (2**32 - 1), position)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64


def sample(
    logits: NDArray[np.float32], how: Sampling, generated: Sequence[int], position: int
) -> tuple[int, float | None, tuple[TokenLogprob, ...]]:
    """Token, its log-probability and the likeliest alternatives (if asked for).

    ``logits`` is float32 ``[vocabulary]`` and may be changed; ``position`` is the one that the token
    takes. Raises ``WrongResult`` on NaN or all-infinite logits.
    """
    scores = logits
    logprobs = _log_softmax(logits) if how.logprobs >= 0 else None
    if how.logit_bias:
        for token, bias in how.logit_bias:
            scores[token] += np.float32(bias)
    if generated and (how.frequency_penalty or how.presence_penalty):
        counts = Counter(generated)
        tokens = np.fromiter(counts.keys(), dtype=np.int64)
        times = np.fromiter(counts.values(), dtype=np.float32)
        scores[tokens] -= times * np.float32(how.frequency_penalty) + np.float32(how.presence_penalty)
    token = int(scores.argmax())
    if not np.isfinite(scores[token]):
        raise WrongResult(f"the logits at position {position} are not finite")
    if how.temperature > 0.0:
        token = _draw(scores, how, position)
    if logprobs is None:
        return token, None, ()
    count = min(how.logprobs, LOGPROBS_MAX)
    best = np.argpartition(-logprobs, count)[: count + 1] if count else np.empty(0, dtype=np.int64)
    top = sorted(((float(logprobs[i]), int(i)) for i in best), key=lambda x: (-x[0], x[1]))[:count]
    return token, float(logprobs[token]), tuple(TokenLogprob(i, p) for p, i in top)


def _draw(scores: NDArray[np.float32], how: Sampling, position: int) -> int:
    scaled = scores.astype(np.float64) - float(scores.max())
    # There are temperatures by which all but the likeliest are infinitely far off.
    with np.errstate(over="ignore"):
        scaled /= how.temperature
    weights = np.exp(scaled)
    total, chance = weights.sum(), uniform(how.seed, how.choice, position)
    if 0 < how.top_k < len(scaled):
        order = _likeliest(scaled, weights, how.top_k, 0.0)[: how.top_k]
        cumulative = np.cumsum(weights[order])
        total = cumulative[-1]
    else:
        order = _likeliest(scaled, weights, 1, total * (how.top_p if how.top_p < 1.0 else chance))
        cumulative = np.cumsum(weights[order])
    if how.top_p < 1.0:
        order = order[: int(np.searchsorted(cumulative, how.top_p * total)) + 1]
        total = cumulative[len(order) - 1]
    return int(order[min(int(np.searchsorted(cumulative, chance * total, side="right")), len(order) - 1)])


def _likeliest(
    scaled: NDArray[np.float64], weights: NDArray[np.float64], count: int, mass: float
) -> NDArray[np.int64]:
    """Tokens by likelihood, then by number, down to some likelihood: at least ``count``, which weigh more than ``mass`` together; all
    if need be. To sort a whole vocabulary takes half as long as a decode step. ``scaled``: logarithms of ``weights``, the largest 0."""
    depth = _FIRST_DEPTH
    while True:
        found = np.flatnonzero(scaled >= -depth)
        enough = len(found) >= count and weights[found].sum() > mass * (1.0 + _SUMS_DIFFER)
        if enough or depth > _WEIGHTLESS:
            break
        depth *= _DEEPER
    order: NDArray[np.int64] = found[np.lexsort((found, -scaled[found]))]
    return order


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
