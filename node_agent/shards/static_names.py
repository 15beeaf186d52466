"""Names of a static shard's graphs, which a node without the packages that make such shards reads as well."""

from __future__ import annotations


def run_name(chunk: int, bucket: int) -> str:
    """Of a chunk of one session."""
    return f"run_{chunk}_{bucket}"


def batch_name(rows: int, bucket: int) -> str:
    """Of a step of several sessions."""
    return f"batch_{rows}_{bucket}"


HEAD_NAME = "head"
