"""The picture of drifters: their ways over the speed of the mean, where they end, and the regions that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.evaluation.dispersal import Dispersal, Goal
from vecfield_diffusion.evaluation.lagrangian import offsets, on_axes
from vecfield_diffusion.evaluation.plots.maps import draw_field
from vecfield_diffusion.evaluation.plots.style import (
    INK,
    Coordinates,
    colour_bar,
    label_axes,
    look_of,
    new_figure,
    save,
)
from vecfield_diffusion.physics.grid import Grid

WAY, END, TRUE, GOAL = "0.25", "#c0392b", "#1f618d", "#117a65"
#: Drifters above which lines and ends fade, so that regions and the map stay in sight.
MANY = 60
#: Points along each side of the grid that regions are drawn on.
FINE = 120
#: Cells around the drifters that are shown, at least, and as a share of their extent.
MARGIN, SHARE = 3.0, 0.25
WIDTH = 8.0


def figure_drift(
    path: Path,
    mean: Tensor,
    tracks: Tensor,
    grid: Grid,
    coordinates: Coordinates,
    *,
    spread: Dispersal | None,
    levels: Sequence[float],
    truth: Tensor | None,
    goal: Goal | None,
    date: str,
    hours: float,
    units: str,
) -> None:
    """Draws drifters from one place into a file.

    Arguments:
        path: The file to write; png, pdf or svg.
        mean: The mean field `(2, H, W)` of the time that they drift.
        tracks: Their ways `(M, T, n, 2)` in cells.
        grid: The grid.
        coordinates: Where the cells lie.
        spread: The density of their ends, in kilometres from where the first of them starts; None for too few.
        levels: The probabilities of the regions.
        truth: The way of a drifter in the truth, `(T, 2)` in cells.
        goal: The place that they may come to.
        date: When they start, in words.
        hours: For how long they drift.
        units: Of the field.
    """
    field = mean.numpy()
    look = look_of(field, grid, coordinates=coordinates)
    figure = new_figure(WIDTH, WIDTH * 0.95)
    axis, bar = figure.subplots(2, 1, height_ratios=[30, 1])
    draw_field(axis, f"{date}, {hours:g} hours", field, look.valid, look)
    ways = tracks.movedim(1, 2).reshape(-1, tracks.shape[1], 2)
    faint = 0.6 * min(1.0, MANY / len(ways)) ** 0.5
    axis.add_collection(LineCollection(list(_on_map(ways, coordinates)), colors=WAY, linewidths=0.4, alpha=faint))
    axis.plot(*_on_map(ways[:, -1], coordinates).T, ".", color=END, markersize=3, alpha=min(1.0, 2 * faint))
    axis.plot(*_on_map(ways[0, 0], coordinates), "o", color="white", markeredgecolor=INK, markersize=7)
    known = [Line2D([], [], color=WAY, label="members"), Line2D([], [], color=END, marker=".", ls="", label="ends")]
    if spread is not None:
        _regions(axis, spread, ways[0, 0], grid, coordinates, levels)
        known.append(Line2D([], [], color=END, label=f"regions of {', '.join(f'{level:.0%}' for level in levels)}"))
    shown = [ways.flatten(0, 1)]
    if truth is not None:
        axis.plot(*_on_map(truth, coordinates).T, "-", color=TRUE, linewidth=1.8)
        known.append(Line2D([], [], color=TRUE, label="truth"))
        shown.append(truth)
    if goal is not None:
        arrived = float(goal.arrivals(tracks).mean())
        axis.plot(*_on_map(goal.edge, coordinates).T, "-", color=GOAL, linewidth=1.5)
        known.append(Line2D([], [], color=GOAL, label=f"where {arrived:.0%} {goal.words}"))
        shown.append(goal.edge)
    _zoom(axis, torch.cat(shown), grid, coordinates)
    axis.legend(handles=known, loc="best", fontsize=8, framealpha=0.85)
    label_axes(axis, look, left=True, bottom=True, width=WIDTH)
    colour_bar(figure, bar, look.norm, look.colours, ("speed of the mean", units))
    save(figure, path)


def _on_map(places: Tensor, coordinates: Coordinates) -> NDArray:
    """Places `(..., 2)` in cells as coordinates of the map."""
    return on_axes(places, coordinates.x, coordinates.y)


def _zoom(axis: Axes, places: Tensor, grid: Grid, coordinates: Coordinates) -> None:
    """Shows what is around the drifters, not beyond the field."""
    known = places[places.isfinite().all(dim=-1)]
    low, high = known.amin(dim=0), known.amax(dim=0)
    centre, half = (low + high) / 2, float(((high - low).max() * (0.5 + SHARE)).clamp(min=MARGIN))
    ends = torch.tensor([grid.shape[1] - 0.5, grid.shape[0] - 0.5])
    corners = torch.stack(((centre - half).clamp(min=-0.5), torch.minimum(centre + half, ends)))
    (left, bottom), (right, top) = _on_map(corners, coordinates)
    axis.set_xlim(*sorted((left, right)))
    axis.set_ylim(*sorted((bottom, top)))


def _regions(
    axis: Axes, spread: Dispersal, start: Tensor, grid: Grid, coordinates: Coordinates, levels: Sequence[float]
) -> None:
    """Draws the edges of the regions."""
    ends = spread.ends * 1000 / torch.stack((grid.dx[int(start[1].round())], grid.dy[int(start[1].round())]))
    low, high = ends.amin(dim=0), ends.amax(dim=0)
    reach = 0.5 * (high - low).max() + 1.0
    columns, rows = (start[k] + torch.linspace(low[k] - reach, high[k] + reach, FINE).double() for k in range(2))
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    density = spread.density(offsets(start, cells, grid) / 1000).numpy()
    x, y = _on_map(cells, coordinates).transpose(2, 0, 1)
    edges = sorted({spread.level(level) for level in levels})
    axis.contour(x, y, density, levels=edges, colors=END, linewidths=np.linspace(1.0, 1.8, len(edges)), zorder=3)
