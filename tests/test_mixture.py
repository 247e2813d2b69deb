"""Mixtures of networks: who draws which member, and the evidence of observations in closed form."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import IndependentPrior

from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.mixture import NetworkMixture, allotted, log_evidence
from vecfield_diffusion.samplers.deterministic import DPMpp2M

SHAPE = (3, 4)
VALID = torch.ones(SHAPE, dtype=torch.bool)
VALID[0, 0] = False
GRID = Grid(VALID)


class Exact:
    """The denoiser of independent values, given observations of some: a stand-in for a trained network."""

    has_energy = False
    autocast = None

    def __init__(self, variance, mean, std):
        self.prior = IndependentPrior(torch.full((2, *SHAPE), variance, dtype=torch.float64), mean)
        self.normalizer = Normalizer(torch.full((2, *SHAPE), 0.5), std)
        self.diffusion = EDM(sigma_max=100.0)

    def in_float32(self):
        return self

    def __call__(self, z, s, observation):
        precision = 1 / self.prior.variance + torch.where(observation.observed, observation.sigma_y**-2.0, 0.0)
        pull = self.prior.mean / self.prior.variance
        pull = pull + torch.where(observation.observed, observation.y / observation.sigma_y**2, 0.0)
        level = s.view(-1, 1, 1, 1) ** 2
        mean, variance = pull / precision, 1 / precision
        x_hat = mean + (z - mean) * variance / (variance + level)
        return torch.where(observation.valid, x_hat, 0.0)


def part(variance=1.0, mean=0.0, std=2.0):
    return SimpleNamespace(denoiser=Exact(variance, mean, std), grid=GRID, path="a", config={})


def cases(n=3, sigma=0.6):
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 + 2.0 * torch.randn(n, 2, *SHAPE, dtype=torch.float64, generator=generator)
    observed = (torch.rand(n, 1, *SHAPE, generator=generator) < 0.6) & VALID
    error = torch.full((n, 1, 1, 1), sigma, dtype=torch.float64)
    y = torch.where(observed, truth, torch.nan)
    return Cases(list(range(n)), truth, observed, torch.zeros(n, 2, *SHAPE, dtype=torch.bool), y, error, GRID)


CONFIG = {"members": 10, "seed": 0, "batch": 64, "likelihood_steps": 64}
PARTS = [part(), part(variance=0.3, mean=0.8, std=1.5), part(variance=2.0, mean=-0.4, std=2.5)]


def closed(part, cases):
    """ln N(y; mean, variance + sigma^2) of the observed values, in physical units."""
    exact = part.denoiser
    std = exact.normalizer.std.double()
    variance = exact.prior.variance * std**2 + cases.sigma_obs**2
    away = cases.y - (exact.normalizer.mean + std * exact.prior.mean)
    values = -away.square() / (2 * variance) - (2 * math.pi * variance).log() / 2
    return torch.where(cases.observed, values, 0.0).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("number", range(3))
def test_the_evidence_is_the_marginal_likelihood(number):
    """But for the steps of the ODE, and for the largest level s, where a mean m is lost to within m / s a value."""
    given, wide = cases(), copy.copy(PARTS[number])
    wide.denoiser = copy.copy(wide.denoiser)
    wide.denoiser.diffusion = EDM(sigma_max=1e4)
    found = log_evidence(wide, given, DPMpp2M(steps=8), CONFIG | {"likelihood_steps": 512})
    torch.testing.assert_close(found, closed(PARTS[number], given), rtol=0, atol=0.02)


def test_observations_change_the_weights_by_bayes(capsys):
    given, weights = cases(), [0.5, 0.3, 0.2]
    found = list(
        NetworkMixture(PARTS, weights, evidence=True).shares(given, DPMpp2M(steps=8), CONFIG | {"members": 10_000})
    )
    exact = torch.stack([closed(one, given) for one in PARTS]) + torch.tensor(weights).log()[:, None]
    for (chosen, shares), row in zip(found, exact.softmax(0).T, strict=True):
        assert chosen.stop == chosen.start + 1
        assert [len(share) / 10_000 for share in shares] == pytest.approx(row.tolist(), abs=0.005)
    assert capsys.readouterr().out.count("weights by evidence") == 3


@pytest.mark.parametrize("weights", [[0.3, 0.7], [0.0, 1.0], [0.24, 0.26, 0.5], [1.0, 0.0]])
def test_each_weight_draws_its_share_in_the_mean_and_every_member_is_drawn_once(weights):
    places = (np.arange(1000) + 0.5) / 1000
    counts = []
    for u in places:
        shares = allotted(weights, 7, u)
        assert [number for share in shares for number in share] == list(range(7))
        counts.append([len(share) for share in shares])
    assert np.mean(counts, axis=0) == pytest.approx(7 * np.array(weights), abs=2e-3)
    assert np.ptp(counts, axis=0).max() <= 2


def test_given_weights_draw_the_same_members_of_all_cases():
    ((chosen, shares),) = NetworkMixture(PARTS, [0.5, 0.3, 0.2]).shares(cases(), DPMpp2M(), CONFIG)
    assert (chosen, [len(share) for share in shares]) == (slice(0, 3), [5, 3, 2])


def alike(**other):
    noisy = SimpleNamespace(diffusion=SimpleNamespace(noisy=True))
    same = dict(denoiser=noisy, units="m s-1", frames=1, stride=1, context=None, grid=GRID, path="run")
    return SimpleNamespace(**(same | other))


@pytest.mark.parametrize("other", [{"units": "km h-1"}, {"frames": 3}, {"context": 1}, {"grid": Grid(~VALID)}])
def test_networks_of_another_kind_are_refused(other):
    with pytest.raises(UserError, match="a mixture takes networks of one"):
        NetworkMixture.of([alike(), alike(**other)], None)


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0], [1.0, math.inf]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(UserError, match="a number >= 0 for each of the 2 checkpoints"):
        NetworkMixture.of([alike(), alike()], weights)
    assert NetworkMixture.of([alike(), alike()], [1.0, 3.0]).weights == [0.25, 0.75]
    assert NetworkMixture.of([alike(), alike()], "evidence") == NetworkMixture([alike(), alike()], [0.5, 0.5], True)
