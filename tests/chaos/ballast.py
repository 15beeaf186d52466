"""Memory that killed agents leave is kept in use until they are back, where the machine would give it away.

The kernel of a virtual machine with free page reporting hands free blocks to its host two seconds after they became
free. At times the machine then stands for about 200 ms: every process of it, whatever became of the agents.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from pathlib import Path

REPORTING = Path("/sys/module/page_reporting/parameters")
_BLOCK = 2 << 20
_PAGE = 4096
_REPORTED_WITHIN_S, _QUIET_S = 2.3, 0.2
"""The kernel begins two seconds after memory became free, and goes on in pieces some 20 ms apart."""
_AFTER_S, _PACE_S = 0.3, 0.004
"""Not beside the takeover, and slowly: 300 MiB within a second, as the kernel waits for two."""


def anonymous_bytes(pid: int) -> int:
    """What a process leaves when it is killed; 0 where that is not known."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith("RssAnon:")), 0)


def settle() -> None:
    """Wait until what was freed of late is given away: the machine is to stand now and not in the next answer."""
    told = REPORTING / "reported_kib"
    if not told.exists():
        return
    begin = last = time.monotonic()
    first = before = told.read_text()
    while (now := time.monotonic()) < begin + _REPORTED_WITHIN_S:
        if before != (before := told.read_text()):
            last = now
        if before != first and now > last + _QUIET_S:
            return
        time.sleep(0.02)


class Ballast:
    """Nothing is held where the kernel does not report free pages."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, size: int) -> None:
        """Take ``size`` bytes soon, beside what goes on; until ``free``."""
        if REPORTING.is_dir() and size:
            self._free.clear()
            self._thread = threading.Thread(target=self._hold, args=(size,), name="ballast", daemon=True)
            self._thread.start()

    def free(self) -> None:
        self._free.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hold(self, size: int) -> None:
        blocks = -(-size // _BLOCK)
        with mmap.mmap(-1, blocks * _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with contextlib.suppress(OSError):  # a kernel without huge pages gives away less
                memory.madvise(mmap.MADV_HUGEPAGE)
            late = self._free.wait(_AFTER_S)
            for at in range(0, blocks * _BLOCK, _BLOCK):
                if late:
                    return
                memory[at : at + _BLOCK : _PAGE] = bytes(_BLOCK // _PAGE)
                late = self._free.wait(_PACE_S)
            self._free.wait()
