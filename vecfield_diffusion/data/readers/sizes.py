"""Arrays whose dimensions have no names: what each dimension is, from its size and from the coordinates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import xarray as xr

from vecfield_diffusion.data.readers.layout import steeper
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError

#: The usual names of coordinates.
COORDINATES = {
    "x": ("x", "lon", "longitude", "X", "xgrid", "xg"),
    "y": ("y", "lat", "latitude", "Y", "ygrid", "yg"),
    "time": ("time", "t"),
}


def anonymous(dataset: xr.Dataset, name: str) -> bool:
    """Whether the dimensions of a variable have no names, or those that xarray and h5netcdf give to such."""
    nameless = re.compile(rf"{re.escape(name)}#\d+|(phony_)?dim_\d+")
    return any(nameless.fullmatch(str(dim)) for dim in dataset.variables[name].dims)


def orders(shape: Sequence[int], both: bool, turned: bool) -> list[tuple[str, ...]]:
    """What the dimensions of the velocity can be, the likeliest first; `-` is one of size 1 that is too many."""
    axes = ["time", "channel", "y", "x"] if both else ["time", "y", "x"]
    if turned:
        axes[-2:] = axes[:-3:-1]
    surplus = [place for place, size in enumerate(shape) if size == 1][: max(0, len(shape) - len(axes))]
    kept = [place for place in range(len(shape)) if place not in surplus]
    if len(kept) == len(axes) - 1:
        axes = axes[1:]
    if len(kept) != len(axes):
        return []
    # Permutations come in the order of the places, so that what changes the usual order least comes first.
    fitting = [order for order in permutations(axes) if not both or shape[kept[order.index("channel")]] == 2]
    names = (dict(zip(kept, order, strict=True)) for order in fitting)
    return [tuple(name.get(place, "-") for place in range(len(shape))) for name in names]


def named(
    dataset: xr.Dataset, components: Sequence[str], given: Mapping[str, str | None], both: bool, source: str
) -> tuple[xr.Dataset, tuple[str, ...]]:
    """The data set with dimensions called time, channel, y and x, and what there is to say about a choice.

    Arguments:
        dataset: The arrays.
        components: The array or arrays of the velocity.
        given: The coordinates x, y and time that the user names.
        both: Whether one array holds both components.
        source: The file, for messages.

    Raises:
        UserError: A shape that cannot be a velocity.
    """
    shape = dataset.variables[components[0]].shape
    group = components[0].rpartition("/")[0]
    lines = {role: _candidates(dataset, role, given.get(role), group) for role in COORDINATES}
    known = {role: size for role, names in lines.items() if (size := _known(dataset, names)) is not None}
    choices = orders(shape, both, bool(dataset.encoding.get("turned")))
    layouts = [dict(zip(order, shape, strict=True)) for order in choices]
    fitting = [
        order
        for order, sizes in zip(choices, layouts, strict=True)
        if all(sizes.get(role, 1) == size for role, size in known.items())
    ]
    planes = [order for order in fitting if (swapped := _swapped(dataset, order, lines)) is not None and not swapped]
    order = next(iter(planes or fitting or choices), None)
    if order is None or min(shape, default=0) < 1:
        raise UserError(
            f"{source}: '{components[0]}' has shape {shape}. Expected {'(N, 2, H, W)' if both else '(N, H, W)'} with "
            "at least one snapshot of at least 3 x 3 cells; choose another array or rewrite it in this order."
        )
    sizes = {axis: size for axis, size in zip(order, shape, strict=True) if axis != "-"}
    for role, name in given.items():
        if name in dataset.variables and known.get(role, sizes.get(role)) != sizes.get(role):
            raise UserError(
                f"{source}: the coordinate '{name}' has shape {dataset.variables[name].shape}, expected "
                f"({sizes.get(role, 1)},): {option(role)}"
            )
    variables = {}
    for name, variable in dataset.variables.items():
        dims = order if name in components else _axes(variable.shape, order, sizes, name, given)
        fits = anonymous(dataset, name) and dims is not None
        dims = tuple(f"{name}#{place}" if dim == "-" else dim for place, dim in enumerate(dims)) if fits else None
        variables[name] = variable if dims is None else xr.Variable(dims, variable._data, variable.attrs)
        variables[name].encoding = variable.encoding
    result = xr.Dataset(variables, attrs=dataset.attrs)
    result.encoding = dataset.encoding
    result.set_close(dataset.close)
    sure = (
        planes
        or dataset.encoding.get("native")
        or len({size for size in sizes.values() if size > 1}) == len([size for size in sizes.values() if size > 1])
    )
    text = ", ".join(axis for axis in order if axis != "-")
    note = f"the sizes {shape} of '{components[0]}' do not tell its axes apart: taken as ({text}). Else turn the array"
    return result, () if sure else (note,)


def _candidates(dataset: xr.Dataset, role: str, given: str | None, group: str) -> list[str]:
    """What may be the coordinate along an axis: as named, else by usual names, in the group of the velocity first."""
    names = COORDINATES[role] if given is None else (given,)
    return [name for name in (*(f"{group}/{name}" for name in names), *names) if name in dataset.variables]


def _known(dataset: xr.Dataset, names: Sequence[str]) -> int | None:
    """The size of an axis that has a coordinate of one dimension: the first of the candidates."""
    for name in names:
        if dataset.variables[name].dtype.kind in "fiuM":
            long = [size for size in dataset.variables[name].shape if size > 1]
            if len(long) == 1:
                return long[0]
    return None


def _swapped(dataset: xr.Dataset, order: Sequence[str], lines: Mapping[str, Sequence[str]]) -> bool | None:
    """Whether a coordinate of every cell says that x and y are the other way round; None where there is none."""
    first, second = [axis for axis in order if axis in ("y", "x")]
    for role in ("x", "y"):
        for name in lines[role]:
            if dataset.variables[name].ndim != 2 or min(dataset.variables[name].shape) < 2:
                continue
            axis = steeper(np.asarray(dataset.variables[name].values, dtype=np.float64))
            if axis is not None:
                return (first, second)[axis] != role
    return None


def _axes(
    shape: tuple[int, ...],
    order: Sequence[str],
    sizes: Mapping[str, int],
    name: str,
    given: Mapping[str, str | None],
) -> tuple[str, ...] | None:
    """What the dimensions of another array are: those of the velocity, some of them, or those with channels."""
    full = [axis for axis in order if axis in ("time", "y", "x")]
    flat = [axis for axis in full if axis != "time"]
    second = int(full[0] == "time")
    own = next(
        (role for role, names in COORDINATES.items() if name == given.get(role) or name.rpartition("/")[2] in names),
        None,
    )
    candidates = [full, flat, *([[own]] if own else []), ["time"], ["x"], ["y"]]
    candidates += [[*full[:second], "channels", *full[second:]], ["channels", *flat]]
    for squeezed in (False, True):
        places = [place for place, size in enumerate(shape) if not (squeezed and size == 1)]
        for axes in candidates:
            fits = [sizes.get(axis, 1) if axis != "channels" else None for axis in axes] == [
                shape[place] if axis != "channels" else None for place, axis in zip(places, axes, strict=False)
            ]
            if fits and len(axes) == len(places):
                # A number of channels of its own is a dimension of its own.
                named = {
                    place: f"channel of {name}" if axis == "channels" else axis
                    for place, axis in zip(places, axes, strict=True)
                }
                return tuple(named.get(place, "-") for place in range(len(shape)))
    return None
