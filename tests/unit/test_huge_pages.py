"""Memory in huge pages: what is moved, what is left alone, and where it cannot be had."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from node_agent.adapters import huge_pages
from node_agent.adapters.huge_pages import HugePages, anonymous

MAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon
00651000-00652000 rw-p 00051000 08:02 173521      /usr/bin/dbus-daemon
00e03000-00e24000 rw-p 00000000 00:00 0           [heap]
7f2c00000000-7f2c02000000 rw-p 00000000 00:00 0
7f2c02000000-7f2c03000000 ---p 00000000 00:00 0
7f2c04000000-7f2c05000000 rw-s 00000000 00:01 55          /dev/zero (deleted)
7f2c06000000-7f2c07000000 rw-p 00000000 00:00 0           [anon: glibc: malloc]
7fff4e000000-7fff4e021000 rw-p 00000000 00:00 0           [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]
"""
RANGES = 3


def test_private_memory_of_no_file_and_no_stack_is_moved() -> None:
    assert anonymous(MAPS) == [
        (0x00E03000, 0x00E24000),
        (0x7F2C00000000, 0x7F2C02000000),
        (0x7F2C06000000, 0x7F2C07000000),
    ]


class Memory:
    """Ranges of a huge page's size, of which every ``every``th small page is in use."""

    def __init__(self, every: int) -> None:
        size, page = huge_pages._size(), mmap.PAGESIZE
        self.map = mmap.mmap(-1, (RANGES + 1) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.begin = -self.address % size
        for at in range(self.begin, self.begin + RANGES * size, every * page):
            self.map[at] = 1

    def kib(self, what: str) -> int:
        """Of the mapping that it lies in, which may be larger."""
        ours = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            key, _, rest = line.partition(" ")
            if "-" in key and not key.endswith(":"):
                start, end = (int(x, 16) for x in key.split("-"))
                ours = start <= self.address + self.begin < end
            elif ours and key == f"{what}:":
                return int(rest.split()[0])
        raise AssertionError(f"no {what} in smaps")


def collapse(pages: HugePages) -> int:
    """All of it; again where the kernel refused a range, which it does while it is busy with a page there."""
    for _ in range(3):
        pages.look()
        found, moved = len(pages.waiting), 0
        while pages.waiting:
            moved += pages.move()
        if moved == found * huge_pages._size():
            break
    return moved


@pytest.fixture
def pages() -> HugePages:
    size = huge_pages._size()
    if not size:
        pytest.skip("this machine has no huge pages")
    held = Memory(every=1)
    address = ctypes.c_void_p(held.address + held.begin)
    if ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), huge_pages._MADV_COLLAPSE):
        pytest.skip("this kernel moves no memory to huge pages")
    return HugePages()


def test_what_is_in_use_lies_in_huge_pages_afterwards(pages: HugePages) -> None:
    memory = Memory(every=1)
    before = memory.kib("AnonHugePages")
    assert collapse(pages) >= RANGES * huge_pages._size()
    assert memory.kib("AnonHugePages") >= before + RANGES * huge_pages._size() // 1024
    assert memory.map[memory.begin] == 1


def test_one_range_is_moved_at_a_time(pages: HugePages, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(every=1)
    monkeypatch.setattr(huge_pages, "_AT_ONCE_S", 1e-9)
    pages.look()
    found = len(pages.waiting)
    assert found >= RANGES
    assert pages.move() <= huge_pages._size()
    assert len(pages.waiting) == found - 1
    assert memory.map[memory.begin] == 1


def test_no_memory_is_added_where_little_is_in_use(pages: HugePages) -> None:
    memory = Memory(every=4)
    before = memory.kib("Rss")
    collapse(pages)
    assert memory.kib("Rss") < before + huge_pages._size() // 1024


def test_nothing_is_moved_where_the_operator_says_never(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    assert collapse(HugePages()) == 0
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path / "absent")
    assert collapse(HugePages()) == 0


def test_a_kernel_that_does_not_know_how_moves_nothing(
    monkeypatch: pytest.MonkeyPatch, pages: HugePages
) -> None:
    held = Memory(every=1)
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", 9999)
    assert collapse(pages) == 0
    assert held.map[held.begin] == 1


def test_a_sandbox_that_hides_proc_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_size", lambda: 2 << 20)
    monkeypatch.setattr(huge_pages, "_PROC", tmp_path)
    assert collapse(HugePages()) == 0
