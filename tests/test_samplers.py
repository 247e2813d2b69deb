"""Samplers on the exact denoiser of a Gaussian field: orders of convergence, energy, identities, counts."""

import math

import pytest
import torch
from oracle import GaussianPrior

from vecfield_diffusion.diffusion.formulations import DDPM, EDM, karras
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun

PRIOR = GaussianPrior()
S_MAX = 10 * PRIOR.eigenvalues.max().sqrt().item()


def affine_map(sampler, levels, denoiser=PRIOR.denoise):
    """The matrix that takes unit noise to samples, `(d, d)`, from one run on all unit vectors."""
    basis = torch.eye(PRIOR.size, dtype=torch.float64).view(-1, *PRIOR.shape)
    return sampler.sample(lambda z, s: denoiser(z, s), levels, lambda: basis).flatten(1)


def exact_map(levels):
    """The matrix of the probability-flow ODE to 0: s_max sqrt(lambda / (lambda + s_max^2)) per eigenvector."""
    top = levels[0].item()
    gain = top * (PRIOR.eigenvalues / (PRIOR.eigenvalues + top**2)).sqrt()
    return PRIOR.vectors * gain @ PRIOR.vectors.T


def slope(sampler, steps=(64, 128, 256)):
    """The order of convergence towards the exact ODE, on a grid that is geometric down to a small level."""
    errors = []
    for n in steps:
        levels = torch.logspace(math.log10(S_MAX), -4, n + 1, dtype=torch.float64)
        levels[-1] = 0
        errors.append((affine_map(sampler(n), levels) - exact_map(levels)).norm().item())
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize(("sampler", "low", "high"), [(Euler, 0.9, 1.05), (Heun, 1.9, 2.2), (DPMpp2M, 1.9, 2.2)])
def test_order_of_convergence(sampler, low, high):
    assert low < slope(sampler) < high


@pytest.mark.parametrize("diffusion", [EDM(sigma_max=S_MAX), DDPM()])
@pytest.mark.parametrize("sampler", [Euler(256), Heun(64), DPMpp2M(64)])
def test_covariance_of_samples_is_that_of_the_prior(diffusion, sampler):
    a = affine_map(sampler, diffusion.levels(sampler.steps))
    error = (a.T @ a - PRIOR.covariance).norm() / PRIOR.covariance.norm()
    assert error < 0.03


def test_energy_is_kept_with_the_noise_that_the_data_ask_for_and_lost_with_less():
    """On a 64x64 field with E ~ k^-3, per eigenvalue: the exact ODE keeps s^2 / (lambda + s^2) of each."""
    ky = torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)[:, None]
    k = (ky**2 + torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)[None, :] ** 2).sqrt()
    energy = torch.where(k > 0, k.clamp(min=1) ** -4, 0.0).flatten()
    eigenvalues = energy / energy.sum() * 2 * 64**2

    def kept(s_max, steps=128):
        z = torch.full_like(eigenvalues, s_max)
        levels = karras(0.002, s_max, steps)
        x = DPMpp2M(steps).sample(
            lambda z, s: z * eigenvalues.view(1, 1, 64, 64) / (eigenvalues.view(1, 1, 64, 64) + s[0] ** 2),
            levels,
            lambda: (z / s_max).view(1, 1, 64, 64),
        )
        return (x.square().sum() / eigenvalues.sum()).item()

    assert kept(10 * eigenvalues.max().sqrt().item()) >= 0.98
    assert kept(80.0) <= 0.90


def test_second_order_steps_by_hand():
    """One step of Heun and two of 2M against the formulas, on a denoiser that is D = z / (1 + s^2)."""
    z0 = torch.tensor([[1.5]], dtype=torch.float64).view(1, 1, 1, 1)
    levels = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)

    def d(z, s):
        return z / (1 + s**2)

    z = 4 * 1.5
    slope_s = (z - d(z, 4)) / 4
    euler = z - 2 * slope_s
    heun = z - 2 * (slope_s + (euler - d(euler, 2)) / 2) / 2
    got = Heun(3).step(lambda z, s: d(z, s), 4 * z0, 4.0, 2.0, lambda: z0, {})
    assert got.item() == pytest.approx(heun)

    first = 0.5 * z + 0.5 * d(z, 4)
    estimate = 1.5 * d(first, 2) - 0.5 * d(z, 4)
    second = 0.5 * first + 0.5 * estimate
    got = DPMpp2M(3).sample(lambda z, s: z / (1 + s**2).view(-1, 1, 1, 1), levels, lambda: z0)
    assert got.item() == pytest.approx(d(second, 1))


def test_churn_is_algorithm_2():
    """Noise up to s (1 + gamma), then Heun from there, with the same noise."""
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(3, *PRIOR.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    sampler = Heun(10, S_churn=2.0, S_noise=1.1)

    def denoise(z, s):
        return PRIOR.denoise(z, torch.full((len(z),), s, dtype=z.dtype))

    got = sampler.step(denoise, z, 3.0, 1.0, lambda: eps, {})
    q = 3.0 * 1.2
    raised = z + 1.1 * math.sqrt(q**2 - 9) * eps
    torch.testing.assert_close(got, Heun(10).step(denoise, raised, q, 1.0, lambda: eps, {}))
    outside = Heun(10, S_churn=2.0, S_max=2.0).step(denoise, z, 3.0, 1.0, lambda: eps, {})
    torch.testing.assert_close(outside, Heun(10).step(denoise, z, 3.0, 1.0, lambda: eps, {}))


@pytest.mark.parametrize("sampler", [Euler(5), Heun(5), DPMpp2M(5), Euler(1), Heun(1), DPMpp2M(1)])
def test_evaluations_are_counted_exactly(sampler):
    counts = []
    levels = karras(0.01, 10.0, sampler.steps)
    noise = torch.ones(2, *PRIOR.shape, dtype=torch.float64)
    sampler.sample(PRIOR.denoise, levels, lambda: noise, progress=counts.append)
    assert sum(counts) == len(counts) == sampler.evaluations


@pytest.mark.parametrize("diffusion", [EDM(), DDPM()])
def test_churn_stays_finite_on_every_path(diffusion):
    """Above the top of the path, too, where the first step of a stochastic sampler looks."""
    noise = torch.ones(1, *PRIOR.shape, dtype=torch.float64)

    def through_time(z, s):
        t = diffusion.time(s)
        return PRIOR.denoise(z, diffusion.level(t)) * diffusion.alpha(t).view(-1, 1, 1, 1).sign()

    out = Heun(10, S_churn=40.0).sample(through_time, diffusion.levels(10), lambda: noise)
    assert out.isfinite().all() and out.abs().max() < 100


def test_hook_sees_every_level_after_the_first():
    seen = []
    levels = karras(0.01, 10.0, 4)
    noise = torch.ones(1, *PRIOR.shape, dtype=torch.float64)

    def hook(z, r):
        seen.append(r)
        return z

    Euler(4).sample(PRIOR.denoise, levels, lambda: noise, hook)
    assert seen == levels[1:].tolist()


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps must be >= 1"):
        Euler(0)
