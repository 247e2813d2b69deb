"""Where and when the points of a component are: its coordinates along the axes or for every cell, and its times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from vecfield_diffusion.data.coordinates import Axis, Plane, to_degrees
from vecfield_diffusion.data.fields import Coordinate
from vecfield_diffusion.data.readers.decoding import described, labels, times_of
from vecfield_diffusion.data.readers.found import FoundComponent
from vecfield_diffusion.data.readers.layout import (
    Layout,
    dims_of,
    length_of,
    line_of,
    long_dims,
    meaning_of,
    planes_of,
)
from vecfield_diffusion.data.readers.projections import angle_of
from vecfield_diffusion.data.readers.reader import plain
from vecfield_diffusion.data.readers.roles import Options, find, units_of
from vecfield_diffusion.data.stored import Reader
from vecfield_diffusion.data.units import factor, is_degrees
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError

EAST = ("eastward", "northward", "zonal", "meridional", "true east", "true north")


def component_at(dataset: xr.Dataset, layout: Layout, options: Options, reader: Reader, source: str) -> FoundComponent:
    """A component with the places of its points.

    Raises:
        UserError: A coordinate that is named and does not fit, or that no globe has.
    """
    variable = dataset.variables[layout.name]
    shape = tuple(variable.sizes[layout.dims[axis]] for axis in ("y", "x"))
    lines = {axis: _axis(dataset, layout, axis, getattr(options, axis), source) for axis in ("x", "y")}
    planes = planes_of(dataset, layout.name, layout.dims, options)
    plane, globe = None, None
    if planes:
        x, y = (_plane_values(dataset, layout, planes[axis], source) for axis in ("x", "y"))
        degrees = meaning_of(dataset, planes["x"]) == "lon" or is_degrees(units_of(dataset.variables[planes["x"]]))
        try:
            plane = Plane.of(x, y, degrees)
        except UserError as error:
            raise UserError(f"{source}: {planes['x']}, {planes['y']}: {error}") from error
        globe = plane if degrees else None
        told = {axis: labels(dataset.variables[name]) for axis, name in planes.items()}
        # A coordinate of one dimension goes first if it has units; without, it only counts the cells.
        if any(line.values is not None and line.units not in ("", "1") for line in lines.values()):
            plane = None
        elif (straight := plane.lines()) is not None:
            names = ("lon", "lat") if degrees else ("x", "y")
            lines = {
                axis: Axis(name, line, told[axis], degrees, planes[axis])
                for axis, name, line in zip(("x", "y"), names, straight, strict=True)
            }
            plane = globe = None
        else:
            lines = {
                axis: replace(line, name=axis, degrees=False, attrs=line.attrs if degrees else told[axis])
                for axis, line in lines.items()
            }
    attrs = described(variable)
    title = f"{layout.name} {attrs.get('standard_name', attrs.get('long_name', ''))}".lower()
    east = any(word in title for word in EAST)
    # As GRIB says of winds on the grid of a model, whatever they are called.
    east = east and attrs.get("GRIB_uvRelativeToGrid") != 1
    mapping = dataset.variables.get(str(attrs.get("grid_mapping", "")).partition(":")[0])
    angle = None
    if mapping is not None and globe is None and not any(line.name in ("lon", "lat") for line in lines.values()):
        try:
            angle = angle_of({key: plain(value) for key, value in mapping.attrs.items()}, lines["x"], lines["y"])
        except LookupError as error:
            if east:
                raise UserError(
                    f"{source}: '{layout.name}' points east or north on a projection, whose angle to the grid cannot "
                    f"be told: {error}. Add longitude and latitude of every cell (y, x) to the file, or turn the "
                    "components and call them x and y (`standard_name`)."
                ) from error
    return FoundComponent(layout.name, reader, shape, lines["x"], lines["y"], plane, globe, attrs, east, angle)


def _axis(dataset: xr.Dataset, layout: Layout, axis: str, given: str | None, source: str) -> Axis:
    if given is not None:
        given = find(dataset, axis, given, source)
    name = line_of(dataset, layout, axis, given)
    if given is not None and name != given and long_dims(dataset.variables[given]) < 2:
        size = dataset.variables[layout.name].sizes[layout.dims[axis]]
        raise UserError(
            f"{source}: the coordinate '{given}' has shape {dataset.variables[given].shape}, expected ({size},): "
            f"{option(axis)}"
        )
    if name is None or dataset.variables[name].dtype.kind not in "fiu":
        return Axis(axis, label=layout.dims[axis])
    variable, attrs, role = dataset.variables[name], labels(dataset.variables[name]), meaning_of(dataset, name)
    units = attrs.get("units", "")
    on_globe = role in ("lon", "lat") and (not units or is_degrees(units) or factor(units, "degree") is not None)
    degrees = is_degrees(units) or on_globe
    rotated = attrs.get("standard_name", "").startswith("grid_") or name.lower() in ("rlon", "rlat")
    values = np.ravel(variable.values)
    if on_globe and units and not is_degrees(units):
        values, attrs = to_degrees(values, units), attrs | {"units": "degrees"}
    called = {"x": "lon", "y": "lat"}[axis] if degrees and not rotated else axis
    return Axis(called, values, attrs, degrees, name)


def _plane_values(dataset: xr.Dataset, layout: Layout, name: str, source: str) -> np.ndarray:
    """A coordinate of every cell, `(H, W)`, in degrees where it is longitude or latitude.

    Raises:
        UserError: It changes with time.
    """
    view = layout.view(dataset.variables[name])
    values = np.asarray(view.transpose(..., "y", "x").values, dtype=np.float64)
    if values.ndim > 2:
        if not np.array_equal(values, np.broadcast_to(values[:1], values.shape), equal_nan=True):
            raise UserError(f"{source}: the coordinate '{name}' changes from one time to the next. Expected one grid.")
        values = values[0]
    on_globe = meaning_of(dataset, name) in ("lon", "lat")
    return to_degrees(values, units_of(dataset.variables[name])) if on_globe else values


def extra_coords_of(dataset: xr.Dataset, layout: Layout, views: Mapping[str, xr.Variable]) -> dict[str, Coordinate]:
    """Coordinates beside those along the dimensions: of every cell, the level, the grid mapping."""
    extra: dict[str, Coordinate] = {}
    out = dims_of(dataset, layout)
    for name in planes_of(dataset, layout.name, layout.dims, None).values():
        values = np.asarray(views[name].transpose(..., "y", "x").values, dtype=np.float64)
        extra[name] = (out[1:], values if values.ndim == 2 else values[0], described(dataset.variables[name]))
    for dim, index in layout.chosen.items():
        variable = dataset.variables.get(dim)
        if variable is not None and variable.dims == (dim,):
            extra[dim] = ((), np.asarray(variable.values[index]), described(variable))
    mapping = str(described(dataset.variables[layout.name]).get("grid_mapping", ""))
    if mapping in dataset.variables and dataset.variables[mapping].shape == ():
        extra[mapping] = ((), np.asarray(dataset.variables[mapping].values), described(dataset.variables[mapping]))
    return extra


def spacing_of(attrs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the attributes of the file say of the grid.

    Raises:
        UserError: A spacing that is no number.
    """
    lengths = {name: attrs[name] for name in ("dx", "dy") if name in attrs}
    for name, length in lengths.items():
        if np.asarray(length).dtype.kind not in "fiu" or not np.isfinite(length).all():
            raise UserError(f"{source}: its attribute {name} is '{length}', expected metres: {option(name)}")
    kinds = {name: attrs.get(name) for name in ("boundary_x", "boundary_y")}
    return lengths | {name: kind for name, kind in kinds.items() if kind in ("periodic", "wall", "open")}


def time_axis(dataset: xr.Dataset, layout: Layout, options: Options, source: str) -> Axis:
    """The times of the snapshots: dates where they can be decoded, else the numbers of the file."""
    if options.time is not None:
        name = find(dataset, "time", options.time, source)
    else:
        lone = [] if "time" in layout.dims else [name for name, item in dataset.variables.items() if item.ndim == 0]
        times = (str(name) for name in lone if meaning_of(dataset, name) == "time")
        name = line_of(dataset, layout, "time", None) or next(times, None)
    if name is None:
        return Axis("time")
    length = length_of(dataset, layout)
    variable = dataset.variables[name]
    values, attrs = times_of(variable)
    runs = dataset.variables[layout.name].sizes.get(layout.dims.get("run"), 1)
    fits = values.size in (length, length // runs)
    values = np.broadcast_to(values.reshape(-1, length // runs), (runs, length // runs)).ravel() if fits else None
    if values is None and options.time is not None:
        raise UserError(f"{source}: '{name}' has shape {variable.shape}, expected times ({length},): {option('time')}")
    return Axis("time", values, attrs)
