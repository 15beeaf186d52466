"""How far what a shard computed is from what its test vector wants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def relative_error(result: Array, expected: Array) -> float:
    """RMS of the difference over RMS of what was expected; infinite where shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def deviation(inputs: Array, computed: Array, expected: Array) -> float:
    """Of activations ``[positions, width]``, what a shard adds to its ``inputs`` (tokens ``[positions]`` of a first shard).

    The greatest of three: ``relative_error``; the RMS over positions of each one's own error, as a part of what the shard adds
    there; and that error of the last position, which alone reads what a chunk of many wrote. The first by itself sees next to
    nothing: in most layers of most models the first position's activations are a hundred times all others', and pass through.
    NaN where something is NaN.
    """
    whole = relative_error(computed, expected)
    if not np.isfinite(whole):
        return whole
    added = expected if inputs.ndim == 1 else expected - inputs
    # Where a shard adds nothing (a block that was put in and not trained), nothing is what is wanted.
    sizes = np.maximum(np.linalg.norm(added, axis=1), np.finfo(np.float32).tiny)
    errors = np.linalg.norm(computed - expected, axis=1) / sizes
    return float(np.max([whole, np.sqrt(np.mean(errors**2)), errors[-1]]))


def logits_deviation(computed: Array, expected: Array) -> float:
    """Of logits ``[positions, vocabulary]``: the worst position's ``relative_error``, without what all of its logits have in
    common: no softmax sees that, and by the text it is nearly all of them, or nothing."""
    if computed.shape != expected.shape:
        return float("inf")
    rows = zip(computed, expected, strict=True)
    return float(np.max([relative_error(c - c.mean(), e - e.mean()) for c, e in rows]))
