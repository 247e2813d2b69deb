"""Arrays of files as snapshots: what their dimensions mean, how their numbers are decoded, how they are fetched.

Every format ends here. A `View` says of one array what each dimension is and how stored numbers become values;
`Arrays` opens a file when it is needed, once per process. The readers, `indices (n,) -> float32 (n, C, H, W)`, are
`Snapshots` of one file, `Joined` files one after the other, `Stacked` files as components side by side, and `Cached`,
which keeps what another reader decoded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import xarray as xr

from vecfield_diffusion.errors import UserError, nearest

#: The axes of a snapshot, in the order in which they are returned.
SPACE = ("channel", "y", "x")
NEUTRAL = {"scale_factor": 1.0, "add_offset": 0.0}
PACKING = (*NEUTRAL, "_FillValue", "missing_value", "_Unsigned")
#: Attributes that speak of how an array is stored, or of arrays that are not kept with it.
STORAGE = (*PACKING, "valid_min", "valid_max", "valid_range", "coordinates", "ancillary_variables", "cell_measures")
#: A chunk of more snapshots than this is worth reading once for all of them.
MANY = 8
PART_BYTES = 2**25


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Reports what the libraries raise in the block for damaged contents, some of which they notice late.

    Raises:
        UserError: The file is damaged.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"'{path}' is damaged: {error}. Copy or download it again.") from error


@dataclass(frozen=True)
class Options:
    """What the user says about the arrays of a file; None where it is to be found out.

    Arguments:
        velocity: One array of both components.
        u: The component along x.
        v: The component along y.
        valid: A mask, 1 = wet.
        invalid: A mask, 1 = solid.
        x: The coordinate of the columns.
        y: The coordinate of the rows.
        time: The coordinate of the snapshots.
        level: The index along a depth or height of several levels.
        only: The one component to read, of a set whose components lie in files of their own.
    """

    velocity: str | None = None
    u: str | None = None
    v: str | None = None
    valid: str | None = None
    invalid: str | None = None
    x: str | None = None
    y: str | None = None
    time: str | None = None
    level: int | None = None
    only: str | None = None


@dataclass(frozen=True)
class Entry:
    """An array as its file describes it, before anything is read.

    Arguments:
        shape: Its sizes.
        dtype: Of the stored numbers.
        attrs: Its attributes.
        dims: The names of its dimensions, where it has any.
        chunks: The sizes of the pieces in which it is stored; None if in one.
        filtered: Whether a piece must be decoded (decompressed) as a whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    attrs: Mapping[str, Any] = field(default_factory=dict)
    dims: tuple[str, ...] = ()
    chunks: tuple[int, ...] | None = None
    filtered: bool = False

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers."""
        return self.dtype.kind in "fiub"

    @property
    def packing(self) -> dict[str, Any]:
        """The attributes that its values must be decoded with."""
        packing = {name: self.attrs[name] for name in PACKING if name in self.attrs}
        packing = {name: np.ravel(value)[0] if np.size(value) == 1 else value for name, value in packing.items()}
        if set(packing) == {"_FillValue"} and self.dtype.kind == "f" and np.isnan(packing["_FillValue"]).all():
            return {}
        return packing

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest valid value, after decoding; infinite where the file gives none."""
        pair = [
            np.ravel(self.attrs.get(name, none))[0] for name, none in (("valid_min", -np.inf), ("valid_max", np.inf))
        ]
        pair = np.ravel(self.attrs["valid_range"]) if "valid_range" in self.attrs else pair
        scale, offset = (float(self.packing.get(name, neutral)) for name, neutral in NEUTRAL.items())
        limits = []
        for limit in pair if np.asarray(pair).dtype.kind in "fiu" else (-np.inf, np.inf):
            # The conventions give the limits in packed units if they are of the packed type.
            packed = np.isfinite(limit) and np.asarray(limit).dtype.kind == "i" and self.dtype.kind == "i"
            limits.append(float(limit) * scale + offset if packed else float(limit))
        slack = 1e-6 * max((abs(limit) for limit in limits if np.isfinite(limit)), default=0.0)
        return min(limits) - slack, max(limits) + slack

    def described(self) -> dict[str, Any]:
        """The attributes that describe its values rather than how they are stored."""
        return {name: plain(value) for name, value in self.attrs.items() if name not in STORAGE and name[:1] != "_"}


def plain(value: Any) -> Any:  # noqa: ANN401
    """An attribute as text, a number or an array of numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return str(value) if array.ndim == 0 else ", ".join(str(plain(each)) for each in array.ravel())
    return array.item() if array.size == 1 else array


@dataclass(frozen=True)
class View:
    """How an array is read as snapshots.

    Arguments:
        name: Its name in the file.
        axes: What each of its dimensions is: `run`, `time`, `channel`, `y` or `x`; a number is the index that is
            taken along a dimension which is none of these.
        times: The snapshots of one run; only where the file has several.
        packing: The attributes to decode with.
        limits: The least and the largest valid value.
    """

    name: str
    axes: tuple[str | int, ...]
    times: int = 0
    packing: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[float, float] = (-np.inf, np.inf)

    @classmethod
    def of(cls, name: str, entry: Entry, axes: Sequence[str | int], times: int = 0) -> View:
        """The view of an array whose dimensions are understood."""
        return cls(name, tuple(axes), times, entry.packing, entry.limits)

    @property
    def static(self) -> bool:
        """Whether it is the same in every snapshot."""
        return not {"run", "time"} & set(self.axes)

    def read(self, array: Any, indices: np.ndarray) -> np.ndarray:  # noqa: ANN401
        """The rows `indices` decoded, float32 `(n, C, H, W)`, of size 1 along axes that the array does not have."""
        return self._arrange(self._decode(self._rows(array, indices)).astype(np.float32, copy=False))

    def plane(self, array: Any) -> np.ndarray:  # noqa: ANN401
        """The values of a static array in double precision, `(H, W)`, or of size 1 where it lacks an axis."""
        return self._arrange(self._decode(self._rows(array, np.zeros(1, dtype=int))).astype(np.float64))[0, 0]

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(indices, self.times) if self.times else (np.zeros_like(indices), indices)

    def _key(self, run: Any, time: Any) -> tuple[Any, ...]:  # noqa: ANN401
        index = {"run": run, "time": time}
        return tuple(axis if isinstance(axis, int) else index.get(axis, slice(None)) for axis in self.axes)

    def _rows(self, array: Any, indices: np.ndarray) -> np.ndarray:  # noqa: ANN401
        """A copy of the rows: consecutive ones in one go, others one after the other."""
        runs, times = self._places(indices)
        if self.static:
            return np.array(array[self._key(0, 0)])[None]
        if len(indices) and "time" in self.axes and np.all(np.diff(times) == 1) and runs[0] == runs[-1]:
            block = array[self._key(runs[0], slice(times[0], times[-1] + 1))]
            # What lies in memory is the store itself, and callers change what they are given.
            block = block.copy() if isinstance(array, np.ndarray) else block
            return np.moveaxis(block, [axis for axis in self.axes if self._stays(axis)].index("time"), 0)
        sizes = [size for size, axis in zip(array.shape, self.axes, strict=True) if axis in SPACE]
        rows = np.empty((len(indices), *sizes), dtype=array.dtype)
        for place, (run, time) in enumerate(zip(runs, times, strict=True)):
            rows[place] = array[self._key(run, time)]
        return rows

    @staticmethod
    def _stays(axis: str | int) -> bool:
        return axis == "time" or axis in SPACE

    def _decode(self, raw: np.ndarray) -> np.ndarray:
        if self.packing:
            variable = xr.Variable([f"d{axis}" for axis in range(raw.ndim)], raw, dict(self.packing))
            decoded = xr.decode_cf(xr.Dataset({"a": variable}), decode_times=False, decode_coords=False)
            raw = decoded["a"].values
        low, high = self.limits
        return raw if np.isinf(low) and np.isinf(high) else np.where((raw >= low) & (raw <= high), raw, np.nan)

    def _arrange(self, rows: np.ndarray) -> np.ndarray:
        kept = [axis for axis in self.axes if axis in SPACE]
        rows = rows.transpose(0, *(1 + kept.index(axis) for axis in SPACE if axis in kept))
        return np.expand_dims(rows, tuple(1 + place for place, axis in enumerate(SPACE) if axis not in kept))


Load = Callable[[Path], Mapping[str, Any]]


class Arrays:
    """The arrays of a file by name. It is opened at the first use in each process, for handles do not survive a fork.

    Only the files opened last stay open: a folder may hold thousands.

    Arguments:
        path: The file.
        load: Opens it, `path -> mapping of arrays`.
        most: Files that are kept open at a time, of those with the same `load`.
    """

    _recent: ClassVar[dict[Load, deque[weakref.ref[Arrays]]]] = {}

    def __init__(self, path: Path, load: Load, most: int = 32) -> None:
        self.path, self.load, self.most = path, load, most
        self.close()

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        return self.all()[name]

    def all(self) -> Mapping[str, Any]:
        """The arrays as the file gives them to this process."""
        if self._process != os.getpid():
            self._open, self._process = self.load(self.path), os.getpid()
            recent = self._recent.setdefault(self.load, deque())
            recent.append(weakref.ref(self))
            while len(recent) > self.most:
                oldest = recent.popleft()()
                if oldest is not None and oldest is not self:
                    oldest.close()
        return self._open

    def close(self) -> None:
        """Lets the file go; the next use opens it again."""
        self._open: Mapping[str, Any] = {}
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "load": self.load, "most": self.most, "_open": {}, "_process": None}


class FileReader(ABC):
    """A reader that leaves the snapshots where they are stored."""

    @abstractmethod
    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices (n,)`, a fresh float32 array `(n, C, H, W)`, NaN where missing.

        Raises:
            UserError: The file cannot be opened, or its data are damaged.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets the files go; the next call opens them again."""


class Snapshots(FileReader):
    """Arrays of one file, side by side as channels.

    Arguments:
        arrays: The file.
        views: How each array is read.
        shape: `(H, W)`; what an array lacks of it is repeated.
        masks: Views of masks, each with the value (True or False) that marks a measured cell.
    """

    def __init__(
        self,
        arrays: Arrays,
        views: Sequence[View],
        shape: tuple[int, int],
        masks: Sequence[tuple[View, bool]] = (),
    ) -> None:
        self.arrays, self.views, self.shape, self.masks = arrays, tuple(views), shape, tuple(masks)
        self._static: dict[str, np.ndarray] = {}

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`."""
        with reading(self.arrays.path):
            parts = [self._part(view, indices) for view in self.views]
            values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            if not (values.flags.writeable and values.flags.c_contiguous):
                values = values.copy()
            for view, measured in self.masks:
                cells = np.nan_to_num(self._part(view, indices), nan=float(not measured)).astype(bool)
                np.copyto(values, np.nan, where=cells != measured)
        return values

    def _part(self, view: View, indices: np.ndarray) -> np.ndarray:
        if view.static and view.name not in self._static:
            self._static[view.name] = view.read(self.arrays[view.name], indices)
        values = self._static[view.name] if view.static else view.read(self.arrays[view.name], indices)
        if not view.static and values.shape[2:] == self.shape:
            return values
        return np.broadcast_to(values, (len(indices), values.shape[1], *self.shape))

    def close(self) -> None:
        """Lets the file go."""
        self.arrays.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_static": {}}


class Joined(FileReader):
    """Readers one after the other along time.

    Arguments:
        readers: The readers.
        lengths: The snapshots of each.
    """

    def __init__(self, readers: Sequence[Callable[[np.ndarray], np.ndarray]], lengths: Sequence[int]) -> None:
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

    def close(self) -> None:
        """Lets the files go."""
        _close(self.readers)


class Stacked(FileReader):
    """Readers of the same snapshots side by side as channels."""

    def __init__(self, readers: Sequence[Callable[[np.ndarray], np.ndarray]]) -> None:
        self.readers = tuple(readers)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, C, H, W)`."""
        return np.concatenate([reader(indices) for reader in self.readers], axis=1)

    def close(self) -> None:
        """Lets the files go."""
        _close(self.readers)


def _close(readers: Sequence[Callable[[np.ndarray], np.ndarray]]) -> None:
    for reader in readers:
        if isinstance(reader, FileReader):
            reader.close()


class Cached(FileReader):
    """Keeps what another reader decoded, so that every snapshot is decoded once.

    It goes as float32 into a temporary file without a name, which vanishes with the process, however that ends; each
    process has its own. Snapshots that lie in one chunk are decoded together. A disk that fills ends the keeping, not
    the reading.

    Arguments:
        reader: The reader.
        groups: `(N,)`, the same number for snapshots that are decoded together.
    """

    _file: BinaryIO | None = None

    def __init__(self, reader: FileReader, groups: np.ndarray) -> None:
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

    def close(self) -> None:
        """Lets the files go; what was decoded stays."""
        self.reader.close()

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


def groups_of(views: Sequence[tuple[View, Entry]], length: int) -> np.ndarray | None:
    """`(N,)`, the same number for snapshots that are decoded together; None where nothing needs to be decoded."""
    pieces = []
    for view, entry in views:
        few = {axis: size for axis, size in zip(view.axes, entry.chunks or (), strict=False) if axis in ("run", "time")}
        costly = entry.filtered or bool(view.packing) or few.get("time", 1) > MANY
        if costly and not view.static:
            pieces.append((few.get("run", 1), few.get("time", 1)))
    if not pieces:
        return None
    runs, times = (max(sizes) for sizes in zip(*pieces, strict=True))
    run, time = np.divmod(np.arange(length), views[0][0].times or length)
    return (run // runs) * (int(time.max()) // times + 1) + time // times


# Which arrays are the velocity.

WORDS = (("eastward", "northward"), ("zonal", "meridional"))
TURNS = (*WORDS, ("x_", "y_"), ("_x", "_y"))
#: What the CF conventions append to the standard name of an array that speaks about another.
MODIFIERS = ("status_flag", "standard_error", "detection_minimum", "number_of_observations")
USUAL = (
    ("u", "v"),
    ("U", "V"),
    ("uo", "vo"),
    ("ugos", "vgos"),
    ("u10", "v10"),
    ("water_u", "water_v"),
    ("uwnd", "vwnd"),
    ("ua", "va"),
    ("x_wind_10m", "y_wind_10m"),
    ("u_velocity", "v_velocity"),
    ("velocity_x", "velocity_y"),
    ("vx", "vy"),
    ("Vx", "Vy"),
    ("ux", "uy"),
    ("U10", "V10"),
    ("vozocrtx", "vomecrty"),
)


def choose_pair(entries: Mapping[str, Entry], options: Options, source: str) -> tuple[tuple[str, str], tuple[str, ...]]:
    """The names of the two components, and what there is to say about the choice.

    As named by the user; else by `standard_name`: eastward and northward (or x and y) forms of one name on the same
    dimensions, where a name with "assuming", an anomaly in the CF table, gives way to the plain one; else by usual
    names; else by names that are themselves eastward and northward (or x and y) forms of one.

    Raises:
        UserError: One component is named without the other, or there is no pair, or there are several.
    """
    if (options.u is None) != (options.v is None):
        raise UserError("name both components: dataset.u=... dataset.v=...")
    if options.u is not None and options.v is not None:
        return (options.u, options.v), ()
    fields = {name: entry for name, entry in entries.items() if entry.dtype.kind in "fiu" and len(entry.shape) >= 2}
    titled = _by_standard_name(fields)
    pairs = _best(titled) or _by_name(fields)
    if not pairs:
        raise UserError(
            f"{source}: no pair of velocity components found by standard_name or usual names. Name them: dataset.u=... "
            f"dataset.v=... out of: {', '.join(fields) or 'no gridded variable at all'}."
        )
    if len(pairs) > 1:
        raise UserError(f"{source}: {len(pairs)} pairs could be the velocity. Choose one: {_listing(pairs)}")
    others = [pair for pair in {**titled, **dict.fromkeys(_by_name(fields), "")} if pair != pairs[0] and _alike(*pair)]
    title = f" ({titled[pairs[0]]})" if pairs[0] in titled else ""
    chosen = f"chose {pairs[0][0]}, {pairs[0][1]}{title}; others: {_listing(others)}"
    return pairs[0], (chosen,) if others else ()


def _listing(pairs: Sequence[tuple[str, str]]) -> str:
    return " | ".join(f"dataset.u={first} dataset.v={second}" for first, second in pairs)


def _by_standard_name(fields: Mapping[str, Entry]) -> dict[tuple[str, str], str]:
    """Pairs whose standard names are two forms of one, each with that of its first."""
    titles = {name: str(plain(entry.attrs.get("standard_name", ""))) for name, entry in fields.items()}
    titles = {name: title for name, title in titles.items() if not title.endswith(MODIFIERS)}
    return {
        (first, second): titles[first]
        for first, second in product(titles, titles)
        if _turned(titles[first], titles[second])
        and (fields[first].dims, fields[first].shape) == (fields[second].dims, fields[second].shape)
    }


def _best(titled: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    """The pairs of the plainest names, and of those the variables that are called alike."""
    plainest = [pair for pair, title in titled.items() if "assuming" not in title] or list(titled)
    return [pair for pair in plainest if _alike(*pair)] or plainest


def _turned(first: str, second: str) -> bool:
    """Whether `second` is the y form of the x form `first`."""
    forms = [first.replace(x, y) for x, y in TURNS if x in first]
    # The CF table shortens long names to 64 characters, at other letters for either form.
    return any(second and (form.startswith(second) or second.startswith(form)) for form in forms)


def _alike(first: str, second: str) -> bool:
    """Whether the variables are called alike, as ugos and vgos or x_wind_10m and y_wind_10m are."""
    turns = (("u", "v"), ("U", "V"), ("x", "y"), ("X", "Y"), *TURNS)
    return any(first.replace(x, y) == second or first.replace(x, y, 1) == second for x, y in turns if x in first)


def _by_name(fields: Mapping[str, Entry]) -> list[tuple[str, str]]:
    usual = [pair for pair in USUAL if all(name in fields for name in pair)]
    words = ((name, name.replace(x, y)) for name in fields for x, y in WORDS if x in name)
    return usual or [pair for pair in dict.fromkeys(words) if pair[1] in fields]


def find_name(names: Mapping[str, Any], wanted: str) -> str | None:
    """The array called `wanted`, by its whole name or, where that is unique, by the last part of it."""
    if wanted in names:
        return wanted
    ends = [name for name in names if name.rpartition("/")[2] == wanted]
    return ends[0] if len(ends) == 1 else None


def missing_array(entries: Mapping[str, Entry], key: str, name: str, source: str, kind: str = "array") -> UserError:
    """The message for an array that the option `dataset.<key>` asks for and the file does not have."""
    listing = ", ".join(f"{other} {tuple(entry.shape)}" for other, entry in entries.items()) or f"no {kind}"
    return UserError(
        f"{source} has no {kind} '{name}' (dataset.{key}={name}).{nearest(name, entries)} It has: {listing}."
    )
