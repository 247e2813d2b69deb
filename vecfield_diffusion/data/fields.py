"""A set of velocity snapshots on one grid, wherever they are stored.

`Fields` knows the grid, the coordinates and the names; a small `reader` fetches the numbers. A reader is a callable
`indices (n,) -> float32 array (n, 2, H, W)` that returns a fresh array: memory, a memory map and a file handle per
process are three readers behind one door.

Two kinds of absence are kept apart. A cell outside `grid.valid` is never measured (land, solid, outside). A valid
cell may still be missing in one snapshot (a gap). `read` gives NaN in both components for both kinds, so that

    measured = isfinite(fields.read(indices)[:, :1])        (n, 1, H, W)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid

Reader = Callable[[np.ndarray], np.ndarray]

BLOCK_BYTES = 2**25
UNEVEN = 0.02
#: The metres of a coordinate's unit; what is not listed counts as metres.
METRES = dict.fromkeys(("km", "kilometer", "kilometre", "kilometers", "kilometres"), 1000.0)


@dataclass(frozen=True)
class MemoryReader:
    """A reader of an array `(N, 2, H, W)`, float32, that lies in memory."""

    array: np.ndarray

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices` as a copy, `(n, 2, H, W)`."""
        return self.array[indices]


@dataclass(eq=False)
class Fields:
    """N snapshots of a two-component velocity on one grid.

    Arguments:
        reader: Fetches snapshots, `indices (n,) -> float32 (n, 2, H, W)`, a fresh array each time.
        length: N.
        grid: Spacing in metres, boundaries and valid cells.
        x: The coordinate of the columns `(W,)`; degrees east if `x_name` is `lon`.
        y: The coordinate of the rows `(H,)`; degrees north if `y_name` is `lat`.
        source: The path of the file.
        names: The names that the components have in the file.
        units: The units of the velocity.
        time: `(N,)`, `datetime64` or numbers, where the file has it.
        time_attrs: Attributes of the time, such as its units.
        x_name: `x` or `lon`.
        y_name: `y` or `lat`.
        x_attrs: Attributes of `x`.
        y_attrs: Attributes of `y`.
        attrs: Where the data come from and their licence, as the file says.
    """

    reader: Reader
    length: int
    grid: Grid
    x: np.ndarray
    y: np.ndarray
    source: str
    names: tuple[str, str]
    units: str = "m s-1"
    time: np.ndarray | None = None
    time_attrs: dict[str, Any] = field(default_factory=dict)
    x_name: str = "x"
    y_name: str = "y"
    x_attrs: dict[str, Any] = field(default_factory=dict)
    y_attrs: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)`."""
        return self.grid.shape

    def read(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """Snapshots as float32 `(n, 2, H, W)`, NaN in both components where a cell is not measured.

        Raises:
            IndexError: An index outside `[0, N)`.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.length):
            raise IndexError(f"snapshots run from 0 to {self.length - 1}, got {chosen.min()} to {chosen.max()}")
        velocity = torch.from_numpy(self.reader(chosen))
        u, v = velocity.isfinite().unbind(1)
        measured = (u & v & self.grid.valid).unsqueeze(1)
        return velocity.masked_fill_(~measured, torch.nan)

    def coordinates(self, indices: Sequence[int]) -> dict[str, tuple[np.ndarray | None, dict[str, Any]]]:
        """Names of the dimensions time, y and x, each with its values at the snapshots `indices` and its attributes."""
        time = None if self.time is None else self.time[np.asarray(indices, dtype=np.int64)]
        return {
            "time": (time, self.time_attrs),
            self.y_name: (self.y, self.y_attrs),
            self.x_name: (self.x, self.x_attrs),
        }

    def summary(self) -> str:
        """One line that says what was understood of the file."""
        height, width = self.shape
        share = 100.0 * self.grid.valid.double().mean().item()
        spacing = ", ".join(f"{name} {_extent(getattr(self.grid, name))}" for name in ("dx", "dy"))
        return (
            f"{self.source}: {self.names[0]}, {self.names[1]} -> {self.length} fields 2x{height}x{width} in "
            f"{self.units}, u along {self.x_name}, {share:.1f} % valid, {spacing}, "
            f"{self.x_name} {self.grid.boundary_x}, {self.y_name} {self.grid.boundary_y}"
        )


def _extent(spacing: Tensor) -> str:
    low, high = spacing.min().item(), spacing.max().item()
    low, high = f"{low:.6g}", f"{high:.6g}"
    return low if low == high else f"{low} to {high}"


def blocks(length: int, cells: int) -> Iterator[np.ndarray]:
    """Consecutive indices that together run over `length` snapshots of `cells` cells, about 32 MB at a time."""
    size = max(1, BLOCK_BYTES // (8 * cells))
    for start in range(0, length, size):
        yield np.arange(start, min(start + size, length))


def measured_cells(reader: Reader, length: int, candidates: np.ndarray) -> np.ndarray:
    """The cells among `candidates (H, W)` that at least one snapshot measures, boolean `(H, W)`.

    Reads no further than it must: with no gaps the first block answers.
    """
    seen = np.zeros_like(candidates)
    for indices in blocks(length, candidates.size):
        seen |= np.isfinite(reader(indices)).all(axis=1).any(axis=0) & candidates
        if seen[candidates].all():
            break
    return seen


def valid_cells(reader: Reader, length: int, mask: np.ndarray | None, shape: tuple[int, int], source: str) -> Tensor:
    """The domain, boolean `(H, W)`: the file's own `mask`, else the cells that some snapshot measures.

    Raises:
        UserError: The mask has no valid cell, or no snapshot measures any.
    """
    if mask is not None and not mask.any():
        raise UserError(
            f"{source}: the mask marks no cell as valid. Expected 1 = wet under dataset.valid=, "
            "1 = solid under dataset.invalid=."
        )
    seen = measured_cells(reader, length, np.ones(shape, dtype=bool) if mask is None else mask)
    if not seen.any():
        raise UserError(
            f"{source}: no snapshot has a cell where both components are numbers: all values are NaN, fill values "
            "or masked. Choose other variables (dataset.u=, dataset.v=) or another file (dataset.path=)."
        )
    return torch.from_numpy(seen if mask is None else mask)


@dataclass(frozen=True)
class Axis:
    """A coordinate as a file has it.

    Arguments:
        name: What it is called in outputs: `x`, `y`, `lon`, `lat` or `time`.
        values: `(W,)`, `(H,)` or `(N,)`; None where the file has none.
        attrs: Its attributes.
        degrees: Whether it counts degrees on the globe.
    """

    name: str
    values: np.ndarray | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    degrees: bool = False

    @property
    def metres(self) -> float:
        """The metres of one unit, as the attribute `units` says, where the coordinate does not count degrees."""
        return METRES.get(str(self.attrs.get("units", "")).strip().lower(), 1.0)

    def step(self) -> float | np.ndarray | None:
        """The spacing in the axis's unit: a number where it is even, else that of every cell; None where unknown."""
        if self.values is None:
            return None
        values = np.asarray(self.values, dtype=np.float64)
        if self.name == "lon":
            values = np.unwrap(values, period=360.0)
        steps = np.diff(values)
        mean = (values[-1] - values[0]) / len(steps)
        if mean != 0 and np.all(np.abs(steps - mean) <= UNEVEN * abs(mean)):
            return float(mean)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise UserError(
                f"the coordinate {self.name} neither rises nor falls throughout. Mend the file, or choose another "
                f"coordinate: dataset.{_role(self.name)}=NAME"
            )
        return np.gradient(values)


def _role(name: str) -> str:
    return {"lon": "x", "lat": "y"}.get(name, name)


def make_grid(
    valid: Tensor,
    x: Axis,
    y: Axis,
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
        UserError: A coordinate that is not evenly spaced (`x`) or not monotonic.
        ValueError: A boundary or a spacing that `Grid` refuses.
    """
    boundaries = {"boundary_x": boundary_x, "boundary_y": boundary_y}
    boundaries = {name: boundary for name, boundary in boundaries.items() if boundary is not None}
    step_x, step_y = x.step() if dx is None else None, y.step() if dy is None else None
    _check_axes(x, y, step_x, spaced=dx is not None and dy is not None)
    if x.degrees and y.degrees:
        lon = torch.tensor(np.unwrap(np.asarray(x.values, dtype=np.float64), period=360.0))
        globe = Grid.from_degrees(lon, torch.tensor(np.asarray(y.values, dtype=np.float64)), valid, **boundaries)
        boundaries["boundary_x"] = globe.boundary_x
        step_x, step_y = globe.dx, globe.dy
    else:
        step_x, step_y = _metres(x, step_x), _metres(y, step_y)
    dx, dy = step_x if dx is None else dx, step_y if dy is None else dy
    return Grid(valid=valid, dx=torch.as_tensor(dx), dy=torch.as_tensor(dy), **boundaries)


def _check_axes(x: Axis, y: Axis, step_x: float | np.ndarray | None, spaced: bool) -> None:
    if isinstance(step_x, np.ndarray):
        raise UserError(
            f"the coordinate {x.name} is not evenly spaced ({step_x.min():g} to {step_x.max():g}). Regrid the file, "
            "or give one spacing in metres: dataset.dx=..."
        )
    if x.degrees != y.degrees and not spaced:
        raise UserError(
            f"{x.name} and {y.name} must both be in degrees or both in metres. Name other coordinates, or give the "
            "spacing in metres: dataset.dx=... dataset.dy=..."
        )


def _metres(axis: Axis, step: float | np.ndarray | None) -> float | np.ndarray:
    return 1.0 if step is None else step * axis.metres


@dataclass(frozen=True)
class Found:
    """What a file format has found out about a file before the grid is known.

    Arguments:
        reader: Fetches snapshots.
        length: N.
        shape: `(H, W)`.
        names: The components.
        mask: The domain `(H, W)`, where the file has one.
        axes: The coordinates `x`, `y` and `time`.
        units: The units of the velocity.
        attrs: Source and licence.
    """

    reader: Reader
    length: int
    shape: tuple[int, int]
    names: tuple[str, str]
    axes: dict[str, Axis]
    mask: np.ndarray | None = None
    units: str = "m s-1"
    attrs: dict[str, str] = field(default_factory=dict)

    def to_fields(self, source: str, **spacing: float | str | np.ndarray | None) -> Fields:
        """The fields of the file `source`; `spacing` are the last four arguments of `make_grid`.

        Raises:
            UserError: No valid cell, or coordinates that give no grid.
        """
        x, y, time = (self.axes[role] for role in ("x", "y", "time"))
        grid = make_grid(valid_cells(self.reader, self.length, self.mask, self.shape, source), x, y, **spacing)
        height, width = self.shape
        return Fields(
            reader=self.reader,
            length=self.length,
            grid=grid,
            x=np.arange(width) * grid.dx.mean().item() if x.values is None else x.values,
            y=np.arange(height) * grid.dy.mean().item() if y.values is None else y.values,
            source=source,
            names=self.names,
            units=self.units,
            time=time.values,
            time_attrs=time.attrs,
            x_name=x.name,
            y_name=y.name,
            x_attrs=x.attrs,
            y_attrs=y.attrs,
            attrs=self.attrs,
        )
