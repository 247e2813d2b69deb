"""From a data set to what is known of its velocity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from vecfield_diffusion.data.fields import find_name
from vecfield_diffusion.data.readers.decoding import PACKING, decoded, limits_of
from vecfield_diffusion.data.readers.found import Found
from vecfield_diffusion.data.readers.joined import merged
from vecfield_diffusion.data.readers.layout import Layout, dims_of, layout_of, length_of, planes_of
from vecfield_diffusion.data.readers.places import component_at, extra_coords_of, spacing_of, time_axis
from vecfield_diffusion.data.readers.quality import Checked
from vecfield_diffusion.data.readers.reader import plain
from vecfield_diffusion.data.readers.roles import BOTH, Options, choose_pair, find, units_of
from vecfield_diffusion.data.readers.sizes import anonymous, named, orders
from vecfield_diffusion.data.stored import Combined, Joined, Reader, Snapshots, Stamp
from vecfield_diffusion.data.units import SPEED, factor
from vecfield_diffusion.data.words import components, option
from vecfield_diffusion.errors import UserError

ORIGINS = ("title", "source", "licence", "license", "references", "institution")
#: Snapshots are decoded together up to about this many bytes, whole chunks at a time.
TOGETHER = 2**22


def understand(dataset: xr.Dataset, options: Options, source: str, stamps: Mapping[str, Stamp] | None = None) -> Found:
    """What a data set holds: the velocity, its axes and coordinates, the other variables.

    Raises:
        UserError: No or several candidate pairs, dimensions without a meaning, or sizes that do not fit.
    """
    names, both, notes = _components(dataset, options, source)
    given = {role: getattr(options, role) for role in ("x", "y", "time")}
    if anonymous(dataset, names[0]):
        _same_shape(dataset, names, source)
        dataset, more = named(dataset, names, given, both, source)
        notes += more
    whole, (dataset, more) = dataset, decoded(dataset, names, source)
    notes += more
    layouts = [layout_of(dataset, name, both, options, source) for name in names]
    first = layouts[0]
    if first.dims.get("time") != layouts[-1].dims.get("time"):
        halves = (understand(whole, replace(options, only=name), source, stamps) for name in names)
        return replace(merged(*halves), notes=notes)
    length, sizes = length_of(dataset, first), dataset.variables[names[0]].sizes
    views = {str(name): first.view(item) for name, item in dataset.variables.items()}
    views = {name: view for name, view in views.items() if view is not None}
    runs, times = (sizes.get(first.dims.get(axis)) for axis in ("run", "time"))
    read = partial(_reader, runs=runs, times=times or 1, source=source, stamps=dict(stamps or {}))
    masks = _masks(dataset, options, views, first, source)
    moving = [(views[name], wet) for name, wet in masks if {"time", "run"} & set(views[name].dims)]
    components, checked = [], Checked(options.quality)
    for name, layout in zip(names, layouts, strict=True):
        variable = dataset.variables[name]
        shown = [*moving, *checked.masks(dataset, layout)]
        reader = read(view := layout.view(variable), (view.sizes["y"], view.sizes["x"]), limits_of(variable), shown)
        components.append(component_at(dataset, layout, options, reader=reader, source=source))
    for component in components:
        if min(component.shape) < 3 or length < 1:
            raise UserError(
                f"{source}: '{component.name}' has {dict(dataset.variables[component.name].sizes)}. Expected at least "
                f"3 x 3 cells and one time, found {component.shape[0]} x {component.shape[1]} cells."
            )
    attrs = {str(name): plain(value) for name, value in dataset.attrs.items() if str(name)[:1] != "_"}
    extra = {"dims": dims_of(dataset, first), "extra_coords": extra_coords_of(dataset, first, views)}
    variable = dataset.variables[names[0]]
    stored = "" if not dataset.encoding.get("kind") else f"{dataset.encoding['kind']}, "
    placed = _placed(dataset, layouts)
    others = {
        name: _in_si(read(view, shape, limits_of(dataset.variables[name])), units_of(dataset.variables[name]))
        for name, (_, view, shape) in placed.items()
    }
    return Found(
        components=tuple(components),
        length=length,
        time=time_axis(dataset, first, options, source),
        mask=_domain([(views[name], wet) for name, wet in masks if name != "observed"], components[0].shape, read),
        attrs={name.replace("license", "licence"): str(attrs[name]) for name in ORIGINS if name in attrs},
        source=source,
        spacing=spacing_of(attrs, source),
        notes=notes + _offers(options, views) + checked.notes,
        layout=f"{stored}{', '.join(names)} ({','.join(map(str, variable.shape))})",
        global_attrs=attrs,
        variables=others,
        variable_units={name: units_of(dataset.variables[name]) for name in others},
        points={name: part[0] for name, part in placed.items()},
        misfits={str(name): item.shape for name, item in dataset.variables.items() if str(name) not in others},
        groups=_groups([dataset.variables[name] for name in names], layouts, length),
        runs=_runs(dataset, runs, times),
        closing=(dataset.close,),
        **(extra if not dataset.encoding.get("unnamed") else {}),
    )


def _components(dataset: xr.Dataset, options: Options, source: str) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
    """The names of the arrays of the velocity, whether it is one for both, and what there is to say of the choice."""
    if options.only is not None:
        return (find(dataset, "u", options.only, source),), False, ()
    if options.u is not None and options.v is not None:
        return (find(dataset, "u", options.u, source), find(dataset, "v", options.v, source)), False, ()
    if options.u is None and options.v is None:
        numeric = {str(name): item for name, item in dataset.variables.items() if item.dtype.kind in "fiub"}
        if options.velocity is not None:
            return (find(dataset, "velocity", options.velocity, source),), True, ()
        likely = [dataset.encoding.get("velocity"), *BOTH]
        for name in filter(None, (find_name(numeric, name) for name in likely if name)):
            turned = bool(dataset.encoding.get("turned"))
            if not anonymous(dataset, name) or orders(numeric[name].shape, True, turned):
                return (name,), True, ()
    names, notes = choose_pair(dataset.variables, options, source)
    return names, False, notes


def _same_shape(dataset: xr.Dataset, names: Sequence[str], source: str) -> None:
    shapes = [dataset.variables[name].shape for name in names]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise UserError(
            f"{source}: '{names[0]}' has shape {shapes[0]} and '{names[1]}' {shapes[1]}. Expected two components on "
            f"the same points, (N, H, W) each: {components()}"
        )


def _runs(dataset: xr.Dataset, runs: int | None, times: int | None) -> np.ndarray | None:
    own = dataset.variables.get("run") if dataset.encoding.get("native") else None
    if own is not None and own.shape == (times or 1,):
        return np.asarray(own.values)
    return np.repeat(np.arange(runs), times or 1) if runs is not None and runs > 1 else None


def _reader(
    view: xr.Variable,
    shape: tuple[int, int],
    limits: tuple[float, float] = (-np.inf, np.inf),
    masks: Sequence[tuple[xr.Variable, bool]] = (),
    *,
    runs: int | None,
    times: int,
    source: str,
    stamps: Mapping[str, Stamp],
) -> Reader:
    """The reader of a variable; runs one after the other where the velocity has any."""
    if runs is None:
        return Snapshots(view, shape, limits, masks, source, stamps)

    def of(run: int, variable: xr.Variable) -> xr.Variable:
        return variable[{"run": run}] if "run" in variable.dims else variable

    readers = [
        Snapshots(of(run, view), shape, limits, [(of(run, mask), wet) for mask, wet in masks], source, stamps)
        for run in range(runs)
    ]
    return Joined(readers, [times] * runs)


def _placed(dataset: xr.Dataset, layouts: Sequence[Layout]) -> dict[str, tuple[str, xr.Variable, tuple[int, int]]]:
    """The other variables: the points that they lie on (`u`, `v` or `centre`), the view, and the sizes of a plane.

    All lie on the points of u unless the dimensions are those of a C-grid. What has the rows of u and the columns of v
    lies at the centres then. Where u and v have one pair of dimensions, as in NEMO, a variable's own attribute
    `coordinates` tells whose points it lies on; without one it lies on those of u if those of v are the same.
    """
    u, v = layouts[0], layouts[-1]
    sizes = [tuple(dataset.variables[part.name].sizes[part.dims[axis]] for axis in ("y", "x")) for part in (u, v)]
    planes = [set(planes_of(dataset, part.name, part.dims, None).values()) for part in (u, v)]
    centre = (sizes[0][0], sizes[1][1])
    placed = {}
    for name, item in ((str(name), item) for name, item in dataset.variables.items()):
        listed = set(str(item.encoding.get("coordinates", item.attrs.get("coordinates", ""))).split())
        own = u.view(item)
        if own is not None and u.dims == v.dims and planes[0] != planes[1] and {"y", "x"} <= set(own.dims):
            points = [point for point, plane in zip("uv", planes, strict=True) if plane <= listed]
            if points:
                placed[name] = points[0], own, sizes[0]
        elif own is not None:
            placed[name] = "u", own, sizes[0]
        elif (other := v.view(item)) is not None:
            placed[name] = "v", other, sizes[1]
        elif u.dims != v.dims and item.shape[-2:] == centre:
            between = replace(u, dims={**u.dims, **dict(zip(("y", "x"), item.dims[-2:], strict=True))}).view(item)
            placed |= {} if between is None else {name: ("centre", between, centre)}
    return placed


def _in_si(reader: Reader, units: str) -> Reader:
    """The reader of another variable; one in units of speed is converted to m s-1, as the velocity is."""
    scale = factor(units, SPEED)
    return reader if scale in (None, 1.0) else Combined([reader], (scale, scale))


def _groups(variables: Sequence[xr.Variable], layouts: Sequence[Layout], length: int) -> np.ndarray | None:
    """`(N,)`, the same number for snapshots that are decoded together; None where nothing needs to be decoded."""
    sizes = {"run": [1], "time": []}
    for variable, layout in zip(variables, layouts, strict=True):
        encoding = variable.encoding
        packed = any(key in encoding for key in PACKING if not _is_nan(encoding.get(key)))
        if (variable._in_memory or encoding.get("decoded", False)) and not packed:
            continue
        chunks = dict(zip(variable.dims, encoding.get("chunksizes") or (), strict=False))
        for axis, found in sizes.items():
            found.append(chunks.get(layout.dims.get(axis), 1))
    if not sizes["time"]:
        return None
    runs, chunk = max(sizes["run"]), max(sizes["time"])
    cells = int(np.prod([variables[0].sizes[layouts[0].dims[axis]] for axis in ("y", "x")]))
    few = max(1, TOGETHER // (8 * cells))
    few = -(-few // chunk) * chunk
    times = variables[0].sizes.get(layouts[0].dims.get("time"), 1)
    run, time = np.divmod(np.arange(length), times)
    return (run // runs) * (times // few + 1) + time // few


def _is_nan(value: Any) -> bool:  # noqa: ANN401
    return value is None or (np.asarray(value).dtype.kind == "f" and bool(np.isnan(value).all()))


def _masks(
    dataset: xr.Dataset, options: Options, views: Mapping[str, xr.Variable], layout: Layout, source: str
) -> list[tuple[str, bool]]:
    """The masks to apply, each with the value of a measured cell.

    `valid` and `observed` are masks without being named where the dimensions have no names. In a native file they must
    be; in another one an array of such a name may be anything, and is a mask only if it has the shape of one.
    """
    given = {"valid": options.valid, "invalid": options.invalid, "observed": None}
    planes = {"y", "x"}
    need = {**dict.fromkeys(given, planes), "observed": planes | {"time"} if length_of(dataset, layout) > 1 else planes}

    def fits(key: str, name: str) -> bool:
        return name in views and need[key] <= set(views[name].dims)

    for key in ("valid", "observed") if "turned" in dataset.encoding else ():
        known = key in dataset.variables and (fits(key, key) or dataset.encoding.get("native"))
        given[key] = key if given[key] is None and known else given[key]
    masks = [(key, find(dataset, key, name, source)) for key, name in given.items() if name is not None]
    sizes = dataset.variables[layout.name].sizes
    moving = tuple(sizes[layout.dims[axis]] for axis in ("time", "y", "x") if axis in layout.dims)
    for key, name in masks:
        if not fits(key, name):
            shapes = dict.fromkeys([moving] if key == "observed" else [moving[-2:], moving])
            remedy = option(key) if key != "observed" else "write it anew or take it out of the file."
            raise UserError(
                f"{source}: the mask '{name}' has shape {dataset.variables[name].shape}. Expected "
                f"{' or '.join(map(str, shapes))}, as the velocity: {remedy}"
            )
    return [(name, key != "invalid") for key, name in masks]


def _domain(
    masks: Sequence[tuple[xr.Variable, bool]], shape: tuple[int, int], read: Callable[..., Reader]
) -> np.ndarray | None:
    """The cells that every mask calls valid in at least one snapshot, `(H, W)`; None without a mask."""
    cells = None
    for view, wet in masks:
        values = read(view, shape)(np.arange(view.sizes.get("time", 1) * view.sizes.get("run", 1)))
        own = (np.nan_to_num(values, nan=float(not wet)).astype(bool) == wet).any(axis=(0, 1))
        cells = own if cells is None else cells & own
    return cells


def _offers(options: Options, views: Mapping[str, xr.Variable]) -> tuple[str, ...]:
    """What there is to say of arrays that are called masks and not used."""
    if options.valid or options.invalid or "valid" in views:
        return ()
    masks = [name for name, view in views.items() if "mask" in name.lower() and {"y", "x"} <= set(view.dims)]
    return tuple(
        f"'{name}' is not applied: {option('valid', name)} if 1 = wet, {option('invalid', name)} if 1 = solid"
        for name in masks
    )
