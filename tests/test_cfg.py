"""Guidance of the denoiser itself: what a scale means, and energies against the exact posterior."""

import pytest
import torch
from oracle import GaussianPrior

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.cfg import AutoGuidance, ClassifierFree, Energy, NoGuidance
from vecfield_diffusion.samplers.deterministic import DPMpp2M

PRIOR = GaussianPrior(4, 6)


class Told(torch.nn.Module):
    """A denoiser that answers differently where something is observed."""

    def __init__(self, factor=1.0, mean=0.0, std=1.0):
        super().__init__()
        self.factor, self.calls, self.autocast = factor, [], None
        self.normalizer = Normalizer(torch.full((2, 1, 1), mean), std).double()

    def in_float32(self):
        return self

    def forward(self, z, s, observation):
        self.calls.append(len(z))
        seen = torch.where(observation.observed, observation.y, 0.0).sum(dim=(1, 2, 3), keepdim=True)
        return self.factor * (PRIOR.denoise(z, s) + seen)


def example(n=3):
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(n, 2, 4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    observed = torch.rand(n, 1, 4, 6, generator=generator) < 0.4
    valid = torch.ones_like(observed)
    given = Observation(y, observed, torch.zeros(n, 1, 1, 1, dtype=torch.float64), valid)
    return z, torch.linspace(0.1, 3, n, dtype=torch.float64), given


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional_one():
    z, s, given = example()
    denoiser = Told()
    told, untold = denoiser(z, s, given), denoiser(z, s, given.nothing())
    assert ClassifierFree(1.0).wrap(denoiser) is denoiser and NoGuidance().wrap(denoiser) is denoiser
    torch.testing.assert_close(ClassifierFree(0.0).wrap(denoiser)(z, s, given), untold)
    for w in (0.3, 1.5, 4.0):
        torch.testing.assert_close(ClassifierFree(w).wrap(denoiser)(z, s, given), untold + w * (told - untold))


def test_both_estimates_come_from_one_call():
    z, s, given = example()
    denoiser = Told()
    ClassifierFree(2.0).wrap(denoiser)(z, s, given)
    assert denoiser.calls == [6]


def test_without_observation_there_is_nothing_to_stress():
    z, s, given = example()
    denoiser = Told()
    torch.testing.assert_close(ClassifierFree(3.0).wrap(denoiser)(z, s, given.nothing()), PRIOR.denoise(z, s))


def test_autoguidance_goes_away_from_the_weaker_network():
    z, s, given = example()
    strong, weak = Told(), Told(factor=0.5)
    guided = AutoGuidance("weak", 1.5)
    with pytest.raises(ValueError, match="ckpt of the weaker network"):
        guided.wrap(strong)
    guided = guided.loaded(weak)
    a, b = strong(z, s, given), weak(z, s, given)
    torch.testing.assert_close(guided.wrap(strong)(z, s, given), b + 1.5 * (a - b))
    for scale, expected in ((1.0, a), (0.0, b)):
        guided.scale = scale
        torch.testing.assert_close(guided.wrap(strong)(z, s, given), expected)


def test_a_weaker_network_in_other_units_is_translated():
    """The same network, its data shifted and scaled: as if it had the units of the strong one."""
    z, s, given = example()

    class Physical(Told):
        """The posterior mean in physical units is the same, whatever the normalizer."""

        def forward(self, z, s, observation):
            n = self.normalizer
            physical, level = n.denormalize(z), s * n.std
            told = torch.where(observation.observed, n.denormalize(observation.y), 0.0)
            return n.normalize(PRIOR.denoise(physical, level) + told)

    strong, weak = Physical(mean=0.2, std=2.0), Physical(mean=-0.1, std=0.5)
    guided = AutoGuidance("weak", 3.0).loaded(weak)
    torch.testing.assert_close(guided.wrap(strong)(z, s, given), strong(z, s, given), rtol=1e-5, atol=1e-6)


class Gaussian:
    """-ln p of `y = x[cells] + sigma eps`, up to a constant."""

    def __init__(self, cells, y, sigma):
        self.cells, self.y, self.sigma = cells, y, sigma

    def __call__(self, velocity):
        return ((velocity.flatten(1)[:, self.cells] - self.y) ** 2).sum(dim=1) / (2 * self.sigma**2)


class Ideal(torch.nn.Module):
    """A network for EDM whose denoiser is the prior."""

    def forward(self, channels, c_noise):
        s = (4 * c_noise).exp()
        c_in, _, c_out, c_skip = (c.view(-1, 1, 1, 1) for c in EDM().preconditioning(s))
        z = channels[:, :2] / c_in
        return (PRIOR.denoise(z, s) - c_skip * z) / c_out


def test_an_energy_goes_through_the_network_and_physical_units():
    """Its step is w s^2 times the gradient by z of E(mean + std D(z)), by central differences."""
    z, s, given = example(1)
    denoiser = Denoiser(Ideal(), EDM(), Normalizer(torch.full((2, 1, 1), 0.3), 2.0).double())
    energy = Gaussian(torch.tensor([0, 7, 20]), torch.tensor([1.0, -1.0, 0.5]).double(), 0.7)
    step = denoiser(z, s, given) - Energy(energy, 0.5).wrap(denoiser)(z, s, given)
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def at(h):
        return energy(denoiser.normalizer.denormalize(denoiser(z + h * direction, s, given)))

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert (step * direction).sum().item() == pytest.approx(0.5 * s.item() ** 2 * slope.item(), rel=1e-6)


def test_an_energy_that_is_weak_moves_samples_to_its_posterior():
    """With an error much larger than the spread of x0 given z, Tweedie's estimate is enough: the mean is exact."""
    denoiser = Denoiser(Ideal(), EDM(sigma_max=200.0), Normalizer(torch.zeros(2, 1, 1), 1.0))
    cells = torch.arange(0, 48, 5)
    y = torch.randn(len(cells), dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 6
    mean, _ = PRIOR.posterior(cells, y, 6.0)
    guided = Energy(Gaussian(cells, y, 6.0), 1.0, below=1e9).wrap(denoiser)
    given = Observation.none(1, torch.ones(4, 6, dtype=torch.bool), torch.float64)
    zero = torch.zeros(1, 2, 4, 6, dtype=torch.float64)
    x = DPMpp2M(64).sample(lambda z, s: guided(z, s, given), EDM(sigma_max=200.0).levels(64), lambda: zero)
    assert (x.flatten() - mean).norm() / mean.norm() < 0.1


def test_an_energy_can_be_differentiated_again():
    """As mmps does: the derivative of the guided estimate, by central differences."""
    z, s, given = example(1)
    denoiser = Denoiser(Ideal(), EDM(), Normalizer(torch.zeros(2, 1, 1), 1.0).double())
    guided = Energy(Gaussian(torch.tensor([0, 7]), torch.tensor([1.0, -1.0]).double(), 0.7)).wrap(denoiser)
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = z.requires_grad_()
    (gradient,) = torch.autograd.grad((guided(z, s, given) * weights).sum(), z)
    with torch.no_grad():
        slope = (guided(z + 1e-5 * direction, s, given) - guided(z - 1e-5 * direction, s, given)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx((slope * weights).sum().item(), rel=1e-6)


def test_an_energy_acts_below_its_threshold_alone():
    z, s, given = example(2)
    denoiser = Denoiser(Ideal(), EDM(), Normalizer(torch.zeros(2, 1, 1), 1.0))
    s = torch.tensor([2.0, 0.5], dtype=torch.float64)
    energy = Gaussian(torch.tensor([0]), torch.tensor([1.0]).double(), 1.0)
    plain, guided = denoiser(z, s, given), Energy(energy, below=1.0).wrap(denoiser)(z, s, given)
    torch.testing.assert_close(guided[0], plain[0], rtol=0, atol=0)
    assert (guided[1] - plain[1]).abs().max() > 0


@pytest.mark.parametrize("make", [lambda: ClassifierFree(-1.0), lambda: AutoGuidance("x", -0.1)])
def test_negative_scales_are_refused(make):
    with pytest.raises(ValueError, match="scale must be >= 0"):
        make()
