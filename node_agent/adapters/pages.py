"""KV memory: the system hands it out page by page as it is touched. And what the allocator keeps of freed memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 64
_MAP_NORESERVE = 0x4000  # Linux; in the module from Python 3.13 on


def pages(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeroed memory, aligned to a page, that goes back with the last reference."""
    count = int(np.prod(shape))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, max(1, count * 4), flags=flags)
    return np.frombuffer(memory, dtype=np.float32)[:count].reshape(shape)


def arrays(count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``[count, *shape]`` of such memory, each of the ``count`` contiguous and aligned as engines want it."""
    size = int(np.prod(shape))
    apart = -(-size * 4 // _ALIGNMENT) * _ALIGNMENT
    memory = pages((count * apart // 4,))
    inner = [int(np.prod(shape[i + 1 :])) * 4 for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(memory, (count, *shape), (apart, *inner))


def forget_pages(buffer: NDArray[np.float32], row: int) -> None:
    """Give back the pages that lie whole within a row of memory from ``pages``; they read as zero again."""
    stride = buffer.strides[0]
    memory: Any = buffer.base
    while isinstance(memory, np.ndarray):
        memory = memory.base
    if isinstance(memory, memoryview):
        memory = memory.obj
    begin, end = -(-row * stride // _PAGE) * _PAGE, (row + 1) * stride // _PAGE * _PAGE
    if isinstance(memory, mmap.mmap) and end > begin:
        memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: it keeps most of what a shard took that was unloaded,
    and of what was needed to read a tokenizer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
