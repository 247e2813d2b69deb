"""HDF5 whose dimensions have no names: plain files, MATLAB 7.3, and the native file, which is also written here.

The native file (`format="vecfield"`, `version=1`):

    /velocity   float32 (N, 2, H, W)    attrs: units
    /valid      bool (H, W) or (N, H, W)        optional: False = land, solid, outside
    /observed   bool (N, H, W)                  optional: gaps of the measurement
    /time (N), /x (W), /y (H) in metres (or km, as their units say), or /lon (W), /lat (H) in degrees       optional
    /context/<name>  float32 (N, C, H, W), (C, H, W), (N, H, W), (H, W) or (N,)     optional: further variables
    attrs: format, version, dx, dy, boundary_x, boundary_y, source, licence

Arrays are read one row after the other: h5py's own fancy indexing of a chunked array is 10 to 30 times slower.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
from torch import Tensor
from xarray.backends import BackendArray, CachingFileManager
from xarray.core.indexing import (
    ExplicitIndexer,
    IndexingSupport,
    LazilyIndexedArray,
    VectorizedIndexer,
    explicit_indexing_adapter,
)

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.readers.reader import Boundary, Format, plain
from vecfield_diffusion.data.stored import reading
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError

VERSION = 1
#: A chunk of more snapshots than this is worth reading once for all of them.
MANY = 8
#: Attributes that hold dimension scales together.
SCALES = ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "DIMENSION_LABELS")


def open_file(path: str | Path) -> h5py.File:
    """The file, open for reading.

    Raises:
        UserError: Another process writes it, or it is truncated or damaged.
    """
    try:
        return h5py.File(path, "r", locking="best-effort")
    except BlockingIOError as error:
        raise UserError(f"another process is writing '{path}'. Wait until it has closed the file.") from error
    except OSError as error:
        state = "truncated" if "truncated" in str(error) else "damaged"
        raise UserError(f"'{path}' is {state}: {error}. Copy or download it again.") from error


@dataclass(frozen=True)
class InFile(BackendArray):
    """An array of an HDF5 file, read row by row, where a row is what one index along the first axis has.

    Every process opens the file at the first use; only those used last stay open.
    """

    file: CachingFileManager
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, key: ExplicitIndexer) -> np.ndarray:
        if isinstance(key, VectorizedIndexer):
            return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._outer)
        # The adapter would sort the rows, and copy all of them once more to undo it.
        return self._outer(key.tuple)

    def _outer(self, key: tuple[Any, ...]) -> np.ndarray:
        array = self.file.acquire()[self.name]
        if not self.shape:
            return np.asarray(array[()])
        rows = np.arange(self.shape[0])[key[0]]
        values = _rows(array, np.atleast_1d(rows), self.dtype)
        for axis, index in reversed(list(enumerate(key[1:], start=1))):
            if not (isinstance(index, slice) and index == slice(None)):
                values = values[(slice(None),) * axis + (index,)]
        return values if np.ndim(rows) else values[0]


def _rows(array: h5py.Dataset, indices: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The rows `indices (n,)`, a fresh array: consecutive ones in one go, others one after the other."""
    if len(indices) > 1 and np.all(np.diff(indices) == 1):
        return array[indices[0] : indices[-1] + 1]
    values = np.empty((len(indices), *array.shape[1:]), dtype)
    for place, index in enumerate(indices):
        values[place] = array[index]
    return values


def read(path: Path, group: str | None = None) -> xr.Dataset:
    """The arrays of an HDF5 file, lazy, by their full names; their dimensions have no names.

    Raises:
        UserError: The file cannot be opened, is damaged, of a newer version, or has no such group.
    """
    opened = CachingFileManager(open_file, str(path))
    with open_file(path) as file, reading(path):
        items: dict[str, h5py.Group | h5py.Dataset] = {}
        file.visititems(lambda name, item: items.setdefault(_text(name), item) and None)
        prefix = "" if group is None else group.strip("/") + "/"
        arrays = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset) and _is_array(item)}
        inside = {name.removeprefix(prefix): item for name, item in arrays.items() if name.startswith(prefix)}
        variables = {name: _variable(opened, name, item) for name, item in inside.items()}
        groups = {name: attributes(item) for name, item in items.items() if isinstance(item, h5py.Group)}
        attrs = attributes(file)
    if group is not None and not variables:
        raise UserError(f"{path} has no group '{group}' ({option('group')}). It has: {', '.join(groups) or 'none'}.")
    native, version = plain(attrs.get("format")) == "vecfield", plain(attrs.get("version", VERSION))
    if native and version != VERSION:
        raise UserError(f"{path}: native format version {version}; this program reads version {VERSION}.")
    matlab = any("MATLAB_class" in variable.attrs for variable in variables.values())
    kind = "native file" if native else "MATLAB" if matlab else "HDF5"
    dataset = xr.Dataset(variables, attrs=attrs)
    dataset.set_close(opened.close)
    dataset.encoding = {"kind": kind, "turned": matlab, "native": native, "groups": groups}
    return dataset


def _variable(opened: CachingFileManager, name: str, item: h5py.Dataset) -> xr.Variable:
    """An array of the file, lazy; its encoding says how it is stored."""
    shape = item.shape or ()
    # What is neither a number nor text cannot be read as snapshots, and is kept for its name alone.
    dtype = item.dtype if item.dtype.kind in "fiub" else np.dtype("S1")
    filtered = item.id.get_create_plist().get_nfilters() > 0
    plainly = not filtered and (item.chunks or (1,))[0] <= MANY
    encoding = {"chunksizes": item.chunks, "decoded": plainly, "dtype": dtype}
    dims = [f"{name}#{axis}" for axis in range(len(shape))]
    if item.dtype.kind not in "fiub":
        values = item.asstr(errors="replace")[()] if h5py.check_string_dtype(item.dtype) else np.zeros(shape, "S1")
        return xr.Variable(dims, np.asarray(values), attributes(item))
    return xr.Variable(dims, LazilyIndexedArray(InFile(opened, item.name, shape, dtype)), attributes(item), encoding)


def _text(name: str | bytes) -> str:
    """A name that can be printed, whatever its bytes are."""
    return (name if isinstance(name, bytes) else name.encode("utf-8", "replace")).decode(errors="replace")


def attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """The attributes, where units that are called otherwise are `units`."""
    attrs = {name: value for name, value in item.attrs.items() if name not in SCALES}
    return usual_units({name: "" if isinstance(value, h5py.Empty) else value for name, value in attrs.items()})


def usual_units(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, where units that are called otherwise are `units`."""
    units = [attrs[name] for name in ("units", "unit", "Unit", "Units") if name in attrs]
    return {**attrs, "units": units[0]} if units else dict(attrs)


def _is_array(item: h5py.Dataset) -> bool:
    """Whether it is more than the name of a dimension, or what MATLAB refers to from elsewhere."""
    bare = b"netCDF dimension but not a netCDF variable"
    return bare not in np.bytes_(item.attrs.get("NAME", b"")) and not _text(item.name).startswith("/#")


def write_hdf5(
    path: str | Path,
    velocity: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    dx: float | np.ndarray = 1.0,
    dy: float | np.ndarray = 1.0,
    boundary_x: Boundary = "open",
    boundary_y: Boundary = "open",
    units: str = "m s-1",
    source: str = "",
    licence: str = "",
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
    time: np.ndarray | None = None,
    valid: np.ndarray | Tensor | None = None,
    time_units: str = "",
    runs: np.ndarray | None = None,
) -> None:
    """Write the native file, whole or not at all.

    It is composed in memory, because the HDF5 library does not survive a disk that fills.

    Arguments:
        path: The file to write; an older one is replaced.
        velocity: `(N, 2, H, W)`, or an iterable of blocks `(n, 2, H, W)`.
        dx: Spacing of the columns in metres, a number or `(H,)`.
        dy: Spacing of the rows in metres, a number or `(H,)`.
        boundary_x: `periodic`, `wall` or `open`.
        boundary_y: Likewise along y.
        units: The units of the velocity.
        source: Where the data come from.
        licence: Their licence.
        x: `(W,)` in metres.
        y: `(H,)` in metres.
        time: `(N,)`.
        valid: Boolean, `(H, W)` or `(N, H, W)`.
        time_units: The units of the time, such as `h` or `hours since 2020-01-01`.
        runs: The trajectory of every snapshot `(N,)`, from 0, where there are several one after the other.

    Raises:
        UserError: The folder cannot be written, or the disk is full.
        ValueError: A block or an array of another shape.
    """
    attrs = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    attrs |= {"format": "vecfield", "version": VERSION, "source": source, "licence": licence}
    extras = {"x": x, "y": y, "time": time, "valid": valid, "run": runs}
    target, content = Path(path), io.BytesIO()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(content, "w") as file:
            file.attrs.update(attrs)
            _write_velocity(file, [velocity] if isinstance(velocity, np.ndarray | Tensor) else velocity, units)
            _write_extras(file, extras)
            if time is not None and time_units:
                file["time"].attrs["units"] = time_units
        with replacing(target) as temporary:
            temporary.write_bytes(content.getbuffer())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error}. Choose another folder or free some space.") from error


def _write_velocity(file: h5py.File, parts: Iterable[np.ndarray | Tensor], units: str) -> None:
    """Append the blocks to `/velocity`, in chunks of up to 8 snapshots and about 64 kB."""
    array = None
    for part in parts:
        block = np.asarray(part, dtype=np.float32)
        if block.ndim != 4 or block.shape[1] != 2 or (array is not None and block.shape[2:] != array.shape[2:]):
            raise ValueError(f"write_hdf5: expected blocks (n, 2, H, W) of one size, got {block.shape}")
        if array is None:
            size = block.shape[1:]
            few = int(np.clip(2**16 // (4 * np.prod(size)), 1, MANY))
            array = file.create_dataset("velocity", (0, *size), np.float32, maxshape=(None, *size), chunks=(few, *size))
        array.resize(len(array) + len(block), axis=0)
        array[len(array) - len(block) :] = block
    if array is None or len(array) == 0:
        raise ValueError("write_hdf5: no snapshot to write")
    array.attrs["units"] = units


def _write_extras(file: h5py.File, extras: dict[str, np.ndarray | Tensor | None]) -> None:
    length, _, height, width = file["velocity"].shape
    shapes = {"x": (width,), "y": (height,), "time": (length,), "run": (length,), "valid": (height, width)}
    for name, extra in extras.items():
        if extra is None:
            continue
        array = np.asarray(extra, dtype=bool if name == "valid" else None)
        if array.shape != shapes[name] and (name != "valid" or array.shape != (length, height, width)):
            raise ValueError(f"write_hdf5: {name} must be of shape {shapes[name]}, got {array.shape}")
        file.create_dataset(name, data=array)


FORMAT = Format(
    "HDF5 (native, plain, MATLAB 7.3)", (".h5", ".hdf5", ".hdf"), lambda path, _: h5py.is_hdf5(path), read, 9
)
