"""HDF5 files: the native one, which is also written here, and plain ones whose arrays are named.

The native file (`format="vecfield"`, `version=1`):

    /velocity   float32 (N, 2, H, W)    attrs: units
    /valid      bool (H, W) or (N, H, W)        optional: False = land, solid, outside
    /observed   bool (N, H, W)                  optional: gaps of the measurement
    /time (N), /x (W), /y (H) in metres (or km, as their units say), or /lon (W), /lat (H) in degrees       optional
    attrs: format, version, dx, dy, boundary_x, boundary_y, source, licence

How snapshots are fetched follows from how they lie in the file: all at once into memory below a limit; through a
memory map where an array is contiguous float32; else by a handle that each process opens for itself, one snapshot
after the other. h5py's own fancy indexing of a chunked array is 10 to 30 times slower than that loop.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from torch import Tensor

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.fields import Axis, Fields, Found, MemoryReader, Reader, blocks
from vecfield_diffusion.errors import UserError, nearest

VERSION = 1
MANY = 8
PACKING = ("scale_factor", "add_offset")
ORIGINS = ("title", "source", "licence", "license", "references", "institution")
Boundary = Literal["periodic", "wall", "open"]


def check_file(path: str | Path) -> Path:
    """The path of an existing HDF5 (or netCDF-4) file.

    Raises:
        UserError: No such file, a folder, a file that cannot be read, netCDF-3, or no HDF5 at all.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"'{path}' is a folder. Expected an HDF5 or netCDF-4 file: dataset.path=...")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no file '{path}'.{nearest(file.name, siblings)} Give an existing one: dataset.path=...")
    try:
        with file.open("rb") as stream:
            magic = stream.read(3)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}. Check its permissions.") from error
    if magic == b"CDF":
        raise UserError(
            f"'{path}' is netCDF-3 (classic), not netCDF-4 / HDF5. Convert it, e.g. `nccopy -k nc4 in.nc out.nc`, "
            "and give the new file: dataset.path=out.nc"
        )
    if not h5py.is_hdf5(file):
        raise UserError(f"'{path}' is not an HDF5 file. Expected HDF5 or netCDF-4: dataset.path=...")
    return file


def open_file(path: Path) -> h5py.File:
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
class Layout:
    """Which arrays of a file make up a snapshot.

    Arguments:
        components: One array `(N, 2, H, W)`, or two of `(N, H, W)`.
        masks: Arrays `(N, H, W)`, each with the value (True or False) that marks a measured cell.
    """

    components: tuple[str, ...]
    masks: tuple[tuple[str, bool], ...] = ()

    def assemble(self, arrays: dict[str, Any], indices: np.ndarray) -> np.ndarray:
        """Snapshots `(n, 2, H, W)`, float32, NaN where a mask says so."""
        parts = [_rows(arrays[name], indices).astype(np.float32, copy=False) for name in self.components]
        velocity = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
        for name, measured in self.masks:
            hidden = _rows(arrays[name], indices).astype(bool) != measured
            np.copyto(velocity, np.nan, where=hidden[:, None])
        return velocity


def _rows(array: np.ndarray | h5py.Dataset, indices: np.ndarray) -> np.ndarray:
    """A copy of the rows `indices`; consecutive ones of a file in one go, others one after the other."""
    if isinstance(array, np.ndarray):
        return np.asarray(array[indices])
    if len(indices) and np.all(np.diff(indices) == 1):
        return array[indices[0] : indices[-1] + 1]
    rows = np.empty((len(indices), *array.shape[1:]), dtype=array.dtype)
    for row, index in zip(rows, indices, strict=True):
        row[...] = array[index]
    return rows


class FileReader:
    """A reader that leaves the snapshots in the file.

    Each process opens its own handle at its first read, and pickling leaves the handle behind: HDF5 handles do not
    survive a fork.

    Arguments:
        path: The file.
        layout: The arrays of a snapshot.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self._arrays: dict[str, Any] = {}
        self._process: int | None = None

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The snapshots `indices`, `(n, 2, H, W)`.

        Raises:
            UserError: The file cannot be opened, or its data are damaged.
        """
        with reading(self.path):
            return self.layout.assemble(self.arrays(), indices)

    def arrays(self) -> dict[str, Any]:
        """The arrays by name, as this process sees them."""
        if self._process != os.getpid():
            file = open_file(self.path)
            names = (*self.layout.components, *(name for name, _ in self.layout.masks))
            self._arrays = {name: _mapped(self.path, file[name]) for name in names}
            self._process = os.getpid()
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "layout": self.layout, "_arrays": {}, "_process": None}


def _mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray | h5py.Dataset:
    """A memory map of an array that lies in one piece in the file as native float32, else the array of the file."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.file.userblock_size or dataset.dtype != np.dtype(np.float32):
        return dataset
    return np.memmap(path, dtype=np.float32, mode="r", offset=offset, shape=dataset.shape)


def open_hdf5(
    path: str,
    velocity: str | None = "velocity",
    u: str | None = None,
    v: str | None = None,
    valid: str | None = None,
    invalid: str | None = None,
    x: str | None = None,
    y: str | None = None,
    time: str | None = None,
    dx: float | None = None,
    dy: float | None = None,
    boundary_x: Boundary | None = None,
    boundary_y: Boundary | None = None,
    preload_gb: float = 2.0,
) -> Fields:
    """The snapshots of an HDF5 file.

    Arguments:
        path: The file.
        velocity: The array `(N, 2, H, W)`, u first; not used if `u` and `v` are given.
        u: The array `(N, H, W)` of the component along x (columns).
        v: The array `(N, H, W)` of the component along y (rows).
        valid: A mask `(H, W)` or `(N, H, W)`, 1 = wet. By default the array `valid`, if there is one.
        invalid: A mask of the same shapes, 1 = solid.
        x: The coordinate of the columns, in metres or the units it names. By default `x` or `lon`, if there is one.
        y: The coordinate of the rows, likewise. By default `y` or `lat`, if there is one.
        time: The time `(N,)`. By default `time`, if there is one.
        dx: The spacing of the columns in metres. By default the attribute, else from the coordinate, else 1.
        dy: The spacing of the rows in metres, likewise.
        boundary_x: By default the attribute, else open; a longitude that closes the circle is periodic.
        boundary_y: By default the attribute, else open.
        preload_gb: Files with less data than this many gigabytes are read into memory.

    Raises:
        UserError: A file that cannot be opened, a missing array, a wrong shape, or no valid cell.
        ValueError: A negative `preload_gb`, or a boundary of another name.
    """
    if preload_gb < 0:
        raise ValueError(f"preload_gb must be at least 0, got {preload_gb}")
    spacing = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    file_path = check_file(path)
    with open_file(file_path) as file, reading(path):
        _check_version(file)
        components = _components(file, velocity, u, v)
        masks = _masks(file, valid, invalid, components)
        layout = Layout(components, tuple((name, wet) for name, wet in masks if file[name].ndim == 3))
        reader = _reader(file_path, file, layout, preload_gb)
        found = _understand(file, components, masks, reader, {"x": x, "y": y, "time": time})
        spacing = {name: _attribute(file, name) if value is None else value for name, value in spacing.items()}
    return found.to_fields(str(path), **spacing)


def _understand(
    file: h5py.File,
    components: tuple[str, ...],
    masks: list[tuple[str, bool]],
    reader: Reader,
    coordinates: dict[str, str | None],
) -> Found:
    """What the file says of the snapshots that the reader fetches."""
    length, height, width = _measure(file, components)
    return Found(
        reader=reader,
        length=length,
        shape=(height, width),
        names=components if len(components) == 2 else (f"{components[0]}[0]", f"{components[0]}[1]"),
        axes={
            "x": _axis(file, coordinates["x"], ("x", "lon"), width),
            "y": _axis(file, coordinates["y"], ("y", "lat"), height),
            "time": _axis(file, coordinates["time"], ("time",), length),
        },
        mask=_domain(file, [mask for mask in masks if mask[0] != "observed"]),
        units=_text(file[components[0]].attrs.get("units", "m s-1")),
        attrs=origins(file.attrs),
    )


def origins(attrs: Mapping[str, Any]) -> dict[str, str]:
    """What the attributes of a file say about its source and licence, with `license` called `licence`."""
    return {name.replace("license", "licence"): _text(attrs[name]) for name in ORIGINS if name in attrs}


def _text(value: Any) -> str:  # noqa: ANN401
    return value.decode() if isinstance(value, bytes) else str(value)


def _attribute(file: h5py.File, name: str) -> float | np.ndarray | str | None:
    value = file.attrs.get(name)
    return _text(value) if isinstance(value, bytes | str) else value


def _is_native(file: h5py.File) -> bool:
    return _text(file.attrs.get("format", "")) == "vecfield"


def _check_version(file: h5py.File) -> None:
    version = file.attrs.get("version", VERSION)
    if _is_native(file) and version != VERSION:
        raise UserError(f"{file.filename}: native format version {version}; this program reads version {VERSION}.")


def _contents(file: h5py.File) -> dict[str, tuple[int, ...]]:
    """The shapes of all arrays of the file, by name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape

    file.visititems(note)
    return shapes


def _array(file: h5py.File, key: str, name: str) -> h5py.Dataset:
    """The array called `name`, which the option `dataset.<key>` asks for."""
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        contents = _contents(file)
        listing = ", ".join(f"{other} {shape}" for other, shape in contents.items()) or "no array"
        hint = " Or name its components: dataset.u=u dataset.v=v" if {"u", "v"} <= set(contents) else ""
        raise UserError(
            f"{file.filename} has no array '{name}' (dataset.{key}={name}).{nearest(name, contents)} "
            f"It has: {listing}.{hint}"
        )
    if item.dtype.kind not in "fiub":
        raise UserError(f"{file.filename}: '{name}' holds {item.dtype}, expected numbers. Choose dataset.{key}=...")
    return item


def _components(file: h5py.File, velocity: str | None, u: str | None, v: str | None) -> tuple[str, ...]:
    """The names of the arrays of the velocity: one, or two."""
    if (u is None) != (v is None):
        raise UserError("name both components, dataset.u=... and dataset.v=..., or one array: dataset.velocity=...")
    named = {"velocity": velocity} if u is None else {"u": u, "v": v}
    if named.get("velocity", "") is None:
        raise UserError("name the arrays to read: dataset.velocity=..., or dataset.u=... and dataset.v=...")
    for key, name in named.items():
        array = _array(file, key, name)
        packing = [attr for attr in PACKING if attr in array.attrs]
        fill = array.attrs.get("_FillValue")
        if packing or (fill is not None and np.isfinite(fill).all()):
            raise UserError(
                f"{file.filename}: '{name}' is a netCDF variable with {', '.join(packing) or '_FillValue'}, which "
                "dataset=hdf5 does not decode. Use dataset=netcdf"
            )
    return tuple(named.values())


def _measure(file: h5py.File, components: tuple[str, ...]) -> tuple[int, int, int]:
    """`(N, H, W)`."""
    shapes = [file[name].shape for name in components]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise UserError(
            f"{file.filename}: '{components[0]}' has shape {shapes[0]} and '{components[1]}' {shapes[1]}. Expected two "
            "components on the same points, (N, H, W) each: dataset.u=... dataset.v=..."
        )
    expected = "(N, 2, H, W)" if len(shapes) == 1 else "(N, H, W)"
    shape = shapes[0]
    fits = len(shape) == 4 and shape[1] == 2 if len(shapes) == 1 else len(shape) == 3
    if not fits or shape[0] < 1 or min(shape[-2:]) < 2:
        raise UserError(
            f"{file.filename}: '{components[0]}' has shape {shape}. Expected {expected} with at least one snapshot "
            "of at least 2 x 2 cells; choose another array or rewrite it in this order."
        )
    return shape[0], shape[-2], shape[-1]


def _masks(
    file: h5py.File, valid: str | None, invalid: str | None, components: tuple[str, ...]
) -> list[tuple[str, bool]]:
    """The masks to apply, each with the value of a measured cell.

    `valid` and `observed` are masks without being named. In a native file they must be; in another one an array of
    such a name may be anything, and is a mask only if it has the shape of one.
    """
    shape = _measure(file, components)
    shapes = {"valid": (shape[1:], shape), "invalid": (shape[1:], shape), "observed": (shape,)}
    given = {"valid": valid, "invalid": invalid, "observed": None}
    for key in ("valid", "observed"):
        item = file.get(key)
        fits = isinstance(item, h5py.Dataset) and item.shape in shapes[key]
        if given[key] is None and item is not None and (fits or _is_native(file)):
            given[key] = key
    masks = [(key, name) for key, name in given.items() if name is not None]
    for key, name in masks:
        found = _array(file, key, name).shape
        if found not in shapes[key]:
            remedy = f"dataset.{key}=..." if key != "observed" else "write it anew or take it out of the file."
            raise UserError(
                f"{file.filename}: the mask '{name}' has shape {found}. Expected {' or '.join(map(str, shapes[key]))}, "
                f"as the velocity: {remedy}"
            )
    return [(name, key != "invalid") for key, name in masks]


def _domain(file: h5py.File, masks: list[tuple[str, bool]]) -> np.ndarray | None:
    """The cells that every mask calls valid in at least one snapshot, `(H, W)`; None without a mask."""
    domain = None
    for name, wet in masks:
        array = file[name]
        cells = array[()].astype(bool) == wet
        cells = cells.any(axis=0) if array.ndim == 3 else cells
        domain = cells if domain is None else domain & cells
    return domain


def _axis(file: h5py.File, given: str | None, defaults: tuple[str, ...], size: int) -> Axis:
    """The coordinate called `given`, else the first of the usual names that fits, else one without values."""
    key = defaults[0]
    if given is not None and _array(file, key, given).shape != (size,):
        raise UserError(
            f"{file.filename}: the coordinate '{given}' has shape {file[given].shape}, expected ({size},): "
            f"dataset.{key}=..."
        )
    fitting = [name for name in defaults if isinstance(file.get(name), h5py.Dataset) and file[name].shape == (size,)]
    name = given or next((name for name in fitting if file[name].dtype.kind in "fiu"), None)
    if name is None:
        return Axis(key)
    attrs = {attr: _text(value) for attr, value in file[name].attrs.items() if attr in ("units", "long_name")}
    degrees = name in ("lon", "lat", "longitude", "latitude") or attrs.get("units", "").startswith("degree")
    return Axis(defaults[-1] if degrees else key, file[name][()], attrs, degrees)


def _reader(path: Path, file: h5py.File, layout: Layout, preload_gb: float) -> Reader:
    """Memory for what fits below `preload_gb`, else the file."""
    reader = FileReader(path, layout)
    arrays = [file[name] for name in layout.components]
    shape = (len(arrays[0]), 2, *arrays[0].shape[-2:])
    if 4.0 * np.prod(shape) <= preload_gb * 1e9:
        velocity = np.empty(shape, dtype=np.float32)
        for indices in blocks(len(velocity), shape[-2] * shape[-1]):
            velocity[indices[0] : indices[-1] + 1] = reader(indices)
        return MemoryReader(velocity)
    for array in arrays:
        if array.chunks is not None and array.chunks[0] > MANY:
            chunk = "x".join(str(min(size, MANY // 2) if axis == 0 else size) for axis, size in enumerate(array.shape))
            warnings.warn(
                f"{path}: each chunk of '{array.name[1:]}' holds {array.chunks[0]} snapshots, and all of them are "
                f"read for one. Raise dataset.preload_gb (now {preload_gb:g}; {4e-9 * np.prod(shape):.3g} needed), or "
                f"rewrite the file: h5repack -l {array.name[1:]}:CHUNK={chunk} in.h5 out.h5",
                stacklevel=3,
            )
    return reader


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

    Raises:
        UserError: The folder cannot be written, or the disk is full.
        ValueError: A block or an array of another shape.
    """
    attrs = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    attrs |= {"format": "vecfield", "version": VERSION, "source": source, "licence": licence}
    extras = {"x": x, "y": y, "time": time, "valid": valid}
    target, content = Path(path), io.BytesIO()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(content, "w") as file:
            file.attrs.update(attrs)
            _write_velocity(file, [velocity] if hasattr(velocity, "ndim") else velocity, units)
            _write_extras(file, extras)
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
    shapes = {"x": [(width,)], "y": [(height,)], "time": [(length,)], "valid": [(height, width)]}
    shapes["valid"].append((length, height, width))
    for name, extra in extras.items():
        if extra is None:
            continue
        array = np.asarray(extra, dtype=bool if name == "valid" else None)
        if array.shape not in shapes[name]:
            raise ValueError(f"write_hdf5: {name} must be of shape {shapes[name][0]}, got {array.shape}")
        file.create_dataset(name, data=array)
