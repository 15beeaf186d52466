"""The model of a scenario: what it weighs, how fast nodes compute it, and a loader that takes time instead of reading files."""

from __future__ import annotations

import asyncio

from mesh.capabilities import Speed
from mesh.errors import InputError
from mesh.types import Digest, LayerRange, ModelRef, ModelShape, ShardInfo
from node_agent.lease import ShardKey
from scheduler.demand import ModelDemand
from scheduler.layer_speed import LayerSpeed, stage_speed
from scheduler.speed import EFFICIENCY
from simulations.compute import ModelledRuntime
from simulations.scenario import Model, time_ns

RUNTIME, QUANTIZATION = "onnx", "int8"
CONTEXT = 2048
_WIDTH = 576
_KV_LAYER_BYTES, _LAYER_BYTES, _EMBEDDING_BYTES = 1536, 3_600_000, 28_300_000
_TAIL = 1.4
_S = 1_000_000_000


class SimModel:
    """Sizes are those of SmolLM2-135M in int8, a layer; times come from the scenario."""

    def __init__(self, told: Model) -> None:
        self._told = told
        digest = Digest(f"{len(told.name):02x}" * 32)
        self.name = told.name
        self.shape = ModelShape(ModelRef(told.name, digest), told.layers, _WIDTH, told.vocabulary, CONTEXT)
        self.demand = ModelDemand(
            self.shape,
            RUNTIME,
            QUANTIZATION,
            _LAYER_BYTES,
            _EMBEDDING_BYTES,
            _EMBEDDING_BYTES,
            _KV_LAYER_BYTES,
            tied_bytes=_EMBEDDING_BYTES,
        )
        self.again = told.again
        self.load_s = time_ns(told.load) / _S

    def key(self, layers: LayerRange) -> ShardKey:
        """What a lease for these layers asks for."""
        return ShardKey(self.name, layers.start, layers.end, RUNTIME, QUANTIZATION)

    def info(self, layers: LayerRange) -> ShardInfo:
        """The shard of these layers."""
        digest = Digest(f"{layers.start:02x}{layers.end:02x}" * 16)
        weights, kv = self.demand.weights(layers), len(layers) * _KV_LAYER_BYTES
        return ShardInfo(self.shape, layers, RUNTIME, QUANTIZATION, digest, weights, kv)

    def speed(self, factor: float) -> LayerSpeed:
        """How fast a node computes its layers; 1 is a core of a small server."""
        told = self._told
        return LayerSpeed(
            self.shape.ref.digest,
            RUNTIME,
            QUANTIZATION,
            told.layer_us / factor,
            told.head_us / factor,
            told.row_share,
            told.prefill_us / factor,
            _TAIL,
            told.context_us / factor,
            told.prefill_context_us / factor,
        )

    def probed(self, factor: float) -> Speed:
        """What such a node's own probe would find, before it has run a layer."""
        per_us = _LAYER_BYTES / 1e3 / EFFICIENCY
        told = self._told
        return Speed(RUNTIME, per_us / told.layer_us * factor, 2 * per_us / told.prefill_us * factor)

    def demand_of(self, model: str, runtime: str, quantization: str) -> ModelDemand:
        """Raises ``InputError`` for any other."""
        if (model, runtime, quantization or QUANTIZATION) != (self.name, RUNTIME, QUANTIZATION):
            raise InputError(f"there is no model {model} in {quantization} here; there is {self.name}")
        return self.demand


class SimShards:
    """A ``node_agent.ports.ShardSource``."""

    def __init__(self, model: SimModel, factor: float) -> None:
        self._model, self._factor = model, factor

    async def find(self, key: ShardKey) -> ShardInfo:
        layers = LayerRange(key.start, key.end)
        if key != self._model.key(layers) or layers.end > self._model.shape.layers:
            raise InputError(f"there is no shard {key} here")
        return self._model.info(layers)

    async def load(self, key: ShardKey, slots: int, capacity: int) -> ModelledRuntime:
        info = await self.find(key)
        await asyncio.sleep(self._model.load_s)
        speed = stage_speed(info, self._model.speed(self._factor))
        return ModelledRuntime(info, slots, capacity, speed)
