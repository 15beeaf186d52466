"""Names of a static shard's graphs, which a node without the packages that make such shards reads as well."""

from __future__ import annotations

from collections.abc import Collection


def graph_name(kind: str, size: int, bucket: int) -> str:
    """``kind``: ``run``, ``steps`` or ``batch``."""
    return f"{kind}_{size}_{bucket}"


def run_name(chunk: int, bucket: int) -> str:
    """Of a chunk of one session."""
    return graph_name("run", chunk, bucket)


def steps_name(chunk: int, bucket: int) -> str:
    """Of a chunk that has the bits of single steps."""
    return graph_name("steps", chunk, bucket)


def batch_name(rows: int, bucket: int) -> str:
    """Of a step of several sessions."""
    return graph_name("batch", rows, bucket)


HEAD_NAME = "head"


def head_name(rows: int) -> str:
    """Of the head, of a last shard."""
    return HEAD_NAME if rows == 1 else f"{HEAD_NAME}_{rows}"


def _of_head(name: str) -> bool:
    return name.partition("_")[0] == HEAD_NAME


def needed_first(names: Collection[str]) -> list[str]:
    """What a shard that is known here computes at a load: the smallest bucket's step, and the head."""
    return [name for name in by_bucket(names)[0] if name.startswith("run_1_") or name == HEAD_NAME]


def by_bucket(names: Collection[str]) -> list[list[str]]:
    """Graphs by the bucket that they are for, from the smallest, with which the head stands: a session begins with those, and
    the others are wanted when it outgrows them."""
    buckets: dict[int, list[str]] = {}
    for name in names:
        if not _of_head(name):
            buckets.setdefault(int(name.rpartition("_")[2]), []).append(name)
    groups = [buckets[b] for b in sorted(buckets)] or [[]]
    groups[0] += [name for name in names if _of_head(name)]
    return groups
