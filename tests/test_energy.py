"""Energies: a score that is their gradient, and the closed forms of Gaussian fields and of a mixture of two."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from ideal import FORMULATIONS, NORMALIZER, PRIOR, IdealNetwork
from programs import FEW, SMALL, TINY, Call, is_message

from vecfield_diffusion.axes import column
from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.diffusion.base import HEADS
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.dual import check_dual, dual_loss
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, Flow, Regression
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Bound
from vecfield_diffusion.guidance.posterior import Tangent, all_rows, prior
from vecfield_diffusion.inference.export import save_program
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.models.energy import DiTEnergy, Energy, UNetEnergy, inner, pool
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.filling import check_energy
from vecfield_diffusion.programs.thermodynamics import energies_of
from vecfield_diffusion.programs.trained import load_trained

SIZES = {"channels": [8, 16], "blocks": 1, "embedding": 16}
TRANSFORMER = {"width": 24, "depth": 1, "heads": 2, "patch": 2, "embedding": 16}
#: Networks by what they are called in messages, with the frames of their fields.
NETWORKS = {
    "inner": lambda **more: UNetEnergy(7, **SIZES, **more),
    "squares": lambda **more: UNetEnergy(7, form="squares", periodic=(True, False), **SIZES, **more),
    "multiscale": lambda **more: UNetEnergy(7, scales=3, **SIZES, **more),
    "transformer": lambda **more: DiTEnergy(7, form="squares", scales=2, **TRANSFORMER, **more),
}
SEQUENCES = {
    "channels": lambda: UNetEnergy(7, frames=3, **SIZES),
    "attention": lambda: UNetEnergy(7, frames=3, time="attention", **SIZES),
    "tokens": lambda: DiTEnergy(7, frames=3, time="attention", **TRANSFORMER),
}


def woken(network, seed=0):
    """The network with weights where it starts as zero."""
    torch.manual_seed(seed)
    for value in network.parameters():
        if value.abs().sum() == 0:
            torch.nn.init.normal_(value, std=0.1)
    return network.double().eval().requires_grad_(False)


def seen(n=2, shape=(5, 6), frames=1, seed=0):
    """Noisy fields, their levels, and an observation of half the cells of a domain with land."""
    generator, lead = torch.Generator().manual_seed(seed), (n,) if frames == 1 else (n, frames)
    y, z = (torch.randn(*lead, 2, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    draws = torch.rand(2, *lead, 1, *shape, generator=generator)
    valid = draws[0] < 0.8
    observation = Observation(y, (draws[1] < 0.5) & valid, column(torch.full((n,), 0.1, dtype=torch.float64), y), valid)
    return z, torch.linspace(0.3, 2.0, n, dtype=torch.float64), observation


def gradient(denoiser, z, s, observation):
    """The energy, and minus its gradient."""
    z = z.detach().requires_grad_()
    energy = denoiser.energy(z, s, observation)
    return energy.detach(), -torch.autograd.grad(energy.sum(), z)[0]


def check_score(denoiser, z, s, observation):
    """The score is minus the gradient of the energy, and the Jacobian of the denoiser is symmetric."""
    with torch.no_grad():
        x_hat = denoiser(z, s, observation)
    score = (x_hat - torch.where(observation.valid, z, 0.0)) / column(s, z) ** 2
    torch.testing.assert_close(gradient(denoiser, z, s, observation)[1], score, rtol=1e-9, atol=1e-9)
    one = observation[:1]
    jacobian = torch.autograd.functional.jacobian(lambda state: denoiser(state, s[:1], one), z[:1])
    jacobian = jacobian.view(z[0].numel(), -1)
    assert jacobian.abs().max() > 0.1
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12 * jacobian.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_score_is_minus_the_gradient_of_the_energy(name):
    check_score(Denoiser(woken(NETWORKS[name]()), EDM(sigma_max=80.0), NORMALIZER), *seen())


@pytest.mark.parametrize("name", SEQUENCES)
def test_also_of_sequences(name):
    denoiser = Denoiser(woken(SEQUENCES[name]()), EDM(sigma_max=80.0), NORMALIZER)
    check_score(denoiser, *seen(shape=(4, 4), frames=3))


def test_a_plain_network_is_no_gradient():
    torch.manual_seed(0)
    denoiser = Denoiser(woken(UNet(7, **SIZES)), EDM(sigma_max=80.0), NORMALIZER)
    with pytest.raises(AssertionError):
        denoiser.energy = lambda z, s, observation: inner(z, z)
        check_score(denoiser, *seen())


def test_the_integral_of_the_score_around_a_loop_is_nothing():
    """Around a triangle by Gauss-Legendre, against the differences of the energy along its sides."""
    denoiser = Denoiser(woken(NETWORKS["inner"]()), EDM(sigma_max=80.0), NORMALIZER)
    z, s, observation = seen(3)
    s, observation = s[:1], observation[:1]
    nodes = torch.tensor([-1, 0, 1], dtype=torch.float64) * math.sqrt(0.6) / 2 + 0.5
    weights = torch.tensor([5, 8, 5], dtype=torch.float64) / 18
    corners = [z[0] + 0.05 * torch.where(observation.valid[0], z[k], 0.0) for k in range(3)]
    sides = []
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        along = [(gradient(denoiser, (start + t * (end - start))[None], s, observation)[1]) for t in nodes]
        sides.append(sum(w * (score * (end - start)).sum() for w, score in zip(weights, along, strict=True)))
        first, last = (gradient(denoiser, corner[None], s, observation)[0] for corner in (start, end))
        torch.testing.assert_close(sides[-1][None], first - last, rtol=1e-5, atol=1e-6)
    assert abs(sum(sides)) < 1e-6 * sum(side.abs() for side in sides)


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_energy_of_a_gaussian_field(name, prediction):
    """For every formulation and prediction: F is half of the exact output, which is linear in the field."""

    class Half(IdealNetwork):
        def forward(self, channels, noise):
            return super().forward(channels, noise) / 2

    diffusion = FORMULATIONS[name](prediction=prediction)
    network = Energy([Half(diffusion)]).double()
    denoiser = Denoiser(network, diffusion, NORMALIZER)
    s = torch.tensor([0.05, 0.7, 4.0], dtype=torch.float64)
    z = torch.randn(3, *PRIOR.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * s.view(
        -1, 1, 1, 1
    )
    observation = Observation.none(3, torch.ones(PRIOR.shape[1:], dtype=torch.bool), torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(z, s, observation), PRIOR.denoise(z, s), rtol=1e-7, atol=1e-7)
        found = denoiser.energy(z, s, observation) - denoiser.energy(0 * z, s, observation)
    variances = PRIOR.eigenvalues + s[:, None] ** 2
    expected = ((z.flatten(1) @ PRIOR.vectors).square() / variances).sum(1) / 2
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


class Mixture(torch.nn.Module):
    """The network whose inner product with the field is the potential of a mixture of two normal laws.

    Both have the variance v of each value, one the mean m and the weight w, the other -m.
    """

    def __init__(self, diffusion, mean, variance=0.5, share=0.3):
        super().__init__()
        self.diffusion, self.mean, self.variance, self.share = diffusion, mean, variance, share

    def log_density(self, z, s):
        """ln p(z, s), `(B,)`."""
        spread = self.variance + s**2
        parts = [
            math.log(weight) - (z - sign * self.mean).square().flatten(1).sum(1) / (2 * spread)
            for weight, sign in ((self.share, 1), (1 - self.share, -1))
        ]
        return torch.logsumexp(torch.stack(parts), 0) - self.mean.numel() / 2 * torch.log(2 * math.pi * spread)

    def mean_of(self, z, s):
        """E[x0 | z]."""
        spread = column(self.variance + s**2, z)
        odds = math.log(self.share / (1 - self.share)) + 2 * (z * self.mean / spread).flatten(1).sum(1)
        mean = column(torch.tanh(odds / 2), z) * self.mean
        return mean + self.variance / spread * (z - mean)

    def forward(self, channels, noise):
        s, x = (4 * noise).exp(), channels[:, :2]
        c_in, _, c_out, c_skip = self.diffusion.preconditioning(self.diffusion.time(s))
        alpha = self.diffusion.alpha(self.diffusion.time(s))
        z = x / column(c_in * alpha, x)
        square = z.square().flatten(1).sum(1)
        level = self.mean.numel() / 2 * torch.log(2 * math.pi * (1 + s**2))
        wanted = square * (1 - c_skip * alpha) / 2 + s**2 * (self.log_density(z, s) + level)
        phi = c_in * alpha / c_out * wanted
        return x * column(phi / x.square().flatten(1).sum(1), x)


MEAN = torch.linspace(-0.5, 1.0, 24, dtype=torch.float64).view(2, 3, 4)


def mixture(diffusion):
    network = Mixture(diffusion, MEAN)
    return network, Denoiser(Energy([network]).double(), diffusion, NORMALIZER)


def mixed(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = torch.logspace(-1, 1, n, dtype=torch.float64)
    z = MEAN * torch.linspace(-1, 1, n, dtype=torch.float64).view(-1, 1, 1, 1)
    z = z + column(s, z) * torch.randn(n, *MEAN.shape, dtype=torch.float64, generator=generator)
    return z, s, Observation.none(n, torch.ones(MEAN.shape[1:], dtype=torch.bool), torch.float64)


@pytest.mark.parametrize("name", ["edm", "ddpm", "flow"])
def test_energy_score_and_slope_of_a_mixture(name):
    """U = -ln p, its gradients by the field and by the level, against the closed forms."""
    network, denoiser = mixture(FORMULATIONS[name]())
    z, s, observation = mixed()
    s = s.requires_grad_()
    energy, score = gradient(denoiser, z, s, observation)
    torch.testing.assert_close(energy, -network.log_density(z, s).detach(), rtol=1e-8, atol=1e-8)
    expected = (network.mean_of(z, s) - z) / column(s, z) ** 2
    torch.testing.assert_close(score, expected.detach(), rtol=1e-7, atol=1e-7)
    (slope,) = torch.autograd.grad(denoiser.energy(z, s, observation).sum(), s)
    (known,) = torch.autograd.grad(-network.log_density(z, s).sum(), s)
    torch.testing.assert_close(slope, known, rtol=1e-6, atol=1e-6)


def test_dual_score_matching_is_smallest_at_the_exact_energy():
    """White fields of unit variance, the law of a fresh network: given z, eps = m +- w with E |eps|^2 their mean.

    The residuals of the two are opposite, so that the gradient of their loss by the slope of the energy is nothing.
    """
    denoiser = Denoiser(UNetEnergy(7, **SIZES).double(), EDM(sigma_max=80.0), NORMALIZER)
    s = torch.full((2,), 0.7, dtype=torch.float64)
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    spread = 1 / (1 + s[0] ** 2).sqrt()
    mean, sign = s[0] / (1 + s[0] ** 2) * z, torch.tensor([1.0, -1.0]).double().view(2, 1, 1, 1)
    x0 = z - s[0] * (mean + sign * spread)
    observation = Observation.none(2, torch.ones(4, 4, dtype=torch.bool), torch.float64)
    loss = dual_loss(denoiser, x0, z, s, observation)
    expected = (2 * spread * mean[0].sum() / 32) ** 2
    torch.testing.assert_close(loss, expected.expand(2), rtol=1e-9, atol=1e-9)
    loss.mean().backward()
    constant = denoiser.network.constant
    assert constant.weight.grad.abs().max() < 1e-9
    torch.nn.init.normal_(constant.weight)
    assert dual_loss(denoiser, x0, z, s, observation).mean() > 1.5 * expected


def test_values_outside_the_domain_do_not_count():
    denoiser = Denoiser(woken(NETWORKS["multiscale"]()), EDM(sigma_max=80.0), NORMALIZER)
    z, s, observation = seen()
    wild = torch.where(observation.valid, z, math.nan)
    assert torch.equal(denoiser.energy(wild, s, observation), denoiser.energy(z, s, observation))
    none = Observation.none(1, torch.ones(5, 6, dtype=torch.bool), torch.float64)
    land = Observation.none(1, torch.arange(6).expand(5, 6) < 3, torch.float64)
    fresh = Denoiser(UNetEnergy(7, **SIZES).double(), EDM(sigma_max=80.0), NORMALIZER)
    white = [fresh.energy(torch.zeros(1, 2, 5, 6).double(), s[:1], given).item() for given in (none, land)]
    assert white[0] == pytest.approx(2 * white[1]) == pytest.approx(30 * math.log(2 * math.pi * (1 + 0.3**2)))


def test_squares_are_the_distance_from_the_output():
    network = woken(NETWORKS["squares"]())
    x, known = torch.randn(2, 9, 5, 6, dtype=torch.float64)[:, :7].split([2, 5], 1)
    noise = torch.zeros(2, dtype=torch.float64)
    output = network.networks[0](torch.cat([x, known], 1), noise)
    expected = (inner(x, x) - inner(x - output, x - output)) / 2
    torch.testing.assert_close(network.potential(x, known, noise)[0], expected)


def test_scales_add_up():
    """Each by the field averaged over its squares, times the number of cells of one."""
    network = woken(NETWORKS["multiscale"]())
    x, noise = torch.randn(1, 7, 8, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    expected = 0
    for k, part in enumerate(network.networks):
        coarse = x.unflatten(-1, (-1, 2**k)).unflatten(-3, (-1, 2**k)).mean((-1, -3))
        expected = expected + 4**k * inner(coarse[:, :2], part(coarse, noise))
    torch.testing.assert_close(network.potential(x[:, :2], x[:, 2:], noise)[0], expected)
    assert pool(torch.ones(2, 1, 5, 3), 2).shape == (2, 1, 3, 2) and pool(torch.ones(1, 1, 5, 3), 2).eq(1).all()


def test_a_learned_variance_is_passed_on():
    network = woken(NETWORKS["inner"](out_channels=4))
    diffusion = IDDPM(learned_variance=True)
    z, s, observation = seen()
    denoiser = Denoiser(network, diffusion, NORMALIZER)
    check_score(denoiser, z, s, observation)
    fraction = denoiser.moments(z, s, observation)[1]
    assert fraction.shape == z.shape and fraction.std() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_training_reaches_every_parameter_of_the_network(name):
    """In bf16 as in float64, with attention that has no derivative of its own."""
    network = woken(NETWORKS[name]()).requires_grad_(True).train()
    z, s, observation = seen()
    denoiser = Denoiser(network, EDM(sigma_max=80.0), NORMALIZER)
    t = denoiser.diffusion.time(s)
    loss = denoising_loss(denoiser, z, observation.valid, observation, t, torch.ones_like(z), training=True)
    loss.mean().backward()
    missed = {key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()}
    assert all(key.startswith(("constant", "embed")) for key in missed), missed
    low = Denoiser(network.float(), EDM(sigma_max=80.0), NORMALIZER, torch.bfloat16)
    given = observation.apply(lambda value: value.float() if value.is_floating_point() else value)
    single = denoising_loss(low, z.float(), given.valid, given, t, torch.ones_like(z).float(), training=True)
    torch.testing.assert_close(single.double(), loss.detach(), rtol=0.1, atol=0.05)
    single.mean().backward()


def test_derivatives_within_other_derivatives():
    """What is evaluated without gradients, with them, and anew within a checkpoint is the same."""
    denoiser = Denoiser(woken(NETWORKS["inner"]()), EDM(sigma_max=80.0), NORMALIZER)
    z, s, observation = seen(shape=(6, 6))
    with torch.no_grad():
        plain = denoiser(z, s, observation)
    torch.testing.assert_close(denoiser(z, s, observation).detach(), plain, rtol=1e-12, atol=1e-12)
    windowed = Windowed(denoiser, (4, 4), 0.5, batch=2)

    def pulled(function):
        state = z.clone().requires_grad_()
        return torch.autograd.grad(function(state, s, observation).square().sum(), state)[0]

    many = Windowed(denoiser, (4, 4), 0.5, batch=64)
    torch.testing.assert_close(pulled(windowed), pulled(many), rtol=1e-9, atol=1e-9)


def test_the_systems_of_mmps_are_symmetric():
    """p^T A V A^T q = q^T A V A^T p for any two directions; with a plain network of the same weights they are not."""
    plain, energy = woken(UNet(7, **SIZES)), woken(UNetEnergy(7, **SIZES))
    energy.networks[0].load_state_dict(plain.state_dict())
    z, s, observation = seen(4, shape=(8, 8))
    rows, generator = all_rows(observation, ()).whitened(), torch.Generator().manual_seed(1)
    twist = []
    for network in (plain, energy):
        tangent = Tangent(prior(Denoiser(network, EDM(sigma_max=80.0), NORMALIZER), observation), z, s, rows)
        p, q = torch.randn(2, *tangent.missing.shape, dtype=torch.float64, generator=generator)
        forth, back = ((a * tangent.forward(tangent.pull(b))).sum(1) for a, b in ((p, q), (q, p)))
        twist.append(((forth - back).abs() / forth.abs()).max().item())
    assert twist[0] > 1e-3 and twist[1] < 1e-9, twist


def test_what_has_no_energy_says_so():
    plain = Denoiser(UNet(7, **SIZES), EDM(sigma_max=80.0), NORMALIZER)
    z, s, observation = seen()
    with pytest.raises(UserError, match="model=energy"):
        plain.energy(z, s, observation)
    with pytest.raises(UserError, match=r"loss\.dual.*model=energy"):
        check_dual(plain)
    energy = Denoiser(UNetEnergy(7, **SIZES), EDM(sigma_max=80.0), NORMALIZER)
    assert energy.has_energy and not plain.has_energy and not Windowed(energy, (4, 4)).has_energy
    for refused in (IDDPM(),):
        with pytest.raises(UserError, match=r"diffusion\.inputs=unit"):
            check_dual(Denoiser(UNetEnergy(7, **SIZES), refused, NORMALIZER))
    for allowed in (EDM(sigma_max=80.0), Flow(), DDPM(inputs="unit"), IDDPM(inputs="unit")):
        check_dual(Denoiser(UNetEnergy(7, **SIZES), allowed, NORMALIZER))
    with pytest.raises(UserError, match="diffusion=regression"):
        Denoiser(UNetEnergy(7, **SIZES), Regression(), NORMALIZER)


@pytest.mark.parametrize(
    ("options", "match"), [({"form": "outer"}, "form must be one of inner, squares"), ({"scales": 0}, "scales must be")]
)
def test_options_that_there_are_not(options, match):
    with pytest.raises(ValueError, match=match):
        UNetEnergy(7, **SIZES, **options)


@pytest.mark.parametrize("name", ["energy", "energy_multiscale", "energy_dit"])
def test_options_are_made_of_their_files(name):
    network = build(option("model", name), "model", in_channels=7)
    assert network.has_energy and len(network.networks) == (3 if name == "energy_multiscale" else 1)


def test_the_work_of_an_energy_whose_levels_cannot_be_compared_is_that_of_its_score():
    """A constant at each level changes the work of the energy, and not that of the score."""
    z, s, observation = seen()
    network, work = woken(NETWORKS["inner"]()), {}
    for constant in (0.0, 1.0):
        network.constant.weight.data.fill_(constant)
        bound = Bound(Denoiser(network, EDM(sigma_max=80.0), NORMALIZER), observation)
        for compared in (False, True):
            energies = energies_of(bound, bound, lambda: torch.ones_like(z), compared)
            work[compared, constant] = energies.between_levels(torch.where(observation.valid, z, 0.0), 0.7, 0.4)
    assert (work[True, 1.0] - work[True, 0.0]).abs().min() > 0.1
    torch.testing.assert_close(work[False, 1.0], work[False, 0.0], rtol=0, atol=0)


# The programs.

MODEL = ["model=energy", "model.blocks=1", *SMALL, "trainer.max_steps=2", "trainer.validate_every=2"]


def test_an_energy_trains_fills_and_says_how_probable_fields_are(place: Path, run: Call) -> None:
    assert run("train", *TINY, *MODEL, "name=energy")[::2] == (0, "")
    given = ["ckpt=outputs/train/energy", "name=energy", *FEW]
    for inpainting in ("conditional", "mmps"):
        assert run("infer", *given, f"inpainting={inpainting}")[::2] == (0, "")
    code, out, err = run("infer", *given, "mask=none", "likelihood=energy", "time=[0,1]")
    assert (code, err) == (0, "") and "log-likelihood" in out
    found = json.loads((place / "outputs/infer/energy/metrics.json").read_text())["log_likelihood"]
    denoiser = load_trained("outputs/train/energy", torch.device("cpu")).denoiser
    with xr.open_dataset(place / "outputs/infer/energy/fields.nc") as data:
        truth = np.stack([data["u_truth"].values, data["v_truth"].values], axis=-3)
    x0 = denoiser.normalizer.normalize(torch.from_numpy(truth).view(2, 2, 16, 16))
    observation = Observation.none(2, torch.ones(16, 16, dtype=torch.bool))
    s = torch.full((2,), denoiser.diffusion.sigma_min)
    expected = -denoiser.energy(x0, s, observation) / x0[0].numel()
    torch.testing.assert_close(torch.tensor(list(found.values())).double(), expected.detach(), rtol=1e-4, atol=1e-4)
    paths = run("infer", *given[:2], "mask=none", "members=2", "sampler.steps=3", "thermodynamics=true")
    assert paths[0] == 0 and "trained without loss.dual" in paths[1]


def test_what_needs_an_energy_says_so(place: Path, run: Call) -> None:
    plain = run("infer", "ckpt=outputs/train/run", "name=plain", *FEW, "mask=none", "likelihood=energy")
    is_message(plain, "likelihood=energy", "outputs/train/run", "model=energy", "likelihood=exact")
    is_message(run("train", *TINY, *MODEL, "diffusion=regression", "name=odd"), "diffusion=regression")
    is_message(run("train", *TINY, *MODEL, "model.form=outer", "name=odd"), "model.form", "squares")


def test_windows_and_programs_have_no_energy(place: Path, run: Call) -> None:
    """A blend of gradients is none; nor does an exported program hold a derivative."""
    assert run("train", *TINY, *MODEL, "window=[12,8]", "name=windows")[::2] == (0, "")
    trained = load_trained("outputs/train/windows", torch.device("cpu"))
    check_energy({"likelihood": "energy"}, trained)
    blended = replace(trained, denoiser=Windowed(trained.denoiser, (12, 8)))
    with pytest.raises(UserError, match="likelihood=energy.*windows"):
        check_energy({"likelihood": "energy"}, blended)
    with pytest.raises(UserError, match="format=safetensors"):
        save_program(place / "energy.pt2", trained.denoiser, Grid(torch.ones(16, 16, dtype=torch.bool), 1.0, 1.0))
