"""Paths, weights and preconditioning against their published formulas."""

import math

import pytest
import torch

from vecfield_diffusion.diffusion.formulations import DDPM, EDM, karras, stratified

FORMULATIONS = {"edm": EDM(sigma_max=200.0), "edm sd": EDM(sigma_data=0.5), "ddpm": DDPM()}


def times(diffusion):
    """Times over the whole range."""
    s = torch.logspace(math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max), 200, dtype=torch.float64)
    return diffusion.time(s)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_time_inverts_level(name):
    diffusion = FORMULATIONS[name]
    t = times(diffusion)
    torch.testing.assert_close(diffusion.time(diffusion.level(t)), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.sigma(t) / diffusion.alpha(t), diffusion.level(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["edm", "edm sd"])
def test_network_input_and_effective_target_have_unit_variance(name):
    """Var[c_in x_t] = 1, and Var[(x0 - c_skip x_t) / c_out] = 1, for data of standard deviation sd."""
    diffusion = FORMULATIONS[name]
    t, sd = times(diffusion), diffusion.sigma_data
    c_skip, c_out, c_in, _ = diffusion.preconditioning(t)
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    torch.testing.assert_close(c_in**2 * (alpha**2 * sd**2 + sigma**2), torch.ones_like(t))
    target = ((1 - c_skip * alpha) ** 2 * sd**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(t))


def test_edm_coefficients_are_those_of_its_table():
    edm = EDM(sigma_data=0.5)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm.preconditioning(sigma)
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    torch.testing.assert_close(edm.weight(sigma) * c_out**2, torch.ones_like(sigma))


def test_ddpm_schedule_is_the_running_product_of_one_minus_beta():
    ddpm, abar = DDPM(), []
    product = 1.0
    for j in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * j / 999)
        abar.append(product)
    abar = torch.tensor(abar, dtype=torch.float64)
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(ddpm.alpha(t), abar.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(ddpm.sigma(t), (1 - abar).sqrt(), rtol=1e-9, atol=0)
    assert ddpm.sigma_max == pytest.approx(((1 - abar[-1]) / abar[-1]).sqrt().item(), rel=1e-9)


def test_ddpm_predicts_the_noise():
    """With F = eps, D is x0; the weighted error of D is the squared error of the noise."""
    ddpm, generator = DDPM(), torch.Generator().manual_seed(0)
    t = torch.tensor([0.0, 10.0, 500.0, 999.0], dtype=torch.float64)
    x0, eps, guess = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    c_skip, c_out, c_in, c_noise = ddpm.preconditioning(t)
    x_t = ddpm.alpha(t) * x0 + ddpm.sigma(t) * eps
    torch.testing.assert_close(c_skip * x_t + c_out * eps, x0, rtol=1e-8, atol=1e-8)
    error = c_skip * x_t + c_out * guess - x0
    torch.testing.assert_close(ddpm.weight(t) * error**2, (guess - eps) ** 2, rtol=1e-6, atol=1e-9)
    assert (c_in == 1).all() and (c_noise == t).all()


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_levels_fall_from_the_top_to_zero(name, steps):
    diffusion = FORMULATIONS[name]
    levels = diffusion.levels(steps)
    assert levels.shape == (steps + 1,) and levels.dtype == torch.float64
    assert levels[0].item() == pytest.approx(diffusion.sigma_max)
    assert levels[-1] == 0 and (levels.diff() < 0).all()


def test_ddpm_levels_are_levels_of_its_chain():
    ddpm = DDPM()
    t = ddpm.time(ddpm.levels(10)[:-1])
    torch.testing.assert_close(t, t.round(), rtol=0, atol=1e-6)


def test_karras_grid_by_hand():
    got = karras(0.002, 80.0, 3, 7.0)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    torch.testing.assert_close(got, torch.tensor([80.0, middle, 0.002, 0.0], dtype=torch.float64))


def test_training_levels_follow_their_law():
    generator = torch.Generator().manual_seed(0)
    log_s = EDM(sigma_min=0.01, sigma_max=100.0).sample_times(100_000, generator).double().log()
    low, high = math.log(0.01), math.log(100.0)
    assert low <= log_s.min() and log_s.max() <= high + 1e-6
    assert log_s.mean().item() == pytest.approx((low + high) / 2, abs=1e-3)
    assert log_s.var().item() == pytest.approx((high - low) ** 2 / 12, rel=1e-3)
    log_s = EDM(noise="log_normal", sigma_max=1e4).sample_times(100_000, generator).double().log()
    assert log_s.mean().item() == pytest.approx(-1.2, abs=2e-3) and log_s.std().item() == pytest.approx(1.2, rel=2e-3)
    t = DDPM().sample_times(10_000, generator)
    assert torch.bincount(t.long(), minlength=1000).eq(10).all()


def test_stratified_has_one_number_in_each_part():
    u = stratified(50, torch.Generator().manual_seed(1))
    assert sorted((u * 50).long().tolist()) == list(range(50))
    assert u.tolist() != sorted(u.tolist())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: EDM(sigma_max="auto"), "sigma_max must be a number"),
        (lambda: EDM(rho=0.0), "rho must be > 0"),
        (lambda: DDPM(beta_max=2.0), "beta_max < 1"),
        (lambda: DDPM(T=1), "T must be >= 2"),
        (lambda: DDPM(T=10).levels(11), "steps must be <= T=10"),
    ],
)
def test_what_makes_no_sense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
