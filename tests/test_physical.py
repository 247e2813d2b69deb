"""What the flow does, on fields whose divergence, parts and flow through coasts are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.physical import (
    coast_flow_rms,
    divergence_squares,
    helmholtz_energies,
    kinetic_energy,
    vorticity_rms,
)
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import gradient, rotated_gradient


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(grid: Grid) -> tuple[Tensor, Tensor]:
    height, width = grid.shape
    x, y = torch.arange(width) * grid.dx[0], torch.arange(height) * grid.dy[0]
    return torch.meshgrid(x, y, indexing="xy")


def test_derivatives_of_a_linear_field_case_by_case() -> None:
    """u = 3 x - 4 y, v = 2 x - y: divergence 2, vorticity 6; times (1, 2) in two cases, three members each."""
    grid = Grid(torch.ones(6, 9, dtype=torch.bool), 2.0, 0.5)
    x, y = places(grid)
    field = torch.stack((3 * x - 4 * y, 2 * x - y))
    fields = torch.stack((field, 2 * field)).expand(3, 2, 2, 6, 9)
    where = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    where[0, ..., 4:], where[1, ..., :2, :3] = True, True
    total, cells = divergence_squares(fields, grid, where)
    assert cells.tolist() == [3 * 30, 3 * 6]
    torch.testing.assert_close(total / cells, torch.tensor([4.0, 16.0], dtype=torch.float64))
    assert vorticity_rms(fields, grid, where) == pytest.approx(math.sqrt((30 * 36 + 6 * 144) / 36))


def test_energies_of_the_parts_are_those_put_in() -> None:
    grid = Grid(torch.ones(12, 16, dtype=torch.bool), 2.0, 0.5, "periodic", "periodic")
    parts = {
        "rotational": rotated_gradient(normal(3, 1, 12, 16), grid),
        "divergent": gradient(normal(3, 1, 12, 16, seed=1), grid),
        "harmonic": torch.tensor([0.3, -0.4], dtype=torch.float64)[:, None, None].expand(3, 2, 12, 16),
    }
    found = helmholtz_energies(sum(parts.values()).view(3, 1, 2, 12, 16), grid)
    for name, part in parts.items():
        torch.testing.assert_close(found[name], (part.square().sum(1).mean((1, 2)) / 2)[:, None], msg=name)


def test_parts_add_up_around_land() -> None:
    valid = torch.ones(10, 14, dtype=torch.bool)
    valid[4:6, 5:9] = False
    grid = Grid(valid, 1.0 + torch.arange(10) / 20, 0.5, "open", "wall")
    fields = torch.where(valid, normal(2, 2, 10, 14), math.nan)
    found = helmholtz_energies(fields, grid)
    torch.testing.assert_close(sum(found.values()), kinetic_energy(fields, grid))
    area = (grid.dx * grid.dy)[:, None] * valid
    by_hand = (fields.nan_to_num().square().sum(1) / 2 * area).sum((1, 2)) / area.sum()
    torch.testing.assert_close(kinetic_energy(fields, grid), by_hand)


def test_flow_through_walls_and_an_island() -> None:
    """u = a x (from the west wall at x = 0 on, 12 wide), v = b: through the walls 0, 12 a and b, b."""
    grid = Grid(torch.ones(5, 6, dtype=torch.bool), 2.0, 0.5, "wall", "wall")
    x, _ = places(grid)
    a, b = 0.7, 0.2
    field = torch.stack((a * (x + 1), torch.full_like(x, b)))
    assert coast_flow_rms(field, grid) == pytest.approx(math.sqrt((5 * (12 * a) ** 2 + 12 * b**2) / 22))
    valid = torch.ones(12, 12, dtype=torch.bool)
    valid[5:7, 5:8] = False
    field = torch.where(valid, torch.tensor([0.3, 0.1]).view(2, 1, 1), math.nan)
    for boundary in ("open", "periodic"):  # 2 faces on either side along x, 3 along y, and none at the edges
        grid = Grid(valid, 1.0, 1.0, boundary, boundary)
        assert coast_flow_rms(field, grid) == pytest.approx(math.sqrt((4 * 0.09 + 6 * 0.01) / 10))


def test_a_coast_on_the_seam_of_a_periodic_axis_counts_once() -> None:
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[:, 0] = False
    grid = Grid(valid, 1.0, 1.0, "periodic", "periodic")
    x, _ = places(grid)
    field = torch.stack((x - 0.5, torch.zeros_like(x)))  # 0 at the coast in the west, 7 at that in the east
    assert coast_flow_rms(field, grid) == pytest.approx(7 / math.sqrt(2))


def test_no_coast_no_number() -> None:
    grid = Grid(torch.ones(4, 8, dtype=torch.bool), 1.0, 1.0, "periodic", "open")
    assert math.isnan(coast_flow_rms(normal(2, 2, 4, 8), grid))
