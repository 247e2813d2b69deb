"""The path told as a bath: VP in other words, the equation that it solves, and the schedule that is learned."""

import copy
import math
from typing import get_args

import pytest
import torch
from ideal import NORMALIZER, PRIOR, IdealNetwork

from vecfield_diffusion.config.build import build
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import VP
from vecfield_diffusion.diffusion.formulations.thermodynamic import Learned, Schedule, Thermodynamic
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.observation import Observation

SCHEDULES = get_args(Schedule)
DOMAIN = torch.ones(PRIOR.shape[1:], dtype=torch.bool)


def uneven():
    """A learned schedule whose parts differ."""
    diffusion = Thermodynamic("learned")
    with torch.no_grad():
        diffusion.learned.increments.copy_(torch.linspace(-0.3, 0.3, Learned.BINS))
    return diffusion


def made(schedule):
    return uneven() if schedule == "learned" else Thermodynamic(schedule)


def test_the_linear_bath_is_vp():
    vp = VP()
    bath = Thermodynamic("linear", ratio=200.0, sigma_max=vp.sigma_max)
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(bath.level(t), vp.level(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(bath.temperature(t), (0.1 + 19.9 * t) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_falls_as_the_temperature_says(schedule):
    """d ln alpha / dt = -T, by central differences, away from the nodes of a schedule that is piecewise linear."""
    diffusion, h = made(schedule), 1e-6
    t = torch.linspace(0.0371, 0.967, 40, dtype=torch.float64)
    slope = (diffusion.alpha(t + h).log() - diffusion.alpha(t - h).log()) / (2 * h)
    torch.testing.assert_close(-slope, diffusion.temperature(t), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_inverts_level_in_and_beyond_the_range(schedule):
    diffusion = made(schedule)
    s = torch.logspace(-4, 3, 200, dtype=torch.float64)
    torch.testing.assert_close(diffusion.level(diffusion.time(s)), s, rtol=1e-11, atol=0)
    ends = diffusion.level(torch.tensor([diffusion.t_min, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.002, 80.0], dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "exponential", "cosine"])
def test_the_temperature_rises_by_the_ratio(schedule):
    diffusion = Thermodynamic(schedule, ratio=50.0)
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    temperature = diffusion.temperature(t)
    assert (temperature.diff() > 0).all() and temperature[-1] / temperature[0] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "warm"}, "^schedule must be one of constant, linear, exponential, cosine, learned, got warm"),
        ({"ratio": 1.0}, r"^ratio must be > 1, the highest temperature over the lowest, got 1\.0"),
        ({"sigma_max": 0.001}, "^sigma_min must be above 0 and below sigma_max"),
    ],
)
def test_what_a_bath_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thermodynamic(**arguments)


# The learned schedule.


def rate(s, eigenvalues):
    """The growth of the entropy with ln s, a value: the mean of lambda / (lambda + s^2)."""
    return (eigenvalues / (eigenvalues + s[:, None] ** 2)).mean(1)


def known_times(eigenvalues, learned):
    """The times of the nodes for N(0, S): the integral of the rate, no part with less than its least share."""
    fine = torch.linspace(0, Learned.BINS, 100 * Learned.BINS + 1, dtype=torch.float64)[:-1] + 0.005
    s = torch.exp(learned.first + learned.width * fine)
    growth = rate(s, eigenvalues).view(Learned.BINS, 100).mean(1)
    least, shares = Learned.EVEN / Learned.BINS, growth / growth.sum()
    for _ in range(100):
        low = shares <= least
        shares = torch.where(low, least, growth * (1 - least * low.sum()) / growth[~low].sum())
    return torch.nn.functional.pad(shares.cumsum(0), (1, 0))


def test_the_schedule_of_a_gaussian_field_is_recovered_within_two_hundredths():
    """By Adam at a network's learning rate, from the errors of noisy fields and not from their mean."""
    diffusion, generator = Thermodynamic("learned"), torch.Generator().manual_seed(0)
    eigenvalues = PRIOR.eigenvalues
    truth = known_times(eigenvalues, diffusion.learned)
    far = (diffusion.learned.nodes()[0] - truth).abs().max()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3)
    for _ in range(1500):
        s = diffusion.level(diffusion.sample_times(64, generator))
        noise = torch.randn(64, len(eigenvalues), dtype=torch.float64, generator=generator)
        square = (noise.square() * eigenvalues * s[:, None] ** 2 / (eigenvalues + s[:, None] ** 2)).mean(1)
        optimizer.zero_grad()
        diffusion.schedule_loss(s, square).mean().backward()
        optimizer.step()
    assert far > 0.2
    assert (diffusion.learned.nodes()[0] - truth).abs().max() < 0.02


def loss_of(diffusion, x0):
    denoiser = Denoiser(IdealNetwork(diffusion), diffusion, NORMALIZER)
    generator = torch.Generator().manual_seed(1)
    t = diffusion.sample_times(len(x0), generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    observation = Observation.none(len(x0), DOMAIN, torch.float64)
    return denoising_loss(denoiser, x0, observation.valid, observation, t, noise, training=True), denoiser, t, noise


def test_the_denoising_loss_trains_the_schedule_and_its_value_does_not_change():
    diffusion = uneven()
    x0 = torch.ones(6, *PRIOR.shape, dtype=torch.float64)
    loss, denoiser, t, noise = loss_of(diffusion, x0)
    loss.mean().backward()
    s = diffusion.level(t)
    square = (PRIOR.denoise(x0 + s.view(-1, 1, 1, 1) * noise, s) - x0).square().mean((1, 2, 3))
    share = diffusion.learned.shares()
    expected = copy.deepcopy(diffusion)
    part = expected.learned.part(s)
    entropy = -(square / s**2 / share.detach()[part] * expected.learned.shares()[part].log()).mean()
    (entropy * Learned.SHARE * expected.learned.width).backward()
    torch.testing.assert_close(
        diffusion.learned.increments.grad, expected.learned.increments.grad, rtol=1e-4, atol=1e-9
    )
    assert torch.equal(loss.detach(), (denoiser.weight(s, s) * square).detach()) or torch.allclose(
        loss.detach(), (diffusion.weight(t) * square).detach(), rtol=1e-9
    )


def test_no_level_goes_untrained():
    diffusion = Thermodynamic("learned")
    with torch.no_grad():
        diffusion.learned.increments.copy_(torch.linspace(0, -40, Learned.BINS))
    shares = diffusion.learned.shares()
    assert shares.min() >= Learned.EVEN / Learned.BINS * (1 - 1e-12) and shares.sum().item() == pytest.approx(1)
    assert diffusion.level(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(80.0)
    assert math.isclose(diffusion.levels(8)[0].item(), 80.0, rel_tol=1e-9)


def test_a_configuration_of_before_it_moved_still_names_it():
    node = {"_target_": "vecfield_diffusion.diffusion.thermodynamic.Thermodynamic", "schedule": "cosine"}
    assert isinstance(build(node, "diffusion"), Thermodynamic)
