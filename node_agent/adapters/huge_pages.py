"""Memory of this process in huge pages, so that its peers see at once that it was killed.

The kernel closes the sockets of a killed process after it has freed its memory, page by page: about 0.1 ms a MiB where pages
are small, and next to nothing where they are huge. For so long every session that goes over the node stands still.
Only ranges that are in use almost whole are moved, so that no memory is added.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_PROC = Path("/proc/self")
_MADV_COLLAPSE = 25
"""Linux 6.1 and later: move a range to huge pages now, whatever the background thread would do."""
_IN_USE = 0.9
"""Share of a range's small pages that are in use already."""
_AT_ONCE_S = 0.001
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0\s*(\[heap\]|\[anon.*|)$")
_PRESENT = np.uint64(1 << 63)


class HugePages:
    """``look`` finds what can be moved, and each ``move`` takes one range of it: sessions must not feel it. Where the kernel cannot, or
    its operator has said ``never``, nothing is."""

    def __init__(self) -> None:
        self._size = _size()
        self.waiting: deque[int] = deque()
        """Addresses of ranges that were found."""

    def look(self) -> None:
        """Find ranges that are in use almost whole; some lie in huge pages already."""
        try:
            self.waiting = deque(self._in_use() if self._size else ())
        except OSError as error:  # a sandbox that hides /proc
            log.info("memory stays in small pages, and a death of this agent is noticed later: %s", error)
            self._size = 0

    def move(self) -> int:
        """Bytes that lie in huge pages now, of what waits up to the first range that did not yet: that takes about 7 ms of one core."""
        libc, moved, begin = ctypes.CDLL(None), 0, time.monotonic()
        while self.waiting:
            address, size = ctypes.c_void_p(self.waiting.popleft()), ctypes.c_size_t(self._size)
            if not libc.madvise(address, size, _MADV_COLLAPSE):
                moved += self._size  # else it is short of memory, or does not know how
            if time.monotonic() - begin > _AT_ONCE_S:
                break
        return moved

    def _in_use(self) -> Iterator[int]:
        """Addresses of ranges of a huge page's size that are in use almost whole."""
        size, page = self._size, os.sysconf("SC_PAGE_SIZE")
        with (_PROC / "pagemap").open("rb", buffering=0) as pagemap:
            for start, end in anonymous((_PROC / "maps").read_text()):
                for address in range(-(-start // size) * size, end - size + 1, size):
                    pagemap.seek(address // page * 8)
                    entries = np.frombuffer(pagemap.read(size // page * 8), np.uint64)
                    if np.count_nonzero(entries & _PRESENT) >= _IN_USE * (size // page):
                        yield address


def anonymous(maps: str) -> list[tuple[int, int]]:
    """Address ranges [start, end) of private writable memory that belongs to no file and no stack, of ``/proc/PID/maps``."""
    found = (_ANONYMOUS.match(line) for line in maps.splitlines())
    return [(int(m[1], 16), int(m[2], 16)) for m in found if m]


def _size() -> int:
    """Bytes of a huge page; 0 where there are none, or are to be none."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
