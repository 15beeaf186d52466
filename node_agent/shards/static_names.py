"""Names of the graphs in a LiteRT shard's file, which a node without the packages that make such files reads as well."""

from __future__ import annotations


def run_name(chunk: int, bucket: int) -> str:
    """Of the signature."""
    return f"run_{chunk}_{bucket}"


def batch_name(rows: int, bucket: int) -> str:
    """Of the signature for a step of several sessions."""
    return f"batch_{rows}_{bucket}"


HEAD_NAME = "head"
