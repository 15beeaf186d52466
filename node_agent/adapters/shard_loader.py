"""Shards from this node's disk into a runtime; what is not there yet is made from the model's file."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mesh.capabilities import Capabilities
from mesh.errors import ShardError
from mesh.forms import form_of
from mesh.types import ShardInfo
from node_agent.adapters.model_store import ModelStore
from node_agent.adapters.packed_weights import forget, packed_files, read_at_once, record_path
from node_agent.adapters.pages import trim_heap
from node_agent.adapters.proven import Proven
from node_agent.config import AgentConfig
from node_agent.lease import ShardKey
from node_agent.ports import Runtime, RuntimeOptions
from node_agent.shards.deviation import deviation, logits_deviation
from node_agent.shards.manifest import LITERT_GRAPH_FILE, ShardManifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.adapters.static_engine import Engine

log = logging.getLogger(__name__)

_STEPS = 2
"""Of a test vector, those that are computed at every load."""


class ShardLoader:
    """A ``node_agent.ports.ShardSource`` over the model store and the runtimes; its work is done on threads."""

    def __init__(
        self,
        config: AgentConfig,
        store: ModelStore,
        capabilities: Callable[[], Capabilities],
        data_dir: Path,
    ) -> None:
        """``data_dir``: of this agent alone."""
        self._config, self._store, self._capabilities = config, store, capabilities
        self._cache = str(data_dir / "packed")

    async def find(self, key: ShardKey) -> ShardInfo:
        _, manifest = await asyncio.to_thread(self._find, key)
        return manifest.info

    async def load(self, key: ShardKey, slots: int, capacity: int) -> Runtime:
        shard = await asyncio.to_thread(self._load, key, slots, capacity)
        asyncio.get_running_loop().run_in_executor(None, self._tidy, shard.info.digest)
        return shard

    def _tidy(self, digest: str) -> None:
        """What nobody needs to wait for."""
        trim_heap()  # a load leaves ten megabytes freed that the allocator keeps
        Proven(record_path(self._cache, digest), 0).settle(packed_files(self._cache, digest))

    def _find(self, key: ShardKey) -> tuple[Path, ShardManifest]:
        form_of(key.runtime, key.quantization)
        folder = self._store.shard_folder(key.model, key.runtime, key.quantization, key.start, key.end)
        if not folder.exists():
            # Needs the packages of the extra "shard"; a node that lacks them gets its shards made.
            from node_agent.adapters.shard_maker import make_shard

            folder = make_shard(
                self._store,
                key.model,
                key.start,
                key.end,
                key.quantization,
                runtime=key.runtime,
                context=self._config.context,
            )
        manifest = self._store.manifest(folder)
        wanted = (key.model, [key.start, key.end], key.runtime, key.quantization)
        found = (manifest.model, list(manifest.layers), manifest.runtime, manifest.quantization)
        if found != wanted:
            raise ShardError(f"{folder} holds {manifest.info}, not what its name says; make the shard again")
        if key.model in self._store.names() and self._store.card(key.model).digest != manifest.model_digest:
            raise ShardError(
                f"{folder} was made from another file than the {key.model} that is here; make the shard again"
            )
        return folder, manifest

    def _load(self, key: ShardKey, slots: int, capacity: int) -> Runtime:
        folder, manifest = self._find(key)
        # Left to itself, ONNX Runtime pins its threads to cores: on cores that others use as well, that
        # costs a fifth of the rate.
        threads = self._config.threads or self._capabilities().cpu.cores
        options = RuntimeOptions(self._config.providers, threads, self._cache, self._config.delegate)
        return load_shard(folder, manifest, slots=slots, capacity=capacity, options=options)


def load_shard(
    folder: Path, manifest: ShardManifest, *, slots: int, capacity: int, options: RuntimeOptions
) -> Runtime:
    """Verify a shard's files, load it, and hold it to its test vector: where it was held to it here before, it has to have the
    bits again that it had then, in a few steps. Raises ``ShardError`` or ``ConfigError``."""
    cache, digest = options.cache, manifest.digest
    proven = Proven(record_path(cache, digest), options.threads)
    proven.verify(folder, manifest.files)
    packed = packed_files(cache, digest)
    if packed and not proven.knows(packed):
        log.warning("packed weights of %s are not those that were kept: they are made anew", folder)
        forget(cache, digest)
        packed = []
    read_at_once(packed)
    opened = partial(_opened, folder, manifest, slots, capacity, options, proven.again)
    shard, bits = opened()
    if packed and proven.contradicts(shard.provider, bits):
        log.warning("packed weights of %s compute otherwise than before: they are made anew", folder)
        shard.close()
        forget(cache, digest)
        shard, bits = opened()
    try:
        shard.prepare()
        if not proven.held(shard.provider, bits):
            _prove(shard, bits, folder, manifest, proven)
    except BaseException:
        shard.close()
        forget(cache, digest)  # the shard may not be to blame
        raise
    proven.keep(packed_files(cache, digest))
    return shard


def _prove(shard: Runtime, bits: str, folder: Path, manifest: ShardManifest, proven: Proven) -> None:
    """Hold a shard to its whole test vector, and note that. Raises ``ShardError``."""
    hold_to_vector(shard, folder, manifest)
    if shard.hold_to_steps(_vector(folder, manifest).inputs):
        proven.note(shard.provider, bits)
    else:
        log.info("%s replays steps one by one: in chunks they round otherwise on %s", folder, shard.provider)


def _opened(
    folder: Path, manifest: ShardManifest, slots: int, capacity: int, options: RuntimeOptions, again: bool
) -> tuple[Runtime, str]:
    """A shard, and the bits of its first steps. ``again``: it was loaded here before, and may be once more."""
    inputs = _vector(folder, manifest).inputs
    shard = _open(folder, manifest, slots, capacity, options, again)
    try:
        return shard, _bits(shard, inputs)
    except BaseException:
        shard.close()
        raise


class _Vector(NamedTuple):
    """A shard's test vector."""

    inputs: NDArray[Any]
    expected: NDArray[Any]
    """Activations of all positions, or of a last shard logits after the last few."""


def _vector(folder: Path, manifest: ShardManifest) -> _Vector:
    with np.load(folder / manifest.test_vector.file) as vector:
        expected: NDArray[Any] = vector["expected"]
        return _Vector(vector["input"], np.atleast_2d(expected))


def _bits(shard: Runtime, inputs: NDArray[Any]) -> str:
    """A digest of what the first steps of a test vector compute, of which each reads what those before it wrote."""
    digest, last = hashlib.sha256(), min(len(inputs), _STEPS) - 1
    for i in range(last + 1):
        digest.update(shard.decode(0, [i], inputs[i : i + 1], i == last).tobytes())
    shard.release(0)
    return digest.hexdigest()


def hold_to_vector(shard: Runtime, folder: Path, manifest: ShardManifest) -> None:
    """Raises ``ShardError`` where the shard does not compute what its test vector wants."""
    inputs, expected = _vector(folder, manifest)
    computed = _computed(shard, inputs)
    shard.release(0)
    if shard.info.last:
        error = logits_deviation(computed[-len(expected) :], expected)
    else:
        error = deviation(inputs, computed, expected)
    if not error <= manifest.test_vector.tolerance:  # a NaN is refused as well
        raise ShardError(
            f"{folder} computes wrong results on {shard.provider}: relative error {error:.3g} on its test "
            f"vector, allowed is {manifest.test_vector.tolerance:.3g}"
        )


def _computed(shard: Runtime, inputs: NDArray[Any]) -> NDArray[Any]:
    """As in a session: a chunk reads what a step wrote, and a step what both did. Activations of all positions, or of a last
    shard logits after each of the three."""
    last, parts = len(inputs) - 1, []
    if last > 0:
        parts.append(shard.decode(0, [0], inputs[:1]).copy())
    if last > 1:
        parts.append(shard.prefill(0, 1, inputs[1:last]).copy())
    parts.append(shard.decode(0, [last], inputs[last:]).copy())
    return np.concatenate(parts)


def _open(
    folder: Path, manifest: ShardManifest, slots: int, capacity: int, options: RuntimeOptions, again: bool
) -> Runtime:
    if manifest.runtime == "onnx":
        from node_agent.adapters.onnx_runtime import OnnxShard

        return OnnxShard(folder, manifest, slots=slots, capacity=capacity, options=options, keep=again)
    from node_agent.adapters.static_runtime import StaticShard

    if manifest.runtime == "onnxstd":
        from node_agent.adapters.onnx_static_engine import OnnxStaticEngine

        engine: Engine = OnnxStaticEngine(folder, manifest.files, options)
    else:
        from node_agent.adapters.litert_engine import open_engine

        engine = open_engine(folder, folder / LITERT_GRAPH_FILE, manifest.digest, options)
    return StaticShard(folder, manifest, engine, slots=slots, capacity=capacity)
