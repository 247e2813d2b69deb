"""A filled series as `infer.py` wrote it, read back with its members, and places in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.stored import turned
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import date_of
from vecfield_diffusion.inference.files import members_beside
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.in_time import step_of
from vecfield_diffusion.programs.source import times


@dataclass(frozen=True)
class Filled:
    """A filled series, from the frame on at which drifters start.

    Arguments:
        fields: Its mean, for coordinates and times.
        first: The number of the first frame.
        members: `(M, T, 2, H, W)` along the axes of the grid, NaN outside the domain.
        truth: `(T, 2, H, W)` where it was known and hidden; None elsewhere.
        step: Seconds between frames.
    """

    fields: Fields
    first: int
    members: Tensor
    truth: Tensor | None
    step: float

    @property
    def grid(self) -> Grid:
        """Its grid."""
        return self.fields.grid


def open_filled(config: Mapping[str, Any]) -> Filled:
    """Returns the part of a filled series that drifters are followed through. Raises UserError: see `drift`."""
    path = Path(config["input"])
    path = path / "fields.nc" if path.is_dir() else path
    fields = open_fields(str(path), **domain_of(path))
    seconds = step_of(fields)[-1] if len(fields) > 1 else None
    if seconds is None:
        raise UserError(f"{path}: drifters need snapshots at times whose unit is known, and there are {len(fields)}")
    first = times(config["time"], fields, range(len(fields)))[0]
    left, wanted = len(fields) - 1 - first, math.inf
    if config["hours"] is not None:
        wanted = config["hours"] * 3600 / seconds
        if abs(wanted - round(wanted)) > 0.01 or round(wanted) > left:
            raise UserError(
                f"hours={config['hours']:g}: expected whole steps of {seconds / 3600:g} hours, and at most {left} of "
                f"them, for so many follow the start ({date_of(fields, first)})"
            )
    if left < 1:
        raise UserError(f"time={config['time']}: no snapshot follows {date_of(fields, first)}, give an earlier one")
    last = first + min(left, round(min(wanted, left)))
    check_steps(fields, first, last)
    frames = list(range(first, last + 1))
    return Filled(fields, first, read_members(path, fields, frames), read_truth(path, fields, frames), seconds)


def check_steps(fields: Fields, first: int, last: int) -> None:
    """Raises UserError where snapshots are missing, or not dated in order, on the way of the drifters."""
    time = fields.time[first : last + 1]
    steps = np.diff(time) / np.timedelta64(1, "s") if time.dtype.kind == "M" else np.diff(time.astype(float))
    if not np.allclose(steps, steps[0], rtol=0.1) or steps[0] <= 0:
        raise UserError(
            f"{fields.source}: the snapshots from {date_of(fields, first)} to {date_of(fields, last)} do not follow "
            "each other at equal steps. Give a shorter time with hours=, or fill all times with infer.py"
        )


def domain_of(path: Path) -> dict[str, str]:
    """Returns how the domain of a filled file is called, where it has one."""
    return {"valid": "valid"} if "valid" in sizes_in(path) else {}


def sizes_in(path: Path) -> dict[str, dict[str, int]]:
    """Returns the sizes of the variables of a netCDF file by name. Raises UserError: There is no such file."""
    if not path.is_file():
        raise UserError(f"input={path}: there is no such file. Expected fields.nc of infer.py, or its folder")
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as data:
            return {str(name): dict(variable.sizes) for name, variable in data.variables.items()}
    except OSError as error:
        raise UserError(f"input={path}: expected fields.nc of infer.py, and this is no netCDF-4 file") from error


def read_members(path: Path, fields: Fields, frames: Sequence[int]) -> Tensor:
    """Returns the members `(M, T, 2, H, W)`. Raises UserError: There are none."""
    names = [f"{name}_members" for name in fields.names]
    if sizes_in(path).keys() >= {*names}:
        return read_pair(path, fields, names, frames)
    if files := members_beside(path):
        return torch.stack([read_pair(file, fields, fields.names, frames) for file in files])
    raise UserError(f"{path}: it has no members ({names[0]}, or files beside it). Fill with infer.py members=32")


def read_truth(path: Path, fields: Fields, frames: Sequence[int]) -> Tensor | None:
    """Returns what was known and hidden, `(T, 2, H, W)`; None where nothing was."""
    names = [f"{name}_truth" for name in fields.names]
    return read_pair(path, fields, names, frames) if sizes_in(path).keys() >= {*names} else None


def read_pair(path: Path, fields: Fields, names: Sequence[str], frames: Sequence[int]) -> Tensor:
    """Returns two variables of a filled file `(..., T, 2, H, W)` as its mean is read: in m s-1, along the grid."""
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as data:
        velocity = np.stack([data[name].values[..., frames, :, :] for name in names], axis=-3)
    velocity = velocity * np.asarray(fields.scale, dtype=velocity.dtype)[:, None, None]
    velocity = velocity if fields.turn is None else turned(velocity, fields.turn)
    return torch.where(fields.grid.valid, torch.from_numpy(velocity), torch.nan)


def cells_of(place: Sequence[float], fields: Fields, key: str) -> Tensor:
    """Returns a place in cells, `(2,)`.

    Arguments:
        place: In the coordinates of the file, along x first; longitudes of any turn.
        fields: The data.
        key: What gave it.

    Raises:
        UserError: It lies outside the field or on land.
    """
    found = []
    for value, axis, name in zip(place, (fields.x, fields.y), (fields.x_name, fields.y_name), strict=True):
        axis = np.asarray(axis, dtype=float)
        if name == "lon":
            value = axis.mean() + (value - axis.mean() + 180) % 360 - 180
        order = np.argsort(axis)
        half = abs(axis[1] - axis[0]) / 2
        if not axis.min() - half <= value <= axis.max() + half:
            ends = f"{axis.min():g} to {axis.max():g}"
            raise UserError(f"{key}: {name} {value:g} is outside the field, whose {name} goes from {ends}")
        found.append(float(np.interp(value, axis[order], order)))
    cell = torch.tensor(found, dtype=torch.float64)
    column, row = cell.round().long().tolist()
    if key == "at" and not fields.grid.valid[row, column]:
        raise UserError(f"at=[{place[0]:g},{place[1]:g}]: this is land, or outside the domain. Give a place in it")
    return cell
