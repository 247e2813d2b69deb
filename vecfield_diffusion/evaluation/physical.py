"""What the flow does, with the operators of its grid: divergence, vorticity, Helmholtz parts, flow through coasts.

Values are per unit of length of the grid: s^-1 for velocities in m s-1 on a grid in metres. Cells that are NaN in any
of the fields take no part, as if they were land.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import REACH, divergence, face_weights, vorticity
from vecfield_diffusion.physics.projection import helmholtz


def divergence_rms(fields: Tensor, grid: Grid, where: Tensor) -> float:
    """Returns the RMS divergence of `fields` `(..., N, 2, H, W)` over `where` `(N, 1, H, W)`, in s^-1."""
    total, cells = divergence_squares(fields, grid, where)
    return float((total.sum() / cells.sum()).sqrt())


def vorticity_rms(fields: Tensor, grid: Grid, where: Tensor) -> float:
    """Returns the RMS vorticity of `fields` `(..., N, 2, H, W)` over `where` `(N, 1, H, W)`, in s^-1."""
    total, cells = _squares(vorticity, fields, grid, where)
    return float((total.sum() / cells.sum()).sqrt())


def divergence_squares(fields: Tensor, grid: Grid, where: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of the squared divergence and the number of its values, of every case `(N,)`."""
    return _squares(divergence, fields, grid, where)


def _squares(
    operator: Callable[[Tensor, Grid], Tensor], fields: Tensor, grid: Grid, where: Tensor
) -> tuple[Tensor, Tensor]:
    flat, grid = measured(fields, grid)
    values = operator(flat, grid).view(-1, *where.shape)
    inside = where & grid.valid
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


def helmholtz_energies(fields: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Returns the kinetic energy `(...)` of the parts of `fields` `(..., 2, H, W)`; they sum to that of the field.

    `rotational`, `divergent` and `harmonic` (neither: means, flows around islands), as `projection.helmholtz` has them.
    The divergent fraction is the share of the second.
    """
    flat, inside = measured(fields, grid)
    parts = dict(zip(("rotational", "divergent", "harmonic"), helmholtz(flat, inside), strict=True))
    return {name: kinetic_energy(part, inside).view(fields.shape[:-3]) for name, part in parts.items()}


def coast_flow_rms(fields: Tensor, grid: Grid) -> float:
    """Returns the RMS of the flow through coasts and walls of `fields` `(..., 2, H, W)`, where there should be none.

    It is the component across each face between a valid cell and land or a `wall`, extrapolated to the face from up to
    three cells before it (exact for parabolas); NaN where the domain has no such face.
    """
    flat, grid = measured(fields, grid)
    flat = torch.where(grid.valid, flat, 0.0)
    faces = _through(flat[:, 0], grid.valid, grid.boundary_x), _through(flat[:, 1].mT, grid.valid.mT, grid.boundary_y)
    through = torch.cat(faces, dim=-1)
    return float(through.square().mean().sqrt()) if through.numel() else math.nan


def _through(component: Tensor, valid: Tensor, boundary: str) -> Tensor:
    """The values `(B, K)` of a component along the last axis at the K faces of `(B, H, W)` that only one cell has."""
    faces = valid.shape[-1] + 1
    mode = "circular" if boundary == "periodic" else "constant"
    cells = F.pad(component, (REACH, REACH), mode=mode)
    ok = F.pad(valid[None].double(), (REACH, REACH), mode=mode)[0] > 0
    coast = ok[:, REACH - 1 : REACH - 1 + faces] ^ ok[:, REACH : REACH + faces]
    if boundary != "wall":
        coast[:, -1] = False  # the open edge, or the first face again
    if boundary == "open":
        coast[:, 0] = False
    weights = face_weights(valid, boundary, sealed=False).to(component)
    return sum(weights[k] * cells[..., k : k + faces] for k in range(2 * REACH))[:, coast]
