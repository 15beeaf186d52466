"""What a shard has proved on this machine, so that its next load need not prove it again.

A file's SHA-256 is half of what a load takes. One that was read whole and right is known again by size, inode and times, as git
knows a file that it need not read: whoever writes to it changes its ctime, which no program sets. What was held to its whole test
vector is known again by the bits of a few steps. Packed weights were made here: they are used as long as nobody wrote to them, and
no power cut may have taken what was written last, of which the bits of a few steps need not tell: rows of an embedding, say.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mesh.errors import InputError
from node_agent.adapters.form_times import this_machine
from node_agent.adapters.model_store import new_file, verify_files
from node_agent.shards.manifest import StoredFile

log = logging.getLogger(__name__)

SETTLED_S = 2
"""A file that changed less than this ago may change again within one tick of its file system's clock."""


class _File(msgspec.Struct, frozen=True):
    """What tells that a file is the one that was read."""

    sha256: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class _Record(msgspec.Struct, frozen=True):
    files: dict[str, _File] = {}
    held: str = ""
    """With what the shard was held to its test vector: machine, packages, threads, and who computed which bits."""
    packed: dict[str, _File] = {}
    """By path."""
    boot: str = ""
    """Of the machine, in which packed weights were written; empty once they are on the disk."""


class Proven:
    """Of one shard, in a file of this process alone; what is new is written by ``keep``."""

    def __init__(self, path: Path | None, threads: int) -> None:
        """``path``: nothing is kept where there is none."""
        self._path, self._kept = path, _Record()
        self._here = f"{this_machine()}, {threads} threads"
        if path is not None:
            try:
                self._kept = msgspec.json.decode(path.read_bytes(), type=_Record)
            except FileNotFoundError:
                pass
            except (OSError, msgspec.MsgspecError) as error:
                log.warning("%s is not read, the shard is verified anew: %s", path, error)
        self._files, self._held = self._kept.files, self._kept.held

    @property
    def again(self) -> bool:
        """Whether anything was held to its test vector here before."""
        return bool(self._kept.held)

    def verify(self, folder: Path, files: dict[str, StoredFile]) -> None:
        """Raise ``ShardError`` unless every file is there with its size and SHA-256; what was read before and has not changed is
        not read again."""
        # Looked at before they are read: what changes in between is seen to have changed.
        found = {name: _seen(folder / name, stored.sha256) for name, stored in files.items()}
        verify_files(folder, {n: f for n, f in files.items() if self._files.get(n) != found[n]})
        settled = time.time_ns() - SETTLED_S * 1_000_000_000
        self._files = {n: s for n, s in found.items() if s is not None and s.ctime_ns < settled}

    def knows(self, packed: Sequence[Path]) -> bool:
        """Whether packed weights are those that were kept with what the shard proved."""
        return _all_seen(packed) == self._kept.packed and self._kept.boot in ("", _boot())

    def held(self, provider: str, bits: str) -> bool:
        """Whether the shard was held to its test vector here, computed by ``provider``, and had these ``bits``."""
        return self._held == self._what(provider, bits)

    def contradicts(self, provider: str, bits: str) -> bool:
        """Whether it was, by the same ``provider`` on the same threads, and had others."""
        return self._held.startswith(self._what(provider, "")) and not self.held(provider, bits)

    def note(self, provider: str, bits: str) -> None:
        """That it was, and had."""
        self._held = self._what(provider, bits)

    def _what(self, provider: str, bits: str) -> str:
        return f"{self._here}, {provider}, {bits}"

    def keep(self, packed: Sequence[Path]) -> None:
        """For the next load, with these packed weights; where it cannot be written that one proves all anew."""
        seen = _all_seen(packed)
        boot = self._kept.boot if seen == self._kept.packed else _boot()
        self._write(_Record(self._files, self._held, seen, boot))

    def settle(self, packed: Sequence[Path]) -> None:
        """See that packed weights which were kept are on the disk; that may take seconds, so nobody waits for it."""
        if not self._kept.boot or not self.knows(packed):
            return
        try:
            for path in packed:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            log.warning("%s may not be on the disk, and is made anew after the next start: %s", path, error)
            return
        self._write(msgspec.structs.replace(self._kept, boot=""))

    def _write(self, record: _Record) -> None:
        if self._path is None or record == self._kept:
            return
        try:
            with new_file(self._path) as file:
                file.write(msgspec.json.encode(record))
        except (OSError, InputError) as error:
            log.warning("%s is not written, the next load verifies the shard anew: %s", self._path, error)


def _boot() -> str:
    """This start of the machine; where it has no name, another one each time."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def _all_seen(packed: Sequence[Path]) -> dict[str, _File]:
    """Nobody else writes to these, just now least of all: their digests are not taken."""
    found = ((str(path), _seen(path)) for path in packed)
    return {name: file for name, file in found if file is not None}


def _seen(path: Path, sha256: str = "") -> _File | None:
    """The file as it is, with the digest that a manifest says it has, if one does; ``None`` where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _File(sha256, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
