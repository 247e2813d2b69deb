"""CF netCDF files: which variables are the velocity, and what their axes mean.

The two components are found by `arrays.choose_pair`. Packed values and fill values are decoded, and what lies outside
`valid_min`, `valid_max`, `valid_range` is missing. Each dimension gets a role - x, y, time, level - from its `axis`,
its `standard_name` or its own name. Where latitude and longitude are given for every cell and no projected coordinate
is, the spacing in metres is that of the curvilinear grid.

netCDF-4 is HDF5 and is read as such, snapshot by snapshot; netCDF-3 is read whole, by xarray's scipy engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from vecfield_diffusion.data.arrays import (
    Arrays,
    Entry,
    Options,
    View,
    choose_pair,
    missing_array,
    plain,
    reading,
)
from vecfield_diffusion.data.fields import Axis, Coordinate, Fields, Found, Land, along, plane_spacing
from vecfield_diffusion.data.hdf5 import (
    LABELS,
    Contents,
    check_file,
    check_path,
    hdf5_contents,
    usual_units,
)
from vecfield_diffusion.errors import UserError

Boundary = Literal["periodic", "wall", "open"]
#: What scipy raises for a damaged file of the classic format.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, AssertionError, MemoryError)
ROLES = {
    "x": {
        "x",
        "lon",
        "longitude",
        "nav_lon",
        "rlon",
        "xc",
        "nx",
        "easting",
        "projection_x_coordinate",
        "grid_longitude",
    },
    "y": {
        "y",
        "lat",
        "latitude",
        "nav_lat",
        "rlat",
        "yc",
        "ny",
        "northing",
        "projection_y_coordinate",
        "grid_latitude",
    },
    "time": {"t", "time", "ocean_time", "valid_time", "time_counter", "date", "timestep", "step"},
    "level": {"z", "depth", "height", "altitude", "level", "lev", "pressure", "isobaric", "air_pressure", "sigma"},
}


def open_netcdf(
    path: str,
    u: str | None = None,
    v: str | None = None,
    level: int | None = None,
    dx: float | None = None,
    dy: float | None = None,
    boundary_x: Boundary | None = None,
    boundary_y: Boundary | None = None,
    preload_gb: float = 2.0,
    land: Land = "auto",
    context: Sequence[str] = (),
    history: Sequence[int] = (),
) -> Fields:
    """The snapshots of a CF netCDF file.

    Arguments:
        path: The file.
        u: The variable of the component along x; by default found as `choose_pair` says.
        v: The variable of the component along y.
        level: The index along a depth or height of several levels.
        dx: The spacing of the columns in metres; by default from the coordinates.
        dy: The spacing of the rows in metres, likewise.
        boundary_x: By default open; a longitude that closes the circle is periodic.
        boundary_y: By default open.
        preload_gb: Files with less data than this many gigabytes are read into memory.
        land: Whether cells that are exactly 0 in both components at all times are land: `zero`, `nan` (only NaN is),
            `auto` (only NaN is, and a note says how many are 0).
        context: Further variables that the network is told.
        history: Earlier snapshots that the network is told, as lags.

    Raises:
        UserError: A file that cannot be opened, no or several candidate pairs, dimensions without a meaning, or no
            valid cell.
        ValueError: A negative `preload_gb`, or a boundary or `land` of another name.
    """
    spacing = {"dx": dx, "dy": dy, "boundary_x": boundary_x, "boundary_y": boundary_y}
    found = find_netcdf(path, Options(u=u, v=v, level=level))
    return found.to_fields(str(path), land, preload_gb, context, history, **spacing)


def find_netcdf(path: str | Path, options: Options) -> Found:
    """What a netCDF file holds.

    Raises:
        UserError: A file that cannot be opened, no or several candidate pairs, or dimensions without a meaning.
    """
    file = check_path(path)
    contents = classic_contents(file) if is_classic(file) else replace(hdf5_contents(check_file(file)), kind="netCDF-4")
    with reading(path):
        return find_named(contents, options)


def is_classic(path: Path) -> bool:
    """Whether a file is netCDF-3."""
    with path.open("rb") as stream:
        return stream.read(3) == b"CDF"


def classic_contents(path: Path) -> Contents:
    """The arrays of a netCDF-3 file and what it says of them.

    Raises:
        UserError: The file is damaged, or of a variety of the format that scipy does not read.
    """
    with _classic(path) as dataset:
        entries = {
            str(name): Entry(each.shape, each.dtype, usual_units(each.attrs), each.dims, each.shape, filtered=True)
            for name, each in dataset.variables.items()
        }
        return Contents(str(path), "netCDF-3", Arrays(path, load_classic, most=2), entries, dict(dataset.attrs))


def load_classic(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file of the classic format, as they are stored.

    Raises:
        UserError: The file is damaged.
    """
    with _classic(path) as dataset:
        return {str(name): np.asarray(variable.values) for name, variable in dataset.variables.items()}


def _classic(path: Path) -> xr.Dataset:
    with path.open("rb") as stream:
        variety = stream.read(4)[3:]
    try:
        if variety not in (b"\x01", b"\x02"):
            raise ValueError(f"variety {variety!r} of the format")
        return xr.open_dataset(path, engine="scipy", decode_cf=False, cache=False)
    except UNREADABLE as error:
        raise UserError(
            f"'{path}' is netCDF-3 that is damaged or cannot be read here: {error}. Download it again, or convert it: "
            "`nccopy -k nc4 in.nc out.nc`"
        ) from error


def find_named(file: Contents, options: Options) -> Found:
    """What a file holds whose dimensions have names.

    Raises:
        UserError: No or several candidate pairs, or dimensions without a meaning.
    """
    components, notes = _components(file, options)
    roles = _roles(file, components[0])
    level = _level(file, components[0], roles, options.level)
    length, *shape = (file.sizes(components[0]).get(roles.get(role), 1) for role in ("time", "y", "x"))
    if length < 1 or min(shape) < 2:
        raise UserError(
            f"{file.source}: '{components[0]}' has {file.sizes(components[0])}, expected at least 2 x 2 cells and one "
            "time."
        )
    views = {name: view for name in file.entries if (view := _view(file, name, roles, level)) is not None}
    masks = file.masks(options, views)
    axes = {role: _axis(file, role, roles.get(role), getattr(options, role)) for role in ("x", "y", "time")}
    planes = {role: _plane(file, role, roles, views, getattr(options, role)) for role in ("x", "y")}
    out = tuple(_called(file, role, roles.get(role, role), getattr(options, role)) for role in ("time", "y", "x"))
    axes, spacing = _curvilinear(file, axes, planes, views)
    extra = _extra(file, components[0], roles, views, planes, level, out)
    notes += file.offers(options, views)
    more = {"spacing": spacing, "notes": notes, "dims": out, "extra_coords": extra}
    return file.found(components, views, masks, length, tuple(shape), axes, **more)


def _components(file: Contents, options: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the two components, and what there is to say about the choice."""
    if options.only is not None:
        names, notes = (options.only,), ()
    else:
        names, notes = choose_pair(file.entries, options, file.source)
    for key, name in zip(("u", "v"), names, strict=False):
        if name not in file.entries:
            fields = {other: entry for other, entry in file.entries.items() if len(entry.shape) >= 2}
            raise missing_array(fields, key, name, file.source, "variable")
    first, last = (file.entries[name] for name in (names[0], names[-1]))
    if first.shape != last.shape or first.dims != last.dims:
        raise UserError(
            f"{file.source}: '{names[0]}' has {file.sizes(names[0])} and '{names[-1]}' {file.sizes(names[-1])}. "
            "Expected two components on the same points: dataset.u=... dataset.v=..."
        )
    if first.shape and not first.dims:
        raise UserError(
            f"{file.source}: '{names[0]}' has no named dimensions; the file is plain HDF5, not netCDF-4. "
            f"Use dataset=hdf5 dataset.u={names[0]} dataset.v={names[-1]}"
        )
    return names, notes


def _roles(file: Contents, name: str) -> dict[str, str]:
    """The dimension of each role among those of the array `name`."""
    sizes = file.sizes(name)
    roles: dict[str, str] = {}
    for dim in sizes:
        role = _role(file, dim)
        if role is not None:
            roles.setdefault(role, dim)
    rest = [dim for dim in sizes if dim not in roles.values()]
    for role in ("x", "y"):
        if role not in roles and rest:
            roles[role] = rest.pop()
    rest = [dim for dim in rest if sizes[dim] > 1]
    if "time" not in roles and len(rest) == 1:
        roles["time"] = rest.pop()
    if "x" not in roles or "y" not in roles or rest:
        raise UserError(
            f"{file.source}: '{name}' has the dimensions {sizes}. Expected time, y and x (and one level): "
            "give their variables an `axis` attribute, or cut the file, e.g. `ncks -d DIM,0 in.nc out.nc`"
        )
    return roles


def _role(file: Contents, name: str) -> str | None:
    attrs = file.entries[name].attrs if name in file.entries else {}
    axis = {"X": "x", "Y": "y", "T": "time", "Z": "level"}.get(str(plain(attrs.get("axis", ""))).upper())
    if axis is not None:
        return axis
    words = (str(plain(attrs.get("standard_name", ""))), name.lower())
    return next((role for word in words for role, known in ROLES.items() if word in known), None)


def _level(file: Contents, name: str, roles: Mapping[str, str], level: int | None) -> int:
    """The index along the level, which need not be given where there is one."""
    count = file.sizes(name).get(roles.get("level"), 1)
    if count > 1 and (level is None or not 0 <= level < count):
        raise UserError(
            f"{file.source}: '{name}' has {count} levels along {roles['level']}. Choose one, 0 to {count - 1}: "
            "dataset.level=0"
        )
    return level if count > 1 and level is not None else 0


def _view(file: Contents, name: str, roles: Mapping[str, str], level: int) -> View | None:
    """How an array is read as snapshots; None where it has other dimensions than the velocity."""
    entry, known = file.entries[name], {dim: role for role, dim in roles.items()}
    axes: list[str | int] = []
    for dim, size in zip(entry.dims, entry.shape, strict=True):
        role = known.get(dim)
        axes.append(level if role == "level" else role if role is not None else 0 if size == 1 else "")
    if not entry.numeric or "" in axes or len({*axes} - {0}) < len([axis for axis in axes if axis != 0]):
        return None
    return View.of(name, entry, axes)


def _called(file: Contents, role: str, dim: str, given: str | None) -> str:
    """The variable that is the coordinate along `dim`; the name of the dimension where there is none."""
    along_it = [name for name, entry in file.entries.items() if entry.dims == (dim,)]
    if given is not None and given in along_it:
        return given
    return dim if dim in along_it else next((name for name in along_it if _role(file, name) == role), dim)


def _axis(file: Contents, role: str, dim: str | None, given: str | None) -> Axis:
    """The coordinate along a dimension: the variable of its name, or another 1-D one on it that says what it is."""
    if given is not None and given not in file.entries:
        raise missing_array(file.entries, role, given, file.source, "variable")
    name = None if dim is None else _called(file, role, dim, given)
    if name is None or name not in file.entries:
        return Axis(role)
    entry = file.entries[name]
    attrs = {key: str(value) for key, value in entry.described().items() if key in LABELS}
    if role == "time":
        return Axis("time", _times(file, name), attrs)
    values = np.ravel(View.of(name, entry, [role]).plane(file.arrays[name]))
    units = attrs.get("units", "").lower()
    degrees = units.startswith("degree") or (not units and name.lower() in ("lon", "lat", "longitude", "latitude"))
    values = values.astype(entry.dtype, copy=False) if entry.dtype.kind == "f" and not entry.packing else values
    return Axis({"x": "lon", "y": "lat"}[role] if degrees else role, values, attrs, degrees)


def _times(file: Contents, name: str) -> np.ndarray:
    """The time as `datetime64` where it can be decoded, else the numbers of the file."""
    numbers = np.asarray(file.arrays[name][()])
    attrs = {key: plain(value) for key, value in file.entries[name].attrs.items() if key in ("units", "calendar")}
    variable = xr.Variable("time", numbers, attrs | file.entries[name].packing)
    try:
        decoded = xr.decode_cf(xr.Dataset({"time": variable}))["time"].values
    except (ValueError, ImportError):
        return numbers
    return numbers if decoded.dtype.kind in "Om" else decoded


def _plane(
    file: Contents, role: str, roles: Mapping[str, str], views: Mapping[str, View], given: str | None
) -> str | None:
    """The longitude or latitude of every cell, where the file has it."""
    planes = [name for name, view in views.items() if {axis for axis in view.axes if axis != 0} == {"x", "y"}]
    if given in planes:
        return given
    return next((name for name in planes if _role(file, name) == role and name not in roles.values()), None)


def _curvilinear(
    file: Contents, axes: dict[str, Axis], planes: Mapping[str, str | None], views: Mapping[str, View]
) -> tuple[dict[str, Axis], dict[str, Any]]:
    """Where latitude and longitude are given for every cell: the axes if the grid is straight, else its spacing.

    A coordinate of one dimension goes first if it has units; without, it only counts the cells.
    """
    lines = (axes[role] for role in ("x", "y"))
    if None in planes.values() or any(
        line.values is not None and line.attrs.get("units", "1") != "1" for line in lines
    ):
        return axes, {}
    x, y = (views[planes[role]].plane(file.arrays[planes[role]]) for role in ("x", "y"))
    units = str(plain(file.entries[planes["x"]].attrs.get("units", "degrees")))
    degrees = units.startswith("degree")
    straight = {"x": along(x, 1), "y": along(y, 0)}
    if all(line is not None for line in straight.values()):
        names = {"x": "lon", "y": "lat"} if degrees else {"x": "x", "y": "y"}
        labels = {role: file.entries[name].described() for role, name in planes.items()}
        labels = {role: {key: str(each[key]) for key in LABELS if key in each} for role, each in labels.items()}
        return axes | {role: Axis(names[role], straight[role], labels[role], degrees) for role in straight}, {}
    dx, dy = plane_spacing(x, y, degrees)
    return axes, {"dx": dx, "dy": dy}


def _extra(
    file: Contents,
    component: str,
    roles: Mapping[str, str],
    views: Mapping[str, View],
    planes: Mapping[str, str | None],
    level: int,
    out: tuple[str, str, str],
) -> dict[str, Coordinate]:
    """Coordinates beside those along the dimensions: of every cell, the level, the grid mapping."""
    extra: dict[str, Coordinate] = {}
    for name in filter(None, planes.values()):
        extra[name] = (out[1:], views[name].plane(file.arrays[name]), file.entries[name].described())
    if "level" in roles and roles["level"] in file.entries:
        name = roles["level"]
        value = np.ravel(file.arrays[name][()])[level]
        extra[name] = ((), np.asarray(value), file.entries[name].described())
    mapping = str(plain(file.entries[component].attrs.get("grid_mapping", "")))
    if mapping in file.entries and file.entries[mapping].shape == ():
        extra[mapping] = ((), np.asarray(file.arrays[mapping][()]), file.entries[mapping].described())
    return extra
