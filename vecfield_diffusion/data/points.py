"""Point observations in a text table, such as drifters or moorings, gathered in the cells of a grid.

The table has a header; its columns are separated by `,`, `;` or tabs and found by their usual names. A point belongs to
the cell whose centre is nearest, if that is within half a spacing. The n points of a cell, of errors e_i, become

    mean = sum(w_i v_i) / sum(w_i),    error = 1 / sqrt(sum(w_i)),    w_i = 1 / e_i^2,

the estimate of least variance for independent errors (Aitken 1935): its posterior is that of the n points. Errors that
are correlated, rho_ij = exp(-r_ij / L - |t_i - t_j| / T), leave the weights and widen the error,

    error^2 = sum_ij w_i w_j e_i e_j rho_ij / (sum_i w_i)^2,

so that many points of one drifter do not count as many drifters (super-observations; Lorenc 1981, Mon. Weather Rev.
109, 701). w_i = 1 and an unknown error without a column of errors. Each component has its own points, as a row may lack
one of them. A row that repeats another one counts once.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.readers.decoding import dates_of
from vecfield_diffusion.data.readers.reader import check_path
from vecfield_diffusion.data.units import DEGREE, LENGTH, SPEED, factor, is_degrees, turned_degrees
from vecfield_diffusion.ellipses import of_sum
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import EARTH_RADIUS

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
MOST_BYTES = 2**32


def open_points(
    path: str | Path, on: Fields, bin: float | None = None, scales: Sequence[float] | None = None
) -> Fields:  # fmt: skip
    """The points of a text table, gathered in the cells of a grid as the module says; cells without one are gaps.

    There is one snapshot for each time that has a point on a valid cell. The variables `error` and `count`,
    `(N, 1, H, W)`, are the standard deviation of the error of the mean, that of the component that is known less well
    (NaN where unknown), and the number of points, that of the component that has more.

    Arguments:
        path: The table: longitude and latitude, or x and y in the units of the grid, and the two components of the
            velocity in those of the data, or in those of speed that stand in brackets in the header, `u [cm/s]`, which
            become m s-1; optionally a standard deviation of the error (of both components) and a time, ISO 8601 (UTC
            unless it says otherwise) or numbers. Lines that start with # are left out.
        on: Fields on the grid: its coordinates, spacing, valid cells and units.
        bin: The length of the intervals, counted from 0 or from 1970, whose points are one snapshot at the middle of
            the interval: in hours for dates, else in the units of the time. By default each time is a snapshot.
        scales: L in km and T in the units of `bin`, over which the correlation of errors falls to 1 / e; they are
            independent if None.

    Raises:
        UserError: A file that cannot be read, a missing column, what is no number (with its line), or no point on a
            valid cell.
        ValueError: A bin or scales that are not positive.
    """
    if bin is not None and not bin > 0:
        raise ValueError(f"bin must be > 0, got {bin}")
    if scales is not None and not (len(scales) == 2 and min(scales) > 0):
        raise ValueError(f"error_scales must be a length and a time above 0, such as [20,12], got {list(scales)}")
    degrees = on.x_name == "lon"
    table = _Table.read(Path(path).expanduser(), DEGREES if degrees else LENGTHS)
    spacings = ((on.grid.dx, on.x), (on.grid.dy, on.y))
    metres = [None if degrees else abs(step.mean().item() / np.diff(line).mean()) for step, line in spacings]
    position = np.stack([table.position(role, unit) for role, unit in zip("xy", metres, strict=True)])
    velocity = np.stack([table.numbers(role) * table.scale(role) for role in ("u", "v")], axis=1)
    if bin is not None and "time" not in table.names:
        raise UserError(f"{path}: bin={bin:g} needs a column of times, called {', '.join(NAMES['time'])}")
    column = _nearest_centre(position[0], on.x, degrees, on.grid.periodic[1])
    row = _nearest_centre(position[1], on.y)
    known = np.isfinite(position).all(axis=0) & np.isfinite(velocity).any(axis=1)
    inside = known & (row >= 0) & (column >= 0)
    wet = inside & on.grid.valid.numpy()[row, column]
    used = wet & ~table.repeated()
    fates = {
        "used": used,
        "repeated": wet & ~used,
        "outside the grid": known & ~inside,
        "on land": inside & ~wet,
        "without values": ~known,
    }
    fate = ", ".join(f"{rows.sum()} {name}" for name, rows in fates.items() if rows.any())
    if not used.any():
        raise UserError(_nothing(path, fate, position[:, known], (on.x, on.y)))
    error, time = table.errors(used), table.times(used)
    times, snapshot = (None, np.zeros(used.sum(), dtype=int)) if time is None else _gather(time, bin)
    shape = (1 if times is None else len(times), *on.shape)
    if 16 * np.prod(shape, dtype=float) > MOST_BYTES:
        raise UserError(
            f"{path}: {shape[0]} times on {shape[1]}x{shape[2]} cells are too many for memory. Gather the times that "
            "belong together, e.g. bin=24 (hours for dates, else units of the time)"
        )
    cells = np.ravel_multi_index((snapshot, row[used], column[used]), shape)
    weights = _Weights.of(cells, velocity[used], error)
    mean, sigma, count = weights.means(velocity[used], shape)
    if scales is not None:
        apart = _apart(position[:, used], None if time is None else time, metres, scales)
        sigma = weights.on_grid(weights.errors(apart), np.nan, shape)
    names = _plain(table.names["u"]), _plain(table.names["v"])
    speed, errors = np.hypot(*np.nan_to_num(mean).swapaxes(0, 1)).max(), "unknown" if error is None else "given"
    return replace(
        on,
        reader=MemoryReader(mean),
        length=shape[0],
        source=str(path),
        names=names,
        time=times,
        x_attrs=ATTRIBUTES.get(on.x_name, {}),
        y_attrs=ATTRIBUTES.get(on.y_name, {}),
        variables={"error": MemoryReader(sigma), "count": MemoryReader(count)},
        variable_units={},
        layout=f"{', '.join(names)} of {len(known)} points ({fate}{weights.words(scales)}; speeds up to {speed:.3g}, "
        f"errors {errors})",
    )


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
        time = pd.Series(time).dt.floor(step := pd.Timedelta(hours=bin)).to_numpy() + step.to_timedelta64() // 2
    elif bin is not None:
        time = (np.floor(time / bin) + 0.5) * bin
    return np.unique(time, return_inverse=True)


@dataclass(frozen=True)
class _Weights:
    """What the points of each cell weigh.

    Arguments:
        chosen: The cells that have a point, as flat indices of (time, row, column), `(c,)`.
        place: The place of each point among them, `(n,)`.
        weight: w, `(n, 2)`, 0 where a component is missing.
        error: e, `(n,)`; None where it is not known.
    """

    chosen: NDArray[np.int64]
    place: NDArray[np.int64]
    weight: NDArray[np.float64]
    error: NDArray[np.float64] | None

    @classmethod
    def of(
        cls, cells: NDArray[np.int64], velocity: NDArray[np.float64], error: NDArray[np.float64] | None
    ) -> _Weights:  # fmt: skip
        """Of points with velocities `(n, 2)` that lie in `cells (n,)`."""
        known = np.isfinite(velocity).astype(float)
        weight = known if error is None else known / error[:, None] ** 2
        return cls(*np.unique(cells, return_inverse=True), weight, error)

    def total(self, values: NDArray) -> NDArray[np.float64]:
        """The sums over the points of each cell, `(c, 2)`."""
        return np.stack([np.bincount(self.place, column, len(self.chosen)) for column in values.T], axis=1)

    def means(self, velocity: NDArray[np.float64], shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
        """Mean `(N, 2, H, W)`, error for independent points and count `(N, 1, H, W)`."""
        weights, counts = self.total(self.weight), self.total(self.weight > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.total(np.where(self.weight > 0, self.weight * np.nan_to_num(velocity), 0.0)) / weights
            sigma = np.where(counts > 0, 1 / np.sqrt(weights), 0.0).max(axis=1, keepdims=True)
        sigma = np.full_like(sigma, np.nan) if self.error is None else sigma
        found = (mean, np.nan), (sigma, np.nan), (counts.max(axis=1, keepdims=True), 0.0)
        return [self.on_grid(values, empty, shape) for values, empty in found]

    def errors(self, apart: NDArray[np.float64]) -> NDArray[np.float64]:
        """The error of the mean of each cell `(c, 1)`, of the component that is known less well, for correlated errors.

        `apart` has the places of the points in units of the scales, `(n, d)`, time last.
        """
        if self.error is None:
            return np.full((len(self.chosen), 1), np.nan)
        sigma = np.zeros((len(self.chosen), 1))
        order = np.argsort(self.place, kind="stable")
        for cell, points in enumerate(np.split(order, np.cumsum(np.bincount(self.place))[:-1])):
            share = torch.diag_embed(torch.from_numpy(self.weight[points] * self.error[points, None]))
            square = of_sum(share, torch.from_numpy(apart[points])).diagonal().numpy()
            weight = self.weight[points].sum(axis=0)
            sigma[cell] = (np.sqrt(square[weight > 0]) / weight[weight > 0]).max()
        return sigma

    def on_grid(self, values: NDArray, empty: float, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Values of the cells `(c, k)` as `(N, k, H, W)`, `empty` in cells without a point."""
        at = np.unravel_index(self.chosen, shape)
        found = np.full((shape[0], values.shape[1], *shape[1:]), empty, dtype=np.float32)
        found[at[0], :, at[1], at[2]] = values
        return found

    def words(self, scales: Sequence[float] | None) -> str:
        """What became of the points."""
        counts = np.bincount(self.place)
        if counts.max() == 1:
            return ""
        kind = "independent" if scales is None else "correlated over {:g} in space and {:g} in time".format(*scales)
        many = f" as {len(counts)} means of up to {counts.max()}, {(counts == 1).sum()} of one alone"
        return f"{many}, errors taken as {kind}"


def _apart(
    position: NDArray[np.float64], time: NDArray | None, metres: Sequence[float | None], scales: Sequence[float]
) -> NDArray[np.float64]:
    """Where and when points `(2, n)` are, in units of the scales, `(n, d)`, time last; chords on the sphere."""
    x, y = position
    if metres[0] is None:
        lon, lat = np.deg2rad(x), np.deg2rad(y)
        away = EARTH_RADIUS * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    else:
        away = np.stack([x * metres[0], y * metres[1]])
    if time is None:
        hours = np.zeros_like(x)
    elif time.dtype.kind == "M":
        hours = (time - time.min()) / np.timedelta64(1, "h")
    else:
        hours = time
    return np.stack([*(away / (1e3 * scales[0])), hours / scales[1]], axis=1)


def _nothing(
    path: str | Path, fate: str, position: NDArray[np.floating], axes: tuple[NDArray[np.floating], ...]
) -> str:
    """What is said where no point can be used."""
    text = fate or "the table has no row"
    for name, values, axis in zip("xy", position, axes, strict=True):
        if values.size:
            text += f"; {name} {values.min():g} to {values.max():g}, of the grid {axis.min():g} to {axis.max():g}"
    return f"{path}: no point lies on a valid cell of the grid: {text}. Give points of this region"


@dataclass(frozen=True)
class _Table:
    """The cells of a table as text.

    Arguments:
        path: The file.
        names: The column of each role that the table has: x, y, u, v, error, time.
        cells: The columns by role, each row under the number of its line in the file.
    """

    path: Path
    names: dict[str, str]
    cells: pd.DataFrame

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
        found = _columns(path, header, {**position, **NAMES})
        names = {role: header[place].strip() for role, place in found.items()}
        cells = pd.DataFrame(rows, numbers, range(len(header)), dtype=str)[[*found.values()]].set_axis([*found], axis=1)
        # Where a semicolon separates, the comma is a decimal point.
        point = "." if delimiter == ";" else ","
        return cls(path, names, cells.apply(lambda column: column.str.strip().str.replace(",", point)))

    def repeated(self) -> NDArray[np.bool_]:
        """The rows that repeat an earlier one, `(n,)`; none without times, where an instrument may repeat itself."""
        repeats = self.cells.duplicated().to_numpy()
        return repeats if "time" in self.names else np.zeros_like(repeats)

    def numbers(self, role: str) -> NDArray[np.float64]:
        """A column as float64, NaN where it is empty."""
        cells = self.cells[role]
        values = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
        self._check(role, np.isnan(values) & ~cells.str.lower().isin(MISSING).to_numpy(), "is not a number")
        return values

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
            return values if turned_degrees(units) is None else -values
        kinds = ("an angle as the grid has", "degrees") if metres is None else ("a length as the grid has", "m or km")
        scale = self._factor(role, DEGREE if metres is None else LENGTH, f"not {kinds[0]}", kinds[1], "the grid")
        return values * scale / (1.0 if metres is None else metres)

    def scale(self, role: str) -> float:
        """What a column of speeds is multiplied by to be in m s-1; 1 where it has no units. Raises UserError."""
        return self._factor(role, SPEED, "no speed", "m/s or cm/s", "the data") if self.units(role) else 1.0

    def _factor(self, role: str, target: str, kind: str, such: str, own: str) -> float:
        scale = factor(self.units(role), target)
        if scale is None:
            raise UserError(
                f"{self.path}: column '{self.names[role]}' has units '{self.units(role)}', which are {kind}. Expected "
                f"such as {such}, or none where the numbers are in the units of {own}"
            )
        return scale

    def errors(self, used: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """The errors of the rows `used (n,)`, where there is such a column."""
        if "error" not in self.names:
            return None
        error = self.numbers("error")
        self._check("error", used & ~(np.isfinite(error) & (error > 0)), "is not a positive error")
        return error[used] * (self.scale("error") if self.units("error") else self.scale("u"))

    def times(self, used: NDArray[np.bool_]) -> NDArray | None:
        """The times of the rows `used (n,)`, numbers or `datetime64[ns]` in UTC, where there is such a column."""
        if "time" not in self.names:
            return None
        cells = self.cells["time"]
        time = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
        time = self.numbers("time") if np.isfinite(time[used.argmax()]) else dates_of(cells)
        self._check("time", used & pd.isna(time), "is neither a number nor a date such as 2020-01-31T06:00")
        return time[used]

    def _check(self, role: str, bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            line, cell = next(self.cells[role][bad].items())
            raise UserError(f"{self.path}, line {line}: '{cell}' in column '{self.names[role]}' {why}")


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text that are neither empty nor a comment, with their numbers."""
    try:
        text = check_path(path).read_text(encoding="utf-8-sig")
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
                f"{', '.join(names[role])}; lines that start with # are no header"
            )
    return found


def _plain(name: str) -> str:
    """The name of a column without its units in brackets."""
    return re.split(r"[\[(]", name)[0].strip().replace(" ", "_")
