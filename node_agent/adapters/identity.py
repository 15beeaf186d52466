"""The node's stable id, kept in its data directory from the first start."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from mesh.errors import ConfigError
from mesh.types import NodeId
from node_agent.adapters.model_store import new_file

_FILE = "node-id"


def node_identity(data_dir: Path) -> NodeId:
    """Read the id, or draw one and keep it; raises ``ConfigError`` when the file holds anything else."""
    path = data_dir / _FILE
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        text = f"n-{secrets.token_hex(4)}"
        with new_file(path) as file:
            file.write(text.encode() + b"\n")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ConfigError(f"{path} holds {text[:40]!r}, which is no node id; remove it to draw a new one")
    return NodeId(text)
