"""Where things are kept unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def default_home() -> Path:
    """``MESH_HOME``, else the user's data directory."""
    home = os.environ.get("MESH_HOME")
    if home:
        return Path(home)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local/share") / "inference-mesh"
