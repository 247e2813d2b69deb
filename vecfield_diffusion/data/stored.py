"""How snapshots are fetched from where they are stored.

A reader is a callable `indices (n,) -> float32 (n, C, H, W)` that returns a fresh array. `Snapshots` reads a
variable, `Joined` readers one after the other along time, `Combined` those of u and of v, and `Cached` keeps what
another reader decoded. A file is never mapped: one that shrinks is a message then and not a signal.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xarray as xr

from vecfield_diffusion.errors import UserError

Reader = Callable[[np.ndarray], np.ndarray]
Stamp = tuple[int, int]
#: The axes of a snapshot, in the order in which they are returned.
ORDER = ("time", "channel", "y", "x")
PART_BYTES = 2**25


def stamp(path: str | Path) -> Stamp:
    """What changes when a file is written anew: its size and the time of its last change."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Reports what the libraries raise in the block for damaged contents, some of which they notice late.

    Raises:
        UserError: The file is damaged, or the memory does not suffice.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(f"'{path}' asks for more memory than there is: {error}. Cut it into smaller files.") from error
    except (OSError, RuntimeError, KeyError, EOFError) as error:
        raise UserError(f"'{path}' is damaged: {error}. Copy or download it again.") from error


@dataclass(eq=False)
class Snapshots:
    """A variable of a data set.

    Arguments:
        variable: Decoded, with dimensions among time, channel, y and x.
        shape: `(H, W)`; what the variable lacks of it is repeated.
        limits: Its least and its largest valid value.
        masks: Variables, each with the value (True or False) that marks a measured cell.
        source: The file, for messages.
        stamps: The files with their state when they were opened.
    """

    variable: xr.Variable
    shape: tuple[int, int]
    limits: tuple[float, float] = (-np.inf, np.inf)
    masks: Sequence[tuple[xr.Variable, bool]] = ()
    source: str = ""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    _still: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`.

        Raises:
            UserError: The file cannot be opened, its data are damaged, or it has changed.
        """
        self._unchanged()
        with reading(self.source):
            values = self._part(self.variable, indices)
            if np.isfinite(self.limits).any():
                values = np.where((values >= self.limits[0]) & (values <= self.limits[1]), values, np.nan)
            if not (values.flags.writeable and values.flags.c_contiguous):
                values = values.copy()
            for variable, measured in self.masks:
                cells = np.nan_to_num(self._part(variable, indices), nan=float(not measured)).astype(bool)
                np.copyto(values, np.nan, where=cells != measured)
        self._unchanged()  # where a file ends too early, the libraries give zeros
        return values

    def _unchanged(self) -> None:
        for path, state in self.stamps.items():
            if not os.path.exists(path) or stamp(path) != state:
                raise UserError(f"'{path}' has changed since it was opened. Let it be finished, and start again.")

    def _part(self, variable: xr.Variable, indices: np.ndarray) -> np.ndarray:
        if "time" not in variable.dims:
            if id(variable) not in self._still:
                self._still[id(variable)] = arranged(variable)
            return np.broadcast_to(still := self._still[id(variable)], (len(indices), still.shape[1], *self.shape))
        # A slice of what lies in memory is the store itself, and callers change what they are given.
        run = len(indices) and not variable._in_memory and np.all(np.diff(indices) == 1)
        values = arranged(variable[{"time": slice(indices[0], indices[-1] + 1) if run else indices}])
        wide = values.shape[2:] == self.shape
        return values if wide else np.broadcast_to(values, (len(indices), values.shape[1], *self.shape))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_still": {}}


def still(reader: Reader) -> bool:
    """Whether a reader gives the same at all times, as that of a depth does."""
    parts = (reader.variable, *(mask for mask, _ in reader.masks)) if isinstance(reader, Snapshots) else ()
    return bool(parts) and all("time" not in part.dims for part in parts)


def arranged(variable: xr.Variable) -> np.ndarray:
    """The values as float32 `(n, C, H, W)`, of size 1 along axes that the variable does not have."""
    kept = [axis for axis in ORDER if axis in variable.dims]
    values = np.asarray(variable.transpose(*kept).values)
    values = values.astype(np.float32, copy=False)
    return np.expand_dims(values, tuple(place for place, axis in enumerate(ORDER) if axis not in kept))


class Joined:
    """Readers one after the other along time, of so many snapshots each."""

    def __init__(self, readers: Sequence[Reader], lengths: Sequence[int]) -> None:
        self.readers = tuple(readers)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`."""
        which = np.searchsorted(self.starts[1:], indices, side="right")
        if len(np.unique(which)) <= 1:
            number = int(which[0]) if len(which) else 0
            return self.readers[number](indices - self.starts[number])
        places = {number: np.flatnonzero(which == number) for number in np.unique(which)}
        parts = {number: self.readers[number](indices[rows] - self.starts[number]) for number, rows in places.items()}
        values = np.empty((len(indices), *next(iter(parts.values())).shape[1:]), dtype=np.float32)
        for number, rows in places.items():
            values[rows] = parts[number]
        return values


@dataclass(eq=False)
class Combined:
    """The two components of a velocity: brought to common points, to m s-1 and to the axes of the grid.

    Arguments:
        readers: One of both components, or one for each.
        scale: What either component is multiplied by.
        cuts: For either component, slices of y and x whose mean is taken; empty where they lie on the same points.
        turn: The angle from east to the axis of the columns, anticlockwise, radians `(H, W)`; None for none.
        gaps: Whether a cell that is exactly 0 in both components is a gap.
    """

    readers: Sequence[Reader]
    scale: tuple[float, float] = (1.0, 1.0)
    cuts: Sequence[Sequence[tuple[slice, slice]]] = ()
    turn: np.ndarray | None = None
    gaps: bool = False

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`."""
        parts = [reader(indices) for reader in self.readers]
        if self.cuts:
            parts = [
                sum(part[:, :, rows, columns] for rows, columns in cuts) / np.float32(len(cuts))
                for part, cuts in zip(parts, self.cuts, strict=True)
            ]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if self.scale != (1.0, 1.0):
            values *= np.asarray(self.scale[: values.shape[1]], dtype=np.float32)[:, None, None]
        if self.gaps:
            np.copyto(values, np.nan, where=(values == 0).all(axis=1, keepdims=True))
        return values if self.turn is None else turned(values, self.turn)


def turned(velocity: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Components `(..., 2, H, W)` along axes that are turned anticlockwise by `angle (H, W)`; -angle turns back."""
    u, v = np.moveaxis(velocity, -3, 0)
    cos, sin = np.cos(angle).astype(velocity.dtype), np.sin(angle).astype(velocity.dtype)
    return np.stack([cos * u + sin * v, cos * v - sin * u], axis=-3)


class Cached:
    """Keeps what another reader decoded, so that every snapshot is decoded once.

    It goes as float32 into a temporary file without a name, which vanishes with the process, however that ends; each
    process has its own. Snapshots that lie in one chunk are decoded together. A disk that fills ends the keeping, not
    the reading. `groups (N,)` has the same number for snapshots that are decoded together.
    """

    _file: BinaryIO | None = None

    def __init__(self, reader: Reader, groups: np.ndarray) -> None:
        self.reader, self.groups = reader, groups
        self._forget()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`."""
        if self._process != os.getpid():
            self._forget()
            self._process, self._file = os.getpid(), tempfile.TemporaryFile(prefix="vecfield-")  # noqa: SIM115
        if self._file is None or not len(indices):
            return self.reader(indices)
        try:
            for group in np.unique(self.groups[indices[~self._kept[indices]]]):
                self._keep(np.flatnonzero(self.groups == group))
            return self._map[indices]
        except OSError as error:
            print(f"note: {tempfile.gettempdir()}: {error.strerror}; decoded fields are kept no longer")
            self._file = self._map = None
            return self.reader(indices)

    def _keep(self, snapshots: np.ndarray) -> None:
        """Decodes the snapshots and writes them, 32 MB at a time."""
        if self._map is None:
            shape = self.reader(snapshots[:1]).shape[1:]
            self._file.truncate(4 * int(np.prod(shape)) * len(self.groups))
            self._map = np.memmap(self._file, np.float32, "r", shape=(len(self.groups), *shape))
        few = max(1, PART_BYTES // (4 * int(np.prod(self._map.shape[1:]))))
        for first in range(0, len(snapshots), few):
            part = snapshots[first : first + few]
            for row, index in zip(self.reader(part), part, strict=True):
                # Written as a file, not through the map: there a full disk would be a signal, here it is an error.
                self._file.seek(int(index) * row.nbytes)
                self._file.write(row.data)
            self._file.flush()
            self._kept[part] = True

    def _forget(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._map: np.ndarray | None = None
        self._kept = np.zeros(len(self.groups), dtype=bool)
        self._process: int | None = None

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def room_for(size: float) -> bool:
    """Whether a cache of `size` bytes takes at most half of what the temporary folder has left."""
    return size <= shutil.disk_usage(tempfile.gettempdir()).free / 2
