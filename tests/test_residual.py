"""Mean plus residual, and the regression alone: exact on Gaussian fields, each loss with its own network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from ideal import FORMULATIONS, NORMALIZER, PRIOR, IdealNetwork
from oracle import GaussianConditional
from programs import FEW, SMALL, TINY, Call, is_message
from test_choices import options

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.diffusion.base import HEADS
from vecfield_diffusion.diffusion.denoiser import Denoiser, mean_only
from vecfield_diffusion.diffusion.formulations import EDM, IDDPM, Flow, Interpolant, Regression
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.export import save_program
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.models.residual import RATE, AroundMean, Residual
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.trained import load_trained

SIGMA = 0.1
MASK = torch.rand(6, 8, generator=torch.Generator().manual_seed(5)) < 0.2
SEEN = MASK.flatten().repeat(2)
GAIN, COVARIANCE = PRIOR.posterior(SEEN, torch.eye(int(SEEN.sum()), dtype=torch.float64), SIGMA)
ZERO = torch.zeros(PRIOR.size, dtype=torch.float64)
SIZES = {"channels": [8, 8], "blocks": 1, "attention": [], "embedding": 16}


def posterior_mean(y):
    return (y.flatten(1)[:, SEEN] @ GAIN.T).view(-1, *PRIOR.shape)


class IdealResidual(IdealNetwork, AroundMean):
    """The exact mean, and the network that makes the denoiser of the residual over its scale exact."""

    def __init__(self, diffusion, scale):
        super().__init__(diffusion, GaussianConditional(ZERO, COVARIANCE / scale**2))
        self.deviation = torch.tensor(scale, dtype=torch.float64)

    @property
    def scale(self):
        return self.deviation

    def mean(self, channels):
        return posterior_mean(channels[:, :2])

    def forward(self, channels, c_noise):
        torch.testing.assert_close(channels[:, -2:], self.mean(channels[:, 2:]))
        return super().forward(channels[:, :-2], c_noise)


def draws(n, seed=0, dtype=torch.float64):
    """Fields of the prior, and observations of them at the same cells."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(n, PRIOR.size, dtype=torch.float64, generator=generator)
    x0 = (white * PRIOR.eigenvalues.sqrt() @ PRIOR.vectors.T).view(n, *PRIOR.shape)
    y = x0 + SIGMA * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    observed = MASK.expand(n, 1, 6, 8)
    error = torch.full((n, 1, 1, 1), SIGMA, dtype=dtype)
    return x0.to(dtype), Observation(y.to(dtype), observed, error, torch.ones_like(observed)), generator


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_mean_and_residual_together_are_the_conditional_denoiser(name, prediction, scale):
    diffusion = FORMULATIONS[name](prediction=prediction)
    denoiser = Denoiser(IdealResidual(diffusion, scale), diffusion, NORMALIZER)
    x0, observation, generator = draws(4)
    s = torch.tensor([0.02, 0.5, 3.0, 0.99 * diffusion.sigma_max], dtype=torch.float64)
    z = x0 + s.view(-1, 1, 1, 1) * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    mean, centred = posterior_mean(observation.y), GaussianConditional(ZERO, COVARIANCE)
    torch.testing.assert_close(denoiser(z, s, observation), mean + centred(z - mean, s), rtol=1e-6, atol=1e-6)


def test_a_sampler_asks_for_the_mean_of_an_observation_once():
    """And gets that of another observation anew, and that of nothing beside it."""
    denoiser, calls = tiny().eval().requires_grad_(False), []
    denoiser.network.regression.register_forward_hook(lambda *given: calls.append(1))
    _, observation, _ = draws(2, dtype=torch.float32)
    nothing, z = observation.nothing(), torch.ones_like(observation.y)

    def estimate(made, told, s):
        return made(z, torch.full((2,), s), told)

    for s in (3.0, 1.0, 0.3):
        estimate(denoiser, observation, s), estimate(denoiser, nothing, s)
    assert len(calls) == 2
    other = replace(observation, y=2 * observation.y)
    for told in (observation, nothing, other, observation):
        fresh = Denoiser(denoiser.network, denoiser.diffusion, NORMALIZER).eval()
        assert torch.equal(estimate(denoiser, told, 1.0), estimate(fresh, told, 1.0))
    assert not torch.equal(estimate(denoiser, other, 1.0), estimate(denoiser, observation, 1.0))
    torch.nn.init.normal_(denoiser.network.regression.head[-1].weight, std=0.2)
    trained = [denoiser.train().mean(observation), denoiser.eval().mean(replace(observation))]
    assert torch.equal(*trained)  # a mean of older weights is not given to training


class Shifted(IdealNetwork, AroundMean):
    """A prior of mean 0.7 for a network that sees no observation."""

    scale = torch.ones((), dtype=torch.float64)

    def mean(self, channels):
        assert not channels[:, 2].any()
        return torch.full_like(channels[:, :2], 0.7)


def test_mmps_starts_from_the_mean_of_the_network_that_is_told_nothing():
    diffusion = EDM()
    denoiser = Denoiser(Shifted(diffusion), diffusion, NORMALIZER)
    x0, observation, generator = draws(3)
    s = torch.tensor([0.3, 2.0, 20.0], dtype=torch.float64)
    z = 0.7 + x0 + s.view(-1, 1, 1, 1) * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    got = MMPS(k_max=200, tolerance=1e-12).bind(denoiser, observation)(z, s)
    mean = 0.7 + posterior_mean(observation.y - 0.7)
    exact = mean + GaussianConditional(ZERO, COVARIANCE)(z - mean, s)
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


class OffByOne(IdealNetwork, AroundMean):
    """The raw output that gives `x0` exactly at the level s / w at which the network works, plus 1."""

    scale = torch.tensor(0.3, dtype=torch.float64)

    def __init__(self, diffusion, x0):
        super().__init__(diffusion, lambda z, s: x0 / self.scale)

    def mean(self, channels):
        return torch.zeros_like(channels[:, :2])

    def forward(self, channels, c_noise):
        return super().forward(channels[:, :-2], c_noise) + 1


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_loss_is_the_squared_error_of_the_output_at_the_level_of_the_residual(name, prediction):
    """An output that is off by one everywhere has the loss 1 at every level; 1 / c_out(s)^2 would give w^2 and more."""
    diffusion = FORMULATIONS[name](prediction=prediction)
    x0, observation, generator = draws(5)
    denoiser = Denoiser(OffByOne(diffusion, x0), diffusion, NORMALIZER)
    t = diffusion.sample_times(5, generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    loss = denoising_loss(denoiser, x0, torch.ones_like(observation.observed), observation, t, noise)
    torch.testing.assert_close(loss, torch.ones_like(loss), rtol=1e-5, atol=0)


def tiny(diffusion=None, seed=0):
    torch.manual_seed(seed)
    diffusion = diffusion or EDM()
    outputs = 4 if diffusion.learned_variance else 2
    network = Residual(7 + 2 * diffusion.coupled, outputs, (True, True), **SIZES)
    for head in (network.regression.head, network.network.head):  # zero at the start: nothing would flow through
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    return Denoiser(network, diffusion, NORMALIZER)


def given(n=8, seed=1, diffusion=None):
    x0, observation, generator = draws(n, seed, torch.float32)
    t = (diffusion or EDM()).sample_times(n, generator)
    measured = torch.rand(n, 1, 6, 8, generator=generator) < 0.9
    return x0, measured, observation, t, torch.randn(x0.shape, generator=generator)


def gradients(denoiser, loss):
    network = denoiser.network
    network.zero_grad()
    loss.backward()
    parts = (network.regression, network.network)
    return [
        torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in part.parameters()]) for part in parts
    ]


@pytest.mark.parametrize("diffusion", [EDM(), EDM(uncertainty=True), IDDPM(learned_variance=True), Flow()])
def test_neither_loss_moves_the_other_network(diffusion):
    denoiser, batch = tiny(diffusion), given(diffusion=diffusion)
    x0, measured, observation = batch[:3]

    def penalty(x_hat, s):
        return x_hat.square().mean(dim=(1, 2, 3))

    both = gradients(denoiser, denoising_loss(denoiser, *batch, training=True, penalty=penalty).mean())
    for parameter in denoiser.network.regression.parameters():
        parameter.requires_grad_(False)
    alone = gradients(denoiser, denoising_loss(denoiser, *batch, training=True, penalty=penalty).mean())
    denoiser.requires_grad_(True)
    error = (denoiser.mean(observation) - x0).square() * measured
    square = gradients(denoiser, (error.sum(dim=(1, 2, 3)) / (2 * measured.sum(dim=(1, 2, 3)))).mean())
    assert both[0].norm() > 0 and both[1].norm() > 0
    assert not alone[0].any() and not square[1].any()
    torch.testing.assert_close(both[0], square[0])
    assert (both[1] - alone[1]).norm() < 0.1 * both[1].norm()  # the scale has moved a little in between


def test_without_training_the_loss_is_that_of_the_estimate_alone_and_leaves_no_trace():
    denoiser, (x0, measured, observation, t, noise) = tiny(), given()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    got = denoising_loss(denoiser, x0, measured, observation, t, noise)
    z = torch.where(measured, x0, 0.0) + t.float().view(-1, 1, 1, 1) * noise
    error = ((denoiser(z, t.float(), observation) - x0).square() * measured).sum(dim=(1, 2, 3))
    error = error / (2 * measured.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(got, (1 / t**2 + 1).float() * error, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_the_scale_tends_to_the_deviation_of_the_residual_and_is_kept_with_the_weights():
    denoiser, batch = tiny(), given()
    x0, measured, observation = batch[:3]
    square = ((denoiser.mean(observation) - x0).square() * measured).sum(dim=(1, 2, 3))
    target = (square / (2 * measured.sum(dim=(1, 2, 3)))).mean().item()
    denoising_loss(denoiser, *batch, training=True)
    assert denoiser.network.variance.item() == pytest.approx(1 + RATE * (target - 1), rel=1e-5)
    for _ in range(800):
        denoiser.network.track(torch.tensor(target))
    assert denoiser.network.scale.item() == pytest.approx(target**0.5, rel=1e-2)
    other = Residual(7, periodic=(True, True), **SIZES)
    other.load_state_dict(denoiser.network.state_dict())
    assert other.scale == denoiser.network.scale


def trained(denoiser, steps=60):
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=5e-3)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - k / steps)
        x0, _, observation, t, noise = given(32, 100 + k, denoiser.diffusion)
        loss = denoising_loss(denoiser, x0, torch.ones_like(observation.valid), observation, t, noise, training=True)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return denoiser.eval()


@pytest.mark.parametrize("path", ["residual", "regression"])
def test_training_leads_to_the_posterior_mean(path):
    torch.manual_seed(0)
    if path == "residual":
        denoiser = trained(Denoiser(Residual(7, periodic=(True, True), **SIZES), EDM(), NORMALIZER))
        alone = mean_only(denoiser)
    else:
        node = option("model", "unet_tiny") | SIZES
        network = build(node, "model", trusted=True, in_channels=7, periodic=(True, True))
        alone = trained(Denoiser(network, Regression(), NORMALIZER))
    x0, observation, _ = draws(256, 7, torch.float32)
    with torch.no_grad():
        mean = alone(torch.randn(x0.shape), torch.ones(256), observation)
        exact = posterior_mean(observation.y.double())
        missed = ((mean - exact).square().mean() / exact.square().mean()).sqrt()
    assert missed < 0.45, missed
    if path == "residual":
        torch.testing.assert_close(mean, denoiser.mean(observation))


#: Samplers that decide by a density, which a regression has none of.
DECIDING = ("feynman_kac", "mala", "pcn", "replica_exchange")


class Sum(torch.nn.Module):
    """A network whose output depends on all that it is given."""

    def forward(self, x, noise):
        return x.sum(dim=1, keepdim=True).expand(-1, 2, -1, -1) + noise.view(-1, 1, 1, 1)


GRID = Grid(torch.ones(6, 8, dtype=torch.bool), 1.0, 1.0, "periodic", "periodic")


@pytest.mark.parametrize("name", [name for name in options("sampler") if name not in DECIDING])
def test_every_sampler_gives_the_mean_alone_with_a_regression(name):
    _, observation, generator = draws(2, dtype=torch.float32)
    denoiser = Denoiser(Sum(), Regression(), NORMALIZER)
    expected = observation.channels().sum(dim=1, keepdim=True).expand(-1, 2, -1, -1)
    z = 100 * torch.randn(2, 2, 6, 8, generator=generator)
    here, there = (denoiser(noisy, torch.tensor([1.0, 1e3]), observation) for noisy in (z, -z))
    assert torch.equal(here, there)
    for steps in (1, 5):
        node = option("sampler", name)
        sampler = build(node | ({"steps": steps} if "steps" in node else {}), "sampler", trusted=True)
        how = (denoiser, Method(sampler, Conditional()), observation, GRID)
        members = sample_ensemble(*how, members=3, seed=0)
        torch.testing.assert_close(members, expected.expand(3, -1, -1, -1, -1), rtol=1e-3, atol=1e-3)


def test_one_step_of_a_regression_is_one_evaluation():
    _, observation, _ = draws(2, dtype=torch.float32)
    sampler, told = build(option("sampler", "dpmpp_2m") | {"steps": 1}, "sampler", trusted=True), []
    how = (Denoiser(Sum(), Regression(), NORMALIZER), Method(sampler, Conditional()), observation, GRID)
    sample_ensemble(*how, members=3, seed=0, progress=told.append)
    assert told == [6]


def test_a_regression_does_what_it_can():
    regression = Denoiser(Sum(), Regression(), NORMALIZER)
    for windowed in (regression, Windowed(regression, (4, 4))):
        with pytest.raises(UserError, match="inpainting=conditional"):
            windowed.in_float32()
    with pytest.raises(UserError, match="model=residual holds a regression already"):
        tiny(Regression())
    with pytest.raises(ValueError, match="^denoiser must have .* predicts the mean, got Sum"):
        mean_only(regression)


def test_the_mean_alone_is_told_the_first_guess():
    diffusion = Interpolant()
    denoiser, (_, observation, _) = tiny(diffusion).eval(), draws(3, dtype=torch.float32)
    alone = mean_only(denoiser)
    prepared = diffusion.with_background(observation, GRID)
    sampler = build(option("sampler", "euler") | {"steps": 1}, "sampler", trusted=True)
    members = sample_ensemble(alone, Method(sampler, Conditional()), observation, GRID, members=2, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(members, denoiser.mean(prepared).expand(2, -1, -1, -1, -1), rtol=1e-3, atol=1e-3)


def test_a_residual_is_exported_as_a_program(tmp_path):
    """Which compares what it gives with the denoiser, for more than one size of batch."""
    denoiser = tiny().eval().requires_grad_(False)
    denoiser.network.variance.fill_(0.1)
    save_program(tmp_path / "residual.pt2", denoiser, GRID)
    assert (tmp_path / "residual.pt2").stat().st_size > 0


# The programs.

MODEL = ["model=residual", "model.blocks=1", *SMALL]
FULL = "name=residual"


def test_a_residual_trains_resumes_fills_and_is_scored(place: Path, run: Call) -> None:
    given = [*TINY, *MODEL, "trainer.warmup=0", "trainer.ema=0", "trainer.checkpoint_minutes=1000"]
    for name, steps in (("part", 2), ("part", 4), ("residual", 4)):
        assert run("train", *given, f"name={name}", f"trainer.max_steps={steps}")[::2] == (0, "")
    cpu = torch.device("cpu")
    part, whole = (load_trained(f"outputs/train/{name}/checkpoints/last.pt", cpu) for name in ("part", "residual"))
    network = whole.denoiser.network
    assert network.variance != 1
    assert all(
        torch.equal(value, network.state_dict()[name]) for name, value in part.denoiser.network.state_dict().items()
    )
    for inpainting in ("conditional", "mmps"):
        code, _, err = run("infer", "ckpt=outputs/train/residual", f"inpainting={inpainting}", FULL, *FEW)
        assert (code, err) == (0, "")
        with xr.open_dataset(place / "outputs" / "infer" / "residual" / "fields.nc") as data:
            assert np.isfinite(data["u_members"].values).all()
    assert run("evaluate", "ckpt=outputs/train/residual", "masks=[block]", "cases=2", FULL, *FEW)[::2] == (0, "")


@pytest.mark.parametrize(
    "overrides",
    ["diffusion=interpolant", "diffusion=iddpm diffusion.learned_variance=true", "diffusion=vp window=[12,8]"],
)
def test_a_residual_goes_with_what_formulations_add(place: Path, run: Call, overrides: str) -> None:
    name = overrides.split()[0].removeprefix("diffusion=")
    given = [*TINY, *MODEL, *overrides.split(), f"name={name}", "trainer.max_steps=2", "trainer.validate_every=2"]
    assert run("train", *given)[::2] == (0, "")
    assert run("infer", f"ckpt=outputs/train/{name}", "inpainting=conditional", *FEW)[::2] == (0, "")


def test_a_regression_trains_fills_and_is_scored(place: Path, run: Call) -> None:
    given = ["diffusion=regression", "name=regression", "sampler.steps=1"]
    assert run("train", *TINY, *SMALL, *given)[::2] == (0, "")
    how = ["ckpt=outputs/train/regression", "name=regression", "sampler.steps=1"]
    assert run("infer", *how, "members=2", "inpainting=conditional")[::2] == (0, "")
    with xr.open_dataset(place / "outputs" / "infer" / "regression" / "fields.nc") as data:
        assert (data["u_std"].values == 0).all()
    assert json.loads((place / "outputs/infer/regression/metrics.json").read_text())["hidden"]["spread_skill"] is None
    scored = [*how, "masks=[block]", "cases=2", "members=2", "inpainting=conditional"]
    assert run("evaluate", *scored)[::2] == (0, "")
    for refused in ("inpainting=mmps", "inpainting=pigdm", "likelihood=hutchinson mask=none"):
        is_message(run("infer", *how, "members=2", *refused.split()), "diffusion=regression", "inpainting=conditional")
    is_message(run("train", *TINY, *MODEL, "diffusion=regression", "name=odd"), "model=residual")
