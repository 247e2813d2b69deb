"""Coordinates as files have them, and the grid that follows: spacing in metres, the turn against east."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor

from vecfield_diffusion.data.units import DEGREE, LENGTH, factor
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import EARTH_RADIUS, Grid

UNEVEN = 0.02
#: Beyond this a coordinate is the fill value of netCDF, 9.97e36, or another of its kind.
FILL = 1e30


@dataclass(frozen=True)
class Axis:
    """A coordinate as a file has it.

    Arguments:
        name: What it is called in outputs: `x`, `y`, `lon`, `lat` or `time`.
        values: `(W,)`, `(H,)` or `(N,)`; None where the file has none.
        attrs: Its attributes.
        degrees: Whether it counts degrees on a sphere.
        label: Its name in the file, for messages.
    """

    name: str
    values: np.ndarray | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    degrees: bool = False
    label: str = ""

    @property
    def units(self) -> str:
        """Its units as the file spells them, empty where it has none."""
        return str(self.attrs.get("units", "")).strip()

    @property
    def called(self) -> str:
        """Its name for messages."""
        return self.label or self.name

    @property
    def metres(self) -> float:
        """The metres of one unit, where the coordinate does not count degrees; 1 where it has no units.

        Raises:
            UserError: Units that are no length.
        """
        metres = factor(self.units, LENGTH)
        if metres is None and self.units not in ("", "1"):
            key = "dx" if self.name in ("x", "lon") else "dy"
            raise UserError(
                f"the coordinate {self.called} has units '{self.units}', which are no length. Give the spacing of the "
                f"cells in metres: {option(key)}"
            )
        return 1.0 if metres is None else metres

    def checked(self) -> Axis:
        """The same, degrees counted as such.

        Raises:
            UserError: No number at all, or degrees that no globe has.
        """
        if self.values is None:
            return self
        values = np.asarray(self.values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(
                f"the coordinate {self.called} has values that are no numbers. Mend the file, or name another."
            )
        most = 90.0 if self.name == "lat" else 720.0
        if self.degrees and np.abs(values).max() > most + 1e-3:
            raise UserError(
                f"the coordinate {self.called} runs from {values.min():g} to {values.max():g}, which are no degrees. "
                f"Say what it counts in its attribute `units` (m, km, degrees_east), or name another: {option('x')}, "
                f"{option('y')}"
            )
        return self

    def step(self) -> float | np.ndarray | None:
        """The spacing in the axis's unit: a number where it is even, else that of every cell; None where unknown."""
        if self.values is None or len(self.values) < 2:
            return None
        values = np.asarray(self.values, dtype=np.float64)
        if self.name == "lon":
            values = np.unwrap(values, period=360.0)
        steps = np.diff(values)
        mean = (values[-1] - values[0]) / len(steps)
        if mean != 0 and np.all(np.abs(steps - mean) <= UNEVEN * abs(mean)):
            return float(mean)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            role = {"lon": "x", "lat": "y"}.get(self.name, self.name)
            raise UserError(
                f"the coordinate {self.called} neither rises nor falls throughout. Mend the file, or choose another "
                f"coordinate: {option(role, 'NAME')}"
            )
        return np.gradient(values, edge_order=min(2, len(values) - 1))


def make_grid(
    valid: Tensor,
    x: Axis,
    y: Axis,
    *,
    dx: float | np.ndarray | None = None,
    dy: float | np.ndarray | None = None,
    boundary_x: str | None = None,
    boundary_y: str | None = None,
) -> Grid:
    """The grid of two coordinates. A spacing that is given goes first; 1.0 stands where nothing is known.

    Arguments:
        valid: Boolean `(H, W)`.
        x: The coordinate of the columns, which must be evenly spaced unless `dx` is given.
        y: The coordinate of the rows.
        dx: In metres, a number or `(H,)`.
        dy: In metres, a number or `(H,)`.
        boundary_x: If None: periodic where a longitude closes the circle, else open.
        boundary_y: If None: open.

    Raises:
        UserError: A coordinate that is not evenly spaced (`x`), not monotonic or in units of no length.
        ValueError: A boundary or a spacing that `Grid` refuses.
    """
    boundaries = {"boundary_x": boundary_x, "boundary_y": boundary_y}
    boundaries = {name: boundary for name, boundary in boundaries.items() if boundary is not None}
    x, y = x if dx is not None else x.checked(), y if dy is not None else y.checked()
    step_x, step_y = x.step() if dx is None else None, y.step() if dy is None else None
    _check_axes(x, y, step_x, spaced=dx is not None and dy is not None)
    if x.degrees and y.degrees and np.abs(np.asarray(y.values)).max() <= 90.001:
        lon = torch.tensor(np.unwrap(np.asarray(x.values, dtype=np.float64), period=360.0))
        globe = Grid.from_degrees(lon, torch.tensor(np.asarray(y.values, dtype=np.float64)), valid, **boundaries)
        boundaries["boundary_x"] = globe.boundary_x
        step_x, step_y = globe.dx, globe.dy
    else:
        step_x = 1.0 if step_x is None else step_x * x.metres
        step_y = 1.0 if step_y is None else step_y * y.metres
    dx, dy = step_x if dx is None else dx, step_y if dy is None else dy
    spacing = {"dx": torch.as_tensor(dx, dtype=torch.float64), "dy": torch.as_tensor(dy, dtype=torch.float64)}
    return Grid(valid=valid, **spacing, **boundaries)


def _check_axes(x: Axis, y: Axis, step_x: float | np.ndarray | None, spaced: bool) -> None:
    if isinstance(step_x, np.ndarray):
        raise UserError(
            f"the coordinate {x.called} is not evenly spaced ({step_x.min():g} to {step_x.max():g}). Regrid the file, "
            f"or give one spacing in metres: {option('dx')}"
        )
    if x.degrees != y.degrees and not spaced:
        lone, other = (x, y) if x.degrees else (y, x)
        if other.values is None:
            raise UserError(
                f"{lone.called} is in degrees along one dimension, and nothing of one dimension goes with it along "
                f"{other.called}. Expected longitude and latitude of one dimension each, or both of every cell (y, x); "
                f"else give the spacing in metres: {option('dx')} {option('dy')}"
            )
        raise UserError(
            f"{x.called} and {y.called} must both be in degrees or both in metres. Name other coordinates, or give the "
            f"spacing in metres: {option('dx')} {option('dy')}"
        )


@dataclass(frozen=True)
class Plane:
    """Coordinates of every cell, `(H, W)` each, NaN where unknown.

    Arguments:
        x: Along x: longitude in degrees, or a length in the units of the file.
        y: Likewise along y.
        degrees: Whether they count degrees on the globe.
    """

    x: np.ndarray
    y: np.ndarray
    degrees: bool

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, degrees: bool) -> Plane:
        """The coordinates, where cells that were left out and filled with one number, such as 0 or -1, are unknown.

        Raises:
            UserError: No number, or degrees that no globe has.
        """
        x, y = (np.asarray(plane, dtype=np.float64).copy() for plane in (x, y))
        unknown = ~((np.abs(x) < FILL) & (np.abs(y) < FILL))
        # No two neighbours lie in one place: what they share is fill, wherever else it stands.
        places = x + 1j * y
        shared = [places[:, 1:][places[:, 1:] == places[:, :-1]], places[1:][places[1:] == places[:-1]]]
        fill = np.isin(places, np.unique(np.concatenate(shared)))
        unknown |= fill & ~fill.all()
        if unknown.all():
            raise UserError(
                f"the coordinates of the cells have no number. Give the spacing: {option('dx')} {option('dy')}"
            )
        x[unknown], y[unknown] = np.nan, np.nan
        if degrees and (np.nanmax(np.abs(y)) > 90.001 or np.nanmax(np.abs(x)) > 720.001):
            raise UserError(
                f"longitudes from {np.nanmin(x):g} to {np.nanmax(x):g} and latitudes from {np.nanmin(y):g} to "
                f"{np.nanmax(y):g} are no degrees. Say what they count in their attribute `units`, or give "
                f"{option('dx')} and {option('dy')}"
            )
        return cls(x, y, degrees)

    def same(self, other: Plane) -> bool:
        """Whether both have the same coordinates to the last bit."""
        return np.array_equal(self.x, other.x, equal_nan=True) and np.array_equal(self.y, other.y, equal_nan=True)

    def steps(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """From every cell to the next along `axis`, eastward and northward, in degrees of latitude or in lengths."""
        dx, dy = np.diff(self.x, axis=axis), np.diff(self.y, axis=axis)
        if not self.degrees:
            return dx, dy
        before, after = np.delete(self.y, -1, axis), np.delete(self.y, 0, axis)
        return ((dx + 180.0) % 360.0 - 180.0) * np.cos(np.deg2rad((before + after) / 2)), dy

    def lines(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The coordinates as those of the columns and of the rows, where the grid is straight."""
        x = self.x if not self.degrees else np.where(np.isfinite(self.x), np.unwrap(self.x, period=360.0), np.nan)
        lines = along(x, 1), along(self.y, 0)
        return None if lines[0] is None or lines[1] is None else lines

    def spacing(self) -> tuple[np.ndarray, np.ndarray]:
        """The spacing in metres, or in the units of the file where they are a length, `dx (H,)` and `dy (H,)`.

        The `distance` between neighbours, averaged over every row; `dy` at a row is the mean of those to the two beside
        it, negative where the rows run to the right of the columns: southward, where the columns run eastward.
        """
        (ax, ay), (bx, by) = self.steps(1), self.steps(0)
        across, between = (_rows_filled(self.distance(axis)) for axis in (1, 0))
        right = np.nanmean(ax[:-1] * by[:, :-1] - ay[:-1] * bx[:, :-1]) < 0
        dy = np.concatenate([between[:1], (between[1:] + between[:-1]) / 2, between[-1:]])
        return across, -dy if right else dy

    def distance(self, axis: int) -> np.ndarray:
        """From every cell to the next along `axis`: the great circle (haversine formula), or the straight line."""
        dx, dy = np.diff(self.x, axis=axis), np.diff(self.y, axis=axis)
        if not self.degrees:
            return np.hypot(dx, dy)
        lat = np.deg2rad(self.y)
        before, after = np.delete(lat, -1, axis), np.delete(lat, 0, axis)
        chord = np.sin(np.deg2rad(dy) / 2) ** 2 + np.cos(before) * np.cos(after) * np.sin(np.deg2rad(dx) / 2) ** 2
        return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(chord))

    def turn(self) -> np.ndarray:
        """The angle from east to the direction of the columns, anticlockwise in radians, `(H, W)`."""
        east, north = self.steps(1)
        # Where the place of a cell is unknown, the columns run as they do elsewhere in its row, or in the nearest.
        for part in (east, north):
            np.copyto(part, _rows_filled(part)[:, None], where=~np.isfinite(part))
        return np.arctan2(_at_cells(north), _at_cells(east))


def _at_cells(steps: np.ndarray) -> np.ndarray:
    """The mean of the step before a cell and the one after it; at the ends the line through the last two steps."""
    ends = [steps[:, [0]] * 1.5 - steps[:, [1]] * 0.5, steps[:, [-1]] * 1.5 - steps[:, [-2]] * 0.5]
    return np.concatenate([ends[0], (steps[:, 1:] + steps[:, :-1]) / 2, ends[1]], axis=1)


def _rows_filled(distance: np.ndarray) -> np.ndarray:
    """The mean of what is known of every row, where a row without any takes that of the nearest ones."""
    known = np.isfinite(distance)
    mean = np.where(known, distance, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    rows = np.flatnonzero(known.any(1))
    return np.interp(np.arange(len(mean)), rows, mean[rows])


def along(plane: np.ndarray, axis: int) -> np.ndarray | None:
    """The coordinate `(H, W)` as one along `axis`, if it changes along that alone (to a thousandth of a step)."""
    known = np.isfinite(plane)
    count = known.sum(axis=1 - axis)
    if (count > 0).sum() < 2:
        return None
    line = np.where(known, plane, 0.0).sum(axis=1 - axis) / np.maximum(count, 1)
    places = np.flatnonzero(count)
    if len(places) < len(line):
        line = make_interp_spline(places, line[places], k=1)(np.arange(len(line)))
    step = np.abs(np.diff(line)).min(initial=np.inf)
    spread = np.nanmax(np.abs(plane - np.expand_dims(line, 1 - axis)))
    return line if spread <= 1e-3 * step else None


def to_degrees(values: np.ndarray, units: str) -> np.ndarray:
    """Longitudes or latitudes in degrees, whether the file counts degrees or radians."""
    scale = factor(units, DEGREE)
    return values if scale is None else np.asarray(values) * scale
