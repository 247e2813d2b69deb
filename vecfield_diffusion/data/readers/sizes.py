"""Arrays whose dimensions have no names: what each dimension is, from its size and from the coordinates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import xarray as xr

from vecfield_diffusion.data.readers.layout import steeper
from vecfield_diffusion.data.readers.reader import rebuilt
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
    """What the dimensions of the velocity can be, the likeliest first; `#1` is one of size 1 that is too many."""
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
    return [tuple(name.get(place, f"#{place}") for place in range(len(shape))) for name in names]


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
    choices = [dict(zip(order, shape, strict=True)) for order in orders(shape, both, dataset.encoding.get("turned"))]
    fitting = [sizes for sizes in choices if all(sizes.get(role, 1) == size for role, size in known.items())]
    planes = [sizes for sizes in fitting if _swapped(dataset, tuple(sizes), lines) is False]
    sizes = next(iter(planes or fitting or choices), None)
    if sizes is None or min(shape, default=0) < 1:
        raise UserError(
            f"{source}: '{components[0]}' has shape {shape}. Expected {'(N, 2, H, W)' if both else '(N, H, W)'} with "
            "at least one snapshot of at least 3 x 3 cells; choose another array or rewrite it in this order."
        )
    for role, name in given.items():
        if name in dataset.variables and known.get(role, sizes.get(role)) != sizes.get(role):
            raise UserError(
                f"{source}: the coordinate '{name}' has shape {dataset.variables[name].shape}, expected "
                f"({sizes.get(role, 1)},): {option(role)}"
            )
    variables = dict(dataset.variables)
    for name, variable in dataset.variables.items():
        dims = tuple(sizes) if name in components else _axes(variable.shape, sizes, name, given)
        if anonymous(dataset, name) and dims is not None:
            dims = [f"{name}{dim}" if dim.startswith("#") else dim for dim in dims]
            variables[name] = xr.Variable(dims, variable._data, variable.attrs, variable.encoding)
    result = rebuilt(dataset, variables)
    long = [size for size in sizes.values() if size > 1]
    sure = planes or dataset.encoding.get("native") or len(set(long)) == len(long)
    text = ", ".join(axis for axis in sizes if not axis.startswith("#"))
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
    shape: tuple[int, ...], sizes: Mapping[str, int], name: str, given: Mapping[str, str | None]
) -> tuple[str, ...] | None:
    """What the dimensions of another array are: those of the velocity, some of them, or those with channels."""
    full = [axis for axis in sizes if axis in ("time", "y", "x")]
    flat = [axis for axis in full if axis != "time"]
    second = int(full[0] == "time")
    own = next(
        (role for role, names in COORDINATES.items() if name == given.get(role) or name.rpartition("/")[2] in names),
        None,
    )
    candidates = [full, flat, *([[own]] if own else []), ["time"], ["x"], ["y"]]
    channels = f"channel of {name}"  # of any number: a dimension of its own
    candidates += [[*full[:second], channels, *full[second:]], [channels, *flat]]
    for least in (0, 2):  # as it is, then without dimensions of size 1
        places = [place for place, size in enumerate(shape) if size >= least]
        for axes in (axes for axes in candidates if len(axes) == len(places)):
            named = dict(zip(places, axes, strict=True))
            if all(axis == channels or sizes.get(axis, 1) == shape[place] for place, axis in named.items()):
                return tuple(named.get(place, f"#{place}") for place in range(len(shape)))
    return None
