"""Denoiser, observation, normalizer, loss: what goes into the network and what comes out."""

import pytest
import torch
from oracle import GaussianPrior

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation

PRIOR = GaussianPrior()
NORMALIZER = Normalizer(torch.zeros(2, 1, 1), 1.0)


class IdealNetwork(torch.nn.Module):
    """The network whose preconditioned output is the exact denoiser of the prior, for any formulation."""

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion

    def forward(self, channels, c_noise):
        t = c_noise if isinstance(self.diffusion, DDPM) else (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = (c.view(-1, 1, 1, 1) for c in self.diffusion.preconditioning(t))
        x_t = channels[:, :2] / c_in
        z = x_t / self.diffusion.alpha(t).view(-1, 1, 1, 1)
        return (PRIOR.denoise(z, self.diffusion.level(t)) - c_skip * x_t) / c_out


def some_observation(n, generator, land=False):
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[0, :3] = not land
    observed = (torch.rand(n, 1, 6, 8, generator=generator) < 0.3) & valid
    y = torch.randn(n, 2, 6, 8, dtype=torch.float64, generator=generator)
    return Observation(y, observed, torch.full((n, 1, 1, 1), 0.05, dtype=torch.float64), valid.expand(n, 1, 6, 8))


@pytest.mark.parametrize("diffusion", [EDM(sigma_max=200.0), DDPM()])
def test_every_formulation_gives_the_same_posterior_mean(diffusion):
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(IdealNetwork(diffusion), diffusion, NORMALIZER)
    s = torch.tensor([0.02, 0.5, 3.0, 150.0], dtype=torch.float64)
    z = torch.randn(4, 2, 6, 8, dtype=torch.float64, generator=generator) * (1 + s).view(-1, 1, 1, 1)
    got = denoiser(z, s, some_observation(4, generator))
    torch.testing.assert_close(got, PRIOR.denoise(z, s), rtol=1e-8, atol=1e-8)


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
