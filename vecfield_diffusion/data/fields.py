"""A set of velocity snapshots on one grid, wherever they are stored.

`Fields` knows the grid, the coordinates and the names; a small `reader` fetches the numbers. A reader is a callable
`indices (n,) -> float32 array (n, 2, H, W)` that returns a fresh array: memory, a memory map and a file handle per
process are three readers behind one door.

Two kinds of absence are kept apart. A cell outside `grid.valid` is never measured (land, solid, outside). A valid
cell may still be missing in one snapshot (a gap). `read` gives NaN in both components for both kinds, so that

    measured = isfinite(fields.read(indices)[:, :1])        (n, 1, H, W)

A velocity is in m s-1 and along the axes of the grid, whatever its file has; `restore` leads back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.law import Law
from vecfield_diffusion.data.stored import Cached, Combined, Reader, room_for, still, turned
from vecfield_diffusion.data.units import SPEED, factor, same_units
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.progress import over

__all__ = ["Fields", "MemoryReader", "Reader", "same_units"]

#: Dimensions, values, attributes.
Coordinate = tuple[tuple[str, ...], np.ndarray, dict[str, Any]]
Land = Literal["auto", "nan", "zero", "gap"]
LAND = get_args(Land)

BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class MemoryReader:
    """A reader of an array `(N, 2, H, W)`, float32, that lies in memory."""

    array: np.ndarray

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices` as a copy, `(n, 2, H, W)`."""
        return self.array[indices]


@dataclass(eq=False, kw_only=True)
class Contents:
    """What a set of files holds beside the velocity.

    Arguments:
        attrs: Where the data come from and their licence, as the file says.
        global_attrs: All attributes of the file itself.
        dims: The names that the file has for time, y and x; None where it has none.
        extra_coords: Further coordinates by name: dimensions (as in `dims`), values, attributes. Latitude and
            longitude `(H, W)`, the grid mapping, the level.
        variables: Readers of the other arrays of the file, by name.
        misfits: The shapes of those arrays that are no snapshots.
        groups: `(N,)`, equal for snapshots that are decoded together; None where nothing needs to be decoded.
        runs: `(N,)`, the trajectory of every snapshot, where there are several one after the other.
        layout: What was understood of the file, for `summary`.
        variable_units: The units of those variables in the file; those of speed are in those of the fields here.
    """

    attrs: dict[str, str] = field(default_factory=dict)
    global_attrs: dict[str, Any] = field(default_factory=dict)
    dims: tuple[str, str, str] | None = None
    extra_coords: dict[str, Coordinate] = field(default_factory=dict)
    variables: Mapping[str, Reader] = field(default_factory=dict)
    misfits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: np.ndarray | None = None
    runs: np.ndarray | None = None
    layout: str = ""
    variable_units: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Fields(Contents):
    """N snapshots of a two-component velocity on one grid.

    Arguments:
        reader: Fetches snapshots, `indices (n,) -> float32 (n, 2, H, W)`, a fresh array each time.
        length: N.
        grid: Spacing in metres, boundaries and valid cells.
        x: The coordinate of the columns `(W,)`; degrees east if `x_name` is `lon`.
        y: The coordinate of the rows `(H,)`; degrees north if `y_name` is `lat`.
        source: The path of the file.
        names: The names that the components have in the file.
        units: The units of the velocity: m s-1, or what the file says where that is no speed.
        time: `(N,)`, `datetime64` or numbers, where the file has it.
        time_attrs: Attributes of the time, such as its units.
        x_name: `x` or `lon`.
        y_name: `y` or `lat`.
        x_attrs: Attributes of `x`.
        y_attrs: Attributes of `y`.
        component_attrs: The attributes of either component, without those of its storage.
        scale: What the components of the file were multiplied by.
        turn: The angle `(H, W)` from east to the axis of the columns, anticlockwise in radians, by which components
            that point east and north were turned; None for none.
        land: The cells `(H, W)` that the file says are land; None where it does not tell them from sea that no snapshot
            measures.
        context: Names of further variables that the network is conditioned on.
        history: Earlier snapshots that the network is conditioned on, as lags.
        frames: The frames of a sequence, which is one sample; 1 for single snapshots.
        stride: The steps from one frame of a sequence to the next.
        law: What is known of the law of generated fields; None of others.

    The others are those of `Contents`; `dims` are `time`, `y_name` and `x_name` where the file has no others.

    Raises:
        ValueError: A lag, a number of frames or a stride that is not a whole number of at least 1.
        UserError: A history beside frames, which hold it.
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
    component_attrs: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    scale: tuple[float, float] = (1.0, 1.0)
    turn: np.ndarray | None = None
    land: Tensor | None = None
    context: Sequence[str] = ()
    history: Sequence[int] = ()
    frames: int = 1
    stride: int = 1
    law: Law | None = None
    _readers: dict[str, Reader] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not all(isinstance(lag, int) and lag >= 1 for lag in self.history):
            raise ValueError(f"history must be lags of at least 1 snapshot, got {list(self.history)}")
        for name, value in (("frames", self.frames), ("stride", self.stride)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if self.frames > 1 and self.history:
            raise UserError(
                f"dataset.history={list(self.history)} with dataset.frames={self.frames}: the frames of a sequence "
                "hold the earlier fields. Leave dataset.history out"
            )
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
        velocity = self.reader(chosen)
        # NumPy looks for NaN ten times as fast as torch does on one core.
        measured = np.isfinite(velocity) & self.grid.valid.numpy()
        if not partial:
            measured = measured.all(axis=1, keepdims=True)
        np.copyto(velocity, np.nan, where=~measured)
        return torch.from_numpy(velocity)

    def within(self, valid: Tensor) -> Fields:
        """The same fields with another domain, boolean `(H, W)`."""
        return replace(self, grid=replace(self.grid, valid=valid), land=None)

    def converted(self, units: str) -> Fields:
        """The same in other units of speed, those that an older network was trained in.

        Raises:
            UserError: Units that cannot be converted to one another.
        """
        if same_units(units, self.units):
            return self
        wanted, own = factor(units, SPEED), factor(self.units, SPEED)
        if wanted is None or own is None:
            raise UserError(f"{self.source} is in {self.units}, which cannot be converted to {units}")
        ratio = own / wanted
        readers = {
            name: reader if factor(self.units_of(name), SPEED) is None else Combined([reader], (ratio, ratio))
            for name, reader in self.variables.items()
        }
        scale = (self.scale[0] * ratio, self.scale[1] * ratio)
        reader = Combined([self.reader], (ratio, ratio))
        return replace(self, reader=reader, variables=readers, scale=scale, units=units)

    def restore(self, velocity: np.ndarray) -> np.ndarray:
        """Velocities `(..., 2, H, W)` as the components of the file, in its units and along its directions."""
        if self.turn is not None:
            velocity = turned(velocity, -self.turn)
        if self.scale == (1.0, 1.0):
            return velocity
        return velocity / np.asarray(self.scale, dtype=velocity.dtype)[:, None, None]

    def variable(self, name: str) -> Reader:
        """Another array of the file as a reader, `indices (n,) -> float32 (n, C, H, W)`, NaN where missing.

        One in units of speed, such as the error of the velocity, is in m s-1.

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

    def units_of(self, name: str) -> str:
        """The units that the file gives to another array, empty where it gives none."""
        return self.variable_units.get(find_name(self.variable_units, name) or "", "")

    def _costly(self, reader: Reader) -> bool:
        size = 4.0 * self.length * self.grid.valid.numel()
        stored = self.groups is not None and not isinstance(reader, MemoryReader)
        return stored and not still(reader) and room_for(size)

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


def find_name(names: Iterable[str], wanted: str) -> str | None:
    """The array called `wanted`, by its whole name or, where that is unique, by the last part of it."""
    names = list(names)
    if wanted in names:
        return wanted
    ends = [name for name in names if name.rpartition("/")[2] == wanted]
    return ends[0] if len(ends) == 1 else None


def _extent(spacing: Tensor) -> str:
    low, high = spacing.min().item(), spacing.max().item()
    low, high = f"{low:.6g}", f"{high:.6g}"
    return low if low == high else f"{low} to {high}"


def blocks(length: int, cells: int) -> Iterator[np.ndarray]:
    """Consecutive indices that together run over `length` snapshots of `cells` cells, about 32 MB at a time."""
    size = max(1, BLOCK_BYTES // (8 * cells))
    for start in range(0, length, size):
        yield np.arange(start, min(start + size, length))


def measured_cells(
    reader: Reader, length: int, candidates: np.ndarray, still: bool = True
) -> tuple[np.ndarray, np.ndarray, int]:
    """Which of the cells `candidates (H, W)` are ever measured, which of them are always 0, and how many were read.

    Reads no further than it must: with no gaps and no still cells the first block answers. Where `still` is False, it
    does not read on to be sure that a cell never moves.
    """
    seen, moved = np.zeros_like(candidates), np.zeros_like(candidates)
    looked = 0
    for indices in over(list(blocks(length, candidates.size)), "blocks", "reading"):
        velocity = reader(indices)
        seen |= np.isfinite(velocity).all(axis=1).any(axis=0) & candidates
        moved |= ((velocity != 0) & np.isfinite(velocity)).any(axis=(0, 1))
        looked += len(indices)
        if seen[candidates].all() and (moved[seen].all() or not still):
            break
    return seen, seen & ~moved, looked


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
            f"{source}: the mask marks no cell as valid. Expected 1 = wet under {option('valid')}, "
            f"1 = solid under {option('invalid')}"
        )
    # A set that stays on the disk is read to its end for this only if the answer matters.
    whole = land == "zero" or (land == "auto" and isinstance(reader, MemoryReader))
    seen, zero, looked = measured_cells(reader, length, np.ones(shape, dtype=bool) if mask is None else mask, whole)
    if not seen.any():
        raise UserError(
            f"{source}: no snapshot has a cell where both components are numbers: all values are NaN, fill values "
            f"or masked. Choose other variables ({components()}) or another file ({option('path')})"
        )
    if land == "auto" and zero.any() and not zero[seen].all():
        when = "all times" if looked == length else f"the first {looked} times"
        print(
            f"note: {source}: {zero.sum()} cells are exactly 0 in both components at {when}. If that is land: "
            f"{option('land', 'zero')}; if it is gaps: {option('land', 'gap')}"
        )
    domain = seen if mask is None else mask
    domain = domain & ~zero if land == "zero" else domain
    if not domain.any():
        raise UserError(f"{source}: every cell is exactly 0 at all times, so {option('land', 'zero')} leaves none.")
    return torch.from_numpy(domain)


def duplicates(velocity: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of snapshots `(N, 2, H, W)` that are the same to the last bit: the first of its kind and another."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, snapshot in enumerate(velocity):
        key = hashlib.blake2b(np.ascontiguousarray(snapshot), digest_size=16).digest()
        if first.setdefault(key, index) != index and np.isfinite(snapshot).any():
            pairs.append((first[key], index))
    return pairs
