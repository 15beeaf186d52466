"""Makes shards on disk: reads the GGUF once per quantization, then cuts for the price of a graph.

The numpy reference runs once for a model's file and leaves the hidden states at every layer boundary, from which the test
vector of any cut is taken. LiteRT shards are made by ``static_maker``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mesh.errors import InputError, ModelFileError
from mesh.forms import STATIC, form_of
from node_agent.adapters.model_store import (
    ModelStore,
    Progress,
    disk_errors,
    new_file,
    new_folder,
    no_progress,
    sha256_of,
    verify_files,
)
from node_agent.shards.architecture import (
    Architecture,
    architecture_of,
    check_tensors,
    layer_tensors,
    rope_tables,
)
from node_agent.shards.gguf_file import GgufFile, dequantize, parse_gguf
from node_agent.shards.manifest import (
    CHECK_FILE,
    FORMAT,
    GRAPH_FILE,
    MANIFEST_FILE,
    Boundary,
    ModelCard,
    ShardManifest,
    StoredFile,
    TestVector,
    write_document,
)
from node_agent.shards.onnx_graph import StoredTensor, build_graph
from node_agent.shards.packing import (
    EMBEDDING,
    HEAD,
    ROPE,
    layer_unit,
    pack_embedding,
    pack_head,
    pack_layer,
    units_of,
)
from node_agent.shards.quantize import BLOCK, QuantizedMatrix, repack_q8_0
from node_agent.shards.reference import attend, even_blocks, gated, peak_limit, rms_norm, rounding_loss
from node_agent.shards.tokenizer import build_tokenizer_json
from scheduler.demand import ModelDemand

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNTIME = "onnx"
_ALIGNMENT = 64
_CHECK_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, people walked on the Moon, far away from home."
)
_CHECK_TOKENS_MAX = 33
CHECK_POSITIONS = 18
"""Of these, how many are a test vector: a step, the shortest chunk of static graphs, and a step that reads what both wrote."""
_LOGITS = 2
"""Positions with logits, at the end: the chunk's last and the last step's."""
_TOLERANCE = {"fp32": 1e-3, "int8": 0.15, "int4": 0.25}
"""Relative RMS error allowed on a test vector; int8 rounds activations as well as weights."""
_INDEX_FILE = "index.json"
_ROUGH = 0.01
"""A layer that loses more when the input of its last matrix is rounded to 8 bits has it parted: three of thirty, and half of what
perplexity lost."""
_REFERENCE = 4
"""Of what a reference holds: one of another number is made anew."""


class WeightIndex(msgspec.Struct, frozen=True):
    """``index.json`` of a folder of weights."""

    format: int
    model_digest: str
    tensors: dict[str, dict[str, StoredTensor]]
    files: dict[str, StoredFile]


# Built here and not by its first use, which would be on several threads at once (as for manifests).
_INDEX = msgspec.json.Decoder(WeightIndex)


def open_gguf(path: Path) -> tuple[memoryview, GgufFile]:
    """The file's bytes and its directory; raises ``ModelFileError``.

    The map is never closed by hand: arrays made from it point into it, and it goes with the last.
    """
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path} is empty")
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return data, parse_gguf(data)


def demand_of(
    store: ModelStore, model: str, quantization: str = "", runtime: str = RUNTIME, context: int = 0
) -> ModelDemand:
    """What a model asks of memory; for ONNX it converts the weights if that was not done yet."""
    runtime, quantization = form_of(runtime, quantization)
    card = store.card(model)
    spec = card.architecture
    if runtime in STATIC:
        from node_agent.adapters.static_maker import CONTEXT, static_demand

        return static_demand(card, runtime, quantization, min(spec.context_max, max(context, CONTEXT)))
    _, index = convert_weights(store, model, quantization)
    sizes = {unit: index.files[f"{unit}.bin"].size for unit in (EMBEDDING, HEAD, ROPE, layer_unit(0))}
    tied = sizes[EMBEDDING] if spec.head_tied else 0
    return ModelDemand(
        shape=card.shape,
        runtime=RUNTIME,
        quantization=quantization,
        layer_bytes=sizes[layer_unit(0)],
        embedding_bytes=sizes[EMBEDDING],
        head_bytes=sizes[HEAD] + tied,
        kv_layer_bytes=spec.kv_bytes_per_token_layer,
        shard_bytes=sizes[ROPE],
        tied_bytes=tied,
    )


def model_card(path: Path, name: str, digest: str, origin: str) -> tuple[ModelCard, str]:
    """Card and ``tokenizer.json`` of a GGUF file; raises ``ModelFileError`` if we cannot run it."""
    import hashlib

    _, gguf = open_gguf(path)
    metadata = gguf.metadata
    spec = architecture_of(metadata, gguf.tensors)
    check_tensors(spec, gguf.tensors)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if len(tokens) > spec.vocabulary:
        raise ModelFileError(f"the tokenizer has {len(tokens)} tokens, the embedding {spec.vocabulary} rows")
    tokenizer = build_tokenizer_json(metadata)

    def token(field: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{field}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    bos, eos, eot = token("bos"), token("eos"), token("eot")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError("the chat template is no text")
    return ModelCard(
        format=FORMAT,
        name=name,
        digest=digest,
        source=origin,
        source_quantization=gguf.tensors["blk.0.ffn_down.weight"].kind_name,
        architecture=spec,
        tokenizer_family=str(metadata.get("tokenizer.ggml.model")),
        chat_template=template,
        bos=tokens[bos] if bos is not None else "",
        eos=tokens[eos] if eos is not None else "",
        add_bos=bool(
            metadata.get(
                "tokenizer.ggml.add_bos_token",
                metadata.get("tokenizer.ggml.model") == "llama",
            )
        ),
        stop_tokens=tuple(sorted({t for t in (eos, eot) if t is not None})),
        token_letters_max=max(map(len, tokens)),
        tokenizer_sha256=hashlib.sha256(tokenizer.encode()).hexdigest(),
    ), tokenizer


class _Converter:
    """One pass over a GGUF: packs every unit."""

    def __init__(
        self, data: memoryview, gguf: GgufFile, spec: Architecture, quantization: str, folder: Path
    ) -> None:
        self.data, self.gguf, self.spec = data, gguf, spec
        self.quantization, self.folder = quantization, folder
        self.tensors: dict[str, dict[str, StoredTensor]] = {}
        self.files: dict[str, StoredFile] = {}

    def values(self, name: str) -> NDArray[np.float32]:
        return dequantize(self.data, self.gguf.tensors[name])

    def matrix(self, name: str) -> NDArray[np.float32] | QuantizedMatrix:
        """A big matrix, without loss where the file's own type allows."""
        tensor = self.gguf.tensors[name]
        if self.quantization == "int8" and tensor.kind_name == "Q8_0":
            raw = np.frombuffer(self.data[tensor.offset : tensor.offset + tensor.nbytes], dtype=np.uint8)
            return repack_q8_0(raw, *tensor.shape)
        return self.values(name)

    def write(self, unit: str, arrays: Iterator[tuple[str, NDArray[Any]]]) -> None:
        path = self.folder / f"{unit}.bin"
        stored: dict[str, StoredTensor] = {}
        with path.open("xb") as file:
            for name, array in arrays:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                stored[name] = StoredTensor(
                    path.name, array.dtype.name, array.shape, file.tell(), array.nbytes
                )
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
        self.tensors[unit] = stored
        self.files[path.name] = stored_file(path)


def convert_weights(
    store: ModelStore, name: str, quantization: str, progress: Progress = no_progress
) -> tuple[Path, WeightIndex]:
    """Weights of a model in ``quantization``, made if they are not there yet."""
    form_of(RUNTIME, quantization)
    card = store.card(name)
    spec = card.architecture
    folder = store.folder(name) / "weights" / quantization
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
        index = _INDEX.decode((folder / _INDEX_FILE).read_bytes())
        if index.format == FORMAT and index.model_digest == card.digest:
            return folder, index
    total = spec.layers + 2
    what = f"converting {name} to {quantization}"
    data, gguf = open_gguf(store.folder(name) / "model.gguf")
    with new_folder(folder) as temporary:
        progress(what, 0, total)
        maker = _Converter(data, gguf, spec, quantization, temporary)
        factors = maker.values("rope_freqs.weight") if "rope_freqs.weight" in gguf.tensors else None
        cos, sin = rope_tables(spec, spec.context_max, factors)
        maker.write(ROPE, iter([("cos", cos), ("sin", sin)]))
        maker.write(EMBEDDING, pack_embedding(maker.matrix("token_embd.weight"), quantization))
        norm = maker.values("output_norm.weight")
        head = None if spec.head_tied else maker.matrix("output.weight")
        maker.write(HEAD, pack_head(norm, head, quantization))
        for layer in range(spec.layers):
            progress(what, layer + 1, total)
            weights = {r: maker.values(t) for r, t in layer_tensors(spec, layer).items()}
            maker.write(layer_unit(layer), pack_layer(spec, weights, quantization))
        index = WeightIndex(FORMAT, card.digest, maker.tensors, maker.files)
        (temporary / _INDEX_FILE).write_bytes(msgspec.json.encode(index))
        progress(what, total, total)
    return folder, index


def check_tokens(store: ModelStore, name: str) -> NDArray[np.int64]:
    """The token ids that test vectors are made from: a fixed text, through the model's tokenizer."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(store.tokenizer_json(name)).encode(_CHECK_TEXT).ids
    return np.array(ids[:_CHECK_TOKENS_MAX] or [0], dtype=np.int64)


def reference(store: ModelStore, name: str, progress: Progress = no_progress) -> Path:
    """``tokens``, hidden ``states`` at every layer boundary and ``logits`` of a short text, by plain numpy: its first
    ``CHECK_POSITIONS``, of which the last few have logits, are what every shard is held to. And what rounding activations to 8 bits
    wants to know: ``limits``, by layer, where the input of its last matrix is to be parted because too much would be lost at once,
    infinite where it is not; ``evened``, ``[layers, 2, blocks]``, what the inputs of attention and of the feed-forward half are divided
    by. Made once for a model's file."""
    card = store.card(name)
    spec = card.architecture
    path = store.folder(name) / f"reference-{_REFERENCE}-{card.digest[:12]}.npz"
    if path.exists():
        return path
    what, total = f"reference of {name}", spec.layers
    data, gguf = open_gguf(store.folder(name) / "model.gguf")

    def values(tensor: str) -> NDArray[np.float32]:
        return dequantize(data, gguf.tensors[tensor])

    tokens = check_tokens(store, name)
    factors = values("rope_freqs.weight") if "rope_freqs.weight" in gguf.tensors else None
    cos, sin = rope_tables(spec, len(tokens), factors)
    embedding = values("token_embd.weight")
    states, limits = [embedding[tokens]], list[float]()
    evened: list[list[NDArray[np.float32]]] = []
    for layer in range(spec.layers):
        progress(what, layer, total)
        weights = {r: values(t) for r, t in layer_tensors(spec, layer).items()}
        middle = attend(spec, weights, states[-1], cos, sin)
        evened.append(_evened(spec, weights, states[-1], middle))
        inner = gated(spec, weights, middle)
        states.append(middle + inner @ weights["down"].T)
        loss = rounding_loss(inner, weights["down"], states[-1])
        limit = peak_limit(inner, weights["down"], states[-1]) if loss > _ROUGH else np.inf
        limits.append(limit)
    output = embedding if spec.head_tied else values("output.weight")
    last = states[-1][:CHECK_POSITIONS][-_LOGITS:]
    logits = rms_norm(last, values("output_norm.weight"), spec.norm_epsilon) @ output.T
    with new_file(path) as file:
        np.savez(
            file,
            tokens=tokens,
            states=np.stack(states),
            logits=logits,
            limits=np.array(limits),
            evened=np.array(evened),
        )
    progress(what, total, total)
    return path


def _evened(
    spec: Architecture,
    weights: Mapping[str, NDArray[np.float32]],
    x: NDArray[np.float32],
    middle: NDArray[np.float32],
) -> list[NDArray[np.float32]]:
    """What the inputs of a layer's matrices that follow a norm are divided by."""
    if spec.width % BLOCK:
        return [np.empty(0, dtype=np.float32)] * 2  # no form has blocks of such a width
    parts = (("attn_norm", x, ("q", "k", "v")), ("ffn_norm", middle, ("gate", "up")))
    return [
        even_blocks(
            rms_norm(given, weights[norm], spec.norm_epsilon), np.concatenate([weights[m] for m in matrices])
        )
        for norm, given, matrices in parts
    ]


def make_shard(
    store: ModelStore,
    name: str,
    start: int,
    end: int,
    quantization: str = "",
    progress: Progress = no_progress,
    runtime: str = RUNTIME,
    context: int = 0,
) -> Path:
    """Folder of the shard ``[start, end)``, made if it is not there yet. ``context``: positions that a session may have,
    where the graph's shapes are static.

    Raises ``InputError`` for a cut that the model does not have, ``ModelFileError`` for a GGUF
    that cannot be read.
    """
    runtime, quantization = form_of(runtime, quantization)
    card = store.card(name)
    spec = card.architecture
    if not 0 <= start < end <= spec.layers:
        raise InputError(f"the cut {start}-{end} is not within the {spec.layers} layers of {name}")
    buckets: tuple[int, ...] = ()
    steps = revision = 1
    if runtime in STATIC:
        from node_agent.adapters.static_maker import CONTEXT, STEPS, buckets_for
        from node_agent.shards.static_network import REVISION

        steps, revision = STEPS.get(runtime, 1), REVISION
        buckets = buckets_for(min(spec.context_max, max(context, CONTEXT)))
    target = store.shard_folder(name, runtime, quantization, start, end)
    if (target / MANIFEST_FILE).exists():
        there = store.manifest(target)
        enough = there.buckets[-1:] >= buckets[-1:] and there.steps >= steps
        if there.model_digest == card.digest and there.revision == revision and enough:
            return target
    with np.load(reference(store, name, progress)) as arrays:
        found = dict(arrays)
    with new_folder(target) as temporary:
        if runtime in STATIC:
            form = (runtime, quantization)
            files, weight_bytes = _static_files(
                store, card, (start, end), form, temporary, progress, buckets, found
            )
        else:
            files, weight_bytes = _onnx_files(store, card, (start, end), quantization, temporary, progress)
        np.savez(
            temporary / CHECK_FILE,
            input=(found["tokens"] if start == 0 else found["states"][start])[:CHECK_POSITIONS],
            expected=found["logits"] if end == spec.layers else found["states"][end][:CHECK_POSITIONS],
        )
        files[CHECK_FILE] = stored_file(temporary / CHECK_FILE)
        manifest = ShardManifest(
            format=FORMAT,
            model=name,
            model_digest=card.digest,
            layers=(start, end),
            model_layers=spec.layers,
            vocabulary=spec.vocabulary,
            context_max=spec.context_max,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            boundary=Boundary("float32", spec.width),
            runtime=runtime,
            quantization=quantization,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=spec.kv_bytes_per_token_layer * (end - start),
            files=files,
            test_vector=TestVector(CHECK_FILE, _TOLERANCE[quantization]),
            buckets=buckets,
            steps=steps,
            revision=revision,
        )
        verify_files(temporary, files)
        (temporary / MANIFEST_FILE).write_bytes(write_document(manifest))
    return target


def _onnx_files(
    store: ModelStore,
    card: ModelCard,
    layers: tuple[int, int],
    quantization: str,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, StoredFile], int]:
    """A graph that points into the model's converted weights; files, and bytes of weights."""
    weights, index = convert_weights(store, card.name, quantization, progress)
    what, spec = f"shard {layers[0]}-{layers[1]}", card.architecture
    progress(what, 0, 1)
    files = {}
    for unit in units_of(spec, *layers):
        file = f"{unit}.bin"
        _link(weights / file, folder / file)
        files[file] = index.files[file]
    weight_bytes = sum(f.size for f in files.values())
    (folder / GRAPH_FILE).write_bytes(build_graph(spec, *layers, quantization, index.tensors))
    files[GRAPH_FILE] = stored_file(folder / GRAPH_FILE)
    progress(what, 1, 1)
    return files, weight_bytes


def _static_files(
    store: ModelStore,
    card: ModelCard,
    layers: tuple[int, int],
    form: tuple[str, str],
    folder: Path,
    progress: Progress,
    buckets: tuple[int, ...],
    found: dict[str, NDArray[Any]],
) -> tuple[dict[str, StoredFile], int]:
    """A graph with its weights in it, and tables beside it; files, and their bytes. ``found``: the model's reference."""
    from node_agent.adapters.static_maker import StaticMaker

    what = f"shard {layers[0]}-{layers[1]}"
    progress(what, 0, 1)
    data, gguf = open_gguf(store.folder(card.name) / "model.gguf")
    maker = StaticMaker(data, gguf, card.architecture, form, found)
    names = maker.write(folder, *layers, buckets)
    files = {name: stored_file(folder / name) for name in names}
    progress(what, 1, 1)
    return files, sum(f.size for f in files.values())


def stored_file(path: Path) -> StoredFile:
    """As a manifest lists it."""
    return StoredFile(sha256_of(path), path.stat().st_size)


def _link(source: Path, target: Path) -> None:
    """Hard link, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        with disk_errors(target):
            shutil.copyfile(source, target)
