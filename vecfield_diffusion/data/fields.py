"""A set of velocity snapshots on one grid, wherever they are stored.

`Fields` knows the grid, the coordinates and the names; a small `reader` fetches the numbers. A reader is a callable
`indices (n,) -> float32 array (n, 2, H, W)` that returns a fresh array: memory, a memory map and a file handle per
process are three readers behind one door.

Two kinds of absence are kept apart. A cell outside `grid.valid` is never measured (land, solid, outside). A valid
cell may still be missing in one snapshot (a gap). `read` gives NaN in both components for both kinds, so that

    measured = isfinite(fields.read(indices)[:, :1])        (n, 1, H, W)
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.arrays import Cached, FileReader, Snapshots, find_name, room_for
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.physics.grid import EARTH_RADIUS, Grid

Reader = Callable[[np.ndarray], np.ndarray]
#: Dimensions, values, attributes.
Coordinate = tuple[tuple[str, ...], np.ndarray, dict[str, Any]]
Land = Literal["auto", "nan", "zero"]
LAND = get_args(Land)

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
        global_attrs: All attributes of the file itself.
        component_attrs: The attributes of either component, without those of its storage.
        dims: The names that the file has for time, y and x; by default `time`, `y_name`, `x_name`.
        extra_coords: Further coordinates by name: dimensions (as in `dims`), values, attributes. Latitude and
            longitude `(H, W)`, the grid mapping, the level.
        variables: Readers of the other arrays of the file, by name.
        misfits: The shapes of those arrays that are no snapshots.
        groups: `(N,)`, equal for snapshots that are decoded together; None where nothing needs to be decoded.
        runs: `(N,)`, the trajectory of every snapshot, where there are several one after the other.
        layout: What was understood of the file, for `summary`.
        context: Names of further variables that the network is told.
        history: Earlier snapshots that the network is told, as lags.

    Raises:
        ValueError: A lag that is not a whole number of at least 1.
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
    global_attrs: dict[str, Any] = field(default_factory=dict)
    component_attrs: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    dims: tuple[str, str, str] | None = None
    extra_coords: dict[str, Coordinate] = field(default_factory=dict)
    variables: Mapping[str, Reader] = field(default_factory=dict)
    misfits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: np.ndarray | None = None
    runs: np.ndarray | None = None
    layout: str = ""
    context: Sequence[str] = ()
    history: Sequence[int] = ()
    _readers: dict[str, Reader] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not all(isinstance(lag, int) and lag >= 1 for lag in self.history):
            raise ValueError(f"history must be lags of at least 1 snapshot, got {list(self.history)}")
        self.dims = self.dims or ("time", self.y_name, self.x_name)

    def __len__(self) -> int:
        return self.length

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)`."""
        return self.grid.shape

    def read(self, indices: Sequence[int] | Tensor | np.ndarray, partial: bool = False) -> Tensor:
        """Snapshots as float32 `(n, 2, H, W)`, NaN where a cell is not measured.

        Arguments:
            indices: The snapshots.
            partial: Whether to keep a component whose partner is missing; by default both are NaN there.

        Raises:
            IndexError: An index outside `[0, N)`.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.length):
            raise IndexError(f"snapshots run from 0 to {self.length - 1}, got {chosen.min()} to {chosen.max()}")
        velocity = torch.from_numpy(self.reader(chosen))
        measured = velocity.isfinite() & self.grid.valid
        if not partial:
            measured = measured.all(1, keepdim=True)
        return velocity.masked_fill_(~measured, torch.nan)

    def variable(self, name: str) -> Reader:
        """Another array of the file as a reader, `indices (n,) -> float32 (n, C, H, W)`, NaN where missing.

        An array `(H, W)` is repeated for every snapshot, one `(N,)` over the grid. C is 1 but for arrays that have
        channels, such as `/context/<name>` of the native file, which `<name>` finds.

        Raises:
            UserError: The file has no such array, or its dimensions are not those of the velocity.
        """
        found = find_name(self.variables, name)
        if found is not None:
            if found not in self._readers:
                reader = self.variables[found]
                self._readers[found] = Cached(reader, self.groups) if self._costly(reader) else reader
            return self._readers[found]
        listing = f"It has: {', '.join(self.variables) or 'none'}."
        if (found := find_name(self.misfits, name)) is not None:
            height, width = self.shape
            raise UserError(
                f"{self.source}: '{name}' has shape {tuple(self.misfits[found])}, which is not that of {self.length} "
                f"snapshots of {height}x{width} cells. Choose another variable. {listing}"
            )
        options = [*self.variables, *(each.rpartition("/")[2] for each in self.variables)]
        raise UserError(f"{self.source} has no variable '{name}'.{nearest(name, options)} {listing}")

    def _costly(self, reader: Reader) -> bool:
        static = isinstance(reader, Snapshots) and all(view.static for view in reader.views)
        size = 4.0 * self.length * self.grid.valid.numel()
        return self.groups is not None and isinstance(reader, FileReader) and not static and room_for(size)

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
        runs = "" if self.runs is None else f" ({len(np.unique(self.runs))} runs)"
        return (
            f"{self.source}: {self.layout or ', '.join(self.names)} -> N={self.length} fields 2x{height}x{width}{runs} "
            f"in {self.units}, u along {self.x_name}, {share:.1f} % valid, {spacing}, "
            f"{self.x_name} {self.grid.boundary_x}, {self.y_name} {self.grid.boundary_y}"
        )


def same_units(first: str, second: str) -> bool:
    """Whether two spellings mean the same units of velocity."""
    plain = [re.sub(r"[\s()^*.]|(?<=m)/(?=s)", "", units.lower()) for units in (first, second)]
    metres = {"ms", "ms-1", "meter/second", "meters/second", "metersecond-1", "metrespersecond", "meterspersecond"}
    return plain[0] == plain[1] or set(plain) <= metres


def _extent(spacing: Tensor) -> str:
    low, high = spacing.min().item(), spacing.max().item()
    low, high = f"{low:.6g}", f"{high:.6g}"
    return low if low == high else f"{low} to {high}"


def blocks(length: int, cells: int) -> Iterator[np.ndarray]:
    """Consecutive indices that together run over `length` snapshots of `cells` cells, about 32 MB at a time."""
    size = max(1, BLOCK_BYTES // (8 * cells))
    for start in range(0, length, size):
        yield np.arange(start, min(start + size, length))


@dataclass(frozen=True)
class Survey:
    """What a set says of its cells.

    Arguments:
        seen: The cells that at least one snapshot measures, boolean `(H, W)`.
        still: Those of them where both components are exactly 0 whenever they are measured.
        looked: The snapshots that were read to find out.
    """

    seen: np.ndarray
    still: np.ndarray
    looked: int


def survey(reader: Reader, length: int, candidates: np.ndarray, still: bool = True) -> Survey:
    """Which of the cells `candidates (H, W)` are ever measured, and which never move.

    Reads no further than it must: with no gaps and no still cells the first block answers. Where `still` is False, it
    does not read on to be sure that a cell never moves.
    """
    seen, moved = np.zeros_like(candidates), np.zeros_like(candidates)
    looked = 0
    for indices in blocks(length, candidates.size):
        velocity = reader(indices)
        seen |= np.isfinite(velocity).all(axis=1).any(axis=0) & candidates
        moved |= ((velocity != 0) & np.isfinite(velocity)).any(axis=(0, 1))
        looked += len(indices)
        if seen[candidates].all() and (moved[seen].all() or not still):
            break
    return Survey(seen, seen & ~moved, looked)


def valid_cells(
    reader: Reader, length: int, mask: np.ndarray | None, shape: tuple[int, int], source: str, land: Land = "auto"
) -> Tensor:
    """The domain, boolean `(H, W)`: the file's own `mask`, else the cells that some snapshot measures.

    Cells that are exactly 0 in both components at all times are land where `land` is `zero`; `auto` prints how many
    there are.

    Raises:
        UserError: The mask has no valid cell, or no snapshot measures any, or all are land.
    """
    if mask is not None and not mask.any():
        raise UserError(
            f"{source}: the mask marks no cell as valid. Expected 1 = wet under dataset.valid=, "
            "1 = solid under dataset.invalid=."
        )
    # A set that stays on the disk is read to its end for this only if the answer matters.
    whole = land == "zero" or (land == "auto" and isinstance(reader, MemoryReader))
    found = survey(reader, length, np.ones(shape, dtype=bool) if mask is None else mask, whole)
    if not found.seen.any():
        raise UserError(
            f"{source}: no snapshot has a cell where both components are numbers: all values are NaN, fill values "
            "or masked. Choose other variables (dataset.u=, dataset.v=) or another file (dataset.path=)."
        )
    if land == "auto" and found.still.any() and not found.still[found.seen].all():
        when = "all times" if found.looked == length else f"the first {found.looked} times"
        print(
            f"note: {source}: {found.still.sum()} cells are exactly 0 in both components at {when}: land? "
            "dataset.land=zero"
        )
    domain = found.seen if mask is None else mask
    if land == "zero" and not (domain & ~found.still).any():
        raise UserError(f"{source}: every cell is exactly 0 at all times, so dataset.land=zero leaves none.")
    return torch.from_numpy(domain & ~found.still if land == "zero" else domain)


def duplicates(velocity: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of snapshots `(N, 2, H, W)` that are the same to the last bit: the first of its kind and another."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, snapshot in enumerate(velocity):
        key = hashlib.blake2b(np.ascontiguousarray(snapshot), digest_size=16).digest()
        if first.setdefault(key, index) != index and np.isfinite(snapshot).any():
            pairs.append((first[key], index))
    return pairs


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
        return np.gradient(values, edge_order=min(2, len(values) - 1))


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


def plane_spacing(x: np.ndarray, y: np.ndarray, degrees: bool) -> tuple[np.ndarray, np.ndarray]:
    """The spacing of a curvilinear grid in metres, `dx (H,)` and `dy (H,)`.

    Distances between neighbours along the great circle (haversine formula), or the straight line where the coordinates
    are not degrees, averaged over every row; `dy` at a row is the mean of the distances to the two beside it, negative
    where the rows run southward.

    Arguments:
        x: The coordinate along x of every cell, `(H, W)`; longitude in degrees. NaN where unknown.
        y: Likewise along y.
        degrees: Whether they count degrees on the globe.
    """
    across = _rows_filled(_distance(x, y, 1, degrees))
    between = _rows_filled(_distance(x, y, 0, degrees))
    down = np.nanmean(np.diff(y, axis=0)) < 0
    dy = np.concatenate([between[:1], (between[1:] + between[:-1]) / 2, between[-1:]])
    return across, -dy if down else dy


def _distance(x: np.ndarray, y: np.ndarray, axis: int, degrees: bool) -> np.ndarray:
    dx, dy = np.diff(x, axis=axis), np.diff(y, axis=axis)
    if not degrees:
        return np.hypot(dx, dy)
    lat = np.deg2rad(y)
    before, after = (np.take(lat, range(start, lat.shape[axis] - 1 + start), axis=axis) for start in (0, 1))
    chord = np.sin(np.deg2rad(dy) / 2) ** 2 + np.cos(before) * np.cos(after) * np.sin(np.deg2rad(dx) / 2) ** 2
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(chord))


def _rows_filled(distance: np.ndarray) -> np.ndarray:
    """The mean of every row, where a row without any takes that of the nearest ones."""
    known = np.isfinite(distance)
    mean = np.where(known, distance, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    rows = np.flatnonzero(known.any(1))
    return np.interp(np.arange(len(mean)), rows, mean[rows])


def along(plane: np.ndarray, axis: int) -> np.ndarray | None:
    """The coordinate `(H, W)` as one along `axis`, if it changes along that alone (to a thousandth of a step)."""
    line = np.nanmean(plane, axis=1 - axis)
    step = np.abs(np.diff(line)).min(initial=np.inf)
    spread = np.nanmax(np.abs(plane - np.expand_dims(line, 1 - axis)))
    return line if spread <= 1e-3 * step else None


#: What `Found` hands on to `Fields` as it is.
SHARED = (
    *("length", "names", "units", "attrs", "global_attrs", "dims", "extra_coords"),
    *("variables", "misfits", "groups", "runs", "layout"),
)


@dataclass(frozen=True)
class Found:
    """What a file format has found out about a file before the grid is known.

    Arguments:
        reader: Fetches snapshots.
        length: N.
        shape: `(H, W)`.
        names: The components.
        axes: The coordinates `x`, `y` and `time`.
        mask: The domain `(H, W)`, where the file has one.
        units: The units of the velocity.
        attrs: Source and licence.
        source: The path of the file.
        spacing: What the file itself says of `dx`, `dy`, `boundary_x` and `boundary_y`.
        notes: What there is to say about what was chosen.

    The others are those of `Fields`.
    """

    reader: Reader
    length: int
    shape: tuple[int, int]
    names: tuple[str, ...]
    axes: dict[str, Axis]
    mask: np.ndarray | None = None
    units: str = "m s-1"
    attrs: dict[str, str] = field(default_factory=dict)
    source: str = ""
    spacing: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layout: str = ""
    global_attrs: dict[str, Any] = field(default_factory=dict)
    component_attrs: tuple[dict[str, Any], ...] = ()
    dims: tuple[str, str, str] | None = None
    extra_coords: dict[str, Coordinate] = field(default_factory=dict)
    variables: Mapping[str, Reader] = field(default_factory=dict)
    misfits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: np.ndarray | None = None
    runs: np.ndarray | None = None

    def to_fields(
        self,
        source: str,
        land: Land = "auto",
        preload_gb: float = 2.0,
        context: Sequence[str] = (),
        history: Sequence[int] = (),
        **spacing: float | str | np.ndarray | None,
    ) -> Fields:
        """The fields of the file `source`; `spacing` are the last four arguments of `make_grid`.

        Raises:
            UserError: No valid cell, or coordinates that give no grid.
            ValueError: `land`, `preload_gb`, `history` or a boundary out of range.
        """
        if preload_gb < 0:
            raise ValueError(f"preload_gb must be at least 0, got {preload_gb}")
        if land not in LAND:
            raise ValueError(f"land must be one of {', '.join(LAND)}, got {land!r}")
        for note in self.notes:
            print(f"note: {source}: {note}")
        reader = self._fetching(source, preload_gb)
        x, y, time = (self.axes[role] for role in ("x", "y", "time"))
        spacing = self.spacing | {name: value for name, value in spacing.items() if value is not None}
        grid = make_grid(valid_cells(reader, self.length, self.mask, self.shape, source, land), x, y, **spacing)
        height, width = self.shape
        return Fields(
            reader=reader,
            grid=grid,
            x=np.arange(width) * grid.dx.mean().item() if x.values is None else x.values,
            y=np.arange(height) * grid.dy.mean().item() if y.values is None else y.values,
            source=source,
            time=time.values,
            time_attrs=time.attrs,
            x_name=x.name,
            y_name=y.name,
            x_attrs=x.attrs,
            y_attrs=y.attrs,
            component_attrs=self.component_attrs or ({}, {}),
            context=context,
            history=history,
            **{name: getattr(self, name) for name in SHARED},
        )

    def _fetching(self, source: str, preload_gb: float) -> Reader:
        """Memory for what fits below `preload_gb`; else the file, through a cache where it must be decoded."""
        if isinstance(self.reader, MemoryReader):
            return self.reader
        size = 8.0 * self.length * self.shape[0] * self.shape[1]
        if size <= preload_gb * 1e9:
            return MemoryReader(self._preloaded(source))
        if self.groups is None:
            return self.reader
        if room_for(size):
            return Cached(self.reader, self.groups)
        warnings.warn(
            f"{source}: its values are packed or lie in large pieces, and are decoded anew for every batch. Raise "
            f"dataset.preload_gb (now {preload_gb:g}; {size * 1e-9:.3g} needed), or free {2e-9 * size:.3g} GB in "
            f"{tempfile.gettempdir()} (TMPDIR) for a cache",
            stacklevel=4,
        )
        return self.reader

    def _preloaded(self, source: str) -> np.ndarray:
        velocity = np.empty((self.length, 2, *self.shape), dtype=np.float32)
        for indices in blocks(self.length, self.shape[0] * self.shape[1]):
            velocity[indices[0] : indices[-1] + 1] = self.reader(indices)
        if isinstance(self.reader, FileReader):
            self.reader.close()
        if pairs := duplicates(velocity):
            listing = ", ".join(f"{second} = {first}" for first, second in pairs[:8])
            more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
            print(f"note: {source}: {len(pairs)} snapshots are copies of earlier ones to the last bit: {listing}{more}")
        return velocity
