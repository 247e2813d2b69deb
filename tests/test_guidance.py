"""Inpainting and physics guidance where the answer is known."""

from dataclasses import replace

import pytest
import torch
from oracle import GaussianPrior

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Conditional, RePaint
from vecfield_diffusion.guidance.physics import NoPhysics, Physics, squared_norm, through_walls
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity
from vecfield_diffusion.samplers.deterministic import DPMpp2M
from vecfield_diffusion.samplers.stochastic import Ancestral

PRIOR = GaussianPrior()
HEIGHT, WIDTH = PRIOR.shape[1:]


def observation(n=4, sigma=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    observed = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.bool)
    observed[..., ::2, ::2] = True
    y = torch.randn(1, *PRIOR.shape, dtype=torch.float64, generator=generator)
    return Observation(
        torch.where(observed, y, torch.nan).expand(n, -1, -1, -1),
        observed.expand(n, -1, -1, -1),
        torch.full((n, 1, 1, 1), sigma, dtype=torch.float64),
        torch.ones(n, 1, HEIGHT, WIDTH, dtype=torch.bool),
    )


def told(z, s, given):
    """A denoiser that shows what it was told: the exact posterior mean where all samples share one observation."""
    observed = given.observed[0].expand(PRIOR.shape).flatten()
    if not observed.any():
        return PRIOR.denoise(z, s)
    y = given.y[0].flatten()[observed]
    return PRIOR.conditional(observed, y, given.sigma_y.max().item())(z, s)


def test_conditional_samples_have_the_exact_posterior_mean_and_spread():
    """An affine map again: zero noise gives the mean, unit vectors the square root of the covariance."""
    given = observation(n=PRIOR.size + 1)
    levels = karras(0.002, 300.0, 64)
    noise = torch.cat([torch.zeros(1, PRIOR.size), torch.eye(PRIOR.size)]).double().view(-1, *PRIOR.shape)
    bound = Conditional().bind(told, given)
    assert Conditional().hook(given, lambda: noise) is None
    x = DPMpp2M(64).sample(bound, levels, lambda: noise).flatten(1)
    observed = given.observed[0].expand(PRIOR.shape).flatten()
    mean, covariance = PRIOR.posterior(observed, given.y[0].flatten()[observed], 0.1)
    torch.testing.assert_close(x[0], mean, rtol=0, atol=0.01)
    a = x[1:] - x[0]
    assert ((a.T @ a).trace() / covariance.trace()).item() == pytest.approx(1, abs=0.03)


def test_replacement_tells_the_network_nothing():
    given = observation()
    z = torch.randn(4, *PRIOR.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = torch.full((4,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(RePaint(1).bind(told, given)(z, s), PRIOR.denoise(z, s))


def test_resampling_tends_to_the_posterior_mean():
    """The mean of an affine map is its value at zero noise. Taken once each, steps leave a bias; many times, little."""
    generator = torch.Generator().manual_seed(5)
    x0, n = torch.randn(2, PRIOR.size, dtype=torch.float64, generator=generator)
    y = PRIOR.vectors * PRIOR.eigenvalues.sqrt() @ x0 + 0.05 * n
    given = replace(observation(n=1, sigma=0.05), y=y.view(1, *PRIOR.shape))
    observed = given.observed[0].expand(PRIOR.shape).flatten()
    mean, _ = PRIOR.posterior(observed, y[observed], 0.05)
    zero = torch.zeros(1, *PRIOR.shape, dtype=torch.float64)
    errors = []
    for resamples in (1, 10, 100):
        method = RePaint(resamples)
        bound, hook = method.bind(told, given), method.hook(given, lambda: zero)
        often = {"repeats": method.repeats, "repeat_above": 0.05}
        x = Ancestral(64).sample(bound, karras(0.002, 300.0, 64), lambda: zero, hook, **often)
        errors.append((x.flatten() - mean).square().mean().sqrt().item())
    assert errors[0] > 0.25 and errors[1] < 0.05 and errors[2] < 0.02, errors


def test_replacement_noises_the_observation_to_the_level_of_the_sample():
    """Known cells become y + sqrt(r^2 - sigma^2) eps, unknown cells stay; below the error of y all stay."""
    given = observation(sigma=0.1)
    eps = torch.randn(4, *PRIOR.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.zeros_like(eps)
    hook = RePaint(1).hook(given, lambda: eps)
    known = given.observed.expand_as(z)
    out = hook(z, 5.0)
    torch.testing.assert_close(out[known], (given.y + (25 - 0.01) ** 0.5 * eps)[known])
    assert out[~known].abs().max() == 0
    for r in (0.05, 0.0):
        assert hook(z, r).abs().max() == 0
    exact = observation(sigma=0.0)
    torch.testing.assert_close(RePaint(1).hook(exact, lambda: eps)(z, 0.0)[known], exact.y[known])


def field(n=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, 12, 10, dtype=torch.float64, generator=generator)


def domain(land=True):
    valid = torch.ones(12, 10, dtype=torch.bool)
    if land:
        valid[4:6, 3:7] = False
    return Grid(valid, dx=2000.0, dy=3000.0, boundary_x="periodic", boundary_y="wall")


def normalizer(std=0.4):
    mean = torch.zeros(2, 12, 10)
    mean[0] = 0.1
    return Normalizer(mean, std).double()


def guided(physics, x_hat, z, s, grid):
    return physics.guide(lambda z, s: x_hat, normalizer(), grid)(z, s)


def test_step_is_the_gradient_of_the_energy_in_physical_units():
    """Against the energy written out by hand and central differences of it."""
    x_hat, grid = field(1), domain()
    z = x_hat + 100.0  # far away, so that nothing is clipped
    s = torch.tensor([0.7], dtype=torch.float64)
    physics = Physics("gradient", divergence=0.8, curl=0.3, curl_target=1e-5)
    step = x_hat - guided(physics, x_hat, z, s, grid)
    div_norm, curl_norm = physics.norms(grid, x_hat)

    def energy(x):
        velocity = normalizer().denormalize(x)
        div = divergence(velocity, grid)[:, 0][:, grid.valid]
        curl = vorticity(velocity, grid)[:, 0][:, grid.valid] - 1e-5
        terms = 0.8 * div.square().sum() / div_norm + 0.3 * curl.square().sum() / curl_norm
        return terms / 2 / normalizer().std ** 2

    direction = torch.randn(x_hat.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    slope = (energy(x_hat + 1e-5 * direction) - energy(x_hat - 1e-5 * direction)) / 2e-5
    gain = 0.49 / 1.49
    assert (step * direction).sum().item() == pytest.approx(gain * slope.item(), rel=1e-5)


@pytest.mark.parametrize("operator", [divergence, vorticity])
@pytest.mark.parametrize("boundary", ["periodic", "wall", "open"])
def test_norm_is_the_largest_singular_value(operator, boundary):
    grid = Grid(domain().valid, dx=2000.0, dy=3000.0, boundary_x=boundary, boundary_y=boundary)
    basis = torch.eye(240, dtype=torch.float64).view(240, 2, 12, 10)
    exact = torch.linalg.matrix_norm(operator(basis, grid).flatten(1), ord=2) ** 2
    got = squared_norm(operator, grid, exact)
    assert 0.97 < (got / 1.05 / exact).item() <= 1 + 1e-9


@pytest.mark.parametrize("boundary", ["periodic", "wall", "open"])
@pytest.mark.parametrize("weights", [(2.0, 0.0), (1.0, 1.0)])
def test_guidance_lowers_the_energy_and_never_blows_up(weights, boundary):
    """Richardson steps at a high level: the energy falls at every step, for the largest weights and every boundary."""
    grid = Grid(domain().valid, dx=2000.0, dy=3000.0, boundary_x="periodic", boundary_y=boundary)
    x = field()
    physics = Physics("gradient", *weights, below=1e9)
    norms = physics.norms(grid, x)
    s = torch.full((3,), 1e4, dtype=torch.float64)
    energies = []
    step = physics.guide(lambda z, s: z - 1e6, normalizer(), grid)  # far from z, so that nothing is clipped
    for _ in range(300):
        energies.append(physics.energy(normalizer().denormalize(x), normalizer().std, grid, norms))
        x = step(x + 1e6, s)
    energies = torch.stack(energies)
    assert (energies.diff(dim=0) <= 1e-12).all()
    assert (energies[-1] < 0.5 * energies[0]).all()


def test_guidance_is_off_above_its_threshold_and_clipped_to_the_noise():
    x_hat, grid = field(2), domain()
    s = torch.tensor([20.0, 5.0], dtype=torch.float64)
    z = x_hat.clone()
    z[:, 0, 0, 0] += 1e-3
    out = guided(Physics("gradient", below=10.0), x_hat, z, s, grid)
    torch.testing.assert_close(out[0], x_hat[0], rtol=0, atol=0)
    assert (out[1] - x_hat[1]).norm().item() == pytest.approx(1e-3, rel=1e-6)


def test_each_sample_is_guided_by_itself():
    x_hat, grid = field(3), domain()
    s = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    together = guided(Physics("gradient"), x_hat, x_hat + 1, s, grid)
    for i in range(3):
        one = guided(Physics("gradient"), x_hat[i : i + 1], x_hat[i : i + 1] + 1, s[i : i + 1], grid)
        torch.testing.assert_close(together[i : i + 1], one)


def test_land_changes_nothing():
    x_hat, grid = field(1), domain()
    s = torch.tensor([0.5], dtype=torch.float64)
    land = ~grid.valid.expand_as(x_hat)
    other = torch.where(land, 7.0, x_hat)
    wet = ~land
    base, moved = (guided(Physics("gradient"), x, x + 1, s, grid) for x in (x_hat, other))
    torch.testing.assert_close(base[wet], moved[wet], rtol=0, atol=0)


def test_the_term_of_training_is_the_energy_of_the_estimate():
    """By hand, for the divergence alone; and its gradient reaches the estimate."""
    x_hat, grid, s = field(2).requires_grad_(), domain(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    physics = Physics("gradient", divergence=0.8)
    got = physics.penalty(normalizer(), grid)(x_hat, s)
    div = divergence(normalizer().denormalize(x_hat), grid)[:, 0][:, grid.valid] / normalizer().std
    expected = 0.4 * div.square().sum(dim=1) / physics.norms(grid, x_hat)[0] / (2 * grid.valid.sum()) / (1 + s**2)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.grad(got.sum(), x_hat)[0].abs().max() > 0
    assert NoPhysics().penalty(normalizer(), grid) is None


def test_velocity_through_walls_by_hand():
    """u beside land and v beside land or the wall; the open and the periodic edge let through."""
    for boundary, rows in (("wall", [0, -1]), ("open", [])):
        grid = Grid(domain().valid, 2000.0, 3000.0, "periodic", boundary)
        expected = torch.zeros(2, 12, 10, dtype=torch.bool)
        expected[0, 4:6, [2, 7]] = True
        expected[1, [3, 6], 3:7] = True
        expected[1, rows] = True
        got = through_walls(torch.ones(1, 2, 12, 10, dtype=torch.float64), grid)[0]
        assert torch.equal(got == 1, expected) and torch.equal(got != 0, expected)


def test_a_step_of_kinetic_energy_goes_to_its_target_and_no_further():
    """At a high level the whole step is taken: sqrt of the mean energy is where it should be, from above and below."""
    grid, s = domain(), torch.full((1,), 1e4, dtype=torch.float64)
    cells = grid.valid.expand(1, 2, 12, 10)
    velocity = torch.where(cells, field(1), 0.0)
    x = (velocity - normalizer().mean) / normalizer().std
    now = velocity.square().sum() / (2 * grid.valid.sum())
    for target in (0.2 * now.item(), 10 * now.item()):
        physics = Physics("gradient", divergence=0.0, kinetic_energy=target, below=1e9)
        out = normalizer().denormalize(guided(physics, x, x + 1e6, s, grid))
        assert (out[cells].square().sum() / (2 * grid.valid.sum())).item() == pytest.approx(target, rel=1e-6)


def test_auto_takes_its_tolerances_from_the_training_data():
    statistics = Statistics(std=0.4, lambda_max=4.0, sigma_max=20.0, divergence_rms=2e-6, vorticity_rms=3e-5)
    physics = Physics(divergence=0.5, curl=0.5, momentum=(0.1, 0.0), velocity_tau=0.02)
    known = physics.resolve(True, statistics)
    assert {term.name: term.tau for term in known.terms} == {"divergence": 2e-6, "curl": 3e-5, "momentum": 0.02}
    assert (known.mode, physics.resolve(False, statistics).mode, physics.mode) == ("rows", "gradient", "auto")
    assert len(known.rows(normalizer(), domain())) == 3 and physics.resolve(False, statistics).rows(None, None) == ()
    assert Physics(tau=1e-5).resolve(True, statistics).terms[0].tau == 1e-5
    with pytest.raises(ValueError, match="mode=rows needs"):
        Physics("rows").resolve(False, statistics)


def test_no_physics_is_the_denoiser_itself():
    assert NoPhysics().guide(told, normalizer(), domain()) is told


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"divergence": -1.0}, r"divergence must be in \[0, 2\]"),
        ({"curl": 2.5}, r"curl must be in \[0, 2\]"),
        ({"divergence": 1.5, "curl": 1.0}, "at most 2 together with divergence=1.5"),
    ],
)
def test_weights_that_would_grow_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Physics("gradient", **options)
