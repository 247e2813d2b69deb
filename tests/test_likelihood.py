"""The likelihood by the probability-flow ODE against the closed form of a Gaussian."""

import math

import pytest
import torch
from oracle import GaussianPrior
from torch import nn

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.samplers.likelihood import log_likelihood

S_MIN = 0.05


class FullRank(GaussianPrior):
    """The Gaussian field and some noise, so that every direction has a density."""

    def __init__(self):
        super().__init__(4, 4)
        self.covariance = self.covariance + 0.3 * torch.eye(self.size, dtype=torch.float64)
        self.eigenvalues, self.vectors = torch.linalg.eigh(self.covariance)

    def log_prob(self, x, mean=0.0):
        """The log-density at the smallest level."""
        covariance = self.covariance + S_MIN**2 * torch.eye(self.size, dtype=torch.float64)
        centre = torch.zeros(self.size, dtype=torch.float64) + mean
        return torch.distributions.MultivariateNormal(centre, covariance).log_prob(x.flatten(1))


PRIOR = FullRank()
S_MAX = 30 * PRIOR.eigenvalues.max().sqrt().item()


def fields(samples=4):
    eps = torch.randn(samples, PRIOR.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (eps @ torch.linalg.cholesky(PRIOR.covariance).T).view(-1, *PRIOR.shape)


def levels(n, s_max=S_MAX):
    return karras(S_MIN, s_max, n)


def test_gaussian_to_a_thousandth_of_a_nat_per_dimension():
    x, told = fields(), []
    got = log_likelihood(PRIOR.denoise, x, levels(192), "exact", progress=told.append)
    assert ((got - PRIOR.log_prob(x)).abs() / PRIOR.size).max() < 1e-3
    assert told == [1] * (2 * 191 + 1)


def test_error_is_of_second_order():
    x = fields()
    exact = PRIOR.log_prob(x)
    errors = []
    for n in (48, 96):
        grid = torch.cat([torch.logspace(math.log10(100 * S_MAX), math.log10(S_MIN), n + 1), torch.zeros(1)]).double()
        errors.append((log_likelihood(PRIOR.denoise, x, grid, "exact") - exact).norm().item())
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.4


def test_hutchinson_is_unbiased():
    """Over the columns of a Hadamard matrix, orthogonal signs, the mean of v^T J v is the trace: v v^T sums to d I."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < PRIOR.size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    columns = iter(hadamard * torch.linspace(0.1, 3, PRIOR.size, dtype=torch.float64))  # only the signs count
    x, grid = fields(), levels(16)

    def noise():
        return next(columns).view(1, *PRIOR.shape).expand(len(x), -1, -1, -1)

    many = log_likelihood(PRIOR.denoise, x, grid, "hutchinson", noise, probes=PRIOR.size)
    exact = log_likelihood(PRIOR.denoise, x, grid, "exact")
    torch.testing.assert_close(many, exact, rtol=1e-10, atol=1e-10)


def test_probes_stay_the_same_along_the_path():
    """One draw a probe for the whole run; the estimate is that of v^T J v with these signs, exactly known here."""
    x, grid, draws = fields(), levels(96), []

    def noise():
        generator = torch.Generator().manual_seed(len(draws))
        draws.append(torch.randn(x.shape, dtype=torch.float64, generator=generator))
        return draws[-1]

    got = log_likelihood(PRIOR.denoise, x, grid, "hutchinson", noise, probes=3)
    assert len(draws) == 3
    s, t = grid[-2], grid[0]
    # d/dl of ln(l + s^2) / 2 is s^2 / (l + s^2): the integral of v^T J v over ln s, per eigenvector.
    variance = PRIOR.eigenvalues
    traced = (t / s).log() - ((variance + t**2) / (variance + s**2)).log() / 2
    wanted = torch.stack([((d.sign().flatten(1) @ PRIOR.vectors) ** 2 * traced).sum(1) for d in draws]).mean(0)
    exact = log_likelihood(PRIOR.denoise, x, grid, "exact")
    torch.testing.assert_close(got - exact, traced.sum() - wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
@pytest.mark.parametrize("junk", [0.0, 1e6, math.nan])
def test_land_does_not_count(mode, junk):
    """Two valid values a cell, whatever land holds; each sample has a coast of its own."""
    x = fields(2)
    valid = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    valid[0, :, :2, 1:] = False
    valid[1, :, :, 3] = False

    def coastal(z, s):
        """Cells of unit variance; 1 on land, and whatever the state is there reaches the sea."""
        leak = torch.where(valid, 0.0, z).mean((1, 2, 3), keepdim=True)
        return torch.where(valid, z / (1 + s[:, None, None, None] ** 2) + leak, 1.0)

    dirty = torch.where(valid, x, junk)
    got = log_likelihood(coastal, dirty, levels(192), mode, lambda: torch.ones_like(x), valid=valid)
    density = torch.distributions.Normal(0, math.sqrt(1 + S_MIN**2)).log_prob(x).double()
    want = torch.where(valid, density, 0.0).sum((1, 2, 3))
    counted = valid.sum((1, 2, 3)) * 2
    assert ((got - want).abs() / counted).max() < 1e-3


def test_start_is_the_mean_at_the_top():
    """A prior that is moved by m, from a first state that is moved by m."""
    x, m = fields(), torch.linspace(-1, 2, PRIOR.size, dtype=torch.float64)

    def moved(z, s):
        return PRIOR.denoise(z - m.view(PRIOR.shape), s) + m.view(PRIOR.shape)

    got = log_likelihood(moved, x, levels(32), "exact", start=m.view(1, *PRIOR.shape).expand_as(x))
    still = log_likelihood(PRIOR.denoise, x - m.view(PRIOR.shape), levels(32), "exact")
    torch.testing.assert_close(got, still)


def test_samples_do_not_depend_on_their_batch_nor_on_the_mode_of_autograd():
    x, grid = fields(), levels(12)
    with torch.no_grad():
        together = log_likelihood(PRIOR.denoise, x, grid, "exact")
    alone = torch.cat([log_likelihood(PRIOR.denoise, x[k : k + 1], grid, "exact") for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert not alone.requires_grad


def test_the_trace_of_a_network_is_that_of_its_jacobian():
    """A convolution, attention over rows and a nonlinearity, in float64, at 2 levels against torch's own Jacobian."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 8, 3, padding=1).double(), nn.Conv2d(8, 2, 3, padding=1).double()

    def denoiser(z, s):
        h = nn.functional.group_norm(nn.functional.silu(first(z)), 2)
        h = h + nn.functional.scaled_dot_product_attention(h, h, h)
        return last(h) / (1 + s.view(-1, 1, 1, 1))

    x, (s, r) = fields(2), (0.5, 0.8)

    def trace(z, level):
        at = torch.full((1,), level, dtype=torch.float64)
        jacobians = [torch.autograd.functional.jacobian(lambda y: denoiser(y, at), z[k : k + 1]) for k in range(len(z))]
        return torch.stack([j.reshape(PRIOR.size, PRIOR.size).trace() for j in jacobians])

    def at(level):
        return torch.full((2,), level, dtype=torch.float64)

    slope = (x - denoiser(x, at(s))) / s
    euler = x + (r - s) * slope
    z = x + (r - s) * (slope + (euler - denoiser(euler, at(r))) / r) / 2
    normal = -(z**2 / r**2 + math.log(2 * math.pi * r**2)).sum((1, 2, 3)) / 2
    spread = PRIOR.size * math.log(r / s) - math.log(r / s) * (trace(x, s) + trace(z, r)) / 2
    got = log_likelihood(denoiser, x, torch.tensor([r, s, 0.0], dtype=torch.float64), "exact")
    torch.testing.assert_close(got, (normal + spread).detach(), rtol=1e-9, atol=1e-9)
    assert all(parameter.grad is None for parameter in [*first.parameters(), *last.parameters()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "exakt"}, "^mode must be one of hutchinson, exact, got exakt"),
        ({"mode": "hutchinson"}, "^noise must be given"),
        ({"mode": "hutchinson", "noise": fields, "probes": 0}, "^probes must be >= 1, got 0"),
        ({"levels": torch.tensor([1.0, 0.0])}, "^levels must fall to 0"),
        ({"levels": torch.tensor([1.0, 2.0, 0.0])}, "^levels must fall to 0"),
    ],
)
def test_what_cannot_be_asked(changes, message):
    arguments = {"mode": "exact", "levels": levels(4)} | changes
    with pytest.raises(ValueError, match=message):
        log_likelihood(PRIOR.denoise, fields(), **arguments)
