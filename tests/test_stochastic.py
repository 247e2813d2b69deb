"""Stochastic samplers: the published formulas for every step, exact laws of the samples, weak order."""

import math
from functools import partial

import pytest
import torch
from oracle import GaussianPrior, IndependentPrior, gaussian_law

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.samplers.deterministic import Euler
from vecfield_diffusion.samplers.stochastic import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    HeunSDE,
    Langevin,
    PredictorCorrector,
)

PRIOR = GaussianPrior(4, 4)
S_MAX = 10 * PRIOR.eigenvalues.max().sqrt().item()

# The chain of Ho et al. (NeurIPS 2020): beta_1 .. beta_1000, and abar_0 = 1.
BETA = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)])
ABAR = (1 - BETA).cumprod(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noises(count, shape=(2, *PRIOR.shape), seed=1):
    """`count` draws, and a noise function that gives them in turn."""
    drawn = list(normal(count, *shape, seed=seed))
    left = iter(drawn)
    return drawn, lambda: next(left)


def at_level(z, s):
    return PRIOR.denoise(z, torch.full((len(z),), s, dtype=z.dtype))


def score(z, s):
    return (at_level(z, s) - z) / s**2


def level(t):
    """The noise level at step t of the chain: sqrt((1 - abar) / abar)."""
    return ((1 - ABAR[t]) / ABAR[t]).sqrt().item()


X_0, X_T, EPS = normal(3, 1, 2, 2, 2)


def step_of_the_chain(sampler, t, eps=EPS, fraction=None):
    """x_{t-1} from x_t, in the variables of the chain, for a denoiser that says X_0."""

    class Says:
        def __call__(self, z, s):
            return X_0

        def moments(self, z, s):
            return X_0, fraction

    z = sampler.step(Says(), X_T / ABAR[t].sqrt(), level(t), level(t - 1), lambda: eps, {})
    return ABAR[t - 1].sqrt() * z


# The published discrete formulas, for every t.


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_equation_12_for_every_t(eta):
    """Song et al., ICLR 2021, in x_t and the predicted noise, with sigma_t of equation 16."""
    for t in range(1, 1001):
        a_t, a_before = ABAR[t], ABAR[t - 1]
        eps_theta = (X_T - a_t.sqrt() * X_0) / (1 - a_t).sqrt()
        sigma = eta * ((1 - a_before) / (1 - a_t)).sqrt() * (1 - a_t / a_before).sqrt()
        want = a_before.sqrt() * X_0 + (1 - a_before - sigma**2).clamp(min=0).sqrt() * eps_theta + sigma * EPS
        torch.testing.assert_close(step_of_the_chain(DDIM(1, eta=eta), t), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral_is_the_chain_of_ddpm_for_every_t(variance):
    """Ho et al., NeurIPS 2020: the mean of equation 7 and the two variances of section 3.2; no noise at t = 1.

    The learned one is equation 15 of Nichol & Dhariwal, ICML 2021.
    """
    fraction = torch.linspace(0, 1, 8, dtype=torch.float64).view(1, 2, 2, 2)
    sampler = Ancestral(1, variance=variance)
    for t in range(1, 1001):
        beta, a_t, a_before = BETA[t], ABAR[t], ABAR[t - 1]
        mean = a_before.sqrt() * beta / (1 - a_t) * X_0 + (1 - beta).sqrt() * (1 - a_before) / (1 - a_t) * X_T
        posterior = (1 - a_before) / (1 - a_t) * beta
        if t == 1:
            std = torch.zeros(1)
        elif variance == "learned":
            std = (fraction * beta.log() + (1 - fraction) * posterior.log()).exp().sqrt()
        else:
            std = (posterior if variance == "small" else beta).sqrt()
        got = step_of_the_chain(sampler, t, fraction=fraction)
        torch.testing.assert_close(got, mean + std * EPS, rtol=1e-8, atol=1e-9)


def test_a_learned_variance_asks_for_a_denoiser_that_gives_it():
    assert Ancestral(variance="learned").needs_variance and not Ancestral().needs_variance and not DDIM().needs_variance
    with pytest.raises(ValueError, match="^denoiser must have a learned variance"):
        Ancestral(3, variance="learned").sample(PRIOR.denoise, karras(0.01, 3.0, 3), noises(9)[1])


# Identities.


def test_ddim_without_noise_is_euler_and_draws_none():
    levels = karras(0.01, S_MAX, 16)
    first = normal(2, *PRIOR.shape)
    got = DDIM(16).sample(PRIOR.denoise, levels, iter([first]).__next__)
    torch.testing.assert_close(got, Euler(16).sample(PRIOR.denoise, levels, lambda: first), rtol=1e-12, atol=1e-12)


def test_ddim_with_all_the_noise_is_ancestral():
    levels = karras(0.01, S_MAX, 16)
    got = DDIM(16, eta=1.0).sample(PRIOR.denoise, levels, noises(16)[1])
    torch.testing.assert_close(got, Ancestral(16).sample(PRIOR.denoise, levels, noises(16)[1]), rtol=1e-9, atol=1e-9)


def test_predictor_without_corrector_is_euler_maruyama():
    levels = karras(0.01, S_MAX, 16)
    got = PredictorCorrector(16, corrector_steps=0).sample(PRIOR.denoise, levels, noises(16)[1])
    assert torch.equal(got, EulerMaruyama(16).sample(PRIOR.denoise, levels, noises(16)[1]))


# Published algorithms over a whole run, in terms of the score and with the same noise.


def test_euler_maruyama_is_reverse_diffusion_of_the_score():
    """Song et al., ICLR 2021, equation 46 with f = 0 and G_i = sqrt(s_i^2 - s_{i-1}^2); D at the end."""
    levels = karras(0.01, S_MAX, 12).tolist()
    (first, *eps), noise = noises(12)
    z = levels[0] * first
    for s, r, e in zip(levels[:-2], levels[1:-1], eps, strict=True):
        z = z + (s**2 - r**2) * score(z, s) + math.sqrt(s**2 - r**2) * e
    got = EulerMaruyama(12).sample(PRIOR.denoise, torch.tensor(levels, dtype=torch.float64), noise)
    torch.testing.assert_close(got, at_level(z, levels[-2]), rtol=1e-9, atol=1e-9)


def test_predictor_corrector_is_algorithm_2():
    """Song et al., ICLR 2021, appendix G, with the step of algorithm 4 at expected norms."""
    levels, snr = karras(0.01, S_MAX, 6).tolist(), 0.2
    (first, *eps), noise = noises(1 + 5 * 3)
    left = iter(eps)
    z = levels[0] * first
    for s, r in zip(levels[:-2], levels[1:-1], strict=True):
        z = z + (s**2 - r**2) * score(z, s) + math.sqrt(s**2 - r**2) * next(left)
        for _ in range(2):
            # |noise| = sqrt(d) and |score| = sqrt(d) / r for white noise of level r
            step = 2 * (snr * math.sqrt(PRIOR.size) / (math.sqrt(PRIOR.size) / r)) ** 2
            z = z + step * score(z, r) + math.sqrt(2 * step) * next(left)
    sampler = PredictorCorrector(6, corrector_steps=2, snr=snr)
    got = sampler.sample(PRIOR.denoise, torch.tensor(levels, dtype=torch.float64), noise)
    torch.testing.assert_close(got, at_level(z, levels[-2]), rtol=1e-9, atol=1e-9)


def test_langevin_is_annealed_langevin_dynamics():
    """Song & Ermon, NeurIPS 2019, algorithm 1 with half their alpha as delta; the first level is corrected, too."""
    levels, epsilon = karras(0.01, S_MAX, 6).tolist(), 2e-5
    (first, *eps), noise = noises(1 + 6 * 3)
    left = iter(eps)
    z = levels[0] * first
    for s in levels[:-1]:
        alpha = epsilon * s**2 / levels[-2] ** 2
        for _ in range(3):
            z = z + alpha / 2 * score(z, s) + math.sqrt(alpha) * next(left)
    # With a smallest level of 0.01, as theirs, their 2e-5 is the default step of 0.1.
    got = Langevin(6, corrections=3).sample(PRIOR.denoise, torch.tensor(levels, dtype=torch.float64), noise)
    torch.testing.assert_close(got, at_level(z, levels[-2]), rtol=1e-9, atol=1e-9)


def test_states_of_langevin_belong_to_their_levels():
    """After the step to r the observed cells' noise, and so a hook's, is that of r: the spread has relaxed to it."""
    levels = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    sampler = Langevin(2, corrections=40)
    seen = []

    def hook(z, r):
        seen.append((r, z.square().mean().item()))
        return z

    nothing = torch.zeros(2, 8, 8, dtype=torch.float64)
    draws = iter(normal(100, 64, *nothing.shape))
    sampler.sample(IndependentPrior(nothing).denoise, levels, lambda: next(draws), hook)
    # The stationary variance for data that are 0 is s^2 / (1 - step_size / 2).
    assert seen[0] == (1.0, pytest.approx(1 / 0.95, rel=0.1)) and seen[1] == (0.0, 0.0)


# The law of the samples, exactly.

CONDITIONAL = PRIOR.conditional(torch.tensor([0, 5, 9, 20]), torch.tensor([1.0, -0.5, 0.3, 0.8]).double(), 0.1)
LAWS = {
    "ddim_0": (partial(DDIM, eta=0.0), 128, 0.03, 0.05),
    "ddim_half": (partial(DDIM, eta=0.5), 128, 0.02, 0.05),
    "ddpm_small": (Ancestral, 128, 0.005, 0.07),
    "ddpm_large": (partial(Ancestral, variance="large"), 128, 0.005, 0.04),
    "euler_maruyama": (EulerMaruyama, 128, 0.005, 0.07),
    "heun_sde": (HeunSDE, 128, 0.005, 0.01),
    "predictor_corrector": (PredictorCorrector, 96, 0.005, 0.05),
    "langevin": (partial(Langevin, corrections=2, step_size=0.3), 128, 0.005, 0.3),
}


@pytest.mark.parametrize(("make", "steps", "mean_error", "covariance_error"), LAWS.values(), ids=LAWS)
def test_mean_and_covariance_of_the_samples(make, steps, mean_error, covariance_error):
    """Of a field of which four values are known, relative to the exact ones."""
    levels = karras(0.002, S_MAX, steps)
    mean, covariance = gaussian_law(make(steps), CONDITIONAL, levels, PRIOR.shape)
    assert (mean - CONDITIONAL.mean).norm() < mean_error * CONDITIONAL.mean.norm()
    assert (covariance - CONDITIONAL.covariance).norm() < covariance_error * CONDITIONAL.covariance.norm()


CELLS = IndependentPrior(torch.tensor([[[0.01, 0.1]], [[1.0, 10.0]]], dtype=torch.float64), mean=0.3)
WEAK = {
    "ddpm_small": (Ancestral, 0.8, 1.05),
    "ddpm_large": (partial(Ancestral, variance="large"), 0.8, 1.05),
    "ddim_1": (partial(DDIM, eta=1.0), 0.8, 1.05),
    "euler_maruyama": (EulerMaruyama, 0.8, 1.05),
    "heun_sde": (HeunSDE, 1.8, 2.3),
}


@pytest.mark.parametrize(("make", "low", "high"), WEAK.values(), ids=WEAK)
def test_weak_order(make, low, high):
    """Of the variance, towards that of the exact reverse diffusion from N(0, s_max^2)."""
    top, v, errors = 30.0, CELLS.variance, []
    gain = v / (v + top**2)
    exact = (gain * top) ** 2 + gain * top**2
    for n in (256, 512):
        levels = torch.logspace(math.log10(top), -4, n + 1, dtype=torch.float64)
        levels[-1] = 0
        errors.append((CELLS.spread(make(n), levels)[1] / exact - 1).norm().item())
    assert low < math.log2(errors[0] / errors[1]) < high


def test_mean_of_the_reverse_diffusion():
    """From N(0, s_max^2) the exact mean is mean s_max^2 / (v + s_max^2)."""
    top, v = 30.0, CELLS.variance
    levels = torch.logspace(math.log10(top), -4, 257, dtype=torch.float64)
    levels[-1] = 0
    for make in (Ancestral, EulerMaruyama, HeunSDE):
        mean, _ = CELLS.spread(make(256), levels)
        torch.testing.assert_close(mean, 0.3 * top**2 / (v + top**2), rtol=1e-3, atol=0)


def test_bias_of_langevin_halves_with_its_step():
    """At one level the variance settles at v / (1 - delta / (2 v)), v = variance + s^2."""
    cells, excess = IndependentPrior(CELLS.variance[:1]), []
    v = cells.variance + 1
    for step_size in (0.1, 0.05):
        sampler = Langevin(1, corrections=round(50 / step_size), step_size=step_size)
        _, spread = cells.spread(sampler, torch.tensor([1.0, 0.0], dtype=torch.float64))
        settled = spread / (cells.variance / v) ** 2  # before D shrank it
        torch.testing.assert_close(settled, v / (1 - step_size / (2 * v)), rtol=1e-6, atol=0)
        excess.append((settled / v - 1).mean().item())
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(eta=1.1), r"^eta must be in \[0, 1\], got 1\.1"),
        (lambda: DDIM(eta=-0.1), r"^eta must be in \[0, 1\], got -0\.1"),
        (lambda: Ancestral(variance="smal"), "^variance must be one of small, large, learned, got smal"),
        (lambda: PredictorCorrector(corrector_steps=-1), "^corrector_steps must be >= 0, got -1"),
        (lambda: PredictorCorrector(snr=0.0), r"^snr must be in \(0, 1\), got 0\.0"),
        (lambda: PredictorCorrector(snr=1.0), r"^snr must be in \(0, 1\), got 1\.0"),
        (lambda: Langevin(corrections=0), "^corrections must be >= 1, got 0"),
        (lambda: Langevin(step_size=2.0), r"^step_size must be in \(0, 2\), got 2\.0"),
        (lambda: Langevin(steps=0), "^steps must be >= 1, got 0"),
    ],
)
def test_what_a_sampler_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
