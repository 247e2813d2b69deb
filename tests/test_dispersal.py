"""Where drifters may be: densities against those of scipy, regions that hold one more end as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from vecfield_diffusion.evaluation.dispersal import Dispersal, Goal
from vecfield_diffusion.evaluation.lagrangian import offsets, on_axes, trajectories
from vecfield_diffusion.physics.grid import Grid


def ends(count: int, seed: int = 0, sets: int = 1) -> torch.Tensor:
    """Ends along a bent filament, `(sets, count, 2)`: no Gaussian law."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, sets, count, generator=generator, dtype=torch.float64)
    return torch.stack((20 * x, 3 * y + 4 * x**2), dim=-1)


def test_the_density_is_that_of_kernels_by_the_rule_of_scott() -> None:
    found, places = Dispersal(ends(30)[0]), ends(50, seed=1)[0]
    kernels = gaussian_kde(found.ends.T.numpy())
    np.testing.assert_allclose(found.density(places), kernels(places.T.numpy()), rtol=1e-10)
    x, y = found.window(300)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    cell = (x[1] - x[0]) * (y[1] - y[0])
    assert float(found.density(grid).sum() * cell) == pytest.approx(1, abs=2e-3)
    inside = kernels(grid.reshape(-1, 2).T.numpy()) >= found.level(0.9)
    assert found.area(0.9, 300) == pytest.approx(float(inside.sum() * cell), rel=1e-9)
    assert found.area(0.5) < found.area(0.9)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_one_more_end_lies_inside_as_often_as_is_said(level: float) -> None:
    """Of 150 ensembles of 40: the error of the mean is 0.6 %; the curve that the ends follow costs a little."""
    drawn, more = ends(40, sets=150), ends(300, seed=1, sets=150)
    held = [Dispersal(given).holds(new, level).double().mean() for given, new in zip(drawn, more, strict=True)]
    assert float(torch.stack(held).mean()) == pytest.approx(level, abs=0.02)


def test_the_level_is_the_density_of_the_others_at_the_ends() -> None:
    """Nine in ten of 19 ends have more than that of rank 2, each under the kernels of the 18 others."""
    given = ends(19)[0]
    whole = Dispersal(given)
    own = torch.diagonal(whole._kernels(given))
    others = ((19 * whole.density(given) - own) / 18).sort().values
    assert whole.level(0.9) == pytest.approx(float(others[1]), rel=1e-12)
    assert whole.level(0.925) == pytest.approx(float((others[0] + others[1]) / 2), rel=1e-12)
    assert whole.level(0.999) == pytest.approx(float(others[0]), rel=1e-12)


def test_drifters_of_one_member_are_left_out_together() -> None:
    """Two drifters at every end say no more than one, and the region is no narrower for them."""
    given = ends(30)[0]
    twice, member = given.repeat(2, 1), torch.arange(30).repeat(2)
    together, apart = Dispersal(twice, member), Dispersal(twice)
    assert together.level(0.9) < apart.level(0.9)
    share = torch.exp(-(torch.cdist(given @ together._white, given @ together._white) ** 2) / 2)
    own = (share.sum(dim=1) - 1) / 29 * float(together._white.det().abs()) / (2 * math.pi)
    torch.testing.assert_close(together._own, own.repeat(2).sort().values)


def test_drifters_on_a_line_have_a_region() -> None:
    line = torch.stack((torch.arange(12.0), 2 * torch.arange(12.0)), dim=1)
    found = Dispersal(line)
    assert found.holds(torch.tensor([5.5, 11.0]), 0.9) and not found.holds(torch.tensor([5.5, 15.0]), 0.9)


def test_what_has_no_region() -> None:
    with pytest.raises(ValueError, match="need 10 drifters that are not lost, got 9"):
        Dispersal(ends(9)[0])
    with pytest.raises(ValueError, match="different places"):
        Dispersal(torch.ones(12, 2))


def test_arrivals_count_those_that_came_there_at_any_time() -> None:
    """In cells of 2 km x 1 km, around column 1 and row 2; one is lost after it has arrived, one before."""
    grid, lost = Grid(SEA, 2000.0, 1000.0), [math.nan, math.nan]
    ways = torch.tensor([[[4, 2], [9, 9], [1, 8], [4, 2]], [[2, 2], lost, [1, 5], lost], [[4, 2], lost, [1, 8], lost]])
    for kilometres, share in ((1.9, 0.0), (2.1, 0.25), (3.1, 0.5), (6.1, 0.75)):
        assert float(Goal.disc(torch.tensor([1.0, 2.0]), kilometres, grid).arrivals(ways.double())) == share
    corner, other = torch.tensor([3.5, 1.5]), torch.tensor([4.5, 2.5])
    assert float(Goal.box(corner, other, grid).arrivals(ways.double())) == 0.5
    assert float(Goal.box(other, corner, grid).arrivals(ways.double())) == 0.5
    # Around the seam of an axis that closes, from column 9.5 to 1.5: a way that went on past it, too.
    round_ = Grid(SEA, 2000.0, 1000.0, boundary_x="periodic")
    box = Goal.box(torch.tensor([9.5, 0.0]), torch.tensor([1.5, 4.0]), round_)
    ways = torch.tensor([[[10.0, 1.0], [12.4, 1.0], [-1.0, 1.0], [1.0, 5.0], [13.0, 1.0], [9.0, 1.0]]])
    assert box.holds(ways).tolist() == [[True, True, True, False, False, False]]


# Beside the currents.

SEA = torch.ones(9, 11, dtype=torch.bool)


def test_a_random_walk_has_the_variance_of_its_diffusivity() -> None:
    """Each jump is sqrt(2 K h) on the ground, in either direction of the rows, after the step of the currents."""
    still, starts = torch.zeros(3, 2, 9, 11), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    grid = Grid(SEA, 4.0, -2.0)
    options = dict(grid=grid, dt=6.0, starts=starts, substeps=3, diffusivity=0.25)
    found = trajectories(still, noise=torch.ones_like, **options)
    jump = math.sqrt(2 * 0.25 * 2.0)
    expected = torch.tensor([[2 + 3 * k * jump / 4, 3 + 3 * k * jump / 2] for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], expected)
    with pytest.raises(ValueError, match="diffusivity must be >= 0"):
        trajectories(still, grid=grid, dt=6.0, starts=starts, diffusivity=-1.0)


def test_offsets_and_places_on_the_axes() -> None:
    grid = Grid(SEA, 4.0, -2.0, boundary_x="periodic")
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 4.5])
    torch.testing.assert_close(offsets(first, second, grid), torch.tensor([-8.0, 5.0]))  # over the edge
    found = on_axes(torch.tensor([[0.5, 8.0], [10.5, -1.0]]), np.arange(11) * 3.0, 40 - np.arange(9) * 2.0)
    np.testing.assert_allclose(found, [[1.5, 24.0], [31.5, 42.0]])
