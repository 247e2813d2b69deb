"""Where scores are taken: observed cells, hidden ones by the distance to an observation; and the seam between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid


def distance_to_observed(observed: Tensor, grid: Grid) -> Tensor:
    """Returns the distance in cells to the nearest observed one, `(N, 1, H, W)`; infinite where none is.

    Arguments:
        observed: The measured cells, boolean `(N, 1, H, W)`.
        grid: Its periodic axes close.
    """
    height, width = grid.shape
    pad_y, pad_x = (size // 2 * close for size, close in zip(grid.shape, grid.periodic, strict=True))
    rows, columns = torch.arange(-pad_y, height + pad_y) % height, torch.arange(-pad_x, width + pad_x) % width
    found = torch.full(observed.shape, math.inf, dtype=torch.float64)
    for case, known in enumerate(observed[:, 0].cpu()):
        if known.any():
            distance = torch.from_numpy(distance_transform_edt(~known[rows][:, columns].numpy()))
            found[case, 0] = distance[pad_y : pad_y + height, pad_x : pad_x + width]
    return found.to(observed.device)


def regions(observed: Tensor, grid: Grid, edges: Sequence[float] = (1, 2, 4, 8, 16)) -> dict[str, Tensor]:
    """Returns the parts of the domain: `observed`, `hidden`, and hidden ones by their distance in cells.

    Those are `hidden d <= 1`, `hidden 1 < d <= 2` .. `hidden d > 16`; the ones without any cell are left out.

    Arguments:
        observed: The measured cells, boolean `(N, 1, H, W)`.
        grid: Its valid cells; periodic axes close.
        edges: Increasing distances.
    """
    valid = grid.valid.to(observed.device)
    observed, hidden = observed & valid, ~observed & valid
    distance = distance_to_observed(observed, grid)
    found = {"observed": observed, "hidden": hidden, f"hidden d <= {edges[0]}": hidden & (distance <= edges[0])}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        found[f"hidden {low} < d <= {high}"] = hidden & (distance > low) & (distance <= high)
    found[f"hidden d > {edges[-1]}"] = hidden & (distance > edges[-1])
    return {name: where for name, where in found.items() if where.any()}


def seam_index(fields: Tensor, observed: Tensor, grid: Grid) -> Tensor:
    """Returns how much the field jumps where the observed cells end, `(N,)`: 1 = no more than elsewhere, no seam.

    The RMS of |w_a - w_b| over neighbours a, b of which one is observed, over that of neighbours of the same side; the
    two axes, whose spacings may differ, enter the latter as often as they do at the border. NaN where there is no
    border, or no jump inside.

    Arguments:
        fields: The members, not their mean, `(..., N, 2, H, W)`, NaN where unknown.
        observed: The measured cells, boolean `(N, 1, H, W)`.
        grid: Its valid cells; periodic axes close.
    """
    flat = fields.reshape(-1, len(observed), *fields.shape[-3:]).double()
    usable = (flat.isfinite().all(dim=2).all(dim=0) & grid.valid.to(flat.device))[:, None]
    across = expected = torch.zeros(len(observed), dtype=torch.float64, device=flat.device)
    for axis, close in zip((-2, -1), grid.periodic, strict=True):
        pairs = usable & usable.roll(-1, axis)
        if not close:
            pairs.movedim(axis, -1)[..., -1] = False
        jumps = (flat - flat.roll(-1, axis)).square().sum(dim=2, keepdim=True).mean(dim=0)
        border = pairs & (observed ^ observed.roll(-1, axis))
        inside = pairs & ~border
        mean = jumps.where(inside, 0.0).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp(min=1)
        across = across + jumps.where(border, 0.0).sum(dim=(1, 2, 3))
        expected = expected + border.sum(dim=(1, 2, 3)) * mean
    return (across / expected).where(expected > 0, math.nan).sqrt()
