"""Totals of a field - its momentum, its kinetic energy - and the nearest field that has given ones.

With the held cells left as they are, the free values that have a mean are a plane, and those of a kinetic energy a
sphere around 0. The nearest point of the plane adds one vector to all free cells; the nearest point of the sphere, in
that plane or in all of space, stretches what is left, the deviations from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid


@dataclass(frozen=True)
class Totals:
    """What a field has in all.

    Arguments:
        momentum: The mean velocity (u, v) over the valid cells; None leaves it free.
        kinetic_energy: The mean of |u|^2 / 2 over the valid cells; None leaves it free.
    """

    momentum: tuple[float, float] | None = None
    kinetic_energy: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.momentum is not None or self.kinetic_energy is not None

    def reach(self, velocity: Tensor, grid: Grid, held: Tensor) -> Tensor:
        """Returns the nearest field to `velocity` `(B, 2, H, W)` that has these totals and keeps its held cells.

        Of sequences each frame by itself. Where the held cells alone have more kinetic energy, the least that is left.

        Arguments:
            velocity: The fields.
            grid: Their grid.
            held: The cells to keep, boolean `(B, 1, H, W)`.
        """
        free = grid.valid & ~held
        count = free.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
        base = torch.zeros_like(velocity[..., :1, :1])
        if self.momentum is not None:
            aim = torch.as_tensor(self.momentum, dtype=velocity.dtype, device=velocity.device).view(2, 1, 1)
            shift = (aim - mean_velocity(velocity, grid)) * grid.valid.sum() / count
            velocity = torch.where(free, velocity + shift, velocity)
            base = torch.where(free, velocity, 0.0).sum(dim=(-2, -1), keepdim=True) / count
        if self.kinetic_energy is None:
            return velocity
        rest = torch.where(grid.valid & held, velocity, 0.0).square() + torch.where(free, base, 0.0).square()
        deviation = torch.where(free, velocity - base, 0.0)
        wanted = 2 * grid.valid.sum() * self.kinetic_energy - _sum(rest)
        stretch = (wanted.clamp(min=0) / _sum(deviation.square()).clamp(min=torch.finfo(velocity.dtype).tiny)).sqrt()
        return torch.where(free, base + stretch * deviation, velocity)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=(-3, -2, -1), keepdim=True)


def mean_velocity(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the mean of `(B, 2, H, W)` over the valid cells, `(B, 2, 1, 1)`."""
    return torch.where(grid.valid, velocity, 0.0).sum(dim=(-2, -1), keepdim=True) / grid.valid.sum()
