"""Where drifters go: advection in series of fields, and how far two predictions of it come apart.

Positions are counted in cells, (column, row), the centre of the first cell at (0, 0). There

    d column / dt = u / dx,    d row / dt = v / dy,

with the spacings of the row, bilinear in space and linear in time, integrated by the classical Runge-Kutta method of
order 4, whose steps end at every frame, so that the kinks of the interpolation do not lower its order. Where a corner
of the interpolation is land, the other corners share its weight. A drifter that comes to a cell which is not valid, or
leaves the domain through an edge that is not periodic, is lost: NaN from there on.

Currents that the fields do not resolve may be added as a random walk of diffusivity K: each step of length h is then
followed by a jump of variance 2 K h along either axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid


def seed_drifters(grid: Grid, count: int, seed: int = 0) -> Tensor:
    """Returns places of drifters at random over the area of the valid cells, `(count, 2)` in cells.

    Raises:
        ValueError: No valid cell.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = grid.valid.cpu()
    if not valid.any():
        raise ValueError("drifters need a valid cell, and the grid has none")
    area = ((grid.dx * grid.dy).abs().cpu()[:, None] * valid).flatten()
    cell = torch.multinomial(area, count, replacement=True, generator=generator)
    jitter = torch.rand(count, 2, dtype=torch.float64, generator=generator) - 0.5
    return torch.stack((cell % valid.shape[1], cell // valid.shape[1]), dim=1) + jitter


def trajectories(
    series: Tensor,
    grid: Grid,
    *,
    dt: float,
    starts: Tensor,
    substeps: int = 8,
    diffusivity: float = 0.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Returns the places of drifters at every frame, `(..., T, n, 2)` in cells; they do not wrap around periodic axes.

    Arguments:
        series: Velocities `(..., T, 2, H, W)` in units of length of the grid over time, NaN outside the domain.
        grid: Their grid.
        dt: The time between frames.
        starts: The places at the first frame, `(n, 2)`.
        substeps: Steps of the integration between two frames.
        diffusivity: K of a random walk, in squared units of length of the grid over time.
        noise: Gives standard normal numbers like a tensor `(B, n, 2)`, for that walk alone.

    Raises:
        ValueError: Shapes that do not belong together, no substep, or a negative diffusivity.
    """
    if series.ndim < 4 or series.shape[-3:] != (2, *grid.shape) or starts.ndim != 2 or starts.shape[1] != 2:
        shapes = f"{tuple(series.shape)}, {tuple(starts.shape)}"
        raise ValueError(
            f"expected a series (..., T, 2, {grid.shape[0]}, {grid.shape[1]}), starts (n, 2), got {shapes}"
        )
    if substeps < 1:
        raise ValueError(f"substeps must be >= 1, got {substeps}")
    if diffusivity < 0:
        raise ValueError(f"diffusivity must be >= 0, got {diffusivity}")
    flat = series.double().reshape(-1, *series.shape[-4:])
    spacing = torch.stack((grid.dx, grid.dy)).to(flat)[:, :, None]
    rates = flat / spacing  # cells per unit of time
    place = starts.to(flat).expand(len(flat), -1, -1)
    valid, found = grid.valid.to(flat.device), [place]
    for frame in range(flat.shape[1] - 1):
        pair, h = rates[:, frame : frame + 2], dt / substeps

        def velocity(at: Tensor, share: float, pair: Tensor = pair) -> Tensor:
            return _interpolated((1 - share) * pair[:, 0] + share * pair[:, 1], at, valid, grid)

        for step in range(substeps):
            begun, half, ended = step / substeps, (step + 0.5) / substeps, (step + 1) / substeps
            k1 = velocity(place, begun)
            k2 = velocity(place + h / 2 * k1, half)
            k3 = velocity(place + h / 2 * k2, half)
            k4 = velocity(place + h * k3, ended)
            place = place + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            if diffusivity:
                jump = math.sqrt(2 * diffusivity * h) * noise(place)
                sides = [_at_rows(side, place[..., 1], grid) for side in (grid.dx, grid.dy)]
                place = place + jump / torch.stack(sides, dim=-1)
        found.append(place)
    return torch.stack(found, dim=1).view(*series.shape[:-3], len(starts), 2)


def distances(first: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """Returns the distance `(...)` of places `(..., 2)` in cells, in units of length of the grid.

    The spacings are those of the row in the middle; a periodic axis is gone along the shorter way.
    """
    return offsets(first, second, grid).norm(dim=-1)


def offsets(first: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """Returns how far `(..., 2)` places lie from first ones along x and y, in units of length; see `distances`.

    Along y it is along the rows: southward where these run southward.
    """
    gap, row = second - first, (first[..., 1] + second[..., 1]) / 2
    for axis, (size, periodic) in enumerate(zip(grid.shape[::-1], grid.periodic[::-1], strict=True)):
        if periodic:
            turned = (gap[..., axis] + size / 2) % size - size / 2
            gap = torch.stack((turned, gap[..., 1]) if axis == 0 else (gap[..., 0], turned), dim=-1)
    sides = [_at_rows(spacing, row, grid) for spacing in (grid.dx, grid.dy)]
    return gap * torch.stack(sides, dim=-1)


def on_axes(places: Tensor, x: ArrayLike, y: ArrayLike) -> NDArray:
    """Returns places `(..., 2)` in cells on the axes of columns and rows, `(..., 2)`; steps go on at the ends."""
    parts = []
    for k, axis in enumerate((np.asarray(x, dtype=float), np.asarray(y, dtype=float))):
        cells = places[..., k].numpy()
        low = np.clip(np.floor(np.nan_to_num(cells)).astype(int), 0, len(axis) - 2)
        parts.append(axis[low] + (cells - low) * (axis[low + 1] - axis[low]))
    return np.stack(parts, axis=-1)


def separations(
    truth: Tensor,
    estimate: Tensor,
    grid: Grid,
    *,
    dt: float,
    starts: Tensor,
    after: Sequence[int] = (1, 3, 5),
    substeps: int = 8,
) -> Tensor:
    """Returns how far drifters in an estimate are from those in the truth, `(..., len(after))`, in units of length.

    It is the mean over the drifters that are lost in neither; NaN where all are.

    Arguments:
        truth: `(T, 2, H, W)`.
        estimate: A mean `(T, 2, H, W)` or members `(M, T, 2, H, W)`.
        grid: Their grid.
        dt: The time between frames.
        starts: Where they start, `(n, 2)` in cells; see `seed_drifters`.
        after: After how many frames.
        substeps: Steps of the integration between two frames.

    Raises:
        ValueError: More frames than there are, or shapes that do not belong together.
    """
    if max(after) >= len(truth):
        raise ValueError(f"after={list(after)}: {len(truth)} frames hold {len(truth) - 1} steps")
    last = max(after) + 1
    ours, theirs = (
        trajectories(fields[..., :last, :, :, :], grid, dt=dt, starts=starts, substeps=substeps)
        for fields in (estimate, truth)
    )
    return distances(ours, theirs.expand_as(ours), grid)[..., list(after), :].nanmean(dim=-1)


def _interpolated(rates: Tensor, at: Tensor, valid: Tensor, grid: Grid) -> Tensor:
    """The rates `(B, n, 2)` at places `(B, n, 2)` of fields `(B, 2, H, W)`, NaN where a drifter is lost."""
    (height, width), (close_y, close_x) = grid.shape, grid.periodic
    lost = ~at.isfinite().all(dim=-1)
    at = at.nan_to_num()
    column, row = at.unbind(dim=-1)
    for position, size, close in ((column, width, close_x), (row, height, close_y)):
        if not close:
            lost |= (position < -0.5) | (position > size - 0.5)
    lost |= ~valid[_index(row.round(), height, close_y), _index(column.round(), width, close_x)]
    left, low = column.floor(), row.floor()
    total, weights = torch.zeros_like(at), torch.zeros_like(column)
    batch = torch.arange(len(rates), device=rates.device)[:, None]
    for up in (0, 1):
        for right in (0, 1):
            weight = (1 - (row - low - up).abs()) * (1 - (column - left - right).abs())
            y, x = _index(low + up, height, close_y), _index(left + right, width, close_x)
            corner = rates[batch, :, y, x]
            known = corner.isfinite().all(dim=-1) & valid[y, x]
            weight = torch.where(known, weight, 0.0)
            total = total + weight[..., None] * corner.nan_to_num()
            weights = weights + weight
    return (total / weights[..., None]).where(~(lost | (weights == 0))[..., None], math.nan)


def _index(position: Tensor, size: int, close: bool) -> Tensor:
    """The number of a cell; beyond an edge that does not close, that of the edge."""
    number = position.long()
    return number % size if close else number.clamp(0, size - 1)


def _at_rows(spacing: Tensor, row: Tensor, grid: Grid) -> Tensor:
    """The spacing of rows that lie between those of the grid, linear; constant beyond its edges."""
    values, (height, _) = spacing.to(row).abs(), grid.shape
    at = (row % height if grid.periodic[0] else row.clamp(0, height - 1)).nan_to_num()
    low = at.floor().long()
    share = at - low
    return (1 - share) * values[low] + share * values[_index(low + 1, height, grid.periodic[0])]
