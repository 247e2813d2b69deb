"""The errors of the observations as the command line names them, and how many of them are made one.

Keys are `sigma_obs=`, `sigma_scale=`, `radars=`, `error_scales=` and `thin=`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Integers
from vecfield_diffusion.data.units import LENGTH, SPEED, factor, same_units, says_nothing
from vecfield_diffusion.ellipses import geometry, root, turned_blocks
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.sensors import great_circle_bearing, plane_bearing
from vecfield_diffusion.inference.super_observations import Thinning
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.source import Source, is_table, read_variable

SQUARE = "m2 s-2"
#: How far a correlation may be above 1, or a covariance above what the variances allow, by rounding of a file.
ROUNDED = 1e-3
_VALUE = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*")


def is_constant(config: Mapping[str, Any]) -> bool:
    """Whether all observations have one error, a number."""
    return isinstance(config["sigma_obs"], int | float) and not (config.get("radars") or config.get("thin"))


def errors(config: Mapping[str, Any], fields: Fields, indices: Sequence[int] | Integers) -> float | Tensor:
    """Returns the errors of observations, a number or as `Cases` has them, of snapshots `(N,)` or sequences `(N, T)`.

    Raises:
        UserError: Variables that there are not, or values that are no errors.
    """
    given, radars = config["sigma_obs"], config.get("radars")
    if isinstance(given, int | float) and not radars:
        if config.get("sigma_scale") is not None:
            raise UserError("sigma_scale is for variables: give sigma_obs=[u_err,v_err], or leave it out")
        return given
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    if len(names) > 3:
        raise UserError(
            f"sigma_obs={given}: expected a number, a variable of the file, one for u and one for v, or these and one "
            "for what both have in common, such as [u_err,v_err,uv_covariance]"
        )
    scale = _scale(config.get("sigma_scale"), fields)
    parts = [_read(name, fields, indices, scale) for name in names[:2]]
    if radars:
        found = _of_radars(config, fields, parts)
        return found.expand(*np.shape(indices), *found.shape[-3:])
    if len(parts) == 1:
        return parts[0].sqrt()
    covariance = torch.zeros_like(parts[0]) if len(names) < 3 else _covariance(names[2], fields, indices, scale, parts)
    return _turned(torch.cat([parts[0], parts[-1], covariance], dim=-3), fields, common=len(names) == 3)


def thinning(config: Mapping[str, Any], source: Source | Fields | None, grid: Grid) -> Thinning | None:
    """Returns how observations become super-observations; None where they stay as they are.

    Arguments:
        config: The keys.
        source: Where they come from.
        grid: Theirs.

    Raises:
        UserError: Blocks that are none, errors that are 0, or what does not go with them.
    """
    thin, scales, asked = config["thin"], config["error_scales"], f"thin={config['thin']}"
    if scales is not None and min(scales) <= 0:
        raise UserError(f"error_scales must be a length and a time above 0, such as [20,12], got {list(scales)}")
    if thin is None:
        if scales is not None and not is_table(source):
            raise UserError("error_scales: of values on a grid it needs thin=, whose means it is for: thin=20km or so")
        return None
    text = _VALUE.fullmatch(thin) if isinstance(thin, str) else None
    metres = None if text is None else factor(text[2], LENGTH)
    if not (isinstance(thin, int) and thin >= 1) and not (metres is not None and float(text[1]) > 0):
        raise UserError(
            f"{asked}: expected the sides of the blocks, such as thin=20km, or how many means a snapshot has at most, "
            "such as thin=500"
        )
    if config["sigma_obs"] == 0:
        raise UserError(f"{asked}: means are made by errors, and sigma_obs=0 keeps every value: add an error")
    for key, plain in (("sensor", {}), ("likelihood", "none"), ("thermodynamics", False)):
        if (config[key] or plain) != plain:
            raise UserError(f"{asked}: means are of velocities that fields are filled from: leave {key} out")
    side, most = (None, thin) if metres is None else (float(text[1]) * metres, None)
    return Thinning(grid, side, most, None if scales is None else 1e3 * scales[0])


def _turned(block: Tensor, fields: Fields, *, common: bool) -> Tensor:
    """The errors of variances and covariances along east and north, or along the axes of the grid."""
    if fields.turn is None:
        return root(*block.split(1, dim=-3)) if common else block.narrow(-3, 0, 2).sqrt()
    return root(*turned_blocks(block, torch.from_numpy(fields.turn)).split(1, dim=-3))


def _of_radars(config: Mapping[str, Any], fields: Fields, parts: Sequence[Tensor]) -> Tensor:
    """The errors that the geometry makes of those of radial velocities."""
    sites, given = config["radars"], config["sigma_obs"]
    if len(sites) < 2 or any(len(site) != 2 for site in sites):
        raise UserError(
            f"radars={sites}: expected the positions of two or more, such as 'radars=[[18.1,-34.2],[18.5,-33.9]]'"
        )
    if len(parts) > 1 or not (parts or given > 0):
        raise UserError(f"sigma_obs={given}: with radars= it is the error of a radial velocity, one number or variable")
    if fields.turn is not None:
        raise UserError("radars: bearings are from north, and this grid is turned. Give variables: sigma_obs=[u,v,uv]")
    x, y = (torch.tensor(axis.astype(float)) for axis in (fields.x, fields.y))
    bearing = great_circle_bearing if fields.x_name == "lon" else plane_bearing
    bearings = torch.stack([bearing(x[None, :], y[:, None], *site) for site in sites])
    return geometry(bearings, parts[0].sqrt() if parts else given).float()


def _read(name: str, fields: Fields, indices: Sequence[int] | Integers, scale: tuple[float, bool] | None) -> Tensor:
    """The variance `(N, 1, H, W)` of an error, in the squared units of the data, from its deviation or variance."""
    found, units = read_variable(fields, name, indices).narrow(-3, 0, 1), fields.units_of(name)
    if (found < 0).any():
        raise UserError(f"sigma_obs={name}: expected errors >= 0 in {fields.source}, found {found.nan_to_num().min()}")
    square, own = factor(units, SQUARE), str(fields.component_attrs[0].get("units", ""))
    if square is not None:
        return found * (square / _per_unit(name, fields) ** 2)
    if factor(units, SPEED) is not None or (units and same_units(units, own)):
        return found.square()
    if scale is not None and _is_number(units):
        number, is_square = scale
        return found * number if is_square else (found * number).square()
    if not units:
        return found.square()
    how = (
        "such as m s-1; a pure number needs sigma_scale=, its factor: '8 cm/s', the error of a radial for a "
        "dilution of precision, or '420 cm2 s-2', the variance that a normalised one is over"
        if _is_number(units)
        else "such as m s-1: convert it, or give a number in m s-1"
    )
    raise UserError(
        f"sigma_obs={name}: '{name}' in {fields.source} has units '{units}'. Expected an error in units of speed, {how}"
    )


def _is_number(units: str) -> bool:
    """Whether units are none; per cent are a hundredth of something."""
    return says_nothing(units) and not re.search(r"%|percent|per cent", units, re.IGNORECASE)


def _covariance(
    name: str,
    fields: Fields,
    indices: Sequence[int] | Integers,
    scale: tuple[float, bool] | None,
    variances: Sequence[Tensor],
) -> Tensor:
    """The covariance `(N, 1, H, W)` of the errors of both components, in the squared units of the data."""
    found, units = read_variable(fields, name, indices).narrow(-3, 0, 1), fields.units_of(name)
    square, product = factor(units, SQUARE), variances[0] * variances[1]
    if square is not None:
        found = found * (square / _per_unit(name, fields) ** 2)
    elif "corr" in name.lower() or (units and scale is None and _is_number(units)):
        found = found * product.sqrt()
    elif scale is not None and _is_number(units):
        found = found * (scale[0] if scale[1] else scale[0] ** 2)
    elif units or "cov" not in name.lower():
        raise UserError(
            f"sigma_obs: '{name}' in {fields.source} has units '{units}'. Expected a covariance, in units such as "
            "m2 s-2, or a correlation, of units 1"
        )
    worst = (found.square() / product).nan_to_num(0.0).amax().sqrt().item()
    if worst > 1 + ROUNDED:
        raise UserError(
            f"sigma_obs: by '{name}' of {fields.source} the errors of u and v have a correlation of {worst:.3g}: "
            "expected a positive covariance, |cov| <= sigma_u sigma_v. Leave it out, or see to its units"
        )
    most = (1 - ROUNDED) * product.sqrt()  # a line is no ellipse: R has an inverse
    return torch.maximum(torch.minimum(found, most), -most)


def _per_unit(name: str, fields: Fields) -> float:
    """The m s-1 of one unit of the data."""
    found = factor(fields.units, SPEED)
    if found is None:
        raise UserError(f"sigma_obs={name}: its units are of speed, and those of {fields.source} are '{fields.units}'")
    return found


def _scale(given: float | str | None, fields: Fields) -> tuple[float, bool] | None:
    """What pure numbers are multiplied by, in units of the data, and whether it is a variance."""
    if given is None or isinstance(given, int | float):
        number, is_square = given, False
    else:
        text = _VALUE.fullmatch(given)
        units = "" if text is None else text[2]
        ratio, square = factor(units, SPEED), factor(units, SQUARE)
        if text is None or ratio is square is None:
            raise UserError(
                f"sigma_scale={given}: expected a number in {fields.units}, or one with units of speed or its square, "
                "such as '8 cm/s' or '420 cm2 s-2'"
            )
        own, is_square = _per_unit("sigma_scale", fields), square is not None
        number = float(text[1]) * (ratio / own if square is None else square / own**2)
    if number is not None and not number > 0:
        raise UserError(f"sigma_scale={given}: expected a number above 0")
    return None if number is None else (number, is_square)
