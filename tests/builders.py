"""A valid thing in one call: nodes, shards, orders, frames, tiny models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mesh.capabilities import Capabilities, Cpu, Disk
from mesh.messages import Frame, Open
from mesh.session_events import SessionOrder
from mesh.types import (
    Address,
    Digest,
    Epoch,
    LayeredRoute,
    LayerRange,
    ModelRef,
    ModelShape,
    NodeId,
    Sampling,
    SessionId,
    ShardInfo,
    Stage,
)
from scheduler.cluster import ClusterSnapshot, Node, NodeSeen, Replica, ReplicaState

OWNER = NodeId("n-owner")
ADDRESS = Address("127.0.0.1:7070")
SESSION = SessionId("ab" * 16)
CAPABILITIES = Capabilities(Cpu(2, 2.0), Disk(1 << 36, 1 << 35))
SHAPE = ModelShape(ModelRef("tiny", Digest("0" * 64)), 6, 8, 100, 256)
GREEDY = Sampling(seed=1)


def shard(start: int = 0, end: int = 6, shape: ModelShape = SHAPE) -> ShardInfo:
    digest = Digest(f"{start:02x}{end:02x}" * 16)
    return ShardInfo(shape, LayerRange(start, end), "onnx", "int8", digest, 1000, 10)


def route(*cuts: int) -> LayeredRoute:
    """Stages between the cuts, each on a node of its own."""
    edges = [0, *cuts, 6]
    return LayeredRoute(
        tuple(
            Stage(NodeId(f"n{i}"), Address(f"10.0.0.{i}:7070"), LayerRange(a, b), shard(a, b).digest)
            for i, (a, b) in enumerate(pairwise(edges))
        )
    )


def opening(**changes: Any) -> Open:
    base = Open(
        session=SESSION,
        epoch=Epoch(1, OWNER),
        position=0,
        route=route(2, 4),
        stage=0,
        owner_address=ADDRESS,
        positions=32,
        window=4,
        deadline_ms=1000,
        prompt=(1, 2, 3),
        generated=(),
        sampling=GREEDY,
    )
    return replace(base, **changes)


def frame(position: int = 0, length: int = 1, **changes: Any) -> Frame:
    base = Frame(SESSION, Epoch(1, OWNER), position, length, True, None, arrived_ns=1)
    return replace(base, **changes)


def order(**changes: Any) -> SessionOrder:
    base = SessionOrder(
        session=SESSION,
        prompt=tuple(range(10)),
        sampling=GREEDY,
        tokens_max=5,
        stop_tokens=frozenset({99}),
        positions_max=64,
        deadline_ns=1_000_000_000,
        chunk=4,
        window=2,
        step_timeout_ns=100_000_000,
    )
    return replace(base, **changes)


def node(name: str, *shards: ShardInfo, sessions: int = 0, **changes: Any) -> Node:
    replicas = tuple(Replica(s, ReplicaState.SERVING, sessions=sessions, slots=16) for s in shards)
    base = Node(
        NodeId(name),
        name,
        Address(f"{name}:1"),
        Address(f"{name}:2"),
        CAPABILITIES,
        1 << 30,
        1 << 30,
        replicas,
    )
    return replace(base, **changes)


def cluster(*nodes: Node) -> ClusterSnapshot:
    snapshot = ClusterSnapshot()
    for each in nodes:
        snapshot = snapshot.apply(NodeSeen(each))
    return snapshot


VOCABULARY = 320


def write_gguf(
    path: Path,
    *,
    family: str = "llama",
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    feed_forward: int = 96,
    tied: bool = True,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    seed: int = 0,
    context: int = 256,
) -> Path:
    """A tiny random model of the family, its tokenizer one token a byte."""
    import gguf

    width = heads * head_dim
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    merge = _letters()[40:42]
    letters = [*_letters(), "".join(merge)]
    tokens = letters + [f"<{i}>" for i in range(VOCABULARY - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(letters) + [3] * (VOCABULARY - len(letters)))
    writer.add_token_merges([" ".join(merge)])
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")

    def add(name: str, *shape: int, scale: float = 0.1, shift: float = 0.0) -> None:
        values = (random.standard_normal(shape) * scale + shift).astype(np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
            return
        quantization = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(values, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)

    add("token_embd.weight", VOCABULARY, width, scale=1.0)
    if not tied:
        add("output.weight", VOCABULARY, width)
    add("output_norm.weight", width, shift=1.0)
    q, kv = heads * head_dim, kv_heads * head_dim
    for i in range(layers):
        add(f"blk.{i}.attn_norm.weight", width, shift=1.0)
        add(f"blk.{i}.ffn_norm.weight", width, shift=1.0)
        for role, rows in (("q", q), ("k", kv), ("v", kv)):
            add(f"blk.{i}.attn_{role}.weight", rows, width)
            if family == "qwen2":
                add(f"blk.{i}.attn_{role}.bias", rows)
        add(f"blk.{i}.attn_output.weight", width, q)
        add(f"blk.{i}.ffn_gate.weight", feed_forward, width)
        add(f"blk.{i}.ffn_up.weight", feed_forward, width)
        add(f"blk.{i}.ffn_down.weight", width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _letters() -> list[str]:
    from node_agent.shards.tokenizer import _bytes_of_letters

    return list(_bytes_of_letters())
