"""Packed weights are kept for a shard's next load, and whatever becomes of them there, the shard loads and computes the same."""

from __future__ import annotations

import mmap
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

import node_agent.adapters.onnx_session as module
import node_agent.adapters.shard_loader as loader
from mesh.errors import ShardError
from mesh.forms import parse_form
from node_agent.adapters.packed_weights import forget, made_anew, packed_files, packed_path, read_at_once
from node_agent.adapters.proven import Proven
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import make_shard
from node_agent.ports import RuntimeOptions
from tests.integration.test_tiny_models import pulled

ONNX, LITERT = "onnx-int8", "litert-int8"
TOKENS = 20


class Host:
    """Loads the first layers of a tiny model again and again."""

    def __init__(self, home: Path, form: str, end: int = 3) -> None:
        runtime, quantization = parse_form(form)
        store = pulled(home)
        self.folder = make_shard(store, "tiny", 0, end, quantization, runtime=runtime)
        self.manifest, self.cache = store.manifest(self.folder), home / "packed"

    def answer(self, threads: int = 1) -> bytes:
        options = RuntimeOptions(threads=threads, cache=str(self.cache))
        shard = load_shard(self.folder, self.manifest, slots=1, capacity=64, options=options)
        found = shard.prefill(0, 0, np.arange(TOKENS)).tobytes()
        found += shard.decode(0, [TOKENS], np.array([7])).tobytes()
        shard.close()
        return found

    def settled(self) -> bytes:
        """What it answers once weights are kept."""
        first = self.answer()
        assert self.answer() == first
        return first

    def kept(self) -> Path:
        """The packed weights, of which there must be just one."""
        (path,) = (p for p in self.cache.iterdir() if p.suffix != ".json")
        return path


def files(path: Path) -> dict[Path, int]:
    """Each file and when it was written."""
    return {p: p.stat().st_mtime_ns for p in [path, *path.rglob("*")] if p.is_file()}


@pytest.mark.parametrize("form", [ONNX, LITERT])
def test_they_are_used_again_and_compute_the_same(tmp_path: Path, form: str) -> None:
    host = Host(tmp_path, form)
    first = host.settled()
    written = files(host.kept())
    assert host.answer() == first
    assert files(host.kept()) == written


def test_of_a_shard_that_was_never_here_before_onnx_runtime_s_are_not_kept(tmp_path: Path) -> None:
    """It may not come again: that would be as much disk as twice its weights, written for nothing."""
    host = Host(tmp_path, ONNX)
    host.answer()
    assert packed_files(str(host.cache), host.manifest.digest) == []
    host.answer()
    assert host.kept()


class Damage(NamedTuple):
    form: str
    do: Callable[[Path], None]


def _flip(name: str, share: float) -> Callable[[Path], None]:
    def do(kept: Path) -> None:
        path = kept / name
        data = bytearray(path.read_bytes())
        at = int(share * len(data))
        data[at : at + 64] = bytes(b ^ 0x55 for b in data[at : at + 64])
        path.write_bytes(data)

    return do


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def do(kept: Path) -> None:
        data = (kept / name).read_bytes()
        (kept / name).write_bytes(data[: int(share * len(data))])

    return do


def _lose(name: str) -> Callable[[Path], None]:
    def do(kept: Path) -> None:
        size = (kept / name).stat().st_size
        (kept / name).write_bytes(b"\0" * size)

    return do


DAMAGES = {
    "graph lost": Damage(ONNX, lambda kept: (kept / "graph.onnx").unlink()),
    "graph empty": Damage(ONNX, _cut("graph.onnx", 0)),
    "graph cut": Damage(ONNX, _cut("graph.onnx", 0.5)),
    "graph other": Damage(ONNX, _flip("graph.onnx", 0.3)),
    "weights gone": Damage(ONNX, lambda kept: (kept / "weights.bin").unlink()),
    "weights cut": Damage(ONNX, _cut("weights.bin", 0.5)),
    "weights zeros": Damage(ONNX, _lose("weights.bin")),
    **{f"weights other at {s}": Damage(ONNX, _flip("weights.bin", s)) for s in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "all gone": Damage(ONNX, shutil.rmtree),
    "litert cut": Damage(LITERT, _cut("", 0.5)),
    "litert zeros": Damage(LITERT, _lose("")),
    **{f"litert other at {s}": Damage(LITERT, _flip("", s)) for s in (0.3, 0.5, 0.7)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_they_are_made_anew(tmp_path: Path, damage: str) -> None:
    told = DAMAGES[damage]
    host = Host(tmp_path, told.form)
    first = host.settled()
    told.do(host.kept())
    assert host.answer() == first
    assert host.answer() == first
    assert host.kept()


def test_one_that_was_written_to_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would tell: the test vector has other tokens."""
    host = Host(tmp_path, ONNX, end=2)
    tested = {*np.load(host.folder / host.manifest.test_vector.file)["input"].tolist()}
    token = next(t for t in range(TOKENS) if t not in tested)
    first = host.settled()

    def damage() -> None:
        graph = onnx.load(str(host.kept() / "graph.onnx"), load_external_data=False).graph
        (table,) = (t for t in graph.initializer if t.name == "embedding.embedding.values")
        told = {entry.key: entry.value for entry in table.external_data}
        row = int(told["length"]) // table.dims[0]
        with (host.kept() / "weights.bin").open("r+b") as file:
            file.seek(int(told["offset"]) + token * row)
            file.write(bytes(row))

    damage()
    with monkeypatch.context() as patch:
        patch.setattr(Proven, "knows", lambda *_: True)
        assert host.answer() != first
    forget(str(host.cache), host.manifest.digest)
    assert host.answer() == first
    damage()
    assert host.answer() == first


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_disk_that_rots_is_seen_by_what_is_computed(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = DAMAGES[damage]
    host = Host(tmp_path, told.form)
    first = host.settled()
    told.do(host.kept())
    monkeypatch.setattr(Proven, "knows", lambda *_: True)
    assert host.answer() == first
    assert host.answer() == first


@pytest.mark.parametrize("form", [ONNX, LITERT])
def test_of_a_refused_shard_none_stay(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, form)
    host.settled()

    def refuse(*_: Any) -> None:
        raise ShardError("computes wrong results")

    monkeypatch.setattr(loader, "hold_to_vector", refuse)
    with pytest.raises(ShardError):
        host.answer(threads=2)
    assert not packed_files(str(host.cache), host.manifest.digest)


def test_a_full_disk_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, ONNX)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 29))
    first = host.settled()
    assert not packed_files(str(host.cache), host.manifest.digest)
    monkeypatch.undo()
    assert host.answer() == first
    assert host.kept()


def test_another_machine_makes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, ONNX)
    first = host.settled()
    before = host.kept()
    monkeypatch.setattr(module, "this_machine", lambda: "another library on another processor")
    assert host.answer() == first
    assert host.kept() != before


def test_what_a_killed_process_left_goes_with_the_next_load(tmp_path: Path) -> None:
    host = Host(tmp_path, ONNX)
    first = host.answer()
    left = packed_path(str(host.cache), host.manifest.digest, "tmp-1-2")
    left.mkdir()
    (left / "weights.bin").write_bytes(b"half")
    assert host.answer() == first
    assert not left.exists()
    assert host.kept()


def test_packed_weights_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = packed_path(str(tmp_path / "packed"), "a" * 64, "xnnpack")
    with pytest.raises(ShardError), made_anew(target) as fresh:
        fresh.write_text("half")
        raise ShardError("died")
    assert [*target.parent.iterdir()] == []
    with made_anew(target) as fresh:
        fresh.write_text("packed")
        assert not target.exists()
    assert [*target.parent.iterdir()] == [target]


def test_the_oldest_go_when_there_are_many(tmp_path: Path) -> None:
    packed = [packed_path(str(tmp_path), f"{i:016x}", "xnnpack") for i in range(12)]
    for i, path in enumerate(packed):
        with made_anew(path) as fresh:
            fresh.write_text("packed")
        os.utime(path, (i, i))
        path.with_suffix(".json").write_text("a record stays")
    assert sorted(tmp_path.glob("*.xnnpack")) == packed[-8:]
    assert len([*tmp_path.glob("*.json")]) == 12
    forget(str(tmp_path), f"{11:016x}")
    assert sorted(tmp_path.glob("*.xnnpack")) == packed[-8:-1]


def in_large_pages(path: Path) -> int:
    """KiB of a file that this process gets in large pages when it maps and reads it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[::4096]
        _, _, after = Path("/proc/self/smaps").read_text().partition(f"{path}\n")
    found = re.search(r"FilePmdMapped:\s+(\d+) kB", after)
    return int(found[1]) if found else 0


WEIGHTS = os.urandom(1 << 20) * 6


def in_small_pieces(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(WEIGHTS), 1000):
            file.write(WEIGHTS[begin : begin + 1000])


@pytest.fixture
def large_pages(tmp_path: Path) -> None:
    """Skips where files lie in small pages, whatever one does."""
    probe = tmp_path / "probe"
    probe.write_bytes(WEIGHTS)
    if not in_large_pages(probe):
        pytest.skip("this kernel has no large pages for files of this file system")


@pytest.mark.usefixtures("large_pages")
def test_they_lie_in_large_pages(tmp_path: Path) -> None:
    target = tmp_path / "packed" / "0.xnnpack"
    with made_anew(target) as fresh:
        in_small_pieces(fresh)
        assert not in_large_pages(fresh)
    assert target.read_bytes() == WEIGHTS
    assert in_large_pages(target) >= 4096
    assert [*target.parent.iterdir()] == [target]


@pytest.mark.usefixtures("large_pages")
def test_they_come_from_the_disk_in_large_pages(tmp_path: Path) -> None:
    packed = tmp_path / "0.xnnpack"

    def dropped() -> None:
        with packed.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    in_small_pieces(packed)
    dropped()
    read_at_once([packed, tmp_path / "gone"])
    assert in_large_pages(packed) >= 4096


def test_where_they_cannot_be_written_over_again_they_stay_as_they_are(tmp_path: Path) -> None:
    target = tmp_path / "packed" / "0.xnnpack"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with made_anew(target) as fresh:
            in_small_pieces(fresh)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(WEIGHTS) // 2, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == WEIGHTS
    assert [*target.parent.iterdir()] == [target]
