"""Denoiser, observation, normalizer, loss: what goes into the network and what comes out."""

import math

import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER, PRIOR, IdealNetwork

from vecfield_diffusion.diffusion.base import HEADS
from vecfield_diffusion.diffusion.denoiser import Denoiser, column
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, OU, VE, VP, Interpolant
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill


def some_observation(n, generator, land=False):
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[0, :3] = not land
    observed = (torch.rand(n, 1, 6, 8, generator=generator) < 0.3) & valid
    y = torch.randn(n, 2, 6, 8, dtype=torch.float64, generator=generator)
    return Observation(y, observed, torch.full((n, 1, 1, 1), 0.05, dtype=torch.float64), valid.expand(n, 1, 6, 8))


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_every_formulation_gives_the_same_posterior_mean(name, prediction):
    diffusion = FORMULATIONS[name](prediction=prediction)
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(IdealNetwork(diffusion), diffusion, NORMALIZER)
    s = torch.tensor([0.02, 0.5, 3.0, 0.99 * diffusion.sigma_max], dtype=torch.float64)
    z = torch.randn(4, 2, 6, 8, dtype=torch.float64, generator=generator) * (1 + s).view(-1, 1, 1, 1)
    got = denoiser(z, s, some_observation(4, generator))
    torch.testing.assert_close(got, PRIOR.denoise(z, s), rtol=1e-8, atol=1e-8)


#: From c_noise as published back to the level.
LABELS = {
    "vp": (VP, lambda diffusion, c: diffusion.level(c / 999)),
    "ou": (OU, lambda diffusion, c: diffusion.level(c / 999)),
    "ddpm": (DDPM, lambda diffusion, c: diffusion.level(c)),
    "ve": (VE, lambda diffusion, c: 2 * c.exp()),
}


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", LABELS)
def test_published_inputs_reach_the_network_as_published(name, prediction):
    """A network that learns the level from the published label, and the state from the published c_in = 1."""
    make, level = LABELS[name]
    diffusion = make(prediction=prediction)

    class Network(torch.nn.Module):
        def forward(self, channels, c_noise):
            s = level(diffusion, c_noise)
            alpha = {"ve": torch.ones_like(s)}.get(name, (1 + s**2).rsqrt()).view(-1, 1, 1, 1)
            x0 = PRIOR.denoise(channels[:, :2] / alpha, s)
            eps = (channels[:, :2] - alpha * x0) / (alpha * s.view(-1, 1, 1, 1))
            level_of = column(s, channels)
            if name == "ve":
                v = eps
                edm = (x0 - channels[:, :2] / (1 + level_of**2)) / (level_of * (1 + level_of**2).rsqrt())
            else:
                v = edm = alpha * eps - alpha * level_of * x0
                edm = -edm
            return {"noise": eps, "score": -eps, "sample": x0, "velocity": v, "edm": edm}[prediction]

    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([0.03, 0.5, 3.0, 0.9 * diffusion.sigma_max], dtype=torch.float64)
    z = torch.randn(4, 2, 6, 8, dtype=torch.float64, generator=generator) * (1 + s).view(-1, 1, 1, 1)
    got = Denoiser(Network(), diffusion, NORMALIZER)(z, s, some_observation(4, generator))
    torch.testing.assert_close(got, PRIOR.denoise(z, s), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_single_precision_loses_nothing_at_the_ends_of_the_path(name):
    """The coefficients are those of float64, where 1 - t is a small difference."""
    diffusion = FORMULATIONS[name](prediction="velocity")
    network = torch.nn.Identity()
    network.forward = lambda channels, c_noise: channels[:, :2]
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([1.01 * diffusion.sigma_min, 0.97 * diffusion.sigma_max], dtype=torch.float32).double()
    z = torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator) * (1 + s).view(-1, 1, 1, 1)
    denoiser, given = Denoiser(network, diffusion, NORMALIZER), some_observation(2, generator)
    exact, single = denoiser(z, s, given), denoiser(z.float(), s.float(), given.apply(as_single))
    assert single.dtype == torch.float32
    # D is the small difference of two terms of the size of z.
    assert ((single - exact).abs().amax(dim=(1, 2, 3)) < 2e-6 * z.abs().amax(dim=(1, 2, 3))).all()


def test_a_level_of_more_digits_leaves_the_type_of_the_field():
    diffusion = EDM()
    network = torch.nn.Conv2d(7, 2, 1)
    denoiser = Denoiser(
        type("F", (torch.nn.Module,), {"forward": lambda self, x, c: network(x)})(), diffusion, NORMALIZER
    )
    given = some_observation(2, torch.Generator().manual_seed(0)).apply(as_single)
    s = torch.tensor([0.5, 2.0], dtype=torch.float64)
    z = torch.ones(2, 2, 6, 8)
    assert torch.equal(denoiser(z, s, given), denoiser(z, s.float(), given))


def as_single(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def test_noise_scales_the_state_and_not_the_observation():
    """At s = 150 the conditioning channels are what they are at s = 0.02."""
    seen = []

    def network(channels, c_noise):
        seen.append(channels)
        return torch.zeros_like(channels[:, :2])

    generator = torch.Generator().manual_seed(0)
    diffusion = EDM(sigma_max=200.0)
    denoiser = Denoiser(torch.nn.Module(), diffusion, NORMALIZER)
    denoiser.network = type("F", (torch.nn.Module,), {"forward": staticmethod(network)})()
    given = some_observation(2, generator)
    z = torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator)
    s = torch.tensor([0.02, 150.0], dtype=torch.float64)
    denoiser(z, s, given)
    torch.testing.assert_close(seen[0][:, :2], z / (1 + s**2).sqrt().view(-1, 1, 1, 1))
    torch.testing.assert_close(seen[0][:, 2:], given.channels())
    assert given.channels().shape[1] == Observation.CHANNELS


def test_values_that_were_not_observed_change_nothing():
    given = some_observation(3, torch.Generator().manual_seed(0))
    broken = Observation(
        torch.where(given.observed, given.y, torch.nan),
        given.observed,
        torch.where(given.observed, given.sigma_y, torch.nan),
        given.valid,
    )
    torch.testing.assert_close(broken.channels(), given.channels(), rtol=0, atol=0)


def test_land_changes_nothing():
    """Whatever the state holds outside the domain, NaN too, cells inside come out the same, and land as 0."""
    generator = torch.Generator().manual_seed(0)
    diffusion = EDM()
    denoiser = Denoiser(IdealNetwork(diffusion), diffusion, NORMALIZER)
    given = some_observation(2, generator, land=True)
    z = torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator)
    s = torch.tensor([0.1, 3.0], dtype=torch.float64)
    base = denoiser(z, s, given)
    for value in (torch.nan, 1e3):
        torch.testing.assert_close(denoiser(torch.where(given.valid, z, value), s, given), base, rtol=0, atol=0)
    assert base[~given.valid.expand_as(base)].abs().max() == 0


def test_what_is_forgotten_is_as_if_never_observed():
    given = some_observation(2, torch.Generator().manual_seed(0), land=True)
    silent = given.forget(torch.tensor([True, False])).channels()
    nothing = Observation.none(2, given.valid[0, 0], torch.float64).channels()
    torch.testing.assert_close(silent[0], nothing[0])
    torch.testing.assert_close(silent[1], given.channels()[1])
    assert nothing[:, [0, 1, 2, 4]].abs().max() == 0 and nothing[:, 3].sum() == 2 * 45


def test_loss_is_the_weighted_mean_over_measured_cells():
    generator = torch.Generator().manual_seed(0)
    diffusion = EDM()
    denoiser = Denoiser(IdealNetwork(diffusion), diffusion, NORMALIZER)
    x0, noise = (torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    measured = torch.rand(2, 1, 6, 8, generator=generator) < 0.7
    t = torch.tensor([0.3, 2.0], dtype=torch.float64)
    given = some_observation(2, generator)
    got = denoising_loss(denoiser, torch.where(measured, x0, torch.nan), measured, given, t, noise)
    clean = torch.where(measured, x0, 0.0)
    x_hat = PRIOR.denoise(clean + t.view(-1, 1, 1, 1) * noise, t)
    for i, s in enumerate(t.tolist()):
        cells = measured[i].expand(2, 6, 8)
        expected = (s**2 + 1) / s**2 * (x_hat - clean)[i][cells].square().mean()
        assert got[i].item() == pytest.approx(expected.item(), rel=1e-8)


def test_training_adds_the_variational_bound_of_a_learned_variance():
    """KL of two normals written out, through the published posterior: its mean and the two variances."""
    generator = torch.Generator().manual_seed(0)
    diffusion = IDDPM(learned_variance=True, vlb_weight=0.01)
    x0, noise = (torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    raw = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=generator)
    network = torch.nn.Identity()
    network.forward = lambda channels, c_noise: raw
    denoiser = Denoiser(network, diffusion, NORMALIZER)
    measured = torch.rand(2, 1, 6, 8, generator=generator) < 0.7
    t = diffusion.rising[[3, 600]]
    r = diffusion.rising[[2, 599]]
    given = (x0, measured, some_observation(2, generator), t, noise)
    extra = denoising_loss(denoiser, *given, training=True) - denoising_loss(denoiser, *given)
    for i in range(2):
        s2, r2, cells = t[i] ** 2, r[i] ** 2, measured[i].expand(2, 6, 8)
        z = x0[i] + t[i] * noise[i]
        x_hat = z - t[i] * raw[i, :2]
        q = torch.distributions.Normal(x0[i] + r2 / s2 * (z - x0[i]), (r2 * (1 - r2 / s2)).sqrt())
        v = torch.sigmoid(raw[i, 2:])
        large = (1 + r2) * (s2 - r2) / (1 + s2)
        variance = large**v * (r2 * (1 - r2 / s2)) ** (1 - v)
        p = torch.distributions.Normal(x_hat + r2 / s2 * (z - x_hat), variance.sqrt())
        expected = 0.01 * 1000 * torch.distributions.kl_divergence(q, p)[cells].mean()
        assert extra[i].item() == pytest.approx(expected.item(), rel=1e-8)


def test_the_mean_does_not_learn_from_the_variational_bound():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    gradients = []
    for weight in (0.0, 10.0):
        network = torch.nn.Identity()
        network.forward = lambda channels, c_noise: raw
        diffusion = IDDPM(learned_variance=True, vlb_weight=weight)
        x0 = torch.zeros(2, 2, 6, 8, dtype=torch.float64)
        given = (x0, x0[:, :1] == 0, some_observation(2, generator), diffusion.rising[[3, 600]], x0 + 1)
        loss = denoising_loss(Denoiser(network, diffusion, NORMALIZER), *given, training=True).sum()
        gradients.append(torch.autograd.grad(loss, raw)[0])
    torch.testing.assert_close(gradients[1][:, :2], gradients[0][:, :2], rtol=0, atol=0)
    assert gradients[0][:, 2:].abs().max() == 0 and gradients[1][:, 2:].abs().min() > 0


def test_learned_uncertainty_is_least_at_the_logarithm_of_the_loss():
    """loss / e^u + u at u(s) = 0 is the loss; its gradient in u is 1 - loss, and vanishes at u = ln loss."""
    generator = torch.Generator().manual_seed(0)
    diffusion = EDM(uncertainty=True).double()
    denoiser = Denoiser(IdealNetwork(EDM()), diffusion, NORMALIZER)
    x0, noise = (torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    given = (x0, x0[:, :1] < 1e9, some_observation(2, generator), torch.tensor([0.3, 2.0]).double(), noise)
    plain = denoising_loss(denoiser, *given)
    torch.testing.assert_close(denoising_loss(denoiser, *given, training=True), plain)
    torch.nn.init.normal_(diffusion.uncertainty.out.weight, generator=generator)
    u = diffusion.uncertainty(torch.tensor([0.3, 2.0]).double().log() / 4)
    torch.testing.assert_close(denoising_loss(denoiser, *given, training=True), plain / u.exp() + u)
    assert (u[0] - u[1]).abs() > 1e-3
    torch.nn.init.zeros_(diffusion.uncertainty.out.weight)
    bias = diffusion.uncertainty.out.bias
    for u in (0.0, plain[0].log().item()):
        bias.data.fill_(u)
        loss = denoising_loss(denoiser, *given, training=True)[0]
        assert loss.item() == pytest.approx(plain[0].item() / math.exp(u) + u)
        (gradient,) = torch.autograd.grad(loss, bias)
        assert gradient.item() == pytest.approx(1 - plain[0].item() / math.exp(u), abs=1e-9)


def test_the_network_sees_the_background_and_it_is_forgotten_with_the_rest():
    """The interpolant: harmonic between the observed cells, beside the other channels; 0 where nothing is observed."""
    interpolant, grid = Interpolant(), Grid(torch.ones(6, 8, dtype=torch.bool), 1.0, 1.0, "periodic", "open")
    y = torch.arange(6.0, dtype=torch.float64).view(1, 1, 6, 1).expand(2, 2, 6, 8).contiguous()
    observed = torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    observed[:, :, [0, 5]] = True
    valid = torch.ones_like(observed)
    given = Observation(y.where(observed, torch.nan), observed, torch.zeros(2, 1, 1, 1).double(), valid)
    told = interpolant.with_background(given, grid)
    torch.testing.assert_close(told.background, y, rtol=1e-5, atol=1e-5)  # a straight line is harmonic
    torch.testing.assert_close(told.channels()[:, 5:], told.background)
    silent = told.forget(torch.tensor([True, False]))
    assert silent.background[0].abs().max() == 0 and (silent.background[1] == told.background[1]).all()
    assert len(told[:1].background) == 1 and EDM().with_background(given, grid) is given


def test_the_background_knows_spacing_and_boundaries():
    """Against the fill itself, where rows are far apart and one axis is periodic."""
    generator = torch.Generator().manual_seed(4)
    given = some_observation(3, generator, land=True)
    for axes in (("periodic", "open"), ("open", "periodic")):
        grid = Grid(given.valid[0, 0], 1.0, torch.linspace(2, 4, 6), *axes)
        expected = harmonic_fill(given.y, given.observed, given.valid, grid.periodic, dx=grid.dx, dy=grid.dy)
        torch.testing.assert_close(Interpolant().with_background(given, grid).background, expected, rtol=0, atol=0)


def test_loss_of_a_snapshot_without_measurements_is_zero():
    denoiser = Denoiser(IdealNetwork(EDM()), EDM(), NORMALIZER)
    x0 = torch.full((1, 2, 6, 8), torch.nan, dtype=torch.float64)
    given = some_observation(1, torch.Generator().manual_seed(0))
    measured = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    loss = denoising_loss(
        denoiser, x0, measured, given, torch.ones(1, dtype=torch.float64), torch.zeros_like(x0).nan_to_num()
    )
    assert loss.item() == 0


def test_normalizer_round_trip_and_one_scale_for_both_components():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 6, 8, generator=generator)
    normalizer = Normalizer(mean, 0.37)
    velocity = torch.randn(3, 2, 6, 8, generator=generator)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(velocity)), velocity)
    torch.testing.assert_close(normalizer.normalize(mean + 0.37)[None], torch.ones(1, 2, 6, 8), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="positive and finite"):
        Normalizer(mean, 0.0)
