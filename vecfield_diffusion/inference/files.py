"""What is written to disk: the filled fields as CF netCDF-4, and small text files, both whole or not at all.

A full disk or a folder without permission leaves what was there before. netCDF is composed in memory first, because the
HDF5 library does not survive a disk that fills: it leaves open handles and can end the process when it tries to close
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError

TITLE = {"Conventions": "CF-1.10", "title": "Velocity fields filled by vecfield_diffusion"}
Coordinates = Mapping[str, tuple[NDArray | None, Mapping[str, Any]]]


def write_fields(
    path: str | Path,
    members: NDArray[np.floating],
    observed: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    coordinates: Coordinates,
    *,
    truth: NDArray[np.floating] | None = None,
    units: str = "m s-1",
    config: str = "",
    seeds: Sequence[int] = (),
    ckpt: str = "",
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write an ensemble of filled fields as `fields.nc`.

    The file holds `u_mean`, `v_mean`, `u_std`, `v_std` (unbiased; NaN for one member) over the dimensions of
    `coordinates`, the members `u`, `v` with `member` in front, the flags `observed` and `valid`, and `u_truth`,
    `v_truth` where known.

    Arguments:
        path: The file to write; one that exists is replaced.
        members: The fields in `units`, `(M, T, 2, H, W)`.
        observed: The measured cells, `(T, H, W)` or `(T, 1, H, W)`.
        valid: The cells of the domain, `(H, W)`; the others become NaN in every field.
        coordinates: The names of the three dimensions time, y and x in this order, each with its values (None where
            the source has none) and attributes, as in the source.
        truth: The known fields, `(T, 2, H, W)`, NaN where unknown.
        units: Units of the fields.
        config: The configuration as YAML text.
        seeds: The seed of every member.
        ckpt: The checkpoint that made the fields.
        attributes: More global attributes, such as source and licence.

    Raises:
        UserError: The file cannot be written.
        ValueError: Arrays whose shapes do not belong together.
    """
    _check_shapes(members, valid, coordinates, truth)
    observed = np.asarray(observed, dtype=bool).reshape(members.shape[1], *valid.shape)
    dims = tuple(coordinates)
    data = xr.Dataset(_statistics(members, valid, dims, units), coords=_coordinates(coordinates))
    data["observed"] = _flags(observed & valid, dims, "hidden observed", "cells that were measured")
    data["valid"] = _flags(valid, dims[1:], "outside inside", "cells of the domain")
    if truth is not None:
        data = data.assign(_components("{}_truth", truth, valid, dims, units, "known {}"))
    data = data.assign_coords(member=("member", np.arange(len(members)), {"standard_name": "realization"}))
    origin = {"config": config, "ckpt": ckpt, "seeds": np.asarray(seeds, dtype=np.int64)}
    data.attrs = TITLE | {key: value for key, value in (attributes or {}).items() if value is not None} | origin
    _write_whole(Path(path), data.to_netcdf(engine="h5netcdf", format="NETCDF4"))


def _check_shapes(
    members: NDArray[np.floating],
    valid: NDArray[np.bool_],
    coordinates: Coordinates,
    truth: NDArray[np.floating] | None,
) -> None:
    wrong = members.ndim != 5 or members.shape[2] != 2 or members.shape[3:] != valid.shape or len(coordinates) != 3
    if wrong or (truth is not None and truth.shape != members.shape[1:]):
        raise ValueError(f"expected members (M, T, 2, H, W) with valid (H, W) and 3 coordinates, got {members.shape}")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    _write_whole(Path(path), text.encode())


def _statistics(members: NDArray[np.floating], valid: NDArray[np.bool_], dims: tuple[str, ...], units: str) -> dict:
    """The variables that describe the ensemble: mean, standard deviation, members."""
    mean = members.mean(axis=0, dtype=np.float64)
    one = len(members) == 1
    std = np.full_like(mean, np.nan) if one else members.std(axis=0, dtype=np.float64, ddof=1)
    variables = _components("{}_mean", mean, valid, dims, units, "{}, ensemble mean", cell_methods="member: mean")
    method = {"cell_methods": "member: standard_deviation"}
    variables |= _components("{}_std", std, valid, dims, units, "{}, ensemble standard deviation", **method)
    return variables | _components("{}", members, valid, ("member", *dims), units, "{}")


def _components(
    name: str,
    field: NDArray[np.floating],
    valid: NDArray[np.bool_],
    dims: tuple[str, ...],
    units: str,
    long_name: str,
    **attributes: str,
) -> dict[str, xr.Variable]:
    """The two variables of `field` `(..., 2, H, W)`, NaN outside the domain."""
    variables = {}
    for channel, (letter, words) in enumerate((("u", "velocity along x"), ("v", "velocity along y"))):
        values = np.where(valid, field[..., channel, :, :], np.nan).astype(np.float32)
        labels = {"units": units, "long_name": long_name.format(words), **attributes}
        variables[name.format(letter)] = xr.Variable(dims, values, labels, {"zlib": True, "complevel": 1})
    return variables


def _flags(field: NDArray[np.bool_], dims: tuple[str, ...], meanings: str, long_name: str) -> xr.Variable:
    labels = {"flag_values": np.array([0, 1], dtype=np.int8), "flag_meanings": meanings, "long_name": long_name}
    return xr.Variable(dims, field.astype(np.int8), labels, {"zlib": True, "complevel": 1})


def _coordinates(coordinates: Coordinates) -> dict[str, xr.Variable]:
    """The coordinate variables; units and calendar of dates belong to their encoding, not to their attributes."""
    variables = {}
    for name, (values, attributes) in coordinates.items():
        if values is None:
            continue
        dates = np.issubdtype(np.asarray(values).dtype, np.datetime64)
        encoding = {key: attributes[key] for key in ("units", "calendar") if dates and key in attributes}
        labels = {key: value for key, value in attributes.items() if key not in encoding}
        variables[name] = xr.Variable((name,), np.asarray(values), labels, encoding)
    return variables


def _write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, whose folder is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write {path.name} into {path.parent}: {error.strerror or error}. "
            "Free some space or choose another folder with hydra.run.dir=..."
        ) from error
