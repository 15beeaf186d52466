"""Weights in the forms that runtimes take.

``int8``: blocks of 32 along the input, ``w = (q - zero) * scale`` with unsigned 8-bit ``q``. Q8_0
files pass through without loss; every other type is fitted to each block's range, which loses at
most 1/510 of it (perplexity moves by less than 1 %: ``python -m tests.benchmarks.quality``).
``fp32``: as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
QUANTIZATIONS = ("int8", "fp32")


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A ``[rows, columns]`` matrix in blocks of 32 along the columns.

    ``values`` uint8 ``[rows, columns]``, ``scales`` float32 ``[rows, columns / 32]``, ``zeros``
    uint8 of the same shape.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]


def quantize_int8(matrix: NDArray[np.float32]) -> QuantizedMatrix:
    """Affine 8-bit fit of each block of 32; ``matrix`` is float32 ``[rows, 32 k]``."""
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows, columns // BLOCK, BLOCK)
    low = np.minimum(blocks.min(axis=2), 0.0)
    high = np.maximum(blocks.max(axis=2), 0.0)
    scales = ((high - low) / 255.0).astype(np.float32)
    safe = np.where(scales > 0.0, scales, np.float32(1.0))
    zeros = np.clip(np.rint(-low / safe), 0, 255)
    values = np.clip(np.rint(blocks / safe[..., None]) + zeros[..., None], 0, 255)
    return QuantizedMatrix(values.astype(np.uint8).reshape(rows, columns), scales, zeros.astype(np.uint8))


def repack_q8_0(raw: NDArray[np.uint8], rows: int, columns: int) -> QuantizedMatrix:
    """GGML's Q8_0 blocks (float16 scale, 32 signed bytes) as they are, shifted to unsigned."""
    blocks = raw.reshape(rows, columns // BLOCK, 2 + BLOCK)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    values = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(rows, columns)
    return QuantizedMatrix(np.ascontiguousarray(values), scales, np.full(scales.shape, 128, dtype=np.uint8))
