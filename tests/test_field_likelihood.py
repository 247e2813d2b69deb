"""The likelihood of fields under a trained denoiser, against the closed form of the flow of independent cells."""

import math

import pytest
import torch
from ideal import FORMULATIONS, IdealNetwork

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.inference.likelihood import nats_per_value
from vecfield_diffusion.physics.grid import Grid

SHAPE = (2, 3, 4)


def drawn(seed):
    return torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VARIANCE, MEAN = 0.2 + 2 * drawn(0), drawn(1) - 0.5


def denoise(z, s):
    return MEAN + VARIANCE / (VARIANCE + s.view(-1, 1, 1, 1) ** 2) * (z - MEAN)


@pytest.mark.parametrize(("name", "mode"), [("edm", "hutchinson"), ("interpolant", "hutchinson"), ("edm", "exact")])
def test_fields_with_land_in_physical_units(name, mode):
    """z goes from x0 to m + g (x0 - m), g^2 = (v + s_max^2) / (v + s_min^2): ln p = ln N(z; start, s_max^2) + ln g.

    The Jacobian is diagonal, so that one probe is exact, too. The top is low, so that it matters where the interpolant
    starts.
    """
    diffusion = FORMULATIONS[name](sigma_max=4.0, sigma_min=0.1)
    normalizer = Normalizer(torch.full(SHAPE, 0.3), 2.0).double()
    denoiser = Denoiser(IdealNetwork(diffusion, denoise), diffusion, normalizer, autocast=torch.bfloat16)
    x = MEAN + torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(SHAPE[1:], dtype=torch.bool)
    valid[1, 2:4] = False
    grid = Grid(valid, 1.0, 2.0, "periodic", "open")
    known = valid.expand(3, 1, *SHAPE[1:]).clone()
    known[1, :, 2] = False  # unknown in one snapshot: outside of its domain
    observed = known & (torch.rand(3, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(3)) < 0.4)
    sigma = torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64)
    given = Observation(x.where(observed, torch.nan), observed, sigma, valid.expand(3, 1, *SHAPE[1:]))
    truth = normalizer.denormalize(x).where(known, torch.nan)
    levels = diffusion.levels(400, "log_snr")
    got = nats_per_value(denoiser, truth, given, grid, levels=levels, mode=mode, seed=0, numbers=[4, 5, 6], batch=2)

    low, high = diffusion.sigma_min, diffusion.sigma_max
    gain = ((VARIANCE + high**2) / (VARIANCE + low**2)).sqrt()
    top = MEAN + gain * (x - MEAN)
    told = diffusion.with_background(Observation(given.y, observed, sigma, known), grid)
    start = 0.0 if told.background is None else told.background
    nats = -((top - start) ** 2) / (2 * high**2) - math.log(high * math.sqrt(2 * math.pi)) + gain.log()
    expected = torch.stack([field[mask.expand(SHAPE)].mean() for field, mask in zip(nats, known, strict=True)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
