"""The node's stable id and Ed25519 key, kept in its data directory from the first start.

The id of a new node is made from its public key, so that it can be proved once links are
authenticated. Until then the key only stands in the node's record.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mesh.errors import ConfigError
from mesh.types import NodeId
from node_agent.adapters import new_key
from node_agent.adapters.model_store import new_file

_ID_FILE = "node-id"
_KEY_FILE = "node-key.pem"
_PUBLIC_FILE = "node-key.pub"
_PUBLIC_BYTES = 32
_DRAW_S = 30


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """``public_key``: raw Ed25519, 32 bytes."""

    node: NodeId
    public_key: bytes


def node_identity(data_dir: Path) -> NodeIdentity:
    """Read identity and key, or make them and keep them; raises ``ConfigError`` when a file holds
    anything else."""
    public_key = _public_key(data_dir)
    path = data_dir / _ID_FILE
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        text = f"n-{hashlib.sha256(public_key).hexdigest()[:8]}"
        with new_file(path) as file:
            file.write(text.encode() + b"\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ConfigError(f"{path} holds {text[:40]!r}, which is no node id; remove it to draw a new one")
    return NodeIdentity(NodeId(text), public_key)


def _public_key(data_dir: Path) -> bytes:
    """Kept in a file of its own, so that the key itself is read only where something is signed."""
    key_path, public_path = data_dir / _KEY_FILE, data_dir / _PUBLIC_FILE
    if not key_path.exists():
        return _new_key(key_path, public_path)
    try:
        public_key = bytes.fromhex(public_path.read_text().strip())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{public_path} cannot be read ({error}); remove it and {key_path} to draw a new key"
        ) from None
    if len(public_key) != _PUBLIC_BYTES:
        raise ConfigError(f"{public_path} holds no Ed25519 key; remove it and {key_path} to draw a new one")
    return public_key


def _new_key(key_path: Path, public_path: Path) -> bytes:
    try:
        drawn = subprocess.run(
            [sys.executable, new_key.__file__], capture_output=True, timeout=_DRAW_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        raise ConfigError(f"no key could be drawn for this node: {said.decode()[-300:] or error}") from None
    public_hex, _, pem = drawn.partition(b"\n")
    public_key = bytes.fromhex(public_hex.decode())
    with new_file(public_path) as file:
        file.write(public_hex + b"\n")
    with new_file(key_path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(pem)
    return public_key
