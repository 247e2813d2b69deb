"""The Gaussian law that proposals are made of: its draws and its denoiser are those of one covariance."""

import pytest
import torch

from vecfield_diffusion.models.eigenfields import Eigenfields
from vecfield_diffusion.models.gaussian import GaussianResidual
from vecfield_diffusion.models.product_modes import ProductModes
from vecfield_diffusion.models.reference import GaussianReference
from vecfield_diffusion.models.waves import Waves

SHAPE = (2, 3, 5)
SIZE = 30


def waves():
    """Fewer modes than there are: the rest is filtered alone."""
    ky, kx = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in SHAPE[1:])
    ky, kx = torch.meshgrid(ky, kx, indexing="ij")
    amplitude = (1 + ky**2 + kx**2) ** -1.5
    return Waves((amplitude * torch.stack([ky**2 + 0.3, -kx * ky, -kx * ky, kx**2 + 0.3])).view(2, 2, 3, 5), modes=10)


def eigenfields():
    generator = torch.Generator().manual_seed(0)
    modes = torch.linalg.qr(torch.randn(SIZE, 7, dtype=torch.float64, generator=generator))[0].T
    return Eigenfields(modes.reshape(7, *SHAPE), torch.logspace(1, -1, 7, dtype=torch.float64), nugget=0.05)


def observed():
    mask = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
    mask[..., 1, ::2] = True
    return mask


def reference(field, mask):
    one = torch.ones(1, *SHAPE, dtype=torch.float64)
    known = (torch.where(mask, 0.8 * one, 0.0), mask, torch.where(mask, 0.2 * one[:, :1], 0.0))
    return GaussianReference(field, *known, torch.ones_like(mask))


@pytest.mark.parametrize("mask", [observed(), torch.zeros_like(observed())], ids=["observed", "nothing"])
@pytest.mark.parametrize("make", [waves, eigenfields])
def test_draws_and_denoiser_belong_to_one_law(make, mask):
    """D(z, s) = m + C (C + s^2 I)^-1 (z - m) with the covariance C that the draws have, which are linear in noise."""
    law, s = reference(make(), mask), 0.6
    one = torch.eye(3 * SIZE, dtype=torch.float64).view(3 * SIZE, 3, *SHAPE)
    parts = iter(one.unbind(1))
    wide = GaussianReference(law.field, *(value.expand(3 * SIZE, *value.shape[1:]) for value in (
        law.y, law.observed, law.error, law.valid)))  # fmt: skip
    maps = wide.draw(lambda: next(parts)).flatten(1)
    covariance = maps.T @ maps
    basis = torch.eye(SIZE, dtype=torch.float64).view(SIZE, *SHAPE)
    wide = GaussianReference(law.field, *(value.expand(SIZE, *value.shape[1:]) for value in (
        law.y, law.observed, law.error, law.valid)))  # fmt: skip
    centre = wide.centre(basis)
    got = wide.denoise(centre + basis, s).flatten(1) - centre.flatten(1)
    gain = torch.linalg.solve(covariance + s**2 * torch.eye(SIZE, dtype=torch.float64), covariance)
    torch.testing.assert_close(got, gain.mT, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide.denoise(centre, s), centre, rtol=1e-5, atol=1e-6)
    assert (centre.abs().max() > 0.1) == bool(mask.any())


def test_a_checkpoint_offers_the_field_that_draws_and_no_other():
    network = GaussianResidual(7, channels=[8], blocks=1, attention=[], embedding=8)
    given = (torch.zeros(1, *SHAPE), observed(), torch.zeros(1, 1, *SHAPE[1:]), torch.ones_like(observed()))
    assert network.reference(*given) is None
    network.field = waves()
    assert isinstance(network.reference(*given), GaussianReference)
    assert not ProductModes.draws
