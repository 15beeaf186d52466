"""What a GGUF's metadata says of the network: the Llama family, Qwen2 included.

Everything that the graph builder and the reference need, as one frozen value; an architecture
that we do not build is refused here, by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import ModelFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from node_agent.shards.gguf_file import TensorInfo

SUPPORTED = ("llama", "qwen2")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """``kind`` is ``none``, ``linear`` or ``yarn``; llama3's factors come as a tensor instead."""

    kind: str = "none"
    factor: float = 1.0
    context_original: int = 0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shape and constants of a Llama-like decoder."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context_max: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling
    rope_interleaved: bool
    """Pairs (0,1), (2,3), ... rotate together: Llama GGUFs hold Q and K rows permuted for that."""
    qkv_bias: bool
    head_tied: bool
    """The output head shares the embedding's tensor."""

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of float32 keys and values that one position takes in one layer."""
        return 2 * 4 * self.kv_heads * self.head_dim


def architecture_of(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Architecture:
    """Read the architecture; raises ``ModelFileError`` naming what is missing or unsupported."""
    family = metadata.get("general.architecture")
    if family not in SUPPORTED:
        raise ModelFileError(
            f"the architecture {family!r} is not supported; supported are {', '.join(SUPPORTED)}"
        )

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{family}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFileError(f"the GGUF field {family}.{key} is {value!r}, not a number")
        return value

    def positive(key: str, default: float | None = None) -> int:
        value = number(key, default)
        if value != int(value) or not 0 < value < 2**31:
            raise ModelFileError(f"the GGUF field {family}.{key} is {value!r}; it must be a count above 0")
        return int(value)

    if number("expert_count", 0):
        raise ModelFileError("mixture-of-experts models are not supported: expert_count is set")
    width, heads = positive("embedding_length"), positive("attention.head_count")
    kv_heads = positive("attention.head_count_kv", heads)
    head_dim = positive("attention.key_length", width // heads)
    if heads % kv_heads:
        raise ModelFileError(f"{heads} heads cannot share {kv_heads} key/value heads evenly")
    if positive("attention.value_length", head_dim) != head_dim:
        raise ModelFileError("keys and values of different length are not supported")
    if positive("rope.dimension_count", head_dim) != head_dim:
        raise ModelFileError("rotary embedding over a part of the head is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError("the GGUF file has no tensor token_embd.weight; it is no whole language model")
    return Architecture(
        family=family,
        layers=positive("block_count"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=positive("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context_max=positive("context_length"),
        norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10_000.0),
        rope_scaling=_scaling(metadata, family, number),
        rope_interleaved=family == "llama",
        qkv_bias="blk.0.attn_q.bias" in tensors,
        head_tied="output.weight" not in tensors,
    )


def _scaling(metadata: Mapping[str, Any], family: str, number: Any) -> RopeScaling:
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelFileError(f"rope scaling {kind!r} is not supported (none, linear and yarn are)")
    if kind == "none":
        # Files of before 2024 say only the linear factor.
        factor = number("rope.scale_linear", 1.0)
        return RopeScaling("linear", factor) if factor not in (0.0, 1.0) else RopeScaling()
    return RopeScaling(
        kind,
        number("rope.scaling.factor", 1.0) or 1.0,
        int(number("rope.scaling.original_context_length", number("context_length"))),
        number("rope.scaling.attn_factor", 1.0),
    )


def rope_tables(
    spec: Architecture, positions: int, factors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables, each float32 ``[positions, head_dim / 2]``.

    ``factors`` is llama3's ``rope_freqs.weight`` (``[head_dim / 2]``, divides the frequencies).
    Linear scaling divides positions; YaRN blends both per frequency (Peng et al. 2023, eq. 23,
    with beta 32 and 1, and the attention factor 0.1 ln(s) + 1 folded into the tables).
    """
    half = spec.head_dim // 2
    frequency = spec.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling, magnitude = spec.rope_scaling, 1.0
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "yarn":

        def rotation_index(turns: float) -> float:
            return (
                spec.head_dim
                * math.log(scaling.context_original / (turns * 2 * math.pi))
                / (2 * math.log(spec.rope_theta))
            )

        low = max(math.floor(rotation_index(32.0)), 0)
        high = min(math.ceil(rotation_index(1.0)), spec.head_dim - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
        frequency = frequency / scaling.factor * ramp + frequency * (1.0 - ramp)
        magnitude = scaling.attention_factor * (0.1 * math.log(scaling.factor) + 1.0)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequency[None, :]
    return (
        (np.cos(angles) * magnitude).astype(np.float32),
        (np.sin(angles) * magnitude).astype(np.float32),
    )


def layer_tensors(spec: Architecture, layer: int) -> dict[str, str]:
    """Role -> GGUF tensor name of one layer."""
    prefix = f"blk.{layer}."
    roles = {
        "attn_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "o": "attn_output.weight",
        "ffn_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
    }
    if spec.qkv_bias:
        roles |= {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
    return {role: prefix + name for role, name in roles.items()}


def layer_shapes(spec: Architecture) -> dict[str, tuple[int, ...]]:
    """Role -> shape that the tensor of that role must have."""
    d, q, kv, ffn = (
        spec.width,
        spec.heads * spec.head_dim,
        spec.kv_heads * spec.head_dim,
        spec.feed_forward,
    )
    return {
        "attn_norm": (d,),
        "q": (q, d),
        "k": (kv, d),
        "v": (kv, d),
        "o": (d, q),
        "ffn_norm": (d,),
        "gate": (ffn, d),
        "up": (ffn, d),
        "down": (d, ffn),
        "q_bias": (q,),
        "k_bias": (kv,),
        "v_bias": (kv,),
    }


def check_tensors(spec: Architecture, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ``ModelFileError`` unless every tensor that the network needs is there in its shape."""
    shapes = layer_shapes(spec)
    wanted: dict[str, tuple[int, ...]] = {"output_norm.weight": (spec.width,)}
    for name in ("token_embd.weight", *(() if spec.head_tied else ("output.weight",))):
        wanted[name] = (spec.vocabulary, spec.width)
    for layer in range(spec.layers):
        for role, name in layer_tensors(spec, layer).items():
            wanted[name] = shapes[role]
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"the GGUF file has no tensor {name}")
        if tensor.shape != shape:
            raise ModelFileError(
                f"tensor {name} has the shape {list(tensor.shape)}, the metadata asks for {list(shape)}"
            )
