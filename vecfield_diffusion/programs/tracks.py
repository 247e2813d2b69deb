"""Drifters as a file of trajectories, as CF has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vecfield_diffusion import __version__
from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.evaluation.lagrangian import on_axes
from vecfield_diffusion.programs.filled import Filled

#: The member that drifters in the truth are of.
TRUTH = -1
CONVENTIONS = {"Conventions": "CF-1.8", "featureType": "trajectory"}


def write_tracks(
    path: Path, filled: Filled, tracks: Tensor, place_of: Tensor, true: Tensor | None, config: Mapping[str, Any]
) -> None:
    """Writes all drifters as trajectories of CF (section H.4): one after the other, `member` -1 those in the truth."""
    members, frames, count, _ = tracks.shape
    ways = tracks.movedim(1, 2).reshape(-1, frames, 2)
    member, place = np.repeat(np.arange(members), count), np.tile(place_of.numpy(), members)
    if true is not None:
        ways = torch.cat((ways, true.movedim(0, 1)))
        member = np.concatenate((member, np.full(true.shape[1], TRUTH)))
        place = np.concatenate((place, np.arange(true.shape[1])))
    fields, last = filled.fields, filled.first + frames
    axes = dict(zip("xy", np.moveaxis(on_axes(ways, fields.x, fields.y), -1, 0), strict=True))
    lon = fields.x_name == "lon"
    names = {"x": "lon" if lon else "x", "y": "lat" if lon else "y"}
    kinds = {
        "lon": {"standard_name": "longitude", "units": "degrees_east", "long_name": "longitude"},
        "lat": {"standard_name": "latitude", "units": "degrees_north", "long_name": "latitude"},
        "x": {"units": str(fields.x_attrs.get("units", "m")), "long_name": "position along x"},
        "y": {"units": str(fields.y_attrs.get("units", "m")), "long_name": "position along y"},
    }
    both, where = ("trajectory", "obs"), " ".join(("time", names["y"], names["x"]))
    time = np.broadcast_to(fields.time[filled.first : last], (len(ways), frames))
    dated = time.dtype.kind == "M"
    labels = {"standard_name": "time", "long_name": "time"} | ({} if dated else dict(fields.time_attrs))
    number = {"long_name": "member of the ensemble, -1 in the truth", "units": "1", "coordinates": ""}
    data = xr.Dataset(
        {
            "trajectory": ("trajectory", np.arange(len(ways), dtype=np.int32), {"cf_role": "trajectory_id"}),
            "member": ("trajectory", member.astype(np.int32), {key: text for key, text in number.items() if text}),
            "place": ("trajectory", place.astype(np.int32), {"long_name": "number of the start", "units": "1"}),
            "lost": (both, np.isnan(axes["x"]).astype(np.int8), {
                "long_name": "whether it was lost at land or an edge", "coordinates": where,
                "flag_values": np.array([0, 1], np.int8), "flag_meanings": "afloat lost"}),
        },
        {"time": (both, time, labels)} | {names[k]: (both, values, kinds[names[k]]) for k, values in axes.items()},
        {
            **CONVENTIONS,
            "title": "Drifters in an ensemble of filled fields",
            "history": f"vecfield_diffusion {__version__}: vecfield-drift input={config['input']}",
            "source": str(filled.fields.source),
            "seed": config["seed"],
        },
    )  # fmt: skip
    encoding: dict[str, dict[str, Any]] = {name: {"_FillValue": np.nan} for name in names.values()}
    encoding["time"] = {"dtype": np.float64, "_FillValue": None}
    if dated:
        encoding["time"] |= {"units": "seconds since 1970-01-01", "calendar": "standard"}
    with replacing(path) as temporary:
        data.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
