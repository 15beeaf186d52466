"""What a model asks of the nodes that host it: bytes by layer, and KV memory for the sessions promised."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh.types import LayerRange, ModelShape


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """Bytes of a model's parts for one runtime and quantization. ``shard_bytes`` every shard has, whatever
    its layers; ``kv_layer_bytes`` a position takes in a layer."""

    shape: ModelShape
    runtime: str
    quantization: str
    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    kv_layer_bytes: int
    shard_bytes: int = 0
    tied_bytes: int = 0
    """Of the embedding, where the head is the same matrix: one shard with both has it once."""

    def scaled(self, quantization: str, share: float) -> ModelDemand:
        """About what it would ask in another quantization, whose weights take ``share`` of the bytes."""
        return replace(
            self,
            quantization=quantization,
            layer_bytes=int(self.layer_bytes * share),
            embedding_bytes=int(self.embedding_bytes * share),
            head_bytes=int(self.head_bytes * share),
            tied_bytes=int(self.tied_bytes * share),
        )

    @property
    def layers(self) -> int:
        return self.shape.layers

    def weights(self, layers: LayerRange) -> int:
        """Bytes of a shard's files."""
        first, last = layers.start == 0, layers.end == self.layers
        edges = (self.embedding_bytes if first else 0) + (self.head_bytes if last else 0)
        both = self.tied_bytes if first and last else 0
        return self.shard_bytes + len(layers) * self.layer_bytes + edges - both

    def memory(self, layers: LayerRange, positions: int) -> int:
        """With KV memory for so many positions, all sessions together."""
        return self.weights(layers) + positions * len(layers) * self.kv_layer_bytes
