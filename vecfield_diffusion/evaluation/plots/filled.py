"""Pictures of filled fields: what was known, what the ensemble gives, how far it is off and how sure it is.

Colour is the speed or the vorticity, on one scale for the truth, the mean and the members, which the truth sets (the
mean where it is unknown); arrows, at most one per block of cells, show the direction. The spread, the root of the
summed variances of both components, and the size of the error of the mean share a scale of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from vecfield_diffusion.evaluation.plots.maps import arrow_key, draw_field, draw_scalar, explain_blanks, lay_out
from vecfield_diffusion.evaluation.plots.style import (
    ARROWS,
    SPREAD,
    WIDE,
    Bools,
    Colour,
    Coordinates,
    Floats,
    Look,
    colour_bar,
    look_of,
    new_figure,
    png,
    save,
)
from vecfield_diffusion.physics.grid import Grid

#: Name, field `(2, H, W)` and shown cells `(H, W)` of a map.
Panel = tuple[str, Floats, Bools]


def figure_inpainting(
    path: str | Path,
    truth: ArrayLike | None,
    observed: ArrayLike,
    members: ArrayLike,
    grid: Grid,
    units: str = "m s-1",
    title: str = "",
    colour: Colour = "speed",
    coordinates: Coordinates | None = None,
    measured: ArrayLike | None = None,
    *,
    date: str = "",
    land: ArrayLike | None = None,
    readings: Mapping[str, ArrayLike] | None = None,
) -> None:
    """Draws the truth (if known), what was observed, the mean, members, the spread and the error into a file.

    Arguments:
        path: The file to write; png, pdf or svg.
        truth: The field `(2, H, W)`, NaN where unknown. One that is not known everywhere is not called the truth.
        observed: The measured cells, `(H, W)` or `(1, H, W)`.
        members: The ensemble, `(M, 2, H, W)`.
        grid: Its land and spacing.
        units: Units of the fields.
        title: A line above the panels.
        colour: `speed`, or `vorticity` in s^-1 (per unit of length of the grid).
        coordinates: Where the cells lie; cell numbers if not given.
        measured: The measured field `(2, H, W)`, read at observed cells and where one component of it is known; the
            truth, else the mean, if not given.
        date: When the snapshot was, in words; stands in the title.
        land: The cells `(H, W)` that are land, where the data tell it from sea that was never measured.
        readings: What instruments read, by name, as vectors along their lines of sight `(2, H, W)`, NaN where they read
            nothing. They stand in the place of the observed field.
    """
    members = np.asarray(members)
    truth = None if truth is None or not np.isfinite(np.asarray(truth)).any() else np.asarray(truth)
    known = members.mean(axis=0) if truth is None else truth
    look = look_of(
        known, grid, colour=colour, coordinates=coordinates, land=None if land is None else np.asarray(land, dtype=bool)
    )
    cells = np.asarray(observed, dtype=bool).reshape(grid.shape) & look.valid
    seen = _observed_panels(readings, None if measured is None else np.asarray(measured), known, cells, look.valid)
    first, sizes = [*_truth_panel(truth, look.valid), *seen], _sizes(members, truth, look.valid)
    even = (len(first) + len(sizes)) % 2 == 0  # two rows: the mean and two members leave no place empty, or one member
    panels = [*first, *_ensemble_panels(members, look, at_most=1 if even or not look.wide else 2)]
    count = len(panels) + len(sizes)
    figure = _field_maps(panels, sizes, look, units, columns=-(-count // 2) if look.wide and count > 3 else count)
    figure.suptitle(", ".join(filter(None, (title, date))) or " ", fontsize=12)
    save(figure, Path(path))


def figure_example(
    truth: ArrayLike,
    observed: ArrayLike,
    members: ArrayLike,
    others: Sequence[tuple[str, ArrayLike]],
    grid: Grid,
    units: str = "m s-1",
    coordinates: Coordinates | None = None,
    *,
    date: str = "",
    width: float = WIDE,
) -> bytes:
    """Returns a PNG of one case: truth, what is observed, the mean, other methods, two members, spread and error.

    Arguments:
        truth: `(2, H, W)`, NaN where unknown.
        observed: `(H, W)` or `(1, H, W)`.
        members: `(M, 2, H, W)`.
        others: Names and fields `(2, H, W)` of other methods.
        grid: Land and spacing.
        units: Of the fields.
        coordinates: Where the cells lie.
        date: When it was, in words.
        width: Of the figure in inches: `WIDE` or `NARROW`.
    """
    truth, members = np.asarray(truth), np.asarray(members)
    look = look_of(truth, grid, coordinates=coordinates, arrows=ARROWS * 3 // 4)
    cells = np.asarray(observed, dtype=bool).reshape(grid.shape) & look.valid
    panels = [*_truth_panel(truth, look.valid), *_observed_panels(None, None, truth, cells, look.valid)]
    mean, *some = _ensemble_panels(members, look, at_most=2)
    panels += [mean, *((name, np.asarray(field), look.valid) for name, field in others), *some]
    sizes = _sizes(members, truth, look.valid)
    figure = _field_maps(panels, sizes, look, units, columns=4 if width == WIDE else 2, width=width)
    figure.suptitle(date or " ", fontsize=11)
    return png(figure)


def sample_grid(
    path: str | Path,
    truth: ArrayLike,
    observed: ArrayLike,
    members: ArrayLike,
    grid: Grid,
    units: str = "m s-1",
    colour: Colour = "speed",
) -> None:
    """Draws a row per case, truth, observed, ensemble mean and one member, into a file: how a training comes along.

    Arguments:
        path: The file to write; png, pdf or svg.
        truth: The fields `(N, 2, H, W)`.
        observed: The measured cells, `(N, H, W)` or `(N, 1, H, W)`.
        members: The ensembles, `(M, N, 2, H, W)`.
        grid: Their land and spacing.
        units: Units of the fields.
        colour: `speed` or `vorticity`.
    """
    truth, members = np.asarray(truth), np.asarray(members)
    look = look_of(truth, grid, colour=colour, arrows=ARROWS * 2 // 3)
    cells = np.asarray(observed, dtype=bool).reshape(len(truth), *grid.shape) & look.valid
    name = "truth" if all(_complete(field, look.valid) for field in truth) else "as measured"
    panels = []
    for field, known, mean, member in zip(truth, cells, members.mean(axis=0), members[0], strict=True):
        panels += [(name, field, look.valid), ("observed", field, known)]
        panels += [("ensemble mean", mean, look.valid), ("member 1", member, look.valid)]
        name = ""
    height = 2.0 * look.tallness * len(truth)
    figure = new_figure(8.0, height + 1.2)
    layout = figure.add_gridspec(len(truth) + 1, 4, height_ratios=[*[2.0 * look.tallness] * len(truth), 0.1])
    for number, (title, field, shown) in enumerate(panels):
        axis = figure.add_subplot(layout[number // 4, number % 4])
        arrows = draw_field(axis, title if number < 4 else "", field, shown, look)
        axis.set(xticks=[], yticks=[])
    arrow_key(figure, arrows, look, units)
    figure.suptitle(" ")
    colour_bar(figure, figure.add_subplot(layout[-1, 1:3]), look.norm, look.colours, look.label(units))
    save(figure, Path(path))


def _field_maps(
    panels: Sequence[Panel],
    sizes: Mapping[str, Floats],
    look: Look,
    units: str,
    *,
    columns: int,
    width: float = WIDE,
) -> Figure:
    """Maps of fields, then of the sizes `(H, W)` of spread and error, with the colour bars of both."""
    width = 9.0 if columns < 3 and width == WIDE else width
    layout = {"bars": 1 + bool(sizes), "columns": columns, "width": width}
    figure, axes, bars = lay_out(len(panels) + len(sizes), look, **layout)
    for axis, (name, field, shown) in zip(axes, panels, strict=False):
        arrows = draw_field(axis, name, field, shown, look)
    top = max((float(np.nanquantile(values, 0.99)) for values in sizes.values()), default=1.0) or 1.0
    for axis, (name, values) in zip(axes[len(panels) :], sizes.items(), strict=True):
        draw_scalar(axis, name, values, look, Normalize(0, top), SPREAD)
    colour_bar(figure, bars[0], look.norm, look.colours, look.label(units))
    if sizes:
        colour_bar(figure, bars[1], Normalize(0, top), SPREAD, (", ".join(sizes), units))
    arrow_key(figure, arrows, look, units)
    hidden = any((look.valid & ~(shown & np.isfinite(field).all(axis=0))).any() for _, field, shown in panels)
    explain_blanks(figure, look, hidden)
    return figure


def _complete(field: Floats, valid: Bools) -> bool:
    return bool(np.isfinite(field)[:, valid].all())


def _truth_panel(truth: Floats | None, valid: Bools) -> list[Panel]:
    """The known field, which is the truth only where it is known everywhere."""
    if truth is None:
        return []
    return [("truth" if _complete(truth, valid) else "as measured", truth, np.isfinite(truth).all(axis=0) & valid)]


def _observed_panels(
    readings: Mapping[str, ArrayLike] | None, measured: Floats | None, known: Floats, cells: Bools, valid: Bools
) -> list[Panel]:
    """What was observed: the readings of instruments, else the measured field, with the share of the cells."""
    if readings:
        fields = {name: np.asarray(values) for name, values in readings.items()}
    else:
        if measured is not None:  # a cell where one component alone is known shows this one
            cells = (cells | np.isfinite(measured).any(axis=0)) & valid
            measured = np.where(np.isfinite(measured).any(axis=0), np.nan_to_num(measured), np.nan)
        fields = {"observed": np.where(cells, known if measured is None else measured, np.nan)}
    found = []
    for name, field in fields.items():
        shown = np.isfinite(field).all(axis=0) & valid
        found.append((f"{name} ({100 * shown.sum() / max(valid.sum(), 1):.3g} %)", field, shown))
    return found


def _ensemble_panels(members: Floats, look: Look, at_most: int = 1) -> list[Panel]:
    """The mean and some members; of one member, the field."""
    if len(members) == 1:
        return [("filled", members[0], look.valid)]
    shown = members[:at_most]
    return [
        ("ensemble mean", members.mean(axis=0), look.valid),
        *((f"member {number}", member, look.valid) for number, member in enumerate(shown, start=1)),
    ]


def _sizes(members: Floats, truth: Floats | None, valid: Bools) -> dict[str, Floats]:
    """The spread of the ensemble and, where the truth is known, the size of the error of its mean, `(H, W)` each."""
    found = {}
    if len(members) > 1:
        found["spread"] = np.sqrt(members.var(axis=0, ddof=1).sum(axis=0))
    if truth is not None:
        found["error"] = np.sqrt(np.square(members.mean(axis=0) - truth).sum(axis=0))
    found = {name: np.where(valid, values, np.nan) for name, values in found.items()}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}
