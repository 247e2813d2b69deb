"""What the flow does, with the operators of its grid: divergence and energy.

Values are per unit of length of the grid: s^-1 for velocities in m s-1 on a grid in metres. Cells that are NaN in any
of the fields take no part, as if they were land.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence


def divergence_rms(fields: Tensor, grid: Grid, where: Tensor) -> float:
    """Returns the RMS divergence of `fields` `(..., N, 2, H, W)` over `where` `(N, 1, H, W)`, in s^-1."""
    total, cells = divergence_squares(fields, grid, where)
    return float((total.sum() / cells.sum()).sqrt())


def divergence_squares(fields: Tensor, grid: Grid, where: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of the squared divergence and the number of its values, of every case `(N,)`."""
    flat, grid = measured(fields, grid)
    values, inside = divergence(flat, grid).view(-1, *where.shape), where & grid.valid
    return values.square().where(inside, 0.0).sum(dim=(0, 2, 3, 4)), len(values) * inside.sum(dim=(1, 2, 3)).double()


def measured(fields: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Returns fields `(..., 2, H, W)` as float64 `(B, 2, H, W)`, and the grid of the cells finite in all of them."""
    flat = fields.reshape(-1, *fields.shape[-3:]).double()
    grid = grid.to(flat.device)
    return flat, replace(grid, valid=grid.valid & flat.isfinite().all(dim=1).all(dim=0))


def kinetic_energy(fields: Tensor, grid: Grid) -> Tensor:
    """Returns the mean of |u|^2 / 2 over the area of the domain, of `fields` `(..., 2, H, W)`, as `(...)`."""
    flat, grid = measured(fields, grid)
    area = (grid.dx * grid.dy).abs()[:, None] * grid.valid
    energy = torch.where(grid.valid, flat, 0.0).square().sum(dim=1) / 2
    return ((energy * area).sum(dim=(-2, -1)) / area.sum()).view(fields.shape[:-3])
