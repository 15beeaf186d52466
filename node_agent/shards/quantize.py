"""Weights in the forms that runtimes take.

``int8``: blocks of 32 along the input, ``w = (q - zero) * scale`` with unsigned 8-bit ``q``. Q8_0
files pass through without loss; every other type is fitted to each block's range, which loses at
most 1/510 of it (perplexity moves by less than 1 %: ``python -m tests.benchmarks.quality``).
``fp32``: as it is. LiteRT has forms of its own: ``ChannelInt8`` and ``BlockedInt4``, and ``SplitInt8`` for a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
SUMS_PART = 0.3
"""Of a block's sum, what folded offsets are multiplied by: all of a row is rounded over one range, which the sums should use and not
widen. Of parts from 0.2 to 0.5 the one at which least is lost."""
_SIXTEENS, _HIGH, _LOW = 16, 119, 136
"""Of a whole number in two digits of -8 to 7: what the first counts, and how far it goes up and down."""
_UNIT_LEAST = np.float32(2.0**-14)
"""The least that float16 has with all its digits."""


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


@dataclass(frozen=True, slots=True)
class ChannelInt8:
    """One scale a row: ``values`` int8 ``[rows, columns]``, ``scales`` float32 ``[rows]``."""

    values: NDArray[np.int8]
    scales: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockedInt4:
    """Blocks of 32 along the columns, ``w = q * scale + offset``, ``q`` from -8 to 7.

    ``packed`` uint8 ``[rows, columns / 2]``, the first of two in the low bits; ``scales`` float16 and ``offsets`` float32,
    both ``[rows, columns / 32]``.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float16]
    offsets: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclass(frozen=True, slots=True)
class SplitInt8:
    """``rest`` without the ``columns``, which are zero in it and stand in ``kept``, float32 ``[rows, columns]``."""

    rest: ChannelInt8
    columns: NDArray[np.int64]
    kept: NDArray[np.float32]


def split_columns(matrix: NDArray[np.float32], peaks: NDArray[np.float32], count: int) -> SplitInt8:
    """Keep the ``count`` columns that matter most to rounding: where inputs peak, and weights too (Dettmers et al. 2022)."""
    weight = peaks * np.abs(matrix).max(axis=0)
    columns = np.sort(np.argsort(-weight, kind="stable")[:count])
    rest = matrix.copy()
    rest[:, columns] = 0.0
    return SplitInt8(quantize_channels(rest), columns, np.ascontiguousarray(matrix[:, columns]))


def quantize_channels(matrix: NDArray[np.float32]) -> ChannelInt8:
    """Symmetric 8-bit fit of each row."""
    scales = (np.abs(matrix).max(axis=1) / 127.0).astype(np.float32)
    safe = np.where(scales > 0.0, scales, np.float32(1.0))
    values = np.clip(np.rint(matrix / safe[:, None]), -127, 127).astype(np.int8)
    return ChannelInt8(values, safe)


def quantize_int4(matrix: NDArray[np.float32]) -> BlockedInt4:
    """Affine 4-bit fit of each block of 32."""
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows, columns // BLOCK, BLOCK)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    scales = ((high - low) / 15.0).astype(np.float16)
    safe = np.where(scales > 0, scales, np.float16(1.0)).astype(np.float32)
    values = np.clip(np.rint((blocks - low[..., None]) / safe[..., None]), 0, 15).astype(np.uint8)
    return _blocked(values.reshape(rows, columns), scales, low)


def repack_q4_1(raw: NDArray[np.uint8], rows: int, columns: int) -> BlockedInt4:
    """GGML's Q4_1 blocks (float16 scale and minimum, 16 bytes: the first half of 32 values in the low bits) as they are."""
    blocks = raw.reshape(rows, columns // BLOCK, 4 + BLOCK // 2)
    head = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
    nibbles = blocks[..., 4:]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(rows, columns)
    return _blocked(values, np.ascontiguousarray(head[..., 0]), head[..., 1].astype(np.float32))


def fold_offsets(matrix: BlockedInt4) -> BlockedInt4:
    """The same product from one matrix without offsets, for an input ``[x, sums, sums]``: ``sums`` are ``x``'s by block times
    ``SUMS_PART``, and zeros up to a whole block. An offset becomes a whole number of its row's units in two digits: columns of
    sixteens, and of ones."""
    rows, blocks = matrix.offsets.shape
    wide = folded_blocks(blocks) // 2 * BLOCK
    most = np.maximum(matrix.offsets.max(axis=1) / _HIGH, -matrix.offsets.min(axis=1) / _LOW)
    unit = _bfloat16_above(np.maximum(most / SUMS_PART, _UNIT_LEAST))
    numbers = np.zeros((rows, wide), dtype=np.int64)
    numbers[:, :blocks] = np.rint(matrix.offsets / (SUMS_PART * unit[:, None]))
    sixteens = (numbers + _SIXTEENS // 2) // _SIXTEENS
    digits = np.concatenate([sixteens, numbers - _SIXTEENS * sixteens], axis=1)
    units = np.repeat([[_SIXTEENS, 1]], wide // BLOCK, axis=1) * unit[:, None]
    return BlockedInt4(
        np.concatenate([matrix.packed, _packed(digits)], axis=1),
        np.concatenate([matrix.scales, units.astype(np.float16)], axis=1),
        np.zeros((rows, blocks + folded_blocks(blocks)), dtype=np.float32),
    )


def folded_blocks(blocks: int) -> int:
    """How many blocks of columns the offsets of ``blocks`` become."""
    return 2 * -(-blocks // BLOCK)


def times_blocks(matrix: BlockedInt4, factors: NDArray[np.float32]) -> BlockedInt4:
    """Each block of columns times its own factor, ``[blocks]``. Powers of two round nothing, unless a scale leaves what float16
    has with all its digits."""
    scales = (matrix.scales * factors.astype(np.float16)).astype(np.float16)
    return BlockedInt4(matrix.packed, scales, matrix.offsets * factors)


def _bfloat16_above(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least of its numbers that are no smaller: XNNPACK rounds scales to them, and what are digits must not be rounded apart."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _packed(digits: NDArray[np.int64]) -> NDArray[np.uint8]:
    """From -8 to 7, in four bits each; the first of two in the low ones."""
    signed = digits & 15
    return (signed[:, 0::2] | (signed[:, 1::2] << 4)).astype(np.uint8)


def _blocked(values: NDArray[np.uint8], scales: NDArray[np.float16], low: NDArray[np.float32]) -> BlockedInt4:
    packed = _packed(values.astype(np.int64) - 8)
    return BlockedInt4(packed, scales, (low + 8 * scales.astype(np.float32)).astype(np.float32))
