"""Totals of given value: the nearest fields that have them, and what each way to keep them does to a Gaussian law."""

from __future__ import annotations

import pytest
import torch
from oracle import GaussianConditional, GaussianPrior
from torch import Tensor

from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.physics import Conserve, Physics, through_edges
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.totals import Totals, mean_velocity

PRIOR = GaussianPrior()
SHAPE = PRIOR.shape
GRID = Grid(torch.ones(SHAPE[1:], dtype=torch.bool), 1e3, 2e3, "periodic", "periodic")
NORMALIZER = Normalizer(torch.zeros(2, 1, 1), 0.4).double()
SIGMA, TAU, MOMENTUM = 0.05, 0.004, (0.1, -0.05)  # the last two in m s-1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def energy(fields: Tensor, valid: Tensor) -> Tensor:
    """The mean of |u|^2 / 2 over the valid cells."""
    return torch.where(valid, fields, 0.0).square().sum((-3, -2, -1)) / (2 * valid.sum())


@pytest.mark.parametrize("kinetic_energy", [None, 0.9])
@pytest.mark.parametrize("momentum", [None, (0.3, -0.2)])
def test_the_nearest_field_of_given_totals(momentum: tuple[float, float] | None, kinetic_energy: float | None) -> None:
    """With land and held cells; no other field that has them is nearer."""
    grid = Grid(random(6, 8, seed=1) > -1)
    held, totals = random(1, 1, 6, 8, seed=2) > 0.8, Totals(momentum, kinetic_energy)
    field = random(1, 2, 6, 8)
    field[..., ~grid.valid] = torch.nan
    found = totals.reach(field, grid, held)
    assert found[..., ~grid.valid].isnan().all()
    assert not torch.where(held & grid.valid, found - field, 0.0).any()
    if momentum is not None:
        torch.testing.assert_close(mean_velocity(found, grid).flatten(), torch.tensor(momentum, dtype=torch.float64))
    if kinetic_energy is not None:
        assert energy(found, grid.valid).item() == pytest.approx(kinetic_energy)
    torch.testing.assert_close(totals.reach(found, grid, held), found, equal_nan=True)
    for size, seed in ((1e-3, 3), (0.1, 4), (1.0, 5)):
        others = totals.reach(found + size * torch.where(held, 0.0, random(50, 2, 6, 8, seed=seed)), grid, held)
        distance = (others - field).nan_to_num().square().sum((1, 2, 3))
        assert totals.given is False or distance.min() >= (found - field).nan_to_num().square().sum()


def test_each_frame_has_its_totals_and_too_much_held_energy_leaves_nothing() -> None:
    totals, grid = Totals((0.1, 0.2), 2.0), Grid(torch.ones(4, 5, dtype=torch.bool))
    held = torch.zeros(2, 3, 1, 4, 5, dtype=torch.bool)
    found = totals.reach(random(2, 3, 2, 4, 5), grid, held)
    torch.testing.assert_close(energy(found, grid.valid), torch.full((2, 3), 2.0, dtype=torch.float64))
    held[..., :2, :] = True
    field = 10 * random(2, 3, 2, 4, 5)
    still = Totals(None, 0.5).reach(field, grid, held)
    assert still[..., :2, :].equal(field[..., :2, :]) and not still[..., 2:, :].any()


def test_what_flows_out_by_hand() -> None:
    """u = a x over open ends: a W dx H dy over the length of the edge; a constant flow leaves as it comes."""
    cells = torch.ones(3, 4, dtype=torch.bool)
    ramp = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    ramp[:, 0] = 0.5 * torch.arange(4)
    for boundary_y, edge in (("open", 2 * 3 * 7.0 + 2 * 4 * 2.0), ("wall", 2 * 3 * 7.0), ("periodic", 2 * 3 * 7.0)):
        grid = Grid(cells, 2.0, 7.0, "open", boundary_y)
        assert through_edges(ramp, grid).item() == pytest.approx(0.5 / 2.0 * 4 * 2.0 * 3 * 7.0 / edge)
        assert (
            through_edges(torch.ones_like(ramp), grid).item() == pytest.approx(0.0, abs=1e-12) or boundary_y == "wall"
        )
    closed = Grid(cells, 2.0, 7.0, "wall", "periodic")
    asked = Conserve(outflow=0.0)
    assert "open edge" in asked.obstacle(closed) and asked.obstacle(grid) is None
    with pytest.raises(UserError, match=r"physics\.outflow"):
        asked.penalty(NORMALIZER, closed)


def with_mean_flow() -> Tensor:
    """The covariance of the prior and a mean flow of variance 0.04 in each component."""
    ones = torch.zeros(2, PRIOR.size, dtype=torch.float64)
    ones[0, : PRIOR.size // 2] = ones[1, PRIOR.size // 2 :] = 1.0
    return PRIOR.covariance + 0.04 * ones.T @ ones


def conditioned(covariance: Tensor, rows: Tensor, y: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance given `rows x = y` with errors."""
    cross = covariance @ rows.T
    gain = torch.linalg.solve(rows @ cross + torch.diag(variances), cross.T).T
    return gain @ y, covariance - gain @ cross.T


def laws() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Observation]:
    """The law given some cells, and given their momentum, too, in normalised units."""
    seen = torch.zeros(SHAPE[1:], dtype=torch.bool)
    seen[:2, :4] = True
    covariance, unit = with_mean_flow(), torch.eye(PRIOR.size, dtype=torch.float64)
    y = random(*SHAPE, seed=3)
    cells = unit[seen.expand(SHAPE).flatten()]
    values, errors = cells @ y.flatten(), torch.full((len(cells),), SIGMA**2, dtype=torch.float64)
    means = mean_velocity(unit.view(-1, *SHAPE), GRID)[..., 0, 0].T
    asked = torch.tensor(MOMENTUM, dtype=torch.float64) / 0.4
    rows, all_values = torch.cat([cells, means]), torch.cat([values, asked])
    all_errors = torch.cat([errors, torch.full((2,), (TAU / 0.4) ** 2, dtype=torch.float64)])
    free, given = conditioned(covariance, cells, values, errors), conditioned(covariance, rows, all_values, all_errors)
    n = 3
    observation = Observation(
        y.expand(n, -1, -1, -1),
        seen.expand(n, 1, -1, -1),
        torch.full((n, 1, 1, 1), SIGMA, dtype=torch.float64),
        torch.ones(n, 1, *SHAPE[1:], dtype=torch.bool),
    )
    return free, given, observation


def test_momentum_as_rows_is_the_law_given_it() -> None:
    """The denoiser of mmps with these rows is that of the posterior, at every level."""
    _, given, observation = laws()
    physics = Conserve(momentum=MOMENTUM, velocity_tau=TAU)
    statistics = Statistics(0.4, lambda_max=1.0, sigma_max=10.0, divergence_rms=1e-6, vorticity_rms=1e-5)
    rows = physics.resolve(True, statistics).rows(NORMALIZER, GRID)
    prior = GaussianConditional(torch.zeros(PRIOR.size, dtype=torch.float64), with_mean_flow())
    bound = MMPS(k_max=300, tolerance=1e-11).bind(lambda z, s, _: prior(z, s), observation, rows)
    z = 2 * random(3, *SHAPE, seed=4)
    for s in (0.05, 0.5, 5.0):
        level = torch.full((3,), s, dtype=torch.float64)
        torch.testing.assert_close(bound(z, level), GaussianConditional(*given)(z, level), rtol=0, atol=1e-6)


def test_moved_to_the_momentum_afterwards_the_law_is_another_one() -> None:
    """Every field has it exactly, but the spread beside the observed cells and the mean are not those given it."""
    free, given, observation = laws()
    physics = Conserve("hard", momentum=MOMENTUM)

    def moved(x: Tensor) -> Tensor:
        return physics.finish(x.view(-1, *SHAPE), observation[:1], NORMALIZER, GRID).flatten(1)

    start = moved(free[0])
    maps = moved(free[0] + torch.linalg.cholesky(free[1] + 1e-12 * torch.eye(PRIOR.size)).T) - start
    covariance = maps.T @ maps
    momentum = mean_velocity(NORMALIZER.denormalize((start + maps).view(-1, *SHAPE)), GRID)[..., 0, 0]
    torch.testing.assert_close(momentum, torch.tensor(MOMENTUM, dtype=torch.float64).expand_as(momentum))
    hidden = ~observation.observed[0].expand(SHAPE).flatten()
    off = ((start[0] - given[0])[hidden].square().mean() / given[1].diagonal()[hidden].mean()).sqrt()
    assert off > 0.3
    assert covariance.diagonal()[hidden].mean() > given[1].diagonal()[hidden].mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(mode="rows", divergence=0.0, kinetic_energy=1.0), "not linear"),
        (dict(mode="hard", kinetic_energy=1.0), "divergence=0"),
        (dict(mode="hard", divergence=0.0, outflow=0.0), "mode=hard"),
        (dict(momentum=(0.0, 0.0), outflow=0.0, divergence=0.5), "at most 0 together"),
        (dict(momentum=(0.0, 0.0), divergence=1.5), "at most 1 together"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Physics(**options)
    with pytest.raises(ValueError, match="momentum, outflow or kinetic_energy"):
        Conserve()
