"""The panels of maps: colour and arrows of a field, scalars, the coast, and the words for cells that show nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.quiver import Quiver

from vecfield_diffusion.evaluation.plots.coast import coastlines
from vecfield_diffusion.evaluation.plots.style import (
    BLANK,
    INK,
    LAND,
    NARROW,
    UNKNOWN,
    Bools,
    Floats,
    Look,
    label_axes,
    new_figure,
    pretty,
    scalar,
)


def draw_field(axis: Axes, name: str, field: Floats, shown: Bools, look: Look) -> Quiver:
    """Draws the cells `shown` of a field `(2, H, W)`, colour and arrows, over land, and returns the arrows."""
    values = np.where(shown, scalar(field, look.grid, look.colour), np.nan)
    draw_scalar(axis, name, values, look, look.norm, look.colours)
    return draw_arrows(axis, np.where(shown, field, np.nan), look)


def draw_scalar(axis: Axes, name: str, values: Floats, look: Look, norm: Normalize, colours: Colormap) -> None:
    """Draws values `(H, W)`: cells as squares, missing ones blank, north up, lengths true on the ground."""
    left, right, first, last = look.extent
    aspect = look.tallness * abs(right - left) / abs(last - first)
    place = {"extent": look.extent, "origin": "lower", "interpolation": "nearest", "aspect": aspect}
    axis.set_facecolor(BLANK)
    outside = np.where(look.valid, np.nan, 0.0 if look.land is None else 1.0 - look.land)
    axis.imshow(outside, cmap=ListedColormap([LAND, UNKNOWN]), norm=Normalize(0, 1), **place)
    axis.imshow(values, norm=norm, cmap=colours, **place)
    if look.geographic and (lines := coastlines(look.extent)):
        axis.add_collection(LineCollection(lines, colors=INK, linewidths=0.6), autolim=False)
    axis.set_xlim(*sorted((left, right)))
    axis.set_ylim(*sorted((first, last)))
    axis.set_title(name, fontsize=10)


def draw_arrows(axis: Axes, field: Floats, look: Look) -> Quiver:
    """Draws an arrow in every block of cells that has a known one, at that nearest to the centre of the block.

    Speeds beyond the end of the scale have the arrow of that end.
    """
    (height, width), step = look.grid.shape, look.step
    row, column = np.nonzero(np.isfinite(field).all(axis=0))
    off_centre = np.hypot(row % step - (step - 1) / 2, column % step - (step - 1) / 2)
    order = np.argsort(off_centre, kind="stable")
    _, first = np.unique((row // step * width + column // step)[order], return_index=True)
    row, column = row[order[first]], column[order[first]]
    left, right, bottom, top = look.extent
    x = left + (column + 0.5) * (right - left) / width
    y = bottom + (row + 0.5) * (top - bottom) / height
    length = look.arrow * width / (0.9 * step)  # the speed of an arrow as long as the axis
    u, v = field[:, row, column]
    shorter = np.minimum(1.0, look.longest / np.maximum(np.hypot(u, v), 1e-30))
    style = {"color": INK, "pivot": "mid", "width": 0.0045, "headwidth": 3.5, "headlength": 4.5, "minlength": 0.5}
    return axis.quiver(x, y, u * shorter, v * shorter, scale=length, scale_units="width", **style)


def arrow_key(figure: Figure, arrows: Quiver, look: Look, units: str) -> None:
    """Draws the key of the arrows in the upper right corner: one of a round speed, with this speed."""
    speed = round_speed(look.arrow)
    label = f"{speed:g} {pretty(units)}"
    place = {"coordinates": "figure", "labelpos": "W", "labelsep": 0.06, "fontproperties": {"size": 9}}
    key = arrows.axes.quiverkey(
        arrows, 1 - 0.3 / figure.get_figwidth(), 1 - 0.14 / figure.get_figheight(), speed, label, **place
    )
    key.set_in_layout(False)


def round_speed(speed: float) -> float:
    """Returns the nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(speed))
    return float(min((1, 2, 5, 10), key=lambda digit: abs(np.log(digit * power / speed))) * power)


def explain_blanks(figure: Figure, look: Look, hidden: bool) -> None:
    """Explains below the panels what grey, pale and blank cells are, as far as there are any.

    Arguments:
        figure: Where.
        look: What is land.
        hidden: Whether a panel has cells that were not observed.
    """
    outside = ~look.valid
    if look.land is None:
        words = "land, or never measured" if look.geographic else "outside the domain"
        entries = [(words, LAND, outside.any())]
    else:
        entries = [("land", LAND, (outside & look.land).any())]
        entries.append(("never measured", UNKNOWN, (outside & ~look.land).any()))
    entries.append(("not observed", BLANK, hidden))
    patches = [
        Patch(facecolor=colour, edgecolor="0.4", linewidth=0.5, label=word) for word, colour, has in entries if has
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def lay_out(count: int, look: Look, *, bars: int, columns: int, width: float) -> tuple[Figure, list[Axes], list[Axes]]:
    """Returns a figure with maps in reading order and colour bars below.

    Arguments:
        count: How many maps.
        look: Their shape.
        bars: How many colour bars, side by side.
        columns: Maps in a row.
        width: Of the figure in inches.
    """
    rows, across = -(-count // columns), width / columns * 0.9
    panel = across * min(look.tallness, 1.6)
    below = 1 if columns >= bars and width > NARROW else bars  # bars above each other where there is little room
    figure = new_figure(width, rows * (panel + 0.32) + 0.55 * below + 0.75)
    cells = figure.add_gridspec(rows + below, columns, height_ratios=[*[panel] * rows, *[0.11] * below])
    axes = [figure.add_subplot(cells[number // columns, number % columns]) for number in range(count)]
    for number, axis in enumerate(axes):
        label_axes(axis, look, left=number % columns == 0, bottom=number + columns >= count, width=across)
    if below == 1:
        edges = [-(-k * columns // bars) for k in range(bars + 1)]
        return figure, axes, [figure.add_subplot(cells[rows, low:high]) for low, high in pairwise(edges)]
    return figure, axes, [figure.add_subplot(cells[rows + k, :]) for k in range(bars)]
