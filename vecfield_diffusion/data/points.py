"""Point observations in a text table, such as drifters or moorings, gathered in the cells of a grid.

The table has a header; its columns are separated by `,`, `;` or tabs and found by their usual names. A point belongs to
the cell whose centre is nearest, if that is within half a spacing. The n points of a cell, of errors e_i, become

    mean = sum(w_i v_i) / sum(w_i),    error = 1 / sqrt(sum(w_i)),    w_i = 1 / e_i^2,

the estimate of least variance for independent errors (Aitken 1935); w_i = 1 and an unknown error without a column of
errors. Each component has its own points, as a row may lack one of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.units import DEGREE, LENGTH, SPEED, factor, is_degrees
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.physics.grid import Grid

#: The names of columns, in small letters and without units in brackets; the first that a table has is taken.
NAMES = {
    "u": ("u", "ve", "u_east", "east", "eastward", "eastward_velocity", "u_velocity", "vx", "uo", "ugos"),
    "v": ("v", "vn", "v_north", "north", "northward", "northward_velocity", "v_velocity", "vy", "vo", "vgos"),
    "error": ("error", "err", "sigma", "std", "uncertainty", "standard_deviation"),
    "time": ("time", "date", "datetime", "date_time", "timestamp", "t"),
}
DEGREES = {"x": ("lon", "longitude", "lng", "x"), "y": ("lat", "latitude", "y")}
LENGTHS = {"x": ("x", "easting"), "y": ("y", "northing")}
ATTRIBUTES = {
    "lon": {"units": "degrees_east", "standard_name": "longitude"},
    "lat": {"units": "degrees_north", "standard_name": "latitude"},
}
REQUIRED = ("x", "y", "u", "v")
MISSING = {"", "nan", "na", "n/a", "null", "none"}
HOUR = 3_600_000_000_000
MOST_BYTES = 2**32


@dataclass(frozen=True)
class Points:
    """Point observations on a grid: N snapshots, one for each time that has a point on a valid cell.

    Arguments:
        velocity: The mean of each component, `(N, 2, H, W)`, NaN where there is none.
        error: The standard deviation of the error of the mean, `(N, 1, H, W)`, that of the component that is known less
            well; NaN where unknown.
        count: The number of points, `(N, 1, H, W)`, that of the component that has more.
        time: `datetime64` or numbers, `(N,)`; None where the table has none.
        source: The path of the file.
        names: The columns of the two components, without units in brackets.
        rows: What became of the rows of the table: how many, by their fate.
    """

    velocity: NDArray[np.float32]
    error: NDArray[np.float32]
    count: NDArray[np.float32]
    time: NDArray | None
    source: str
    names: tuple[str, str]
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """What was understood of the table, in short."""
        fates = ", ".join(f"{number} {fate}" for fate, number in self.rows.items() if number)
        speed = np.hypot(*np.moveaxis(np.nan_to_num(self.velocity), 1, 0)).max()
        errors = "unknown" if np.isnan(self.error).all() else "given"
        return (
            f"{', '.join(self.names)} of {sum(self.rows.values())} points ({fates}; speeds up to {speed:.3g}, "
            f"errors {errors})"
        )

    def to_fields(
        self,
        grid: Grid,
        x: NDArray[np.floating],
        y: NDArray[np.floating],
        x_name: str = "x",
        y_name: str = "y",
        units: str = "m s-1",
    ) -> Fields:
        """The snapshots as fields whose variables are `error` and `count`; cells without a point are gaps.

        Arguments:
            grid: The grid that the points were gathered on.
            x: Its columns, `(W,)`.
            y: Its rows, `(H,)`.
            x_name: `x` or `lon`.
            y_name: `y` or `lat`.
            units: The units of the velocity.
        """
        return Fields(
            reader=MemoryReader(self.velocity),
            length=len(self.velocity),
            grid=grid,
            x=np.asarray(x),
            y=np.asarray(y),
            source=self.source,
            names=self.names,
            units=units,
            time=self.time,
            x_name=x_name,
            y_name=y_name,
            x_attrs=dict(ATTRIBUTES.get(x_name, {})),
            y_attrs=dict(ATTRIBUTES.get(y_name, {})),
            variables={"error": MemoryReader(self.error), "count": MemoryReader(self.count)},
            layout=self.layout,
        )


def open_points(
    path: str | Path,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    degrees: bool,
    valid: NDArray[np.bool_],
    periodic_x: bool = False,
    bin: float | None = None,
    metres: tuple[float, float] = (1.0, 1.0),
) -> Points:
    """The points of a text table, gathered in the cells of a grid as the module says.

    Arguments:
        path: The table: longitude and latitude, or x and y in the units of the grid, and the two components of the
            velocity in those of the data, or in those of speed that stand in brackets in the header, `u [cm/s]`, which
            become m s-1; optionally a standard deviation of the error (of both components) and a time, ISO 8601 (UTC
            unless it says otherwise) or numbers. Lines that start with # are left out.
        x: The centres of the columns, `(W,)`.
        y: The centres of the rows, `(H,)`, rising or falling.
        degrees: Whether `x` and `y` are longitudes and latitudes.
        valid: The cells of the domain, boolean `(H, W)`.
        periodic_x: Whether the last column is followed by the first.
        bin: The length of the intervals, counted from 0 or from 1970, whose points are one snapshot at the middle of
            the interval: in hours for dates, else in the units of the time. By default each time is a snapshot.
        metres: The metres of one unit of `x` and of `y`, by which positions are converted whose header has units.

    Raises:
        UserError: A file that cannot be read, a missing column, what is no number (with its line), or no point on a
            valid cell.
        ValueError: A bin that is not positive.
    """
    if bin is not None and not bin > 0:
        raise ValueError(f"bin must be > 0, got {bin}")
    table = _Table.read(Path(path).expanduser(), DEGREES if degrees else LENGTHS)
    units = [None, None] if degrees else metres
    position = np.stack([table.position(role, unit) for role, unit in zip("xy", units, strict=True)])
    velocity = np.stack([table.numbers(role) * table.scale(role) for role in ("u", "v")], axis=1)
    if bin is not None and "time" not in table.names:
        raise UserError(f"{path}: bin={bin:g} needs a column of times, called {_listing('time')}")
    column = _nearest_centre(position[0], x, degrees, periodic_x)
    row = _nearest_centre(position[1], y)
    known = np.isfinite(position).all(axis=0) & np.isfinite(velocity).any(axis=1)
    inside = known & (row >= 0) & (column >= 0)
    used = inside & valid[row, column]
    fates = {"used": used, "outside the grid": known & ~inside, "on land": inside & ~used, "without values": ~known}
    rows = {fate: int(np.count_nonzero(chosen)) for fate, chosen in fates.items()}
    if not used.any():
        raise UserError(_nothing(path, rows, position[:, known], (x, y)))
    error, time = table.errors(used), table.times(used)
    times, snapshot = (None, np.zeros(rows["used"], dtype=int)) if time is None else _gather(time, bin)
    shape = (1 if times is None else len(times), *valid.shape)
    if 16 * np.prod(shape, dtype=float) > MOST_BYTES:
        raise UserError(
            f"{path}: {shape[0]} times on {shape[1]}x{shape[2]} cells are too many for memory. Gather the times that "
            "belong together, e.g. bin=24 (hours for dates, else units of the time)"
        )
    cells = np.ravel_multi_index((snapshot, row[used], column[used]), shape)
    mean, sigma, count = _means(cells, velocity[used], error, shape)
    names = _plain(table.names["u"]), _plain(table.names["v"])
    return Points(mean, sigma, count, times, str(path), names, rows)


def _nearest_centre(
    values: NDArray[np.floating], centres: NDArray[np.floating], degrees: bool = False, periodic: bool = False
) -> NDArray[np.int64]:
    """The index of the cell that holds each value, half a spacing on either side of its centre; -1 for none."""
    axis = np.asarray(centres, dtype=np.float64)
    axis = np.unwrap(axis, period=360.0) if degrees else axis
    falling = axis[-1] < axis[0]
    axis = axis[::-1] if falling else axis
    middles = (axis[1:] + axis[:-1]) / 2
    edges = np.concatenate([[2 * axis[0] - middles[0]], middles, [2 * axis[-1] - middles[-1]]])
    if degrees or periodic:
        # On a circle each value has one image within half a turn of the middle of the grid.
        turn = 360.0 if degrees else edges[-1] - edges[0]
        start = (edges[0] + edges[-1] - turn) / 2
        values = start + (values - start) % turn
    index = np.searchsorted(edges, values, side="right") - 1
    index = index % len(axis) if periodic else np.where(index < len(axis), index, -1)
    return np.where(index >= 0, len(axis) - 1 - index, -1) if falling else index


def _gather(time: NDArray, bin: float | None) -> tuple[NDArray, NDArray[np.int64]]:
    """The distinct times, or the middles of the intervals that have any, and the place of each time among them."""
    if bin is not None and time.dtype.kind == "M":
        step = round(bin * HOUR)
        time = (time.astype(np.int64) // step * step + step // 2).astype("datetime64[ns]")
    elif bin is not None:
        time = (np.floor(time / bin) + 0.5) * bin
    return np.unique(time, return_inverse=True)


def _means(
    cells: NDArray[np.int64], velocity: NDArray[np.float64], error: NDArray[np.float64] | None, shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Mean `(N, 2, H, W)`, error and count `(N, 1, H, W)` of the points `(n, 2)` that lie in `cells (n,)`."""
    length, height, width = shape
    chosen, place = np.unique(cells, return_inverse=True)
    at = np.unravel_index(chosen, shape)
    mean = np.full((length, 2, height, width), np.nan, dtype=np.float32)
    sigma = np.full((length, 1, height, width), np.nan, dtype=np.float32)
    count = np.zeros((length, 1, height, width), dtype=np.float32)
    for channel in range(2):
        known = np.isfinite(velocity[:, channel])
        weight = known / (1.0 if error is None else error) ** 2
        total = np.bincount(place, weight)
        some = total > 0
        target = (at[0][some], channel, at[1][some], at[2][some])
        sums = np.bincount(place, weight * np.where(known, velocity[:, channel], 0.0))
        mean[target] = sums[some] / total[some]
        first = (target[0], 0, *target[2:])
        count[first] = np.maximum(count[first], np.bincount(place, known)[some])
        if error is not None:
            sigma[first] = np.fmax(sigma[first], 1 / np.sqrt(total[some]))
    return mean, sigma, count


def _nothing(
    path: str | Path, rows: Mapping[str, int], position: NDArray[np.floating], axes: tuple[NDArray[np.floating], ...]
) -> str:
    """What is said where no point can be used."""
    text = ", ".join(f"{number} {fate}" for fate, number in rows.items() if number) or "the table has no row"
    for name, values, axis in zip("xy", position, map(np.asarray, axes), strict=True):
        if values.size:
            text += f"; {name} {values.min():g} to {values.max():g}, of the grid {axis.min():g} to {axis.max():g}"
    return f"{path}: no point lies on a valid cell of the grid: {text}. Give points of this region"


def _listing(role: str, names: Mapping[str, Sequence[str]] = NAMES) -> str:
    return ", ".join(names[role])


@dataclass(frozen=True)
class _Table:
    """The cells of a table as text.

    Arguments:
        path: The file.
        names: The column of each role that the table has: x, y, u, v, error, time.
        columns: Their cells.
        lines: The line of each row in the file.
    """

    path: Path
    names: dict[str, str]
    columns: dict[str, Sequence[str]]
    lines: Sequence[int]

    @classmethod
    def read(cls, path: Path, position: Mapping[str, Sequence[str]]) -> _Table:
        """The columns that are known by their names; `position` has those of x and y."""
        lines = _lines(path)
        if not lines:
            raise UserError(f"{path} is empty. Expected a header such as lon,lat,u,v and a row for each point")
        delimiter = max(",;\t", key=lines[0][1].count)
        header, *rows = (next(csv.reader([line], delimiter=delimiter, skipinitialspace=True)) for _, line in lines)
        numbers = [number for number, _ in lines[1:]]
        for number, row in zip(numbers, rows, strict=True):
            if len(row) != len(header):
                raise UserError(f"{path}, line {number}: {len(row)} values, expected {len(header)} as in the header")
        # Where a semicolon separates, the comma is a decimal point.
        point = "." if delimiter == ";" else ","
        columns = [[row[place].strip().replace(",", point) for row in rows] for place in range(len(header))]
        found = _columns(path, header, {**position, **NAMES})
        names = {role: header[place].strip() for role, place in found.items()}
        return cls(path, names, {role: columns[place] for role, place in found.items()}, numbers)

    def numbers(self, role: str) -> NDArray[np.float64]:
        """A column as float64, NaN where it is empty."""
        cells = ["nan" if cell.lower() in MISSING else cell for cell in self.columns[role]]
        try:
            return np.array(cells, dtype=np.float64)
        except ValueError:
            bad = next(i for i, cell in enumerate(cells) if not _is_number(cell))
            raise self._refuse(role, bad, "is not a number") from None

    def units(self, role: str) -> str:
        """The units in brackets in the header of a column, empty where it has none."""
        found = re.search(r"[\[(](.*?)[\])]", self.names[role])
        return found[1].strip() if found else ""

    def position(self, role: str, metres: float | None) -> NDArray[np.float64]:
        """A column of positions in units of `metres`, or in degrees where that is None.

        Raises:
            UserError: Units in the header that are no length, or no angle.
        """
        values, units = self.numbers(role), self.units(role)
        if not units or (metres is None and is_degrees(units)):
            return values
        scale = factor(units, DEGREE if metres is None else LENGTH)
        if scale is None:
            kind, such = ("an angle", "degrees") if metres is None else ("a length", "m or km")
            raise UserError(
                f"{self.path}: column '{self.names[role]}' has units '{units}', which are not {kind} as the grid has. "
                f"Expected such as {such}, or none where the numbers are in the units of the grid"
            )
        return values * scale / (1.0 if metres is None else metres)

    def scale(self, role: str) -> float:
        """What a column of speeds is multiplied by to be in m s-1; 1 where it has no units.

        Raises:
            UserError: Units that are no speed.
        """
        units = self.units(role)
        scale = factor(units, SPEED) if units else 1.0
        if scale is None:
            raise UserError(
                f"{self.path}: column '{self.names[role]}' has units '{units}', which are no speed. Expected such as "
                "m/s or cm/s, or none where the numbers are in the units of the data"
            )
        return scale

    def errors(self, used: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """The errors of the rows `used (n,)`, where there is such a column."""
        if "error" not in self.columns:
            return None
        error = self.numbers("error")
        self._check("error", used & ~(np.isfinite(error) & (error > 0)), "is not a positive error")
        return error[used] * (self.scale("error") if self.units("error") else self.scale("u"))

    def times(self, used: NDArray[np.bool_]) -> NDArray | None:
        """The times of the rows `used (n,)`, numbers or `datetime64[ns]` in UTC, where there is such a column."""
        if "time" not in self.columns:
            return None
        cells = self.columns["time"]
        if _is_number(cells[int(used.argmax())]):
            time = self.numbers("time")
        else:
            dates = pd.to_datetime(pd.Series(cells), format="ISO8601", utc=True, errors="coerce")
            time = dates.dt.tz_localize(None).to_numpy().astype("datetime64[ns]")
        self._check("time", used & pd.isna(time), "is neither a number nor a date such as 2020-01-31T06:00")
        return time[used]

    def _check(self, role: str, bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            raise self._refuse(role, int(bad.argmax()), why)

    def _refuse(self, role: str, row: int, why: str) -> UserError:
        cell = self.columns[role][row]
        return UserError(f"{self.path}, line {self.lines[row]}: '{cell}' in column '{self.names[role]}' {why}")


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text that are neither empty nor a comment, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no file '{path}'.{nearest(path.name, siblings)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}' as text in UTF-8: {error}") from error
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _columns(path: Path, header: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The place of each role in the header."""
    plain = [_plain(name).lower() for name in header]
    found = {role: plain.index(name) for role in names for name in reversed(names[role]) if name in plain}
    for role, place in found.items():
        if plain.count(plain[place]) > 1:
            raise UserError(
                f"{path}: {plain.count(plain[place])} columns are called '{plain[place]}', expected one {role}"
            )
    for role in REQUIRED:
        if role not in found:
            raise UserError(
                f"{path}: no column of {role} in the header '{', '.join(map(str.strip, header))}'. Expected one of: "
                f"{_listing(role, names)}; lines that start with # are no header"
            )
    return found


def _plain(name: str) -> str:
    """The name of a column without its units in brackets."""
    return re.split(r"[\[(]", name)[0].strip().replace(" ", "_")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
