"""CF netCDF-4 files: which variables are the velocity, and what their axes mean.

The two components are found, in this order,

1. by name, `dataset.u=... dataset.v=...`;
2. by `standard_name`: eastward and northward (or x and y) forms of one name, on the same dimensions. A name with
   "assuming" is an anomaly in the CF table and gives way to the plain one;
3. by a list of usual names.

Where several pairs are left, the file is refused with the list of them. Packed values and fill values are decoded, and
what lies outside `valid_min`, `valid_max`, `valid_range` is missing. Each dimension gets a role - x, y, time, level -
from its `axis`, its `standard_name` or its own name.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import xarray as xr

from vecfield_diffusion.data.fields import Axis, Fields, Found, MemoryReader
from vecfield_diffusion.data.hdf5 import check_file, open_file, origins, reading
from vecfield_diffusion.errors import UserError, nearest

Boundary = Literal["periodic", "wall", "open"]
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
    "time": {"t", "time", "ocean_time", "valid_time", "time_counter", "date"},
    "level": {"z", "depth", "height", "altitude", "level", "lev", "pressure", "isobaric", "air_pressure", "sigma"},
}
TURNS = (("eastward", "northward"), ("x_", "y_"), ("_x", "_y"), ("zonal", "meridional"))
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
)


def open_netcdf(
    path: str,
    u: str | None = None,
    v: str | None = None,
    level: int | None = None,
    dx: float | None = None,
    dy: float | None = None,
    boundary_x: Boundary | None = None,
    boundary_y: Boundary | None = None,
) -> Fields:
    """The snapshots of a CF netCDF-4 file, read into memory.

    Arguments:
        path: The file.
        u: The variable of the component along x; by default found as the module says.
        v: The variable of the component along y.
        level: The index along a depth or height of several levels.
        dx: The spacing of the columns in metres; by default from the coordinates.
        dy: The spacing of the rows in metres, likewise.
        boundary_x: By default open; a longitude that closes the circle is periodic.
        boundary_y: By default open.

    Raises:
        UserError: A file that cannot be opened, no or several candidate pairs, dimensions without a meaning, or no
            valid cell.
        ValueError: A boundary of another name.
    """
    open_file(check_file(path)).close()
    with reading(path):
        dataset = xr.open_dataset(path, engine="h5netcdf", decode_times=False, cache=False, phony_dims="access")
    with dataset:
        names = _pair(dataset, u, v, path)
        found = _understand(dataset, names, level, path)
    return found.to_fields(str(path), dx=dx, dy=dy, boundary_x=boundary_x, boundary_y=boundary_y)


def _understand(dataset: xr.Dataset, names: tuple[str, str], level: int | None, path: str) -> Found:
    """The velocity `(N, 2, H, W)` and its coordinates."""
    first, second = (dataset[name] for name in names)
    if first.shape != second.shape or first.dims != second.dims:
        raise UserError(
            f"{path}: '{names[0]}' has {dict(first.sizes)} and '{names[1]}' {dict(second.sizes)}. Expected two "
            "components on the same points: dataset.u=... dataset.v=..."
        )
    if any(str(dim).startswith("phony_dim") for dim in first.dims):
        raise UserError(
            f"{path}: '{names[0]}' has no named dimensions; the file is plain HDF5, not netCDF-4. "
            f"Use dataset=hdf5 dataset.u={names[0]} dataset.v={names[1]}"
        )
    roles = _roles(dataset, first, path)
    velocity = np.stack([_values(dataset[name], roles, level, path) for name in names], axis=1)
    length, _, height, width = velocity.shape
    if length < 1 or min(height, width) < 2:
        raise UserError(f"{path}: '{names[0]}' has {dict(first.sizes)}, expected at least 2 x 2 cells and one time.")
    return Found(
        reader=MemoryReader(velocity),
        length=length,
        shape=(height, width),
        names=names,
        axes={
            "x": _axis(dataset, "x", roles["x"]),
            "y": _axis(dataset, "y", roles["y"]),
            "time": _time(dataset, roles.get("time")),
        },
        units=str(first.attrs.get("units", "m s-1")),
        attrs=origins(dataset.attrs),
    )


def _pair(dataset: xr.Dataset, u: str | None, v: str | None, path: str) -> tuple[str, str]:
    """The names of the two components."""
    if (u is None) != (v is None):
        raise UserError("name both components: dataset.u=... dataset.v=...")
    if u is not None and v is not None:
        for key, name in (("u", u), ("v", v)):
            if name not in dataset.variables:
                listing = ", ".join(f"{other} {tuple(dataset[other].shape)}" for other in dataset.data_vars) or "none"
                raise UserError(
                    f"{path} has no variable '{name}' (dataset.{key}={name}).{nearest(name, dataset.data_vars)} "
                    f"It has: {listing}."
                )
        return u, v
    pairs = _by_standard_name(dataset) or _by_usual_name(dataset)
    if len(pairs) == 1:
        return pairs[0]
    fields = [str(name) for name, variable in dataset.data_vars.items() if _is_field(variable)]
    if not pairs:
        raise UserError(
            f"{path}: no pair of velocity components found by standard_name or usual names. Name them: dataset.u=... "
            f"dataset.v=... out of: {', '.join(fields) or 'no gridded variable at all'}."
        )
    listing = " | ".join(f"dataset.u={first} dataset.v={second}" for first, second in pairs)
    raise UserError(f"{path}: {len(pairs)} pairs could be the velocity. Choose one: {listing}")


def _is_field(variable: xr.DataArray) -> bool:
    return variable.ndim >= 2 and variable.dtype.kind in "fiu"


def _by_standard_name(dataset: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs whose standard names are two forms of one; the plainest names, the most alike variables."""
    titles = {
        str(name): str(variable.attrs.get("standard_name", ""))
        for name, variable in dataset.data_vars.items()
        if _is_field(variable)
    }
    pairs = [
        (first, second)
        for first, second in product(titles, titles)
        if _turned(titles[first], titles[second]) and dataset[first].dims == dataset[second].dims
    ]
    plain = [pair for pair in pairs if "assuming" not in titles[pair[0]]]
    alike = [pair for pair in plain or pairs if _alike(*pair)]
    return alike or plain or pairs


def _turned(first: str, second: str) -> bool:
    """Whether `second` is the y form of the x form `first`."""
    forms = [first.replace(x, y) for x, y in TURNS if x in first]
    # The CF table shortens long names to 64 characters, at other letters for either form.
    return any(second and (form.startswith(second) or second.startswith(form)) for form in forms)


def _alike(first: str, second: str) -> bool:
    """Whether the variables are called alike, as ugos and vgos or x_wind_10m and y_wind_10m are."""
    turns = (("u", "v"), ("U", "V"), ("x", "y"), ("X", "Y"), *TURNS)
    return any(first.replace(x, y) == second or first.replace(x, y, 1) == second for x, y in turns if x in first)


def _by_usual_name(dataset: xr.Dataset) -> list[tuple[str, str]]:
    return [pair for pair in USUAL if all(name in dataset.data_vars and _is_field(dataset[name]) for name in pair)]


def _roles(dataset: xr.Dataset, array: xr.DataArray, path: str) -> dict[str, str]:
    """The dimension of each role among those of `array`."""
    roles: dict[str, str] = {}
    for dim in map(str, array.dims):
        role = _role(dataset, dim)
        if role is not None:
            roles.setdefault(role, dim)
    rest = [str(dim) for dim in array.dims if str(dim) not in roles.values()]
    for role in ("x", "y"):
        if role not in roles and rest:
            roles[role] = rest.pop()
    rest = [dim for dim in rest if array.sizes[dim] > 1]
    if "time" not in roles and len(rest) == 1:
        roles["time"] = rest.pop()
    if "x" not in roles or "y" not in roles or rest:
        raise UserError(
            f"{path}: '{array.name}' has the dimensions {dict(array.sizes)}. Expected time, y and x (and one level): "
            "give their variables an `axis` attribute, or cut the file, e.g. `ncks -d DIM,0 in.nc out.nc`"
        )
    return roles


def _role(dataset: xr.Dataset, dim: str) -> str | None:
    attrs = dataset[dim].attrs if dim in dataset.variables else {}
    axis = {"X": "x", "Y": "y", "T": "time", "Z": "level"}.get(str(attrs.get("axis", "")).upper())
    if axis is not None:
        return axis
    words = (str(attrs.get("standard_name", "")), dim.lower())
    return next((role for word in words for role, known in ROLES.items() if word in known), None)


def _values(array: xr.DataArray, roles: dict[str, str], level: int | None, path: str) -> np.ndarray:
    """The decoded values `(N, H, W)`, float32, NaN where missing."""
    if "level" in roles and array.sizes[roles["level"]] > 1:
        count = array.sizes[roles["level"]]
        if level is None or not 0 <= level < count:
            raise UserError(
                f"{path}: '{array.name}' has {count} levels along {roles['level']}. Choose one, 0 to {count - 1}: "
                "dataset.level=0"
            )
        array = array.isel({roles["level"]: level})
    order = [roles[role] for role in ("time", "y", "x") if role in roles]
    array = array.isel({dim: 0 for dim in array.dims if dim not in order}).transpose(*order)
    with reading(path):
        values = array.values
    low, high = _valid_range(array)
    values = np.where((values >= low) & (values <= high), values, np.nan).astype(np.float32)
    return values if "time" in roles else values[None]


def _valid_range(array: xr.DataArray) -> tuple[float, float]:
    """The limits of valid values, in units of the velocity; infinite where the file gives none."""
    attrs, packing = array.attrs, array.encoding
    pair = np.ravel(attrs.get("valid_range", (attrs.get("valid_min", -np.inf), attrs.get("valid_max", np.inf))))
    stored = packing.get("dtype", array.dtype)
    limits = []
    for limit in pair:
        # The conventions give the limits in packed units if they are of the packed type.
        packed = np.isfinite(limit) and np.asarray(limit).dtype.kind == "i" and stored.kind == "i"
        scale, offset = packing.get("scale_factor", 1.0), packing.get("add_offset", 0.0)
        limits.append(float(limit) * float(scale) + float(offset) if packed else float(limit))
    slack = 1e-6 * max((abs(limit) for limit in limits if np.isfinite(limit)), default=0.0)
    return min(limits) - slack, max(limits) + slack


def _axis(dataset: xr.Dataset, role: str, dim: str) -> Axis:
    """The coordinate along `dim`: the variable of that name, or another 1-D one on it that says what it is."""
    along = [name for name, variable in dataset.variables.items() if variable.dims == (dim,)]
    name = dim if dim in along else next((name for name in along if _role(dataset, str(name)) == role), None)
    if name is None:
        return Axis(role)
    variable = dataset[name]
    attrs = {key: str(value) for key, value in variable.attrs.items() if key in ("units", "long_name", "standard_name")}
    units = attrs.get("units", "").lower()
    degrees = units.startswith("degree") or (not units and str(name).lower() in ("lon", "lat", "longitude", "latitude"))
    return Axis({"x": "lon", "y": "lat"}[role] if degrees else role, variable.values, attrs, degrees)


def _time(dataset: xr.Dataset, dim: str | None) -> Axis:
    """The time as `datetime64` where it can be decoded, else the numbers of the file."""
    if dim is None or dim not in dataset.variables:
        return Axis("time")
    numbers = dataset[dim]
    attrs = {key: str(value) for key, value in numbers.attrs.items() if key in ("units", "calendar", "long_name")}
    try:
        decoded = xr.decode_cf(dataset[[dim]])[dim].values
    except (ValueError, ImportError):
        decoded = numbers.values
    return Axis("time", numbers.values if decoded.dtype.kind == "O" else decoded, attrs)
