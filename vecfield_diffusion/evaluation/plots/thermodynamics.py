"""The figure of energy, heat and work along the paths of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vecfield_diffusion.evaluation.plots.methods import panels
from vecfield_diffusion.evaluation.plots.style import WIDE, Floats, save

#: What is drawn of the curves, and how.
DRAWN = {"energy": "-", "heat": "--", "work": "-."}


def figure_thermodynamics(
    path: Path, levels: Sequence[float], curves: Mapping[str, Sequence[float]], forward: Floats, reverse: Floats
) -> None:
    """Draws curves over noise levels, and the work of annealed paths both ways.

    Arguments:
        path: The file; its ending says the format.
        levels: Noise levels `(n + 1,)`, in standard deviations of the data.
        curves: Among others energy, heat and work at each, in nats for each value.
        forward: Work of paths down, `(M,)`, in nats.
        reverse: Work of paths up, `(M,)`.
    """
    figure, (left, right) = panels(2, 4.0, WIDE)
    for name, line in DRAWN.items():
        left.semilogx(levels, curves[name], line, label=name)
    left.invert_xaxis()
    left.set(xlabel="noise level [standard deviations of the data]", ylabel="nats for each value")
    edges = np.histogram_bin_edges(np.concatenate([forward, -reverse]), bins=20)
    right.hist(forward, edges, alpha=0.6, label="down")
    right.hist(-reverse, edges, alpha=0.6, label="up, sign turned")
    right.set(xlabel="work of annealed paths [nats]", ylabel="paths")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    save(figure, path)
