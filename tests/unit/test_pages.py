"""Memory that is freed goes back to the system."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from node_agent.adapters.pages import trim_heap

_BLOCK, _BLOCKS = 1 << 16, 1024
"""Small enough to come from the heap and not from a mapping of its own."""


def _resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_freed_memory_is_given_back_although_something_lies_above_it() -> None:
    blocks = [np.ones(_BLOCK, dtype=np.uint8) for _ in range(_BLOCKS)]
    above = np.ones(_BLOCK, dtype=np.uint8)
    blocks.clear()
    kept = _resident()
    trim_heap()
    assert kept - _resident() > _BLOCK * _BLOCKS / 2
    assert above.all()
