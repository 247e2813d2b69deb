"""Any formulation, prediction, sampler and grid: mean and covariance of the samples on a Gaussian field.

The network is the one that makes the formulation's preconditioned output the exact conditional denoiser. A sampler is
then an affine map of its noise, which one run reads off: the k-th draw of noise is the identity in its own block of the
batch and zero elsewhere, and the last sample, all zeros, gives the mean. No Monte Carlo.

First, formulation and prediction change nothing but the levels: at every level the network and its preconditioning
are the exact denoiser, for every pair of the two, and samples through them are its samples, for every formulation,
sampler and grid, the prediction going round. Second, the law of the samples tends to the closed form of the equation
that the sampler solves as the steps are refined, for every formulation and sampler, the grids going round.
"""

import functools
from typing import get_args

import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER, IdealNetwork
from oracle import GaussianConditional

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import CONF, option
from vecfield_diffusion.diffusion.base import HEADS, ScheduleName
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.observation import Observation

SHAPE = (2, 1, 3)
SIZE = 6
#: Samplers that decide on the way, which no affine map describes: see `test_metropolis.py` for their laws.
DECIDING = ("feynman_kac", "mala", "pcn", "replica_exchange")
SAMPLERS = sorted({path.stem for path in (CONF / "sampler").glob("*.yaml")} - set(DECIDING))
GRIDS = get_args(ScheduleName)
DOMAIN = torch.ones(SHAPE[1:], dtype=torch.bool)
#: Those that a denoiser, E[x0 | z], does for; `tests/test_few_steps.py` has the other.
OF_MEANS = [name for name in SAMPLERS if name != "consistency"]
ODE = ("euler", "heun", "midpoint", "ddim", "dpmpp_2m", "adaptive")
SDE = ("ddpm", "euler_maruyama", "heun_sde", "predictor_corrector")
#: What the levels below sigma_min, which end with one step, cost the smallest variances.
FLOOR = 0.02


def posterior():
    """Six values whose variances go from 10 to a thousandth, as those of a smooth field do."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))[0]
    variances = torch.logspace(1, -3, SIZE, dtype=torch.float64)
    return GaussianConditional(vectors[0] + 1, vectors * variances @ vectors.T)


POSTERIOR = posterior()
#: Ranges that the variances ask for, where they are free: ten times the largest standard deviation.
RANGES = {name: {"sigma_max": 30.0} for name in ("ve", "ou", "flow", "interpolant", "edm", "thermodynamic")} | {
    "iddpm": {"j_0": 21}
}
RANGES["user"] = {"t_max": 0.98}


@functools.cache
def sampler_of(name, grid, steps):
    node = option("sampler", name)
    changed = {"steps": steps, "grid": grid, "step_size": 0.05, "corrections": 4, "rtol": 1e-4, "atol": 1e-4}
    return build(node | {key: changed[key] for key in changed if key in node}, "sampler", trusted=True)


def affine(sampler, denoise, levels):
    """Mean `(d,)` and covariance `(d, d)` of the samples, from one run."""
    shape, d = SHAPE, SIZE
    draws = []

    def count():
        draws.append(None)
        return torch.zeros(1, *shape, dtype=torch.float64)

    sampler.sample(denoise, levels, count)
    batch, k = torch.zeros(len(draws), d, len(draws) * d + 1, dtype=torch.float64), iter(range(len(draws)))
    blocks = torch.eye(len(draws) * d, dtype=torch.float64).view(len(draws), d, -1)
    batch[:, :, :-1] = blocks

    def noise():
        return batch[next(k)].T.reshape(-1, *shape).contiguous()

    out = sampler.sample(denoise, levels, noise).flatten(1)
    maps = out[:-1] - out[-1]
    return out[-1], maps.T @ maps


def limit(name, s_max):
    """Mean and covariance that N(0, s_max^2) becomes: of the ODE, of the SDE; else the posterior.

    In a direction of variance v the ODE multiplies the distance to the mean by sqrt(v / (v + s_max^2)). The SDE, whose
    reverse takes N(mean, v + s_max^2) to the posterior, multiplies it by a = v / (v + s_max^2).
    """
    v, mean = POSTERIOR.eigenvalues, POSTERIOR.mean
    a = v / (v + s_max**2)
    if name in ODE:
        keep, variance = a.sqrt(), a * s_max**2
    elif name in SDE:
        keep, variance = a, v - a**2 * v
    else:
        return mean, POSTERIOR.covariance
    u = POSTERIOR.vectors
    return mean - u @ (keep * (u.T @ mean)), u * variance @ u.T


def wasserstein(law, other):
    """W2 / sqrt(d) between two normal laws."""
    root = symmetric_root(law[1])
    overlap = symmetric_root(root @ other[1] @ root)
    square = (law[0] - other[0]).square().sum() + (law[1] + other[1] - 2 * overlap).trace()
    return (square.clamp(min=0) / SIZE).sqrt().item()


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def formulation(name, prediction="edm"):
    """The formulation, and a denoiser through its ideal network."""
    diffusion = FORMULATIONS[name](prediction=prediction, **RANGES.get(name, {}))
    denoiser = Denoiser(IdealNetwork(diffusion, POSTERIOR), diffusion, NORMALIZER)

    def denoise(z, s):
        return denoiser(z, s, Observation.none(len(z), DOMAIN, torch.float64))

    return diffusion, denoise


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("path", FORMULATIONS)
def test_every_prediction_is_the_exact_denoiser_at_every_level(path, prediction, grid):
    diffusion, denoise = formulation(path, prediction)
    generator = torch.Generator().manual_seed(0)
    for level in diffusion.levels(20, grid)[:-1]:
        s = level.expand(4)
        z = POSTERIOR.mean.view(SHAPE) + level * torch.randn(4, *SHAPE, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(denoise(z, s), POSTERIOR(z, s), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("i", "name"), list(enumerate(SAMPLERS)))
@pytest.mark.parametrize(("k", "path"), list(enumerate(FORMULATIONS)))
def test_formulation_and_prediction_change_nothing_but_the_levels(k, path, i, name):
    """Of each sampler with each formulation; grids and predictions go round."""
    prediction, grid = list(HEADS)[(i + 2 * k) % len(HEADS)], GRIDS[(i + k) % len(GRIDS)]
    diffusion, denoise = formulation(path, prediction)
    sampler = sampler_of(name, grid, 6)
    levels = diffusion.levels(sampler.steps, grid)
    got, expected = affine(sampler, denoise, levels), affine(sampler, POSTERIOR, levels)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize(("i", "name"), list(enumerate(DECIDING)))
@pytest.mark.parametrize(("k", "path"), list(enumerate(FORMULATIONS)))
def test_formulation_and_prediction_change_no_decision(k, path, i, name):
    """Of each of these samplers with each formulation; predictions go round, and each meets each sampler."""
    diffusion, denoise = formulation(path, list(HEADS)[(i + k) % len(HEADS)])
    changed = {"steps": 4, "corrections": 2, "rounds": 3, "particles": 3}
    node = option("sampler", name)
    sampler = build(node | {key: changed[key] for key in changed if key in node}, "sampler", trusted=True)

    def run(denoiser):
        generator = torch.Generator().manual_seed(0)
        steps = diffusion.levels(4, "log_snr")
        return sampler.sample(denoiser, steps, lambda: torch.randn(3, *SHAPE, dtype=torch.float64, generator=generator))

    torch.testing.assert_close(run(denoise), run(POSTERIOR), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("j", "name"), list(enumerate(OF_MEANS)))
@pytest.mark.parametrize(("i", "path"), list(enumerate(FORMULATIONS)))
@pytest.mark.parametrize("turn", [0, 1])
def test_the_law_of_the_samples_tends_to_the_closed_form(turn, i, path, j, name):
    """With four times the steps the distance is at most half as large, where it is not nothing already.

    By the formulation's own grid, and by one of the others, which go round.
    """
    grid = GRIDS[turn and 1 + (i + j) % (len(GRIDS) - 1)]
    diffusion = formulation(path)[0]
    errors = []
    for steps in (12, 48):
        sampler = sampler_of(name, grid, steps)
        law = affine(sampler, POSTERIOR, diffusion.levels(sampler.steps, grid))
        errors.append(wasserstein(law, limit(name, diffusion.sigma_max)))
    assert errors[1] < max(0.5 * errors[0], FLOOR), errors
