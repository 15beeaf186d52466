"""What a shard proved here before is not proved again, until its files change."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from mesh.errors import ShardError
from node_agent.adapters import form_times
from node_agent.adapters import proven as module
from node_agent.adapters.model_store import sha256_of, verify_files
from node_agent.adapters.proven import Proven
from node_agent.shards.manifest import StoredFile


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    found: list[str] = []

    def noted(folder: Path, files: dict[str, StoredFile]) -> None:
        found.extend(files)
        verify_files(folder, files)

    monkeypatch.setattr(module, "verify_files", noted)
    return found


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are as good as old."""
    monkeypatch.setattr(module, "SETTLED_S", 0)


def shard(folder: Path) -> dict[str, StoredFile]:
    files = {}
    for name in ("graph", "check"):
        path = folder / name
        path.write_bytes(name.encode() * 1000)
        files[name] = StoredFile(sha256_of(path), path.stat().st_size)
    return files


def load(folder: Path, files: dict[str, StoredFile], path: Path | None) -> None:
    proven = Proven(path, 2)
    proven.verify(folder, files)
    proven.keep([])


@pytest.mark.usefixtures("settled")
def test_files_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    files, kept = shard(tmp_path), tmp_path / "kept.json"
    load(tmp_path, files, kept)
    load(tmp_path, files, kept)
    assert reads == ["graph", "check"]
    load(tmp_path, files, None)
    assert reads == ["graph", "check"] * 2


@pytest.mark.usefixtures("settled")
def test_a_flipped_bit_is_found_though_size_and_mtime_are_as_they_were(
    tmp_path: Path, reads: list[str]
) -> None:
    files, kept, graph = shard(tmp_path), tmp_path / "kept.json", tmp_path / "graph"
    load(tmp_path, files, kept)
    before = graph.stat()
    data = bytearray(graph.read_bytes())
    data[700] ^= 1
    graph.write_bytes(data)
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ShardError, match=r"graph does not match the SHA-256"):
        load(tmp_path, files, kept)
    assert reads == ["graph", "check", "graph"]


def test_a_file_that_has_just_been_written_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    """A change within the same tick of the file system's clock would not show."""
    files, kept = shard(tmp_path), tmp_path / "kept.json"
    load(tmp_path, files, kept)
    load(tmp_path, files, kept)
    assert reads == ["graph", "check"] * 2


@pytest.mark.usefixtures("settled")
def test_another_manifest_wants_its_own_proof(tmp_path: Path, reads: list[str]) -> None:
    files, kept = shard(tmp_path), tmp_path / "kept.json"
    load(tmp_path, files, kept)
    other = files | {"graph": StoredFile("0" * 64, files["graph"].size)}
    with pytest.raises(ShardError, match="SHA-256"):
        load(tmp_path, other, kept)
    (tmp_path / "graph").unlink()
    with pytest.raises(ShardError, match="missing"):
        load(tmp_path, files, kept)


@pytest.mark.parametrize("damaged", [b"", b"{", b'{"files": 7}', b"\xff"])
def test_a_damaged_record_proves_nothing(tmp_path: Path, reads: list[str], damaged: bytes) -> None:
    files, kept = shard(tmp_path), tmp_path / "kept.json"
    kept.write_bytes(damaged)
    load(tmp_path, files, kept)
    assert reads == ["graph", "check"]


def test_where_nothing_can_be_written_a_shard_loads_all_the_same(tmp_path: Path, reads: list[str]) -> None:
    files, blocked = shard(tmp_path), tmp_path / "graph" / "kept.json"
    proven = Proven(blocked, 2)
    proven.verify(tmp_path, files)
    proven.note("XNNPACK", "a0")
    proven.keep([])
    assert reads == ["graph", "check"]


def test_a_shard_was_held_where_machine_packages_threads_provider_and_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"
    proven = Proven(kept, 2)
    assert not proven.held("XNNPACK", "a0")
    proven.note("XNNPACK", "a0")
    proven.keep([])
    assert Proven(kept, 2).held("XNNPACK", "a0")
    assert not Proven(kept, 2).held("XNNPACK", "a1")
    assert not Proven(kept, 2).held("libedgetpu.so.1", "a0")
    assert not Proven(kept, 1).held("XNNPACK", "a0")
    monkeypatch.setattr(module, "this_machine", lambda: "another")
    assert not Proven(kept, 2).held("XNNPACK", "a0")


def test_what_computes_is_told_apart_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other builds of ONNX Runtime are packages of another name."""
    before = form_times.this_machine()
    version = importlib.metadata.version
    monkeypatch.setattr(
        form_times, "version", lambda name: "9.9" if name == "onnxruntime-openvino" else version(name)
    )
    form_times.this_machine.cache_clear()
    try:
        assert form_times.this_machine() != before
    finally:
        form_times.this_machine.cache_clear()


def test_packed_weights_are_known_as_long_as_nobody_wrote_to_them(tmp_path: Path) -> None:
    kept, packed = tmp_path / "kept.json", [tmp_path / "graph", tmp_path / "weights"]
    for path in packed:
        path.write_bytes(b"packed")
    Proven(kept, 2).keep(packed)
    assert Proven(kept, 2).knows(packed)
    assert not Proven(kept, 2).knows(packed[:1])
    assert not Proven(kept, 2).knows([])
    packed[0].write_bytes(b"pack it")
    assert not Proven(kept, 2).knows(packed)
    packed[0].unlink()
    assert not Proven(kept, 2).knows(packed)


def test_other_bits_contradict_what_was_held_on_the_same_threads_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    proven = Proven(kept, 2)
    assert not proven.contradicts("XNNPACK", "a0")
    proven.note("XNNPACK", "a0")
    proven.keep([])
    assert not Proven(kept, 2).contradicts("XNNPACK", "a0")
    assert Proven(kept, 2).contradicts("XNNPACK", "a1")
    assert not Proven(kept, 1).contradicts("XNNPACK", "a1")
    assert not Proven(kept, 2).contradicts("CPUExecutionProvider", "a1")


def test_packed_weights_outlive_a_start_of_the_machine_once_they_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, packed = tmp_path / "kept.json", [tmp_path / "graph", tmp_path / "weights"]
    for path in packed:
        path.write_bytes(b"packed")
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    Proven(kept, 2).keep(packed)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_boot", lambda: "the next")
        assert not Proven(kept, 2).knows(packed)
    assert Proven(kept, 2).knows(packed)
    synced.clear()
    Proven(kept, 2).settle(packed)
    assert synced[:2] == ["graph", "weights"]
    assert Proven(kept, 2).knows(packed)
    Proven(kept, 2).keep(packed)  # the next load knows them
    monkeypatch.setattr(module, "_boot", lambda: "the next")
    assert Proven(kept, 2).knows(packed)
    packed[0].write_bytes(b"packed anew")
    Proven(kept, 2).keep(packed)
    monkeypatch.setattr(module, "_boot", lambda: "the one after")
    assert not Proven(kept, 2).knows(packed)


def test_packed_weights_that_are_gone_before_they_settle(tmp_path: Path) -> None:
    kept, packed = tmp_path / "kept.json", [tmp_path / "weights"]
    packed[0].write_bytes(b"packed")
    Proven(kept, 2).keep(packed)
    packed[0].unlink()
    Proven(kept, 2).settle(packed)
    assert not Proven(kept, 2).knows(packed)
