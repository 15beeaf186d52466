"""Another Python, with packages that ours cannot have, that loads shards from this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_LOAD = """
import json, sys
from pathlib import Path
import numpy as np
from mesh.errors import MeshError
from node_agent.adapters.shard_loader import load_shard
from node_agent.ports import RuntimeOptions
from node_agent.shards.manifest import MANIFEST_FILE, ShardManifest, read_document
folder, providers = Path(sys.argv[1]), tuple(sys.argv[3].split(","))
manifest = read_document((folder / MANIFEST_FILE).read_bytes(), ShardManifest, "shard")
try:
    options = RuntimeOptions(providers, threads=1)
    shard = load_shard(folder, manifest, slots=2, capacity=int(sys.argv[4]), options=options)
except MeshError as error:
    print(json.dumps({"error": str(error)}))
else:
    tokens = np.array(json.loads(sys.argv[2]), dtype=np.int64)
    logits = shard.prefill(1, 0, tokens[:-1]).copy()
    logits = shard.decode(1, [len(tokens) - 1], tokens[-1:])
    print(json.dumps({"provider": shard.provider, "logits": logits.tolist()}))
"""


def install(folder: Path, *packages: str) -> Path:
    """A new environment's Python; skips where the packages are not to be had."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin/python"
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"{packages[0]} cannot be installed here: {done.stderr.strip()[-200:]}")
    return python


def run(python: Path, code: str, *words: str) -> Any:
    """What a piece of code prints as its last line, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [str(python), "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(
    python: Path,
    shard: Path,
    tokens: list[int],
    provider: str = "CPUExecutionProvider",
    capacity: int = 128,
) -> dict[str, Any]:
    """``provider`` and ``logits`` after the tokens, or the ``error`` for which the shard was refused."""
    told: dict[str, Any] = run(python, _LOAD, str(shard), json.dumps(tokens), provider, str(capacity))
    return told
