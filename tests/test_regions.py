"""Distances by brute force, seams of known height."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.regions import distance_to_observed, regions, seam_index
from vecfield_diffusion.physics.grid import Grid

H, W = 9, 12


def domain(boundary_x: str = "open", boundary_y: str = "open") -> Grid:
    return Grid(torch.ones(H, W, dtype=torch.bool), 2.0, 0.5, boundary_x, boundary_y)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("boundaries", [("open", "open"), ("periodic", "open"), ("periodic", "periodic")])
def test_distance_is_that_of_all_pairs(boundaries: tuple[str, str]) -> None:
    observed = torch.rand(3, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.04
    observed[2] = False
    found = distance_to_observed(observed, domain(*boundaries))
    assert found[2].isinf().all()
    for case in range(2):
        for row in range(H):
            for column in range(W):
                dy, dx = ((observed[case, 0].nonzero() - torch.tensor([row, column])).abs().double()).T
                dx = torch.minimum(dx, W - dx) if boundaries[0] == "periodic" else dx
                dy = torch.minimum(dy, H - dy) if boundaries[1] == "periodic" else dy
                assert found[case, 0, row, column] == pytest.approx(torch.hypot(dx, dy).min().item())


def test_regions_divide_the_domain() -> None:
    grid = domain("periodic")
    grid.valid[0, :4] = False
    observed = torch.rand(4, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.05
    observed[3] = False
    found = regions(observed, grid, edges=(1, 2.5))
    assert list(found) == ["observed", "hidden", "hidden d <= 1", "hidden 1 < d <= 2.5", "hidden d > 2.5"]
    assert (found["observed"] ^ found["hidden"] == grid.valid).all()
    bins = sum(where.int() for name, where in found.items() if " d " in name or "< d" in name)
    assert (bins == found["hidden"].int()).all()
    assert (found["hidden d > 2.5"][3, 0] == grid.valid).all()
    assert "hidden" not in regions(torch.ones_like(observed), grid)


def test_a_step_of_known_height() -> None:
    """Checks of +-1/2 (all jumps inside: 1 in u) with a step of 4 in v at the edge of the hidden half: sqrt(17)."""
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    field = torch.stack(((row + column) % 2 - 0.5, 4.0 * (column >= 6))).double()
    observed = (column >= 6)[None, None]
    assert seam_index(field[None], observed, domain())[0] == pytest.approx(math.sqrt(17))
    assert seam_index(field[None, None].expand(5, -1, -1, -1, -1), observed, domain()).item() == pytest.approx(17**0.5)
    plain = torch.stack((field[0], torch.zeros(H, W)))
    assert seam_index(plain[None], observed, domain())[0] == pytest.approx(1)


def test_no_seam_where_the_axes_differ() -> None:
    """A field that is rough along y only: a border along y alone has the jumps of that axis."""
    field = (torch.arange(H) % 2).double()[:, None].expand(2, H, W)[None]
    observed = (torch.arange(H) < 4)[None, None, :, None].expand(1, 1, H, W)
    assert seam_index(field, observed, domain()).item() == pytest.approx(1)


def test_noise_has_no_seam() -> None:
    """White noise has no seam at any mask; land does not enter; without a border there is no number."""
    grid = domain("periodic", "periodic")
    observed = torch.rand(40, 1, H, W, generator=torch.Generator().manual_seed(1)) < 0.5
    noise = normal(30, 40, 2, H, W)
    assert seam_index(noise, observed, grid).mean() == pytest.approx(1, abs=0.01)
    grid.valid[2:4, 3:6] = False
    dirty = torch.where(grid.valid, noise, math.nan)
    torch.testing.assert_close(
        seam_index(dirty, observed, grid), seam_index(noise.where(grid.valid, 1e6), observed, grid)
    )
    assert seam_index(noise, torch.zeros_like(observed), grid).isnan().all()
