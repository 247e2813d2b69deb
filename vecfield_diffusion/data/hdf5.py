"""HDF5 files: the native one, which is also written here, and plain ones whose arrays are named.

The native file (`format="vecfield"`, `version=1`):

    /velocity   float32 (N, 2, H, W)    attrs: units
    /valid      bool (H, W) or (N, H, W)        optional: False = land, solid, outside
    /observed   bool (N, H, W)                  optional: gaps of the measurement
    /time (N), /x (W), /y (H) in metres (or km, as their units say), or /lon (W), /lat (H) in degrees       optional
    /context/<name>  float32 (N, C, H, W), (C, H, W), (N, H, W), (H, W) or (N,)     optional: further variables
    attrs: format, version, dx, dy, boundary_x, boundary_y, source, licence

In other files, `find_arrays` tells from the sizes what the dimensions of an array are. How snapshots are fetched
follows from how they lie in the file: all at once into memory below a limit; through a memory map where an array is
contiguous float32; else by a handle that each process opens for itself, one snapshot after the other, and through a
cache where they must be decoded. h5py's own fancy indexing of a chunked array is 10 to 30 times slower than that loop.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from torch import Tensor

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.data.arrays import (
    Arrays,
    Entry,
    Options,
    Snapshots,
    View,
    choose_pair,
    find_name,
    groups_of,
    missing_array,
    plain,
    reading,
)
from vecfield_diffusion.data.fields import Axis, Fields, Found, Land, along, plane_spacing
from vecfield_diffusion.errors import UserError, nearest

VERSION = 1
MANY = 8
#: The usual names of an array that holds both components, and of coordinates.
BOTH = ("velocity", "velocities", "vel", "uv", "flow")
COORDINATES = {
    "x": ("x", "lon", "longitude", "X"),
    "y": ("y", "lat", "latitude", "Y"),
    "time": ("time", "t"),
}
#: Attributes that hold dimension scales together.
SCALES = ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "DIMENSION_LABELS")
LABELS = ("units", "long_name", "standard_name", "axis", "calendar")
SPACING = ("dx", "dy", "boundary_x", "boundary_y")
ORIGINS = ("title", "source", "licence", "license", "references", "institution")
Boundary = Literal["periodic", "wall", "open"]


def check_path(path: str | Path) -> Path:
    """The path of an existing file that can be read.

    Raises:
        UserError: No such file, a folder, or a file that cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"'{path}' is a folder. Expected a file; dataset=file also takes folders: dataset.path=...")
    if not file.exists():
        siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no file '{path}'.{nearest(file.name, siblings)} Give an existing one: dataset.path=...")
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}. Check its permissions.") from error
    return file


def check_file(path: str | Path) -> Path:
    """The path of an existing HDF5 (or netCDF-4) file.

    Raises:
        UserError: No such file, a folder, a file that cannot be read, netCDF-3, or no HDF5 at all.
    """
    file = check_path(path)
    with file.open("rb") as stream:
        magic = stream.read(3)
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


class Handles(dict):
    """The arrays of an open HDF5 file, looked up when asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.file = path, open_file(path)

    def __missing__(self, name: str) -> Any:  # noqa: ANN401
        self[name] = _mapped(self.path, self.file[name])
        return self[name]


def _mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray | h5py.Dataset:
    """A memory map of an array that lies in one piece in the file as native float32, else the array of the file."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.file.userblock_size or dataset.dtype != np.dtype(np.float32):
        return dataset
    return np.memmap(path, dtype=np.float32, mode="r", offset=offset, shape=dataset.shape)


def hdf5_contents(path: Path) -> Contents:
    """The arrays of an HDF5 file and what it says of them.

    Raises:
        UserError: The file cannot be opened, or it is damaged.
    """
    with open_file(path) as file, reading(path):
        items: dict[str, h5py.Group | h5py.Dataset] = {}
        file.visititems(lambda name, item: items.setdefault(name, item) and None)
        datasets = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}
        entries = {name: _entry(item, name) for name, item in datasets.items() if _is_array(item)}
        groups = {name: _attributes(item) for name, item in items.items() if isinstance(item, h5py.Group)}
        attrs = _attributes(file)
    native, version = plain(attrs.get("format")) == "vecfield", plain(attrs.get("version", VERSION))
    if native and version != VERSION:
        raise UserError(f"{path}: native format version {version}; this program reads version {VERSION}.")
    kind = "native file" if native else "HDF5"
    return Contents(str(path), kind, Arrays(path, Handles), entries, attrs, native, groups=groups)


def _attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    attrs = {name: item.attrs[name] for name in item.attrs if name not in SCALES}
    return usual_units({name: "" if isinstance(value, h5py.Empty) else value for name, value in attrs.items()})


def usual_units(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, where units that are called otherwise are `units`."""
    units = [attrs[name] for name in ("units", "unit", "Unit", "Units") if name in attrs]
    return {**attrs, "units": units[0]} if units else dict(attrs)


def _is_array(item: h5py.Dataset) -> bool:
    """Whether it is more than the name of a dimension, or what MATLAB refers to from elsewhere."""
    bare = b"netCDF dimension but not a netCDF variable"
    return bare not in np.bytes_(item.attrs.get("NAME", b"")) and not item.name.startswith("/#")


def _entry(item: h5py.Dataset, name: str) -> Entry:
    filtered = item.id.get_create_plist().get_nfilters() > 0
    return Entry(item.shape or (), item.dtype, _attributes(item), _dimensions(item, name), item.chunks, filtered)


def _dimensions(item: h5py.Dataset, name: str) -> tuple[str, ...]:
    """The names of the dimensions, which are those of the dimension scales; empty where one has none."""
    if item.is_scale and item.ndim == 1:
        return (name,)
    if "DIMENSION_LIST" not in item.attrs:
        return ()
    names = [scales[0].name.lstrip("/") if len(scales) else "" for scales in item.dims]
    return tuple(names) if all(names) else ()


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
    land: Land = "auto",
    context: Sequence[str] = (),
    history: Sequence[int] = (),
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
        land: Whether cells that are exactly 0 in both components at all times are land: `zero`, `nan` (only NaN is),
            `auto` (only NaN is, and a note says how many are 0).
        context: Further variables that the network is told.
        history: Earlier snapshots that the network is told, as lags.

    Raises:
        UserError: A file that cannot be opened, a missing array, a wrong shape, or no valid cell.
        ValueError: A negative `preload_gb`, or a boundary or `land` of another name.
    """
    if velocity is None and u is None and v is None:
        raise UserError("name the arrays to read: dataset.velocity=..., or dataset.u=... and dataset.v=...")
    found = find_hdf5(path, Options(None if u or v else velocity, u, v, valid, invalid, x, y, time))
    spacing = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    return found.to_fields(str(path), land, preload_gb, context, history, **spacing)


@dataclass(frozen=True)
class Contents:
    """A file whose arrays have no named dimensions.

    Arguments:
        source: Its path, for messages.
        kind: What sort of file it is.
        arrays: Its arrays.
        entries: Their description.
        attrs: The attributes of the file.
        native: Whether it is of the format of this program, so that names mean what they say.
        turned: Whether x comes before y where the sizes do not tell.
        groups: The attributes of the groups of the file.
    """

    source: str
    kind: str
    arrays: Arrays
    entries: Mapping[str, Entry]
    attrs: Mapping[str, Any]
    native: bool = False
    turned: bool = False
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def found(
        self,
        components: tuple[str, ...],
        views: Mapping[str, View],
        masks: Sequence[tuple[View, bool]],
        length: int,
        shape: tuple[int, int],
        axes: dict[str, Axis],
        **more: Any,  # noqa: ANN401
    ) -> Found:
        """What was found, once the dimensions of the arrays are understood.

        Arguments:
            components: The arrays of the velocity.
            views: How they and others are read as snapshots.
            masks: Masks, each with the value of a measured cell; they make gaps where they change with time, and
                the domain of the cells that are measured at least once.
            length: N.
            shape: `(H, W)`.
            axes: The coordinates.
            more: Other arguments of `Found`.
        """
        first, last = (self.entries[name] for name in (components[0], components[-1]))
        both = len(components) == 1 and "channel" in views[components[0]].axes
        moving = [(view, wet) for view, wet in masks if not view.static]
        attrs = {name: plain(value) for name, value in self.attrs.items() if name[:1] != "_"}
        return Found(
            reader=Snapshots(self.arrays, [views[name] for name in components], shape, moving),
            length=length,
            shape=shape,
            names=(f"{components[0]}[0]", f"{components[0]}[1]") if both else components,
            axes=axes,
            mask=_domain([mask for mask in masks if mask[0].name != "observed"], self.arrays, shape, length),
            units=str(plain(first.attrs.get("units", "m s-1"))),
            attrs={name.replace("license", "licence"): str(attrs[name]) for name in ORIGINS if name in attrs},
            source=self.source,
            layout=f"{self.kind}, {', '.join(components)} ({','.join(map(str, first.shape))})",
            global_attrs=attrs,
            component_attrs=(first.described(), last.described()),
            variables={name: Snapshots(self.arrays, [view], shape) for name, view in views.items()},
            misfits={name: entry.shape for name, entry in self.entries.items() if name not in views},
            groups=groups_of([(views[name], self.entries[name]) for name in components], length),
            **more,
        )

    def masks(self, options: Options, views: Mapping[str, View]) -> list[tuple[View, bool]]:
        """The masks that the user names, each with the value of a measured cell.

        Raises:
            UserError: There is no such array, or it does not have the dimensions y and x.
        """
        named = {key: self.find(key, name) for key in ("valid", "invalid") if (name := getattr(options, key))}
        for key, name in named.items():
            if name not in views or not {"x", "y"} <= set(views[name].axes):
                raise UserError(
                    f"{self.source}: the mask '{name}' has shape {self.entries[name].shape}. Expected the y and x of "
                    f"the velocity (and time): dataset.{key}=..."
                )
        return [(views[name], key == "valid") for key, name in named.items()]

    def offers(self, options: Options, views: Mapping[str, View]) -> tuple[str, ...]:
        """What there is to say of arrays that are called masks and not used."""
        if options.valid or options.invalid or "valid" in views:
            return ()
        masks = [name for name, view in views.items() if "mask" in name.lower() and {"y", "x"} <= set(view.axes)]
        return tuple(
            f"'{name}' is not applied: dataset.valid={name} if 1 = wet, dataset.invalid={name} if 1 = solid"
            for name in masks
        )

    def sizes(self, name: str) -> dict[str, int]:
        """The dimensions of an array whose dimensions have names, with their sizes."""
        return dict(zip(self.entries[name].dims, self.entries[name].shape, strict=False))

    def find(self, key: str, name: str) -> str:
        """The full name of the array called `name`, which the option `dataset.<key>` asks for.

        Raises:
            UserError: There is none, or it holds no numbers.
        """
        found = find_name(self.entries, name)
        if found is None:
            hint = " Or name its components: dataset.u=u dataset.v=v" if {"u", "v"} <= set(self.entries) else ""
            raise UserError(f"{missing_array(self.entries, key, name, self.source)}{hint if key == 'velocity' else ''}")
        entry = self.entries[found]
        if not entry.numeric and not (key == "time" and entry.dtype.kind == "M"):
            raise UserError(f"{self.source}: '{name}' holds {entry.dtype}, expected numbers. Choose dataset.{key}=...")
        return found


@dataclass(frozen=True)
class Layout:
    """What the dimensions of the velocity are.

    Arguments:
        axes: Of each: `time`, `channel`, `y` or `x`; 0 for one of size 1 that is none of these.
        sizes: Of each axis.
    """

    axes: tuple[str | int, ...]
    sizes: Mapping[str | int, int]

    @property
    def length(self) -> int:
        """N."""
        return self.sizes.get("time", 1)

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)`."""
        return self.sizes["y"], self.sizes["x"]

    def stored(self, *axes: str) -> tuple[int, ...]:
        """The sizes of some axes, in the order in which they are stored."""
        return tuple(self.sizes[axis] for axis in self.axes if axis in axes)


def find_hdf5(path: str | Path, options: Options) -> Found:
    """What a native or plain HDF5 file holds.

    Raises:
        UserError: A file that cannot be opened, a missing array or a wrong shape.
    """
    contents = hdf5_contents(check_file(path))
    with reading(path):
        return find_arrays(contents, options)


def find_arrays(file: Contents, options: Options) -> Found:
    """What a file holds whose dimensions are known by their sizes alone.

    Raises:
        UserError: A missing array or a wrong shape.
    """
    components, notes = _components(file, options)
    layout = _layout(file, components, options)
    views = {}
    for name, entry in file.entries.items():
        axes = layout.axes if name in components else _axes_of(entry.shape, layout)
        if entry.numeric and axes is not None:
            views[name] = View.of(name, entry, axes)
    masks = [(views[name], wet) for name, wet in _masks(file, options, layout, views)]
    axes, spacing = _axes(file, options, layout, views)
    given = {name: plain(file.attrs[name]) for name in SPACING if name in file.attrs}
    notes += file.offers(options, views)
    return file.found(components, views, masks, layout.length, layout.shape, axes, spacing=spacing | given, notes=notes)


def _components(file: Contents, options: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the arrays of the velocity, one or two, and what there is to say about the choice."""
    if (options.u is None) != (options.v is None):
        raise UserError("name both components, dataset.u=... and dataset.v=..., or one array: dataset.velocity=...")
    if options.only is not None:
        return (file.find("u", options.only),), ()
    if options.u is not None and options.v is not None:
        return (file.find("u", options.u), file.find("v", options.v)), ()
    if options.velocity is not None:
        return (file.find("velocity", options.velocity),), ()
    numeric = {name: entry for name, entry in file.entries.items() if entry.numeric}
    for name in filter(None, (find_name(numeric, name) for name in BOTH)):
        if _orders(numeric[name].shape, True, file.turned):
            return (name,), ()
    return choose_pair(numeric, options, file.source)


def _layout(file: Contents, components: tuple[str, ...], options: Options) -> Layout:
    """What the dimensions of the velocity are: as the sizes of the coordinates say, else in the usual order."""
    shapes = [file.entries[name].shape for name in components]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise UserError(
            f"{file.source}: '{components[0]}' has shape {shapes[0]} and '{components[1]}' {shapes[1]}. Expected two "
            "components on the same points, (N, H, W) each: dataset.u=... dataset.v=..."
        )
    both = len(shapes) == 1 and options.only is None
    layouts = [Layout(axes, dict(zip(axes, shapes[0], strict=True))) for axes in _orders(shapes[0], both, file.turned)]
    known = _known_sizes(file, options)
    fitting = [each for each in layouts if all(each.sizes.get(key, 1) == size for key, size in known.items())]
    layout = next(iter(fitting or layouts), None)
    if layout is None or layout.length < 1 or min(layout.shape) < 2:
        expected = "(N, 2, H, W)" if both else "(N, H, W)"
        raise UserError(
            f"{file.source}: '{components[0]}' has shape {shapes[0]}. Expected {expected} with at least one snapshot "
            "of at least 2 x 2 cells; choose another array or rewrite it in this order."
        )
    return layout


def _orders(shape: tuple[int, ...], both: bool, turned: bool) -> list[tuple[str | int, ...]]:
    """What the dimensions of the velocity can be, the likeliest first; dimensions of size 1 that are too many are 0."""
    axes = ["time", "channel", "y", "x"] if both else ["time", "y", "x"]
    if turned:
        axes[-2:] = axes[:-3:-1]
    surplus = [place for place, size in enumerate(shape) if size == 1][: max(0, len(shape) - len(axes))]
    kept = [size for place, size in enumerate(shape) if place not in surplus]
    if len(kept) == len(axes) - 1:
        axes = axes[1:]
    if len(kept) != len(axes):
        return []
    # Permutations come in the order of the places, so that what changes the usual order least comes first.
    orders = [order for order in permutations(axes) if not both or kept[order.index("channel")] == 2]
    names = (
        dict(zip((place for place in range(len(shape)) if place not in surplus), each, strict=True)) for each in orders
    )
    return [tuple(name.get(place, 0) for place in range(len(shape))) for name in names]


def _known_sizes(file: Contents, options: Options) -> dict[str, int]:
    """The sizes of axes that have a coordinate of one dimension: as named, else the first with a usual name."""
    sizes = {}
    for key, usual in COORDINATES.items():
        given = getattr(options, key)
        names = usual if given is None else (file.find(key, given),)
        lines = [file.entries[name].shape for name in names if name in file.entries and _lines(file.entries[name]) == 1]
        if lines:
            sizes[key] = max(lines[0])
    return sizes


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes without the dimensions of a single number."""
    return tuple(size for size in shape if size > 1)


def _lines(entry: Entry) -> int:
    """The dimensions that are more than one number long; 0 where it holds no coordinate."""
    return len(_long(entry.shape)) if entry.dtype.kind in "fiuM" else 0


def _axes_of(shape: tuple[int, ...], layout: Layout) -> tuple[str | int, ...] | None:
    """What the dimensions of another array are: those of the velocity, some of them, or those with channels."""
    full = [axis for axis in layout.axes if axis in ("time", "y", "x")]
    flat = [axis for axis in full if axis != "time"]
    second = int(full[0] == "time")
    candidates = [full, flat, ["time"], ["x"], ["y"], [*full[:second], "channel", *full[second:]], ["channel", *flat]]
    for squeezed in (False, True):
        places = [place for place, size in enumerate(shape) if not (squeezed and size == 1)]
        for axes in candidates:
            if [layout.sizes.get(axis, 1) if axis != "channel" else None for axis in axes] == [
                shape[place] if axis != "channel" else None for place, axis in zip(places, axes, strict=False)
            ] and len(axes) == len(places):
                named = dict(zip(places, axes, strict=True))
                return tuple(named.get(place, 0) for place in range(len(shape)))
    return None


def _masks(file: Contents, options: Options, layout: Layout, views: Mapping[str, View]) -> list[tuple[str, bool]]:
    """The masks to apply, each with the value of a measured cell.

    `valid` and `observed` are masks without being named. In a native file they must be; in another one an array of
    such a name may be anything, and is a mask only if it has the shape of one.
    """
    still, moving = layout.stored("y", "x"), layout.stored("time", "y", "x")
    shapes = {"valid": (still, moving), "invalid": (still, moving), "observed": (moving,)}
    given = {"valid": options.valid, "invalid": options.invalid, "observed": None}
    for key in ("valid", "observed"):
        fits = key in views and file.entries[key].shape in shapes[key]
        if given[key] is None and key in file.entries and (fits or file.native):
            given[key] = key
    masks = [(key, file.find(key, name)) for key, name in given.items() if name is not None]
    for key, name in masks:
        shape = file.entries[name].shape
        if name not in views or _long(shape) not in [_long(each) for each in shapes[key]]:
            remedy = f"dataset.{key}=..." if key != "observed" else "write it anew or take it out of the file."
            expected = " or ".join(map(str, dict.fromkeys(shapes[key])))
            raise UserError(
                f"{file.source}: the mask '{name}' has shape {shape}. Expected {expected}, as the velocity: {remedy}"
            )
    return [(name, key != "invalid") for key, name in masks]


def _domain(
    masks: Sequence[tuple[View, bool]], arrays: Arrays, shape: tuple[int, int], length: int
) -> np.ndarray | None:
    """The cells that every mask calls valid in at least one snapshot, `(H, W)`; None without a mask."""
    cells = None
    for view, wet in masks:
        values = Snapshots(arrays, [view], shape)(np.arange(1 if view.static else length))
        each = (np.nan_to_num(values, nan=float(not wet)).astype(bool) == wet).any(axis=(0, 1))
        cells = each if cells is None else cells & each
    return cells


def _axes(
    file: Contents, options: Options, layout: Layout, views: Mapping[str, View]
) -> tuple[dict[str, Axis], dict[str, Any]]:
    """The coordinates, and the spacing in metres where they are two-dimensional."""
    axes = {key: _axis(file, key, getattr(options, key), layout.sizes.get(key, 1)) for key in COORDINATES}
    names = {key: _plane(file, key, getattr(options, key), views) for key in ("x", "y")}
    if any(axes[key].values is not None or names[key] is None for key in names):
        return axes, {}
    x, y = (views[names[key]].plane(file.arrays[names[key]]) for key in ("x", "y"))
    lines = {"x": along(x, 1), "y": along(y, 0)}
    if all(line is not None for line in lines.values()):
        return axes | {key: _labelled(file, key, names[key], line) for key, line in lines.items()}, {}
    dx, dy = plane_spacing(x, y, _labelled(file, "x", names["x"], None).degrees)
    return axes, {"dx": dx, "dy": dy}


def _axis(file: Contents, key: str, given: str | None, size: int) -> Axis:
    """The coordinate called `given`, else the first of the usual names that fits, else one without values."""
    names = COORDINATES[key] if given is None else (file.find(key, given),)
    for name in names:
        entry = file.entries.get(name)
        if (
            entry is not None
            and entry.dtype.kind in "fiuM"
            and np.prod(entry.shape) == max(entry.shape, default=1) == size
        ):
            return _labelled(file, key, name, np.ravel(file.arrays[name][()]))
        if given is not None and _lines(entry) < 2:
            raise UserError(
                f"{file.source}: the coordinate '{given}' has shape {entry.shape}, expected ({size},): "
                f"dataset.{key}=..."
            )
    return Axis(key)


def _plane(file: Contents, key: str, given: str | None, views: Mapping[str, View]) -> str | None:
    """The coordinate of every cell, `(H, W)`, called `given` or by one of the usual names."""
    names = COORDINATES[key] if given is None else (file.find(key, given),)
    fitting = [name for name in names if name in views and {a for a in views[name].axes if a != 0} == {"y", "x"}]
    return fitting[0] if fitting else None


def _labelled(file: Contents, key: str, name: str, values: np.ndarray | None) -> Axis:
    attrs = {attr: str(value) for attr, value in file.entries[name].described().items() if attr in LABELS}
    degrees = name in ("lon", "lat", "longitude", "latitude") or attrs.get("units", "").startswith("degree")
    return Axis({"x": "lon", "y": "lat"}.get(key, key) if degrees else key, values, attrs, degrees)


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
