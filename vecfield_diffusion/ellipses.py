"""Errors of measured velocities, `(..., C, H, W)`, and the ellipses that those of u and v form together in a cell.

With one channel they are the standard deviation of both components, with two those of u and of v, which are then
independent. With three they are L_uu, L_vv and L_vu of the lower triangular root of the covariance of both,

    R = L L^T = [ L_uu^2        L_uu L_vu       ]
                [ L_uu L_vu     L_vu^2 + L_vv^2 ].

All three kinds scale as velocities do, and are 0 where nothing is measured. Along the axes of the ellipse,
R = Q diag(a^2, b^2) Q^T with the rotation Q, the errors of a cell are independent: a velocity with such errors is two
scalars, and whatever takes errors of its own for each of them takes R.

Errors of one instrument are correlated from place to place and from time to time, in units of the scales of both

    rho_ij = exp(-r_ij - |t_i - t_j|).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.axes import u_and_v

#: Pairs of values whose correlations are held at once.
PAIRS = 1 << 22


def root(var_u: Tensor, var_v: Tensor, covariance: Tensor) -> Tensor:
    """Returns errors of three channels from variances and covariance, `(..., 1, H, W)` each, NaN where unknown.

    Where the variance of u is not known, that of v counts by itself. What is no covariance gives NaN in L_vv.
    """
    alone = ~var_u.isfinite()
    first = var_u.sqrt()
    across = torch.where(alone | ((first == 0) & (covariance == 0)), 0.0, covariance / first)
    return torch.cat([first, (var_v - across.square()).sqrt(), across], dim=-3)


def split(error: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns L_uu and L_vv, or the standard deviations, and L_vu, where it is there."""
    return (error, None) if error.shape[-3] < 3 else (error.narrow(-3, 0, 2), error.narrow(-3, 2, 1))


def blocks(error: Tensor) -> Tensor:
    """Returns the variance of both components, those of u and of v, or these and their covariance: as many channels."""
    own, across = split(error)
    if across is None:
        return own.square()
    u, v = u_and_v(own)
    return torch.cat([u.square(), v.square() + across.square(), u * across], dim=-3)


def deviations(error: Tensor) -> Tensor:
    """Returns the standard deviation of both components, or those of u and of v: one or two channels."""
    own, across = split(error)
    return own if across is None else blocks(error).narrow(-3, 0, 2).sqrt()


def is_known(error: Tensor) -> Tensor:
    """Returns the components whose error is known, boolean, one or two channels."""
    return deviations(error).isfinite()


def correlated(error: Tensor, white: Tensor) -> Tensor:
    """Returns errors made of unit normal noise `(..., 2, H, W)`: L times it."""
    own, across = split(error)
    if across is None:
        return own * white
    u, v = u_and_v(own * white)
    return torch.cat([u, v + across * white.narrow(-3, 0, 1)], dim=-3)


def axes(error: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns the angle of the ellipse's first axis from that of u, `(..., 1, H, W)`, and the deviations along both.

    The angle is in radians, and None where the components are independent: the deviations are then those of the error.
    """
    own, across = split(error)
    if across is None:
        return None, own
    var_u, var_v, covariance = blocks(error).split(1, dim=-3)
    middle, half = (var_u + var_v) / 2, torch.hypot((var_u - var_v) / 2, covariance)
    large = (middle + half).sqrt()
    # The product of the axes is that of the diagonal of L: no difference of large numbers.
    small = own.prod(dim=-3, keepdim=True) / torch.where(large > 0, large, 1.0)
    return torch.atan2(2 * covariance, var_u - var_v) / 2, torch.cat([large, small], dim=-3)


def turned(fields: Tensor, angle: Tensor | None) -> Tensor:
    """Returns velocities `(..., 2, H, W)` as their parts along and across a direction, Q^T u; as they are for None."""
    if angle is None:
        return fields
    (u, v), c, s = u_and_v(fields), angle.cos().to(fields), angle.sin().to(fields)
    return torch.cat([c * u + s * v, c * v - s * u], dim=-3)


def back(fields: Tensor, angle: Tensor | None) -> Tensor:
    """Returns what `turned` was given, Q u'."""
    return fields if angle is None else turned(fields, -angle)


def turned_blocks(block: Tensor, angle: Tensor) -> Tensor:
    """Returns Q^T R Q of variances and covariance `(..., 3, H, W)`: those of velocities that are `turned`."""
    (u, v, both), c, s = block.split(1, dim=-3), angle.cos().to(block), angle.sin().to(block)
    along = c**2 * u + s**2 * v + 2 * c * s * both
    across = s**2 * u + c**2 * v - 2 * c * s * both
    return torch.cat([along, across, (c**2 - s**2) * both + c * s * (v - u)], dim=-3)


def at_least(error: Tensor, least: float) -> Tensor:
    """Returns errors whose axes are no shorter than `least`."""
    angle, lengths = axes(error)
    lengths = lengths.clamp(min=least)
    if angle is None:
        return lengths
    along_axes = torch.cat([lengths.square(), torch.zeros_like(angle)], dim=-3)
    return root(*turned_blocks(along_axes, -angle).split(1, dim=-3))


def geometry(bearings: Tensor, error: Tensor | float) -> Tensor:
    """Returns the errors, of three channels, of velocities made of one radial velocity of each of several radars.

    By least squares R = e^2 (sum_i b_i b_i^T)^-1 with the unit vectors b_i = (sin, cos) of the bearings: the dilution
    of precision by the geometry (GDOP; Chapman et al., J. Geophys. Res. 102, 18737, 1997). It grows without bound, and
    is NaN in the end, where all beams are parallel.

    Arguments:
        bearings: The direction of each beam in a cell, in degrees clockwise from north, `(n, H, W)`, n >= 2.
        error: The standard deviation e of a radial velocity, a number or `(..., 1, H, W)`.
    """
    radians = torch.deg2rad(bearings.double())
    east, north = radians.sin(), radians.cos()
    uu, vv, uv = (product.sum(dim=0, keepdim=True) for product in (east * east, north * north, east * north))
    square = torch.as_tensor(error).double().square()
    det = uu * vv - uv.square()
    det = torch.where(det > 1e-6 * uu * vv + 1e-12, det, torch.nan)
    return root(*(square * part / det for part in (vv, uu, -uv)))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns rho of errors at `(..., m, d)` and `(..., n, d)`, place and time in units of the scales, time last."""
    apart = torch.cdist(a[..., :-1], b[..., :-1], compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-apart - (a[..., :, None, -1] - b[..., None, :, -1]).abs())


def of_sum(parts: Tensor, places: Tensor) -> Tensor:
    """Returns the covariance of a sum of errors G_i eps_i that are correlated, sum_ij rho_ij G_i G_j^T, `(..., 2, 2)`.

    Arguments:
        parts: G, `(..., n, 2, 2)`.
        places: Where and when, `(..., n, d)`, as `correlation` has them.
    """
    total = parts.new_zeros(*parts.shape[:-3], 2, 2)
    for some in torch.arange(parts.shape[-3]).split(max(1, PAIRS // places[..., 0].numel())):
        rest = (correlation(places[..., some, :], places) @ parts.flatten(-2)).unflatten(-1, (2, 2))
        total += torch.einsum("...pab,...pcb->...ac", parts[..., some, :, :], rest)
    return total
