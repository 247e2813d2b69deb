"""What the dimensions of a component are, and which variables are its coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cftime
import numpy as np
import xarray as xr

from vecfield_diffusion.data.readers.roles import Options, meaning
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError

AXES = ("run", "time", "channel", "y", "x")


@dataclass(frozen=True)
class Layout:
    """What the dimensions of one component are.

    Arguments:
        name: The component.
        dims: Its dimension of each axis: run, time, channel, y, x.
        chosen: The index that is taken along each other dimension.
    """

    name: str
    dims: Mapping[str, str]
    chosen: Mapping[str, int]

    def axes_of(self, variable: xr.Variable) -> dict[str, str] | None:
        """The axis of each dimension of another variable; None where it has other dimensions."""
        known = {dim: axis for axis, dim in self.dims.items()}
        rest = [dim for dim, size in variable.sizes.items() if dim not in known and dim not in self.chosen and size > 1]
        own = [dim for dim in rest if str(dim).startswith("channel of ")]
        if len(rest) > len(own) or variable.dtype.kind not in "fiub":
            return None
        return {dim: known[dim] for dim in variable.dims if dim in known} | dict.fromkeys(own, "channel")

    def view(self, variable: xr.Variable) -> xr.Variable | None:
        """The variable with the names of the axes as dimensions; None where it has other dimensions."""
        axes = self.axes_of(variable)
        if axes is None:
            return None
        rest = {dim: self.chosen.get(dim, 0) for dim in variable.dims if dim not in axes}
        view = variable[rest] if rest else variable
        return xr.Variable([axes[dim] for dim in view.dims], view._data, view.attrs, view.encoding)


def layout_of(dataset: xr.Dataset, name: str, both: bool, options: Options, source: str) -> Layout:
    """What the dimensions of a component are.

    Raises:
        UserError: One that has no meaning here, or several values of one that a snapshot has one of.
    """
    variable = dataset.variables[name]
    sizes, roles, others, chosen = dict(variable.sizes), {}, {}, {}
    covered = _covered(dataset, name)
    for dim in sizes:
        role = _role(dataset, str(dim), options)
        role = {"lon": "x", "lat": "y"}.get(role, role)
        # A swath has a time for every line, and M and N may be anything: longitude and latitude go before names.
        role = None if dim in covered and role not in ("x", "y") else role
        if both and (dim == "channel" or (role is None and sizes[dim] == 2 and "channel" not in roles)):
            roles["channel"] = dim
        elif role == "run" and options.member is not None:
            others[dim] = "member"
        elif role in AXES and role not in roles:
            roles[role] = dim
        else:
            others[dim] = role or ""
    loose = [dim for dim, role in others.items() if role in ("x", "y") or (role == "" and sizes[dim] > 1)]
    roles |= _by_position(dataset, name, roles, loose, sizes)
    for dim, role in others.items():
        if dim in roles.values():
            continue
        if sizes[dim] > 1 and not {"x", "y"} <= roles.keys():
            role = "point"
        elif role in AXES:  # a second time, such as the step of a forecast
            role = ""
        chosen[dim] = _chosen(name, dim, sizes, role, options, source)
    if not {"x", "y"} <= roles.keys():
        raise _no_plane(name, sizes, source)
    _one_place(dataset, roles, source)
    return Layout(name, roles, chosen)


def _covered(dataset: xr.Dataset, name: str) -> set[str]:
    """The two dimensions that coordinates of every cell have, such as longitude and latitude; empty without such."""
    own = set(dataset.variables[name].dims)
    flat = [str(other) for other, item in dataset.variables.items() if item.ndim == 2 and set(item.dims) <= own]
    dims = [set(dataset.variables[plane].dims) for plane in _pair(dataset, flat, None).values()]
    return dims[0] if dims and dims[0] == dims[1] else set()


def _role(dataset: xr.Dataset, dim: str, options: Options) -> str | None:
    """What a dimension is, by the coordinates along it, then by its name."""
    lines = [str(name) for name, item in dataset.variables.items() if item.dims == (dim,)]
    for role in ("x", "y", "time"):
        if getattr(options, role) in lines:
            return role
    lines = sorted(lines, key=lambda name: name != dim)
    found = (meaning_of(dataset, name) for name in lines if dataset.variables[name].dtype.kind != "b")
    role = next((role for role in found if role is not None), None)
    # A coordinate of two dimensions may carry the name of one of them.
    return role if role is not None else meaning(dim, {})


def meaning_of(dataset: xr.Dataset, name: str) -> str | None:
    variable = dataset.variables[name]
    first = np.ravel(variable.values)[0] if variable.dtype.kind == "O" and variable.size else None
    if variable.dtype.kind == "M" or isinstance(first, cftime.datetime):
        return "time"
    return meaning(name, variable.attrs)


def _by_position(
    dataset: xr.Dataset, name: str, roles: Mapping[str, str], loose: Sequence[str], sizes: Mapping[str, int]
) -> dict[str, str]:
    """The last dimensions that nothing names, as y and x: as the coordinates of every cell say, else in order."""
    free = [role for role in ("y", "x") if role not in roles]
    last = [dim for dim in loose if dim in list(sizes)[-2:] or len(free) == 1][-len(free) :] if free else []
    if len(last) < len(free):
        return {}
    if len(last) == 2:
        plane = planes_of(dataset, name, {"y": last[0], "x": last[1]}, None).get("x")
        if plane is not None:
            values = np.asarray(dataset.variables[plane].transpose(..., *last).values, dtype=np.float64)
            values = values.reshape(-1, *values.shape[-2:])[0]
            last = last[::-1] if steeper(values) == 0 else last
    return dict(zip(free, last, strict=True))


def steeper(values: np.ndarray) -> int | None:
    """The axis along which a coordinate of every cell, `(H, W)`, changes at least twice as much; None if neither."""
    rows, columns = (np.nanmedian(np.abs(np.diff(values, axis=axis))) for axis in (0, 1))
    return 0 if rows > 2 * columns else 1 if columns > 2 * rows else None


def _one_place(dataset: xr.Dataset, roles: Mapping[str, str], source: str) -> None:
    """Raises UserError where runs that would follow each other lie in different places."""
    for name, item in dataset.variables.items():
        if roles.get("run") in item.dims and meaning_of(dataset, str(name)) in ("lon", "lat", "x", "y"):
            lines = np.moveaxis(np.asarray(item.values), item.dims.index(roles["run"]), 0)
            if not np.array_equal(lines, np.broadcast_to(lines[:1], lines.shape), equal_nan=True):
                raise UserError(
                    f"{source}: the runs along '{roles['run']}' lie in different places ('{name}' changes from one to "
                    f"the next) and are no series. Choose one: {option('member', 0)}"
                )


def _chosen(name: str, dim: str, sizes: Mapping[str, int], role: str, options: Options, source: str) -> int:
    """The index along a dimension that a snapshot has one value of.

    Raises:
        UserError: It has several, and the user names none.
    """
    count = sizes[dim]
    if count == 1:
        return 0
    if role == "point":
        raise _no_plane(name, sizes, source)
    key = "member" if role == "member" else "level"
    index = getattr(options, key)
    if index is not None and 0 <= index < count:
        return index
    if role == "":
        raise UserError(
            f"{source}: nothing says what the dimension '{dim}' of '{name}' is (sizes {dict(sizes)}). If one of its "
            f"values is a level or a case: {option('level', f'0 to {count - 1}')}; if time, give it a coordinate with "
            "units such as 'days since 2000-01-01', or call it time."
        )
    raise UserError(
        f"{source}: '{name}' has {count} {key}s along {dim}, which are no times. Choose one, 0 to {count - 1}: "
        f"{option(key, 0)}"
    )


def _no_plane(name: str, sizes: Mapping[str, int], source: str) -> UserError:
    return UserError(
        f"{source}: '{name}' has the dimensions {dict(sizes)}. Expected time, y and x (and one level) of a regular or "
        "curvilinear grid: give their variables an `axis` attribute, or grid what lies along tracks, stations or meshes"
    )


def dims_of(dataset: xr.Dataset, layout: Layout) -> tuple[str, str, str]:
    """The variables that are the coordinates along time, y and x; the names of the dimensions where there are none."""
    return tuple(line_of(dataset, layout, axis, None) or layout.dims.get(axis, axis) for axis in ("time", "y", "x"))


def line_of(dataset: xr.Dataset, layout: Layout, axis: str, given: str | None) -> str | None:
    """The coordinate of one dimension along an axis: that is named, that of the dimension, or another that fits."""
    dim = layout.dims.get(axis)
    lines = [str(name) for name, item in dataset.variables.items() if dim in item.dims and long_dims(item) <= 1]
    if given in lines or dim in lines:
        return given if given in lines else dim
    roles = {"x": ("lon", "x"), "y": ("lat", "y"), "time": ("time",)}[axis]
    return next((name for name in lines if meaning_of(dataset, name) in roles), None)


def long_dims(variable: xr.Variable) -> int:
    return sum(size > 1 for size in variable.shape)


def planes_of(dataset: xr.Dataset, name: str, dims: Mapping[str, str], options: Options | None) -> dict[str, str]:
    """The coordinates of every cell along x and y; empty where the file does not have both."""
    around = {dims["y"], dims["x"]}
    own = dataset.variables[name]
    listed = str(own.encoding.get("coordinates", own.attrs.get("coordinates", "")))
    flat = [
        str(other)
        for other, item in dataset.variables.items()
        if around <= set(item.dims) <= around | {dims.get("time")} and item.dtype.kind in "fiu"
    ]
    return _pair(dataset, sorted(flat, key=lambda other: other not in listed.split()), options)


def _pair(dataset: xr.Dataset, names: Sequence[str], options: Options | None) -> dict[str, str]:
    """The first coordinates along x and y among variables: longitude and latitude, else x and y; empty without both."""
    roles = {name: meaning_of(dataset, name) for name in names}
    for pair in (("lon", "lat"), ("x", "y")):
        found = {}
        for axis, role in zip(("x", "y"), pair, strict=True):
            given = None if options is None else getattr(options, axis)
            found[axis] = given if given in names else next((name for name in names if roles[name] == role), None)
        if None not in found.values():
            return found
    return {}


def length_of(dataset: xr.Dataset, layout: Layout) -> int:
    sizes = dataset.variables[layout.name].sizes
    return sizes.get(layout.dims.get("time"), 1) * sizes.get(layout.dims.get("run"), 1)
