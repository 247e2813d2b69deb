"""The tempered law p^(1/T): of Gaussian fields exactly, by any sampler; of others by weighted particles."""

import math

import pytest
import torch
from oracle import GaussianConditional, GaussianPrior, gaussian_law
from test_metropolis import Mixture, drawn, levels
from test_samplers import EVERY, Learned

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.formulations import EDM, Regression
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Bound, Conditional, RePaint
from vecfield_diffusion.guidance.posterior import DPS, MMPS
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.samplers.base import LevelDenoiser
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun
from vecfield_diffusion.samplers.metropolis import MALA
from vecfield_diffusion.samplers.stochastic import HeunSDE
from vecfield_diffusion.samplers.tempered import FeynmanKac

PRIOR = GaussianPrior(3, 4)
S_MAX = 30 * PRIOR.eigenvalues.max().sqrt().item()


def at_temperature(sampler, T):
    sampler.temperature = T
    return sampler


@pytest.mark.parametrize("T", [0.5, 2.0])
@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_keeps_its_mean_and_has_t_times_its_variances(name, T):
    """The learned variance of an ancestral step is that of its own noise."""
    mean = torch.linspace(-1, 2, PRIOR.size, dtype=torch.float64)
    law = GaussianConditional(mean, PRIOR.covariance)

    class Both(Learned):
        def __call__(self, z, s):
            return law(z, s)

        def moments(self, z, s):
            return law(z, s), torch.full_like(z, 0.3)

    plain, tempered = (
        gaussian_law(at_temperature(EVERY[name](6), t), Both(), karras(0.02, 30.0, 6), PRIOR.shape) for t in (1.0, T)
    )
    torch.testing.assert_close(tempered[0], plain[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tempered[1], T * plain[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [0.5, 2.0])
@pytest.mark.parametrize("make", [lambda T: DPMpp2M(192, temperature=T), lambda T: HeunSDE(192, temperature=T)])
def test_every_mode_has_t_times_its_own_variance_within_a_hundredth(make, T):
    steps = karras(0.001, S_MAX, 192)
    covariance = gaussian_law(make(T), PRIOR.denoise, steps, PRIOR.shape)[1]
    modes = PRIOR.eigenvalues > 1e-3
    variances = (PRIOR.vectors.T @ covariance @ PRIOR.vectors).diagonal()[modes]
    torch.testing.assert_close(variances, T * PRIOR.eigenvalues[modes], rtol=0.01, atol=0)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_the_denoiser_of_the_tempered_law_is_that_of_a_lower_level(T):
    """D(z, r / sqrt(T)) = z + (T J + I - J)^-1 (D(z, r) - z) = m + T S (T S + r^2)^-1 (z - m)."""
    mean = torch.linspace(-1, 2, PRIOR.size, dtype=torch.float64)
    law, tempered = GaussianConditional(mean, PRIOR.covariance), GaussianConditional(mean, T * PRIOR.covariance)
    z, r = drawn(1, 3, PRIOR.shape)(), torch.tensor([0.7], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: law(x, r).flatten(), z).view(PRIOR.size, PRIOR.size)
    one = torch.eye(PRIOR.size, dtype=torch.float64)
    solved = torch.linalg.solve(T * jacobian + one - jacobian, (law(z, r) - z).flatten())
    torch.testing.assert_close(z.flatten() + solved, tempered(z, r).flatten(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law(z, r / math.sqrt(T)), tempered(z, r), rtol=1e-9, atol=1e-9)


def test_the_posterior_is_tempered_as_a_whole():
    """With mmps the mean given the observation stays, and each of its variances is T times as large."""
    n, domain = PRIOR.size + 1, torch.ones(PRIOR.shape[1:], dtype=torch.bool)
    none = Observation.none(n, domain, torch.float64)
    observed = torch.zeros_like(none.observed)
    observed[..., 0] = True
    observation = Observation(torch.full_like(none.y, 0.7), observed, torch.full_like(none.sigma_y, 0.1), none.valid)
    steps, laws = karras(0.01, S_MAX, 32), []
    for T in (1.0, 0.5):
        bound = MMPS(k_max=40, tolerance=1e-9).bind(PRIOR.denoise, observation)
        full = DPMpp2M(32, temperature=T)
        basis = torch.zeros(n, *PRIOR.shape, dtype=torch.float64)
        basis[:-1] = torch.eye(PRIOR.size, dtype=torch.float64).view(-1, *PRIOR.shape)
        x = full.sample(bound, steps, lambda basis=basis: basis).flatten(1)
        laws.append((x[-1], (x[:-1] - x[-1]).T @ (x[:-1] - x[-1])))
    torch.testing.assert_close(laws[1][0], laws[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(laws[1][1], 0.5 * laws[0][1], rtol=1e-4, atol=1e-5)


def test_at_temperature_one_the_noise_is_what_was_given():
    noise = drawn(1)
    assert Euler().heated(noise) is noise


@pytest.mark.parametrize("inpainting", [RePaint(), DPS()])
@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Heun(temperature=0.5), "sampler.temperature=0.5 is that of a denoiser, and inpainting="),
        (MALA(), "sampler=mala decides on its steps"),
        (FeynmanKac(), "sampler=feynman_kac weights states by their history"),
    ],
)
def test_what_changes_the_state_goes_with_no_temperature_and_no_decision(inpainting, sampler, message):
    with pytest.raises(UserError, match=message):
        Method(sampler, inpainting).check(EDM())
    Method(sampler, Conditional()).check(EDM())


@pytest.mark.parametrize("sampler", [Heun(temperature=0.5), MALA()])
def test_a_regression_has_neither_temperature_nor_density(sampler):
    with pytest.raises(UserError, match="diffusion=regression gives the mean alone, which no sampler changes"):
        Method(sampler, Conditional()).check(Regression())


def test_a_bound_denoiser_has_the_energy_of_its_own():
    class Bowl:
        has_energy = True

        def energy(self, z, s, observation):
            return z.flatten(1).square().sum(1) / 2 + len(observation)

    observation = Observation.none(3, torch.ones(PRIOR.shape[1:], dtype=torch.bool), torch.float64)
    z, new = drawn(3, 1, PRIOR.shape)(), drawn(3, 2, PRIOR.shape)()
    ratio = LevelDenoiser(Bound(Bowl(), observation)).log_ratio(z, new, 0.5)
    torch.testing.assert_close(ratio, (z.square() - new.square()).flatten(1).sum(1) / 2)
    assert not Bound(PRIOR.denoise, observation).has_energy


# Weighted particles.


@pytest.mark.parametrize("T", [0.5, 2.0])
def test_particles_of_a_gaussian_field_have_equal_weights(T):
    sampler = FeynmanKac(12, particles=5, temperature=T)
    sampler.sample(PRIOR.denoise, karras(0.02, 30.0, 12), drawn(4, 1, PRIOR.shape))
    assert sampler.record.numbers()["effective_particles"] == pytest.approx(5, rel=1e-6)


def test_particles_find_the_tempered_proportion_of_two_modes():
    """.3^2 / (.3^2 + .7^2) = .155 at T = 1/2, and variances of half their own; without weights the share is another."""
    n, exact = 1500, 0.09 / (0.09 + 0.49)
    mixture, steps = Mixture(w=0.3, v=0.01), levels(40, 6.0, 0.02)
    shares = {}
    for name, sampler in (
        ("weighted", FeynmanKac(40, particles=24, temperature=0.5)),
        ("plain", HeunSDE(40, temperature=0.5)),
    ):
        x = sampler.sample(mixture, steps, drawn(n, 2)).flatten()
        shares[name] = (x < 0).double().mean().item()
    error = math.sqrt(exact * (1 - exact) / n)
    assert abs(shares["weighted"] - exact) < 3 * error + 0.01, shares
    assert abs(shares["plain"] - exact) > 3 * error + 0.01, shares


def test_particles_are_resampled_by_their_weights_where_these_are_too_uneven():
    """Systematic resampling: each particle as often as P times its weight, rounded up or down; others stay."""
    sampler = FeynmanKac(particles=8)
    particles = torch.arange(16, dtype=torch.float64).view(8, 2, 1, 1, 1)
    weights = torch.tensor([0.8, 0.1, 0.05, 0.01, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    logs = torch.stack([weights.log() + 3, torch.linspace(0, 0.1, 8, dtype=torch.float64)], dim=1)
    after, left = sampler.resample(particles, logs, drawn(2))
    counts = (after[:, 0].flatten() == particles[:, 0].flatten()[:, None]).sum(1)
    assert counts.sum() == 8 and ((counts - 8 * weights).abs() < 1).all()
    assert torch.equal(after[:, 1], particles[:, 1]) and torch.equal(left[:, 1], logs[:, 1])
    assert (left[:, 0] == 0).all()
    picked = [float(sampler.one(particles[:, :1], logs[:, :1], drawn(1, seed))) for seed in range(400)]
    assert abs(sum(value == 0 for value in picked) / 400 - 0.8) < 4 * math.sqrt(0.16 / 400)
