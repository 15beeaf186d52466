"""Models and shards on disk.

::

    <home>/models/<name>/
        model.gguf  model.json  tokenizer.json
        weights/<quantization>/<unit>.bin + index.json    written once per quantization
        shards/<runtime>-<quantization>-<start>-<end>/    graph, manifest, test vector, links to weights

Everything appears whole or not at all: it is written under a temporary name, synced and renamed.
What a killed process leaves begins with ``.tmp-`` and is removed by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from mesh.errors import InputError, ShardError
from node_agent.shards.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    ModelCard,
    ShardManifest,
    StoredFile,
    read_document,
)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, units done and units in all."""

_TEMPORARY = ".tmp-"
_STALE_S = 3600


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that show nothing."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says which path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path if path.exists() else path.parent).free
            raise InputError(
                f"no space left while writing {path} ({free // 2**20} MiB free); "
                "free some or set MESH_HOME to another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                f"{path} cannot be written: {error.strerror}; "
                "set MESH_HOME, or --data-dir for what an agent keeps of itself"
            ) from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet. Raises ``InputError``."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # something on the way is a file, or takes no folders
        raise InputError(
            f"the folder {folder} cannot be made: {error.strerror}; "
            "set MESH_HOME, or --data-dir for what an agent keeps of itself"
        ) from error


def _temporary(target: Path) -> Path:
    import time

    make_folder(target.parent)
    for stale in target.parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _STALE_S:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return target.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that is renamed to ``target`` when the block ends well and removed when it does not."""
    with disk_errors(target):
        temporary = _temporary(target)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that is renamed to ``target`` when the block ends well; a folder there is replaced."""
    with disk_errors(target):
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            yield temporary
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class ModelStore:
    """The folder ``<home>/models``."""

    def __init__(self, home: Path) -> None:
        self.root = home / "models"

    def folder(self, name: str) -> Path:
        if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
            raise InputError(f"{name!r} is no model name; use letters, digits, '.', '_' and '-'")
        return self.root / name

    def names(self) -> list[str]:
        return sorted(p.parent.name for p in self.root.glob(f"[!.]*/{CARD_FILE}"))

    def card(self, name: str) -> ModelCard:
        path = self.folder(name) / CARD_FILE
        try:
            return read_document(path.read_bytes(), ModelCard, str(path))
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(self.names()) or "none"
            raise InputError(
                f"the model {name!r} is not here (models in {self.root}: {known}); "
                f"fetch it with 'mesh model pull {name}'"
            ) from None

    def tokenizer_json(self, name: str) -> str:
        """The tokenizer's text, checked against the card."""
        path = self.folder(name) / "tokenizer.json"
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.card(name).tokenizer_sha256:
            raise ShardError(f"{path} does not match its model card; pull the model again")
        return data.decode()

    def shard_folder(self, name: str, runtime: str, quantization: str, start: int, end: int) -> Path:
        return self.folder(name) / "shards" / f"{runtime}-{quantization}-{start:02d}-{end:02d}"

    def shards(self, name: str) -> list[tuple[Path, ShardManifest]]:
        """All shards of a model, unverified, by folder name."""
        return [
            (path.parent, self.manifest(path.parent))
            for path in sorted((self.folder(name) / "shards").glob(f"[!.]*/{MANIFEST_FILE}"))
        ]

    def manifest(self, folder: Path) -> ShardManifest:
        path = folder / MANIFEST_FILE
        try:
            return read_document(path.read_bytes(), ShardManifest, str(path))
        except FileNotFoundError:
            raise ShardError(f"there is no shard in {folder}") from None


def verify_files(folder: Path, files: dict[str, StoredFile]) -> None:
    """Raise ``ShardError`` unless every file is there with its size and SHA-256."""
    for name, wanted in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted.size:
                raise ShardError(
                    f"{path} has {size} bytes, its manifest says {wanted.size}; make the shard again"
                )
            if sha256_of(path) != wanted.sha256:
                raise ShardError(f"{path} does not match the SHA-256 in its manifest; make the shard again")
        except FileNotFoundError:
            raise ShardError(f"{path} is missing; make the shard again") from None
