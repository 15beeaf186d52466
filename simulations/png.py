"""Plots as PNG files, drawn by matplotlib where it is installed (``pip install inference-mesh[simulate]``)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from mesh.errors import ConfigError
from simulations.plots import COLOURS, Plot

_DPI = 120
_INCHES = (8.0, 2.6)


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """A file for each; raises ``ConfigError`` where matplotlib is missing."""
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError(
            "--png needs matplotlib: pip install 'inference-mesh[simulate]'; --page needs nothing"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots:
        drawn = figure.Figure(figsize=_INCHES, layout="constrained")
        axes = drawn.add_subplot()
        for number, line in enumerate(plot.lines):
            values = [float("nan") if v is None else v for v in line.values]
            axes.plot(line.at, values, color=COLOURS[number % len(COLOURS)], label=line.name, linewidth=1.3)
        axes.set_title(plot.title, loc="left", fontsize=10)
        axes.set_xlabel(plot.unit)
        axes.set_ylim(0, plot.most * 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        if len(plot.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        paths.append(folder / f"{re.sub('[^a-z0-9]+', '-', plot.title.lower()).strip('-')}.png")
        drawn.savefig(paths[-1], dpi=_DPI)
    return paths
