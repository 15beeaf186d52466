"""Shards from this node's disk into a runtime; what is not there yet is made from the model's file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from mesh.capabilities import Capabilities
from mesh.errors import InputError, ShardError
from mesh.types import ShardInfo
from node_agent.adapters.model_store import ModelStore
from node_agent.config import AgentConfig
from node_agent.lease import ShardKey
from node_agent.ports import Runtime
from node_agent.shards.manifest import ShardManifest

RUNTIME = "onnx"


class ShardLoader:
    """A ``node_agent.ports.ShardSource`` over the model store and ONNX Runtime; its work is done on threads."""

    def __init__(
        self, config: AgentConfig, store: ModelStore, capabilities: Callable[[], Capabilities]
    ) -> None:
        self._config, self._store, self._capabilities = config, store, capabilities

    async def find(self, key: ShardKey) -> ShardInfo:
        _, manifest = await asyncio.to_thread(self._find, key)
        return manifest.info

    async def load(self, key: ShardKey, slots: int, capacity: int) -> Runtime:
        return await asyncio.to_thread(self._load, key, slots, capacity)

    def _find(self, key: ShardKey) -> tuple[Path, ShardManifest]:
        if key.runtime != RUNTIME:
            raise InputError(f"the runtime {key.runtime!r} is not in this agent; it has {RUNTIME}")
        folder = self._store.shard_folder(key.model, key.runtime, key.quantization, key.start, key.end)
        if not folder.exists():
            # Needs the packages of the extra "shard"; a node that lacks them gets its shards made.
            from node_agent.adapters.shard_maker import make_shard

            folder = make_shard(self._store, key.model, key.start, key.end, key.quantization)
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
        from node_agent.adapters.onnx_runtime import OnnxOptions, load_shard

        folder, manifest = self._find(key)
        # Left to itself, ONNX Runtime pins its threads to cores: on cores that others use as well, that
        # costs a fifth of the rate.
        threads = self._config.threads or self._capabilities().cpu.cores
        options = OnnxOptions(self._config.providers, threads)
        return load_shard(folder, manifest, slots=slots, capacity=capacity, options=options)
