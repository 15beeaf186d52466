"""Model cards and shard manifests: what stands beside the files, and how it is read back.

Parsing is strict (``msgspec``): a wrong type or a missing field is a ``ShardError`` that names
the path inside the document.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from mesh.errors import ShardError
from mesh.types import Digest, LayerRange, ModelRef, ModelShape, ShardInfo
from node_agent.shards.architecture import Architecture

FORMAT = 1
CARD_FILE, MANIFEST_FILE, CHECK_FILE = "model.json", "shard.json", "check.npz"
GRAPH_FILE, LITERT_GRAPH_FILE = "graph.onnx", "graph.tflite"
_GRAPHS = {"onnx": GRAPH_FILE, "litert": LITERT_GRAPH_FILE, "onnxstd": "weights.bin"}
"""What every shard has, by runtime."""


class StoredFile(msgspec.Struct, frozen=True):
    """A file's SHA-256 (hex) and size in bytes."""

    sha256: str
    size: int


class ModelCard(msgspec.Struct, frozen=True):
    """``model.json``: everything an ingress needs of a model besides its tokenizer."""

    format: int
    name: str
    digest: str
    source: str
    source_quantization: str
    architecture: Architecture
    tokenizer_family: str
    chat_template: str | None
    bos: str
    eos: str
    add_bos: bool
    stop_tokens: tuple[int, ...]
    token_letters_max: int
    """Letters of the longest token: a text of n letters has at least n divided by this tokens."""
    tokenizer_sha256: str

    @property
    def shape(self) -> ModelShape:
        spec = self.architecture
        return ModelShape(
            ModelRef(self.name, Digest(self.digest)),
            spec.layers,
            spec.width,
            spec.vocabulary,
            spec.context_max,
        )


class Boundary(msgspec.Struct, frozen=True):
    """What crosses the shard's edges."""

    dtype: str
    width: int


class TestVector(msgspec.Struct, frozen=True):
    """``file`` holds ``input`` and ``expected``; ``tolerance`` bounds how far from it a shard may compute (``shards.deviation``)."""

    __test__ = False

    file: str
    tolerance: float


class ShardManifest(msgspec.Struct, frozen=True):
    """``shard.json``: what a host must know before it loads the shard."""

    format: int
    model: str
    model_digest: str
    layers: tuple[int, int]
    model_layers: int
    vocabulary: int
    context_max: int
    heads: int
    kv_heads: int
    head_dim: int
    boundary: Boundary
    runtime: str
    quantization: str
    weight_bytes: int
    kv_bytes_per_token: int
    files: dict[str, StoredFile]
    test_vector: TestVector
    buckets: tuple[int, ...] = ()
    """Contexts that a graph of static shapes was built for, positions; empty: any."""
    steps: int = 1
    """Steps that a graph replays at once, with the bits that they have one by one."""
    revision: int = 1
    """Of what made it: where a model is sharded again, one of an older revision is made anew."""

    @property
    def digest(self) -> Digest:
        """Digest of what the shard computes: the graph and weights, not the test vector.

        Shards made on different machines from one file are therefore the same shard.
        """
        parts = [f"{self.model_digest} {self.runtime} {self.quantization} {list(self.layers)}"]
        parts += [
            f"{name} {stored.sha256}"
            for name, stored in sorted(self.files.items())
            if name != self.test_vector.file
        ]
        return Digest(hashlib.sha256("\n".join(parts).encode()).hexdigest())

    @property
    def info(self) -> ShardInfo:
        shape = ModelShape(
            ModelRef(self.model, Digest(self.model_digest)),
            self.model_layers,
            self.boundary.width,
            self.vocabulary,
            self.context_max,
        )
        return ShardInfo(
            shape,
            LayerRange(*self.layers),
            self.runtime,
            self.quantization,
            self.digest,
            self.weight_bytes,
            self.kv_bytes_per_token,
        )


# What msgspec knows of a type is built by its first use, which crashes where two threads are first at once: manifests are
# read on threads. It is built here, while this module is imported.
_KNOWN = tuple(msgspec.json.Decoder(kind) for kind in (ModelCard, ShardManifest))

_Document = TypeVar("_Document", bound=msgspec.Struct)


def read_document(data: bytes, kind: type[_Document], where: str) -> _Document:
    """Parse a card or manifest; raises ``ShardError`` naming ``where`` and the path inside."""
    try:
        document = msgspec.json.decode(data, type=kind)
        version = getattr(document, "format", FORMAT)
        if version != FORMAT:
            raise ShardError(
                f"{where} has format {version}, this version reads {FORMAT}; make the shards again"
            )
        if isinstance(document, ShardManifest):
            _check_manifest(document, where)
        return document
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{where} is damaged: {error}; pull the model or make the shard again") from None


def _check_manifest(manifest: ShardManifest, where: str) -> None:
    start, end = manifest.layers
    if not 0 <= start < end <= manifest.model_layers:
        raise ShardError(
            f"{where} claims layers [{start}, {end}) of a model of {manifest.model_layers} layers"
        )
    for field in ("weight_bytes", "kv_bytes_per_token", "context_max", "vocabulary", "kv_heads"):
        if getattr(manifest, field) <= 0:
            raise ShardError(f"{where} is damaged: {field} is {getattr(manifest, field)}")
    for name in manifest.files:
        if "/" in name or name.startswith("."):
            raise ShardError(f"{where} names the file {name!r} outside its own folder")
    if manifest.runtime not in _GRAPHS:
        raise ShardError(f"{where} is for the runtime {manifest.runtime!r}; known are {', '.join(_GRAPHS)}")
    for name in (_GRAPHS[manifest.runtime], manifest.test_vector.file):
        if name not in manifest.files:
            raise ShardError(f"{where} is damaged: it does not list {name}")


def write_document(document: msgspec.Struct) -> bytes:
    """A card or manifest as indented JSON, for people to read."""
    encoded: Any = msgspec.json.encode(document)
    return bytes(msgspec.json.format(encoded, indent=2)) + b"\n"
