"""What the flow does, on fields whose divergence and energy are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.physical import divergence_squares, kinetic_energy
from vecfield_diffusion.physics.grid import Grid


def places(grid: Grid) -> tuple[Tensor, Tensor]:
    height, width = grid.shape
    x, y = torch.arange(width) * grid.dx[0], torch.arange(height) * grid.dy[0]
    return torch.meshgrid(x, y, indexing="xy")


def test_derivatives_of_a_linear_field_case_by_case() -> None:
    """u = 3 x - 4 y, v = 2 x - y: divergence 2; times (1, 2) in two cases, three members each."""
    grid = Grid(torch.ones(6, 9, dtype=torch.bool), 2.0, 0.5)
    x, y = places(grid)
    field = torch.stack((3 * x - 4 * y, 2 * x - y))
    fields = torch.stack((field, 2 * field)).expand(3, 2, 2, 6, 9)
    where = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    where[0, ..., 4:], where[1, ..., :2, :3] = True, True
    total, cells = divergence_squares(fields, grid, where)
    assert cells.tolist() == [3 * 30, 3 * 6]
    torch.testing.assert_close(total / cells, torch.tensor([4.0, 16.0], dtype=torch.float64))


def test_energy_of_a_domain_with_land() -> None:
    valid = torch.ones(10, 14, dtype=torch.bool)
    valid[4:6, 5:9] = False
    grid = Grid(valid, 1.0 + torch.arange(10) / 20, 0.5, "open", "wall")
    noise = torch.randn(2, 2, 10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fields, area = torch.where(valid, noise, math.nan), (grid.dx * grid.dy)[:, None] * valid
    by_hand = (fields.nan_to_num().square().sum(1) / 2 * area).sum((1, 2)) / area.sum()
    torch.testing.assert_close(kinetic_energy(fields, grid), by_hand)
