"""Several runs in one HDF5 file, x before y.

The Well     t1_fields/velocity (run, time, x, y, 2)   (Ohana et al. 2024, arXiv 2412.00568)
PDEBench     Vx, Vy (run, time, x, y)                  (Takamoto et al. 2022, arXiv 2210.07182)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from vecfield_diffusion.data.readers.hdf5 import open_file
from vecfield_diffusion.data.readers.hdf5 import read as read_hdf5
from vecfield_diffusion.data.readers.reader import Format, plain, rebuilt
from vecfield_diffusion.errors import UserError


def read(path: Path, group: str | None = None) -> xr.Dataset:
    """The file with the dimensions run, time, x, y and channel, and the coordinates x, y and time.

    Raises:
        UserError: It is not of two Cartesian dimensions.
    """
    dataset = read_hdf5(path, group)
    known = _well(path, dataset) if "t1_fields/velocity" in dataset else _pdebench(path, dataset)
    sizes: dict[str, int] = {}
    variables = {}
    first = sorted(dataset.variables, key=lambda name: name not in ("t1_fields/velocity", "Vx"))
    for name, variable in ((name, dataset.variables[name]) for name in first):
        dims = known.get(name)
        if dims is None or len(dims) != variable.ndim:
            continue
        if all(sizes.setdefault(dim, size) == size for dim, size in zip(dims, variable.shape, strict=True)):
            variables[name] = xr.Variable(dims, variable._data, variable.attrs, variable.encoding)
    for axis in ("x", "y", "time"):
        names = (f"dimensions/{axis}", f"{axis}-coordinate", f"{axis[0]}-coordinate")
        name = next((name for name in names if name in dataset), None)
        # PDEBench gives the edges of the time steps: one more than there are snapshots.
        if name is not None and dataset[name].shape[-1] >= sizes.get(axis, np.inf):
            values = np.asarray(dataset[name].values, dtype=np.float64)[..., : sizes[axis]]
            variables[axis] = xr.Variable((*["run"] * (values.ndim - 1), axis), values, dataset[name].attrs)
    rest = {name: variable for name, variable in dataset.variables.items() if name not in variables}
    return rebuilt(dataset, {**rest, **variables})


def _well(path: Path, dataset: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """The dimensions of every array of a file of The Well, as its attributes say."""
    groups = dataset.encoding["groups"]
    dims = [str(plain(dim)) for dim in np.ravel(groups.get("dimensions", {}).get("spatial_dims", ["x", "y"]))]
    if dims != ["x", "y"]:
        raise UserError(f"{path}: its dimensions are {', '.join(dims)}. Expected x, y: a Cartesian plane.")
    dataset.encoding |= {"kind": "The Well", "velocity": "t1_fields/velocity"}
    dataset.attrs |= _boundaries(groups)
    return {
        name: _axes(name, variable.attrs)
        for name, variable in dataset.variables.items()
        if not name.startswith("dimensions/") and variable.dtype.kind in "fiub"
    }


def _axes(name: str, attrs: Mapping[str, Any]) -> tuple[str, ...]:
    varying = [dim for dim, key in (("run", "sample_varying"), ("time", "time_varying")) if attrs.get(key, True)]
    if name.startswith("scalars/"):
        return tuple(varying)
    along = np.ravel(attrs.get("dim_varying", [True, True])).astype(bool)
    varying += [dim for dim, varies in zip(("x", "y"), along, strict=False) if varies]
    return (*varying, *["channel"] * name.startswith("t1_fields/"))


def _boundaries(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The boundary of each axis: periodic, wall if all that is said of it is a wall, else open."""
    kinds: dict[str, set[str]] = {"x": set(), "y": set()}
    for name, attrs in groups.items():
        if name.startswith("boundary_conditions/"):
            for dim in map(plain, np.ravel(attrs.get("associated_dims", []))):
                kinds.setdefault(dim, set()).add(str(plain(attrs.get("bc_type", "open"))).lower())
    named = {f"boundary_{dim}": kinds[dim] for dim in ("x", "y") if kinds[dim]}
    return {
        name: "periodic" if "periodic" in found else "wall" if found == {"wall"} else "open"
        for name, found in named.items()
    }


def _pdebench(path: Path, dataset: xr.Dataset) -> dict[str, tuple[str, ...]]:
    shape = dataset["Vx"].shape
    if len(shape) != 4:
        raise UserError(f"{path}: 'Vx' has shape {shape}. Expected (run, time, x, y): a plane.")
    dataset.encoding["kind"] = "PDEBench"
    return {name: ("run", "time", "x", "y") for name, item in dataset.variables.items() if item.shape == shape}


def _knows(path: Path, _: bytes) -> bool:
    if not h5py.is_hdf5(path):
        return False
    with open_file(path) as file:
        return "t1_fields" in file or {"Vx", "Vy", "x-coordinate", "y-coordinate"} <= set(file)


FORMAT = Format("The Well, PDEBench", (".h5", ".hdf5"), _knows, read, 2)
