"""The terms of the training loss, against closed forms on Gaussian fields, and from the command line."""

from __future__ import annotations

import math

import pytest
import torch
from ideal import NORMALIZER, PRIOR, IdealNetwork
from programs import SMALL, TINY, Call, is_message

from vecfield_diffusion.commands import train
from vecfield_diffusion.config.build import build
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM, VP
from vecfield_diffusion.diffusion.losses import (
    Evaluated,
    Loss,
    Objective,
    consistency,
    denoising_loss,
    exact,
    level_rate,
    sliced,
)
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models.unet import UNet


def seen(x0, s, z, x_hat, denoiser=None, measured=None):
    """A batch as the terms see it, nothing observed."""
    observation = Observation.none(len(z), torch.ones(z.shape[-2:], dtype=torch.bool), dtype=z.dtype)
    measured = observation.valid if measured is None else measured
    return Evaluated(denoiser, x0, measured, observation, s, z, x_hat, torch.ones_like(s))


def corners(variance, s):
    """Fields and noise `(4, 2, 1, 2)` whose second moments are exactly those of independent values."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    shape = variance.view(1, 2, 1, 2)
    return signs[:, 0].view(-1, 1, 1, 1) * shape.sqrt(), s * signs[:, 1].view(-1, 1, 1, 1) * torch.ones_like(shape)


def test_sliced_score_matching_has_the_mean_and_the_gradient_of_the_denoising_loss():
    """For a gain of every value, wrong ones included: (g - 1)^2 l + g^2 s^2, and its derivative by g."""
    variance = torch.tensor([0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    s = 0.7
    x0, noise = corners(variance, s)
    gain = torch.tensor([0.1, 0.9, 0.5, 1.3], dtype=torch.float64).view(1, 2, 1, 2).requires_grad_()
    z = (x0 + noise).requires_grad_()
    levels = torch.full((4,), s, dtype=torch.float64)
    loss = sliced(seen(x0, levels, z, gain * z)).mean()
    g, lam = gain.detach().flatten(), variance
    torch.testing.assert_close(loss, (((g - 1) ** 2 * lam + g**2 * s**2).mean()))
    (gradient,) = torch.autograd.grad(loss, gain)
    torch.testing.assert_close(gradient.flatten(), (2 * (g - 1) * lam + 2 * g * s**2) / 4)


def test_the_signs_of_sliced_score_matching_see_the_whole_jacobian(monkeypatch):
    """The mean over all signs is the trace, one draw has what lies beside the diagonal; unmeasured values have none."""
    matrix = torch.tensor([[0.5, 0.3, 0.1], [0.7, 0.2, 0.4], [0.9, 0.6, 0.8]], dtype=torch.float64)
    measured = torch.tensor([True, False]).view(1, 1, 1, 2)
    found = []
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4):
        z = torch.zeros(1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
        known = z[:, :, 0, 0]  # one cell is measured, both of its components
        x_hat = torch.stack([known @ matrix[:2, :2].T, 0 * known], dim=2).view(1, 2, 1, 2)
        monkeypatch.setattr(torch, "randn_like", lambda z, signs=signs: signs.view_as(z))
        found.append(sliced(seen(z.detach(), torch.ones(1, dtype=torch.float64), z, x_hat, measured=measured)).item())
    exact_mean = (2 * (0.5 + 0.2) - 2) / 2  # (2 s^2 tr J - s^2 d) / d with d = 2
    assert sum(found) / 16 == pytest.approx(exact_mean, abs=1e-12)
    assert {round(value, 9) for value in found} == {round(exact_mean + sign * (0.3 + 0.7), 9) for sign in (-1, 1)}


@pytest.mark.parametrize("formulation", [EDM(sigma_max=200.0), VP(inputs="unit")], ids=["edm", "vp"])
def test_the_exact_term_is_zero_at_the_posterior_mean_alone(formulation):
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(6, PRIOR.size, dtype=torch.float64, generator=generator)
    x0 = (white * PRIOR.eigenvalues.sqrt() @ PRIOR.vectors.T).view(6, *PRIOR.shape)
    valid = torch.ones(6, 8, dtype=torch.bool)
    given = (x0, valid.expand(6, 1, 6, 8), Observation.none(6, valid, dtype=torch.float64))
    t = formulation.sample_times(6, generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    objective = Objective(0.0, [(2.0, exact(lambda z, s, observation: PRIOR.denoise(z, s)))])
    denoiser = Denoiser(IdealNetwork(formulation), formulation, NORMALIZER)
    assert denoising_loss(denoiser, *given, t, noise, objective=objective).abs().max() < 1e-9
    # Off by a tenth of the output everywhere: twice the formulation's weight times the square of that.
    off = Denoiser(Off(denoiser.network), formulation, NORMALIZER)
    loss = denoising_loss(off, *given, t, noise, objective=objective)
    out = off.estimate(x0, formulation.level(t), given[2]).out
    torch.testing.assert_close(loss, 2 * off.weight(formulation.level(t), out) * (0.1 * out).square())


class Off(torch.nn.Module):
    """A network and a tenth."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, noise):
        return self.network(x, noise) + 0.1


class Quadratic:
    """The energy of two values of variance `variance + s^2`, normalised up to `drift ln s`."""

    has_energy = True

    def __init__(self, variance, drift):
        self.variance, self.drift = variance, drift

    def energy(self, z, s, observation):
        total = self.variance + s**2
        square = z.square().flatten(1).sum(1)
        return square / (2 * total) + torch.log(2 * math.pi * total) + self.drift * s.log()


@pytest.mark.parametrize("drift", [0.0, 0.6])
def test_consistency_is_the_square_of_the_derivative_of_the_free_energy(drift):
    """dU/d ln s has the mean 0 where U = -ln p, and `drift` where ln Z runs away with ln s."""
    variance, s = 2.0, 0.7
    model = Quadratic(variance, drift)
    x0, noise = corners(torch.full((4,), variance / 2, dtype=torch.float64), s)
    x0, noise = x0[:, :, :, :1] * 2**0.5, noise[:, :, :, :1]
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    order = torch.cat([pairs[:, 0], pairs[:, 1]])
    x0, noise = x0[order], noise[order]
    levels = torch.full((32,), s, dtype=torch.float64)
    levels[16:] = 3.0  # brought to the levels of the first half
    z = x0 + torch.cat([noise[:16], noise[16:] * 3.0 / s])
    given = seen(x0, levels, z, z, model)
    # The second moments are exact, and the energy is quadratic: so is the mean, but for the square of the step.
    got = consistency(given).mean().item()
    assert got == pytest.approx((drift / 2) ** 2, abs=2e-4)
    odd = Evaluated(model, *(value[:31] for value in given[1:]))
    assert consistency(odd)[-1] == 0
    assert len(consistency(odd)) == 31


def test_the_rate_of_an_energy_is_its_derivative_by_the_level():
    z = torch.tensor([[0.3, -2.0], [4.0, 1.0]], dtype=torch.float64).view(2, 2, 1, 1)
    s = torch.tensor([0.5, 2.0], dtype=torch.float64)
    total = 1.5 + s**2
    square = z.square().flatten(1).sum(1)
    exact_rate = s**2 * (2 / total - square / total**2) + 0.25
    torch.testing.assert_close(level_rate(Quadratic(1.5, 0.25), z, s, None), exact_rate, rtol=1e-3, atol=1e-3)


def test_a_network_with_attention_learns_from_second_derivatives():
    torch.manual_seed(0)
    network = UNet(7, channels=[8, 8], blocks=1, attention=[-1], embedding=16)
    torch.nn.init.normal_(network.head[-1].weight, std=0.1)
    denoiser = Denoiser(network, EDM(), NORMALIZER, autocast=torch.bfloat16)
    valid, generator = torch.ones(8, 8, dtype=torch.bool), torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 2, 8, 8, generator=generator)
    t = torch.tensor([0.1, 0.5, 1.0, 5.0], dtype=torch.float64)
    given = (denoiser, x0, valid.expand(4, 1, 8, 8), Observation.none(4, valid), t, noise)
    objective = Objective(0.0, [(1.0, sliced)], differentiates=True)
    loss = denoising_loss(*given, training=True, objective=objective)
    loss.mean().backward()
    size = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    assert loss.isfinite().all() and size.isfinite() and size > 0
    plain = denoising_loss(*given, training=True)
    torch.testing.assert_close(denoising_loss(*given, training=True, objective=Objective(2.0)), 2 * plain)


def test_the_configuration_asks_for_the_denoising_loss_alone():
    assert build(train.config()["loss"], "loss", trusted=True) == Loss()
    assert Loss().weights == {
        "denoising": 1.0,
        "sliced": 0.0,
        "exact": 0.0,
        "dual": 0.0,
        "consistency": 0.0,
        "budget": 0.0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sliced": -1.0}, "sliced must be >= 0"),
        ({"viscosity": -1.0}, "viscosity must be >= 0"),
        ({"order": 0}, "order must be >= 1"),
        ({"denoising": 0.0}, "denoising must be > 0 where no other term has a weight"),
        ({"budget": math.inf}, "budget must be >= 0"),
    ],
)
def test_weights_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Loss(**given)


SEQUENCES = ["dataset.frames=2", "dataset.trajectory=4"]


@pytest.mark.parametrize(
    "options",
    [
        ["loss.sliced=1", "loss.denoising=.5"],
        ["dataset.twin=true", "loss.exact=1"],
        [*SEQUENCES, "loss.budget=.1"],
        ["model=energy", "loss.dual=.1", "loss.consistency=.1"],
    ],
    ids=["sliced", "exact", "budget", "energy"],
)
def test_every_term_trains_and_validation_stays_the_denoising_loss(run: Call, options, request):
    name = f"name=loss_{request.node.callspec.id}"
    code, out, err = run("train", *TINY, *SMALL, "trainer.max_steps=2", *options, name)
    assert code == 0, err
    assert "val/loss" in out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["loss.exact=1"], ["loss.exact takes fields whose score is known", "dataset.twin=true"]),
        (["loss.budget=1"], ["loss.budget takes sequences of whole periodic fields", "dataset.frames=5"]),
        (["loss.consistency=1"], ["loss.consistency", "model=energy"]),
        (["loss.dual=1"], ["loss.dual", "model=energy"]),
        (["loss.sliced=-1"], ["loss.sliced", "must be >= 0"]),
        (["loss.sliced=1", "diffusion=regression"], ["loss.sliced", "diffusion=regression"]),
        (["loss.sliced=1", "model=energy"], ["loss.sliced", "that of an energy is a derivative", "model=unet_small"]),
        (["loss.slice=1"], ["unknown key loss.slice", "sliced"]),
        ([*SEQUENCES, "dataset.twin=true", "loss.budget=1"], ["nothing is known of the viscosity", "loss.viscosity="]),
    ],
)
def test_what_a_term_cannot_be_given_is_one_line(run: Call, options, parts):
    is_message(run("train", *TINY, *SMALL, *options, "name=refused"), *parts)
