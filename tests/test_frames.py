"""Sequences `(B, T, 2, H, W)` through formulations, samplers, guidance and physics: exact answers, frame by frame."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER, IdealNetwork
from oracle import GaussianPrior, gaussian_law
from torch import Tensor
from trajectories import ByFrame, Trajectories, draw, frames_of, seen

from vecfield_diffusion.axes import by_frame, column, total
from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import CONF, option
from vecfield_diffusion.diffusion.base import HEADS, karras
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM, IDDPM, Interpolant
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance import posterior
from vecfield_diffusion.guidance.cfg import ClassifierFree, Energy
from vecfield_diffusion.guidance.inpainting import Conditional, RePaint
from vecfield_diffusion.guidance.linear import operator_rows
from vecfield_diffusion.guidance.physics import NoPhysics, Physics
from vecfield_diffusion.guidance.posterior import DPS, MMPS, PiGDM, all_rows
from vecfield_diffusion.guidance.sensors import Component, Footprint, Radial
from vecfield_diffusion.inference.calibration import fit_factor
from vecfield_diffusion.inference.ensemble import member_noise, sample_ensemble, seeds_of
from vecfield_diffusion.inference.likelihood import nats_per_value
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics import operators
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.harmonic import harmonic_fill
from vecfield_diffusion.physics.projection import helmholtz, leray, project
from vecfield_diffusion.samplers.adaptive import Adaptive
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler
from vecfield_diffusion.samplers.stochastic import Ancestral

SEQUENCES = Trajectories()
SHAPE = SEQUENCES.shape
T, _, H, W = SHAPE
LEVELS = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
PERIODIC = Grid(torch.ones(H, W, dtype=torch.bool), boundary_x="periodic", boundary_y="periodic")
TAUS = {"tau": 0.3, "curl_tau": 0.5, "velocity_tau": 0.2}


def prior(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
    return SEQUENCES.denoise(z, s)


# The posterior over all frames.


@pytest.mark.parametrize("physics", [NoPhysics(), Physics("rows", 0.6, 0.4, momentum=(0.1, -0.2), **TAUS)])
def test_mmps_is_the_posterior_over_all_frames(physics):
    """Cells, single components, errors by cell, a missing frame, physics in each, against one dense solve."""
    normalizer = Normalizer(0.1 * draw(2, H, W, seed=8), 1.3).double()
    observation, z = seen(3, SHAPE), draw(3, *SHAPE, seed=5) * (1 + column(LEVELS, torch.empty(3, *SHAPE)))
    rows = physics.rows(normalizer, PERIODIC, T)
    bound = MMPS(k_max=400, tolerance=1e-11, warm_start=False).bind(prior, observation, rows)
    expected = SEQUENCES.given(z, LEVELS, all_rows(observation, rows))
    torch.testing.assert_close(bound(z, LEVELS), expected, rtol=0, atol=1e-7)
    alone = SEQUENCES.given(z, LEVELS, all_rows(replace(observation, observed=observation.observed & False), ()))
    assert (expected - alone)[:, 1].abs().max() > 0.1  # what is seen of other frames counts in the missing one


@pytest.mark.parametrize("frames", [1, T])
def test_rows_of_physics_hold_in_every_frame(frames):
    operator = functools.partial(operator_rows, operators.divergence, 0.2, 0.3, PERIODIC, NORMALIZER)
    x = draw(2, frames, 2, H, W)
    rows, single = operator(frames).flat(), operator().flat()
    torch.testing.assert_close(
        rows.forward(x).unflatten(1, (frames, -1)).flatten(0, 1), single.forward(x.flatten(0, 1))
    )
    assert torch.equal(rows.y, single.y.repeat(1, frames)) and rows.present.all()


def test_pigdm_of_sequences_has_its_closed_form():
    observation, z = seen(3, SHAPE), draw(3, *SHAPE, seed=5)
    rows = all_rows(observation, ())
    got = PiGDM().bind(prior, observation)(z, LEVELS)
    for i, s in enumerate(LEVELS):
        a = SEQUENCES.matrix(rows, i)
        variance = SEQUENCES.vectors * (SEQUENCES.eigenvalues * s**2 / (SEQUENCES.eigenvalues + s**2))
        x_hat = SEQUENCES.denoise(z[i : i + 1], s[None]).flatten()
        system = rows.sigma[i].square().diag() + s**2 / (1 + s**2) * a @ a.T
        step = variance @ SEQUENCES.vectors.T @ a.T @ torch.linalg.solve(system, rows.y[i] - a @ x_hat)
        torch.testing.assert_close(got[i].flatten(), x_hat + step, rtol=0, atol=1e-4)


def test_dps_takes_the_norm_over_all_frames():
    observation, z = seen(3, SHAPE), draw(3, *SHAPE, seed=5)
    rows, method = all_rows(observation, ()), DPS(7.0)
    bound = method.bind(prior, observation)
    x_hat = bound(z, LEVELS)
    stepped = method.hook(observation, lambda: z, bound, 10)(z, 1.0)
    for i, s in enumerate(LEVELS):
        a = SEQUENCES.matrix(rows, i)
        missing = rows.y[i] - a @ x_hat[i].flatten()
        gain = SEQUENCES.vectors * (SEQUENCES.eigenvalues / (SEQUENCES.eigenvalues + s**2)) @ SEQUENCES.vectors.T
        expected = z[i].flatten() + 0.7 * gain @ a.T @ missing / missing.norm()
        torch.testing.assert_close(stepped[i].flatten(), expected)


def test_samples_given_observations_have_the_posterior_law():
    """Over all frames, by the adaptive sampler, too, whose error is that of a whole sequence."""
    observed = torch.arange(0, SEQUENCES.size, 7)
    y = draw(len(observed), seed=6)
    exact = SEQUENCES.conditional(observed, y, 0.2)
    mean, law = gaussian_law(DPMpp2M(64), exact, karras(0.002, 400.0, 64), SHAPE)
    assert (mean - exact.mean).abs().max() < 0.02 and (law - exact.covariance).abs().max() < 0.02
    noise = draw(2, *SHAPE, seed=7)
    levels = karras(0.002, 80.0, 2)
    x = Adaptive(1e-6, 1e-6).sample(exact, levels, lambda: noise)
    expected = DPMpp2M(800).sample(exact, karras(0.002, 80.0, 800), lambda: noise)
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3)


# Frames that are independent are snapshots.

ALONE, NARROW = GaussianPrior(H, 6), GaussianPrior(H, W)


def folded(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("path", FORMULATIONS)
def test_every_formulation_and_prediction_denoises_frames(path, prediction):
    diffusion = FORMULATIONS[path](prediction=prediction)
    denoiser = Denoiser(ByFrame(IdealNetwork(diffusion, ALONE.denoise)), diffusion, NORMALIZER)
    grid = Grid(torch.ones(H, 6, dtype=torch.bool))
    observation = replace(seen(3, (T, 2, H, 6)), single=None)
    z, s = draw(3, T, 2, H, 6) * 3, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    own = diffusion.with_background(observation, grid)
    each = diffusion.with_background(frames_of(observation), grid)
    x_hat = denoiser(z, s, own)
    assert torch.equal(folded(x_hat), denoiser(folded(z), s.repeat_interleave(T), each))
    torch.testing.assert_close(folded(x_hat), ALONE.denoise(folded(z), s.repeat_interleave(T)), rtol=1e-7, atol=1e-7)


def network(in_channels: int = 7, out_channels: int = 2) -> ByFrame:
    torch.manual_seed(0)
    net = UNet(in_channels, out_channels, channels=[8], blocks=1, attention=[], embedding=8)
    torch.nn.init.normal_(net.head[-1].weight, std=0.1)
    return ByFrame(net.double()).eval()


@pytest.mark.parametrize("diffusion", [EDM(sigma_max=20.0), Interpolant(), IDDPM(learned_variance=True)])
def test_the_loss_of_a_sequence_is_the_mean_over_all_that_was_measured(diffusion):
    net = network(9 if diffusion.coupled else 7, 4 if diffusion.learned_variance else 2)
    denoiser = Denoiser(net, diffusion, NORMALIZER)
    grid = Grid(torch.ones(H, W, dtype=torch.bool))
    observation = diffusion.with_background(replace(seen(3, SHAPE), single=None), grid)
    x0, noise, measured = draw(3, *SHAPE, seed=1), draw(3, *SHAPE, seed=2), draw(3, T, 1, H, W, seed=3) > 0
    t = diffusion.sample_times(3, torch.Generator().manual_seed(0))
    loss = denoising_loss(denoiser, x0, measured, observation, t, noise, training=True)
    frames = [folded(value) for value in (x0, measured)]
    each = denoising_loss(
        denoiser, *frames, frames_of(observation), t.repeat_interleave(T), folded(noise), training=True
    )
    count = total(folded(measured)).double()
    expected = (each * count).view(3, T).sum(1) / count.view(3, T).sum(1)
    torch.testing.assert_close(loss, expected)


def test_physics_in_training_is_that_of_the_mean_frame():
    """The energy for each value, of the divergence and of the kinetic energy, which is that of each frame."""
    physics, grid, x = Physics("gradient", 0.5, kinetic_energy=0.7), PERIODIC, draw(2, *SHAPE)
    penalty, s = physics.penalty(NORMALIZER, grid), torch.tensor([0.3, 2.0], dtype=torch.float64)
    each = penalty(folded(x), s.repeat_interleave(T)).view(2, T)
    torch.testing.assert_close(penalty(x, s), each.mean(1))


#: Those that decide by the density do so for a sequence as a whole.
WHOLE = {"feynman_kac", "mala", "pcn", "replica_exchange"}
SAMPLERS = sorted({path.stem for path in (CONF / "sampler").glob("*.yaml")} - WHOLE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_sequences_takes_the_steps_of_its_frames(name):
    """With the same noise. The adaptive sampler has one step for all frames: of one frame, that of a snapshot."""
    node = option("sampler", name)
    sampler = build(node | {key: 4 for key in ("steps",) if key in node}, "sampler", trusted=True)
    frames = 1 if name == "adaptive" else T
    denoiser, observation = Denoiser(network(), EDM(sigma_max=20.0), NORMALIZER), seen(2, (2, 2, H, W))
    observation = replace(observation, single=None).apply(
        lambda tensor: tensor[:, :1].expand(-1, frames, *tensor.shape[2:])
    )
    levels = denoiser.diffusion.levels(sampler.steps, sampler.schedule)
    valid = observation.valid

    def run(observation: Observation, valid: Tensor, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        noise = lambda: torch.randn(2, frames, 2, H, W, generator=generator, dtype=torch.float64).view(shape)  # noqa: E731
        return sampler.sample(lambda z, s: denoiser(z, s, observation), levels, noise, valid=valid)

    with torch.no_grad():
        whole = run(observation, valid, (2, frames, 2, H, W))
        each = run(frames_of(observation), folded(valid), (2 * frames, 2, H, W))
    assert torch.equal(folded(whole), each)


# Ensembles, by every method.


def divergent(u: Tensor) -> Tensor:
    return total(u.square())


RADARS = Radial([[0.0, 0.0], [5.0, 1.0]]).placed(torch.arange(W).double(), torch.arange(H).double(), False)
METHODS = {
    "conditional": {},
    "repaint": {"inpainting": RePaint(2), "sampler": Ancestral(3)},
    "mmps": {"inpainting": MMPS(k_max=300, tolerance=1e-12, warm_start=False)},
    "mmps, conditioned": {"inpainting": MMPS(k_max=300, tolerance=1e-12, warm_start=False, conditioned=True)},
    "pigdm": {"inpainting": PiGDM()},
    "gradient": {"physics": Physics("gradient", 0.5, 0.2, kinetic_energy=0.4)},
    "hard": {"physics": Physics("hard")},
    "cfg": {"guidance": ClassifierFree(1.5)},
    "energy": {"guidance": Energy(divergent)},
    "footprint": {"inpainting": PiGDM(), "sensor": Footprint(3)},
    "component": {"inpainting": PiGDM(), "sensor": Component("v")},
    "radial": {"inpainting": PiGDM(), "sensor": RADARS},
    "rows": {
        "inpainting": MMPS(k_max=300, tolerance=1e-12, warm_start=False, conditioned=True),
        "physics": Physics("rows", 0.5, 0.3, 0.2, momentum=(0.1, -0.2), **TAUS),
    },
}


def ensembles(name: str) -> tuple[Tensor, Tensor]:
    """Of sequences, and of their frames with the same numbers; land, an exact value."""
    parts = {"sampler": Euler(3), "inpainting": Conditional()} | METHODS[name]
    # Without an observation, repaint goes on to repeat its steps.
    observation = seen(2, SHAPE, missing=None if name == "repaint" else 1, land=True)
    if name in ("conditional", "repaint", "gradient", "hard", "cfg", "energy"):
        observation = replace(observation, single=None)
    if name != "energy":
        sigma = observation.sigma_y.clone()
        sigma[0, 0] = 0.0 if name in ("conditional", "hard") else 0.2
        observation = replace(observation, sigma_y=sigma)
    if name == "repaint":
        observation = replace(observation, sigma_y=torch.full_like(observation.sigma_y, 0.1))
    grid = Grid(observation.valid[0, 0, 0], boundary_x="periodic", boundary_y="wall")
    symmetric = isinstance(parts["inpainting"], MMPS)  # as the Jacobian must be
    net = ByFrame(IdealNetwork(EDM(sigma_max=20.0), NARROW.denoise)) if symmetric else network()
    denoiser = Denoiser(net, EDM(sigma_max=20.0), Normalizer(0.1 * draw(2, H, W), 1.3).double())
    numbers = [[5, 6, 7, 8], [7, 8, 9, 10]]
    run = functools.partial(sample_ensemble, denoiser, Method(**parts), grid=grid, members=2, seed=3)
    return run(observation, numbers=numbers), run(frames_of(observation), numbers=sum(numbers, []))


@pytest.mark.parametrize("name", METHODS)
def test_an_ensemble_of_independent_frames_is_that_of_snapshots(name, monkeypatch):
    """By every way to condition and all that stands beside; systems of a sequence are those of its frames together."""
    monkeypatch.setattr(posterior, "WHITE_TOLERANCE", 1e-13)
    whole, each = ensembles(name)
    assert whole.shape == (2, 2, *SHAPE) and (whole[0] - whole[1]).nan_to_num().std() > 0.05
    torch.testing.assert_close(whole.flatten(1, 2), each, rtol=0, atol=1e-8, equal_nan=True)


def test_the_noise_of_a_frame_is_the_same_in_every_sequence():
    like = torch.zeros(1, dtype=torch.float64)

    def noise(numbers: list) -> list[Tensor]:
        seeds = [seeds_of(3, number, 1) for number in numbers]
        draws = member_noise(seeds, (*((len(numbers[0]),) if isinstance(numbers[0], list) else ()), 2, H, W), like)
        return [draws(), draws()]

    for whole, part, snapshot in zip(noise([[4, 5, 6, 7]]), noise([[6, 7, 8]]), noise([6]), strict=True):
        assert torch.equal(whole[0, 2:], part[0, :2]) and torch.equal(part[0, 0], snapshot[0])
        assert (whole[0].flatten(1) @ whole[0].flatten(1).T / whole[0, 0].numel()).triu(1).abs().max() < 0.6


@pytest.mark.parametrize("numbers", [[[0, 0, 1, 2]], [[-1, 0, 1, 2]], [[0, 1, 2]]])
def test_numbers_of_frames_that_would_share_noise_are_refused(numbers):
    denoiser = Denoiser(network(), EDM(sigma_max=20.0), NORMALIZER)
    observation = replace(seen(1, SHAPE), single=None)
    with pytest.raises(ValueError, match="^numbers"):
        sample_ensemble(
            denoiser, Method(Euler(2), Conditional()), observation, PERIODIC, members=1, seed=0, numbers=numbers
        )


def test_the_factor_of_the_spread_is_that_of_all_frames():
    members, truth = draw(4, 3, *SHAPE), draw(3, *SHAPE, seed=1)
    truth[0, 1, 0, 2] = torch.nan
    where = draw(3, T, 1, H, W, seed=2) > 0
    assert fit_factor(members, truth, where) == pytest.approx(
        fit_factor(members.flatten(1, 2), folded(truth), folded(where)), rel=1e-14
    )


def test_the_likelihood_of_independent_frames_is_the_mean_of_theirs():
    denoiser = Denoiser(ByFrame(IdealNetwork(EDM(sigma_max=20.0), ALONE.denoise)), EDM(sigma_max=20.0), NORMALIZER)
    grid, truth = Grid(torch.ones(H, 6, dtype=torch.bool)), draw(2, T, 2, H, 6)
    truth[0, 1, 0, 1:3] = torch.nan
    options = {"grid": grid, "levels": karras(0.1, 20.0, 6), "seed": 1}
    none = Observation.none(2, grid.valid, torch.float64, frames=T)
    numbers = [[0, 1, 2, 3], [2, 3, 4, 5]]
    for mode in ("exact", "hutchinson"):
        whole = nats_per_value(denoiser, truth, none, mode=mode, numbers=numbers, **options)
        each = nats_per_value(denoiser, folded(truth), frames_of(none), mode=mode, numbers=sum(numbers, []), **options)
        count = total(folded(truth).isfinite().all(1, keepdim=True)).double()
        torch.testing.assert_close(whole, (each * count).view(2, T).sum(1) / count.view(2, T).sum(1))


# Operators.


@pytest.mark.parametrize(
    "function",
    [
        operators.divergence,
        operators.vorticity,
        lambda u, grid: operators.gradient(u[..., :1, :, :], grid),
        lambda u, grid: operators.rotated_gradient(u[..., 1:, :, :], grid),
        leray,
        lambda u, grid: torch.cat(helmholtz(u, grid), dim=-3),
        lambda u, grid: project(u, grid, held(u)),
        lambda u, grid: harmonic_fill(u, held(u), grid.valid.expand_as(held(u)), grid.periodic, grid.dx, grid.dy),
        lambda u, grid: RADARS.rows(Observation(u, held(u), u[..., :1, :, :] * 0 + 1, held(u)), NORMALIZER, grid)[
            1
        ].forward(u),
        lambda u, grid: Footprint(3).measure(u, grid),
        lambda u, grid: Component("u").measure(u, grid),
        lambda u, grid: RADARS.readings(u)["seen from 5, 1"],
    ],
)
def test_operators_act_frame_by_frame(function):
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[0, :2] = False
    grid = Grid(valid, dx=1.5, boundary_x="periodic", boundary_y="wall")
    u = draw(2, *SHAPE)
    got = function(u, grid)
    torch.testing.assert_close(got, by_frame(lambda x: function(x, grid), u), rtol=1e-10, atol=1e-10, equal_nan=True)
    assert got.shape[:2] == (2, T)


def held(u: Tensor) -> Tensor:
    """Cells by what they hold: the same in a sequence and in its frames."""
    return u[..., :1, :, :] > 0.5


def test_recorded_radials_of_sequences():
    values = {"r": draw(2, T, 1, H, W), "b": 40 * draw(2, T, 1, H, W, seed=1), "e": draw(2, T, 1, H, W, seed=2).exp()}
    radar = Radial(velocity=["r"], bearing=["b"], error=["e"])
    observation = seen(2, SHAPE)
    (rows,) = (
        radar.recorded(values.__getitem__)
        .select(torch.tensor([1, 0]))
        .rows(observation[torch.tensor([1, 0])], NORMALIZER, PERIODIC)
    )
    frames = {name: folded(value) for name, value in values.items()}
    (each,) = radar.recorded(frames.__getitem__).rows(frames_of(observation), NORMALIZER, PERIODIC)
    x = draw(2, *SHAPE, seed=5)
    torch.testing.assert_close(folded(rows.forward(x.flip(0)).flip(0)), each.forward(folded(x)))
    torch.testing.assert_close(folded(rows.y.flip(0)), each.y)


def test_nothing_and_forgotten_sequences():
    none = Observation.none(2, torch.ones(H, W, dtype=torch.bool), frames=T)
    assert none.y.shape == (2, *SHAPE) and none.channels().shape == (2, T, 5, H, W) and not none.observed.any()
    observation = seen(2, SHAPE)
    once = observation.forget(torch.tensor([True, False]))
    assert not once.observed[0].any() and torch.equal(once.observed[1], observation.observed[1])
    both = replace(observation, sigma_y=observation.sigma_y.expand(-1, -1, 2, -1, -1))
    torch.testing.assert_close(both.error, observation.error)
    assert torch.equal(folded(both.channels()).nan_to_num(), frames_of(both).channels().nan_to_num())
