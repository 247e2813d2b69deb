"""Work, heat and free energies, exact: paths of Gaussians and mixtures by quadrature, estimates in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.stats import norm

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.evaluation.thermodynamics import (
    ByEnergy,
    ByScore,
    along,
    annealed,
    bar,
    crooks,
    effective,
    jarzynski,
)
from vecfield_diffusion.samplers.likelihood import exact_trace

LEVELS = [2.0, 1.0, 0.6]


class Mixture:
    """One value, w N(-m, v) + (1 - w) N(m, v): U = -ln p and D at every level, exactly."""

    def __init__(self, weight=0.3, mean=0.8, variance=0.5):
        self.weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        self.means = torch.tensor([-mean, mean], dtype=torch.float64)
        self.variance = variance

    def parts(self, z, s):
        variance = (self.variance + s.square()).view(-1, 1)
        away = z.flatten(1) - self.means
        return self.weights.log() - away.square() / (2 * variance) - (2 * math.pi * variance).log() / 2

    def energy(self, z, s):
        return -self.parts(z, s).logsumexp(1)

    def denoise(self, z, s):
        share = self.parts(z, s).softmax(1)
        gain = (self.variance / (self.variance + s.square())).view(-1, 1)
        return (share * (self.means + gain * (z.flatten(1) - self.means))).sum(1).view_as(z)


GAUSS = Mixture(weight=0.5, mean=0.0)


def by_energy(law, shift=0.0):
    """The energies of a law, with a constant of each level: Z = s^-shift."""
    return ByEnergy(law.denoise, lambda z, s: law.energy(z, s) + shift * s.log())


def by_score(law, nodes=8):
    return ByScore(
        law.denoise,
        lambda x, z: exact_trace(x, z, torch.ones_like(z, dtype=bool)),
        torch.ones(1, dtype=torch.bool),
        nodes,
    )


def quadrature(draws, nodes):
    """Places of `draws` unit normal numbers, `draws` tensors `(n, 1, 1, 1)`, and their weights `(n,)`."""
    places, weights = hermegauss(nodes)
    grid = np.stack(np.meshgrid(*[places] * draws, indexing="ij")).reshape(draws, -1)
    product = np.prod(np.meshgrid(*[weights / weights.sum()] * draws, indexing="ij"), axis=0).ravel()
    return [torch.tensor(row).view(-1, 1, 1, 1) for row in grid], torch.tensor(product)


def starts(law, s, draws, nodes):
    """States in equilibrium at level s, with `draws` further normal numbers, and the weights of all."""
    noise, weights = quadrature(draws + 1, nodes)
    width = math.sqrt(law.variance + s**2)
    states = torch.cat([mean + width * noise[0] for mean in law.means])
    return states, iter([part.repeat(2, 1, 1, 1) for part in noise[1:]]), torch.cat([w * weights for w in law.weights])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("law", [GAUSS, Mixture()], ids=["gauss", "mixture"])
def test_the_mean_of_exp_of_minus_the_work_is_the_ratio_of_partition_functions(law, reverse):
    """With steps so large that by themselves they would settle at a variance a third too large."""
    levels = LEVELS[::-1] if reverse else LEVELS
    start, noise, weights = starts(law, levels[0], 2, 40)
    path = annealed(by_energy(law, 0.4), start, levels, lambda: next(noise), step_size=0.5, reverse=reverse)
    mean = (weights * torch.exp(-path.work.sum(0))).sum().item()
    assert mean == pytest.approx((levels[0] / levels[-1]) ** 0.4, rel=1e-6)
    assert (weights * path.work.sum(0)).sum() > 0.4 * math.log(levels[-1] / levels[0]) + 0.01  # dissipation
    change = law.energy(path.end, torch.tensor([levels[-1]], dtype=torch.float64))
    change = change - law.energy(start, torch.tensor([levels[0]], dtype=torch.float64))
    change = change + 0.4 * math.log(levels[-1] / levels[0])
    torch.testing.assert_close((path.work + path.heat).sum(0), change)


def test_forward_and_reverse_work_cross_at_the_difference():
    """Crooks for each value: p_forward(W) exp(-W + dF) and p_reverse(-W) have the same moments."""
    law = Mixture()
    energies, difference = by_energy(law, 0.4), 0.4 * math.log(LEVELS[-1] / LEVELS[0])
    found = []
    for levels, reverse in ((LEVELS, False), (LEVELS[::-1], True)):
        start, noise, weights = starts(law, levels[0], 2, 60)
        path = annealed(energies, start, levels, lambda n=noise: next(n), step_size=0.3, reverse=reverse)
        found.append((path.work.sum(0), weights))
    (forward, ours), (backward, theirs) = found
    for moment in (lambda w: w, lambda w: w.square(), torch.tanh):
        left = (ours * torch.exp(difference - forward) * moment(forward)).sum().item()
        assert left == pytest.approx((theirs * moment(-backward)).sum().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("law", [GAUSS, Mixture()], ids=["gauss", "mixture"])
def test_a_denoiser_alone_gives_the_work_and_heat_of_the_energy(law):
    z = torch.linspace(-3, 3, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    states = torch.stack([z, z + 0.05, z - 0.05])  # short moves: two nodes are of fourth order
    ours, exact = (along(kind(law), states, LEVELS) for kind in (by_score, by_energy))
    torch.testing.assert_close(ours.work, exact.work, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.heat, exact.heat, rtol=1e-5, atol=1e-6)
    assert ours.work.shape == ours.heat.shape == (2, 9)


def test_two_nodes_are_exact_between_states_of_gaussian_fields_and_land_has_no_part():
    sample = torch.Generator().manual_seed(0)
    z, new = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64, generator=sample)
    inside = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    inside[..., 0, :] = False
    gain = torch.linspace(0.1, 0.9, 40, dtype=torch.float64).view(2, 4, 5)  # D of variances g s^2 / (1 - g)

    def denoise(z, s):
        return gain * z

    energies = ByScore(lambda z, s: denoise(z, s) * inside, lambda x, z: (gain * inside).sum().expand(len(z)), inside)
    variance = 0.7**2 / (1 - gain)
    exact = total(torch.where(inside, new.square() - z.square(), 0.0) / (2 * variance))
    torch.testing.assert_close(energies.between_states(z, new, 0.7), exact)
    rate = total(
        torch.where(inside, (1 - gain) - (1 - gain).square() * z.square() / column(torch.full((3,), 0.49), z), 0.0)
    )
    torch.testing.assert_close(energies.rate(z, 0.7), rate)


def midpoints(n):
    return norm.ppf((np.arange(n) + 0.5) / n)


def test_bar_finds_the_ratio_of_two_gaussians_where_the_exponential_average_does_not():
    """N(0, 1) to N(3, 4): with U = (x - m)^2 / (2 v) the difference is -ln(v) / 2; at the middles of equal shares."""
    x, y = midpoints(2000), 3 + 2 * midpoints(3000)

    def change(x):
        return (x - 3) ** 2 / 8 - x**2 / 2

    found = bar(change(x), -change(y))
    assert found.value == pytest.approx(-math.log(2), abs=2e-3)
    assert 0 < found.error < 0.1 and 100 < found.samples < 2000
    alone = -math.log(np.exp(-change(x)).mean())  # rare samples of the narrow side dominate
    assert abs(alone + math.log(2)) > 50 * abs(found.value + math.log(2))


def test_bar_weighs_sides_of_unequal_number():
    """Work N(dF + v / 2, v) both ways: at one number a side by symmetry, at others near it."""
    spread = 1.5
    for n, m, limit in ((400, 400, 1e-9), (100, 4000, 0.01)):
        forward = 2.0 + spread**2 / 2 + spread * midpoints(n)
        reverse = -2.0 + spread**2 / 2 + spread * midpoints(m)
        assert bar(forward, reverse).value == pytest.approx(2.0, abs=limit)
    assert bar(np.array([1.0]), np.array([-1.0])).value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="finite"):
        bar(np.array([np.nan]), np.array([1.0]))


def test_the_error_of_bar_is_the_spread_of_its_estimates():
    generator, found = np.random.default_rng(0), []
    for _ in range(400):
        forward, reverse = 1.125 + 1.5 * generator.standard_normal((2, 50))
        found.append(bar(forward, reverse)[:2])
    values, errors = np.array(found).T
    assert values.std() == pytest.approx(np.sqrt(np.square(errors).mean()), rel=0.15)  # a spread of 400: 3.5 %


def test_bar_is_that_of_pymbar():
    pymbar = pytest.importorskip("pymbar", reason="pymbar is an extra of the package")
    forward, reverse = np.random.default_rng(1).normal(1.0, 1.3, (2, 200))
    theirs = pymbar.other_estimators.bar(forward, reverse, relative_tolerance=1e-12)
    ours = bar(forward, reverse)
    assert ours.value == pytest.approx(theirs["Delta_f"], abs=1e-8)
    assert ours.error == pytest.approx(theirs["dDelta_f"], rel=1e-3)


def test_checks_hold_for_gaussian_work_and_fail_for_a_wrong_difference():
    spread = 0.8
    forward = 2.0 + spread**2 / 2 + spread * midpoints(4000)
    reverse = -2.0 + spread**2 / 2 + spread * midpoints(4000)
    right = jarzynski(forward, 2.0)
    assert right.low < 1 < right.high and right.value == pytest.approx(1, abs=0.01)
    assert jarzynski(forward, 2.2).low > 1
    slope = crooks(forward, reverse)
    assert slope.value == pytest.approx(1, abs=0.01) and slope.low < 1 < slope.high
    wrong = crooks(
        2.0 + 2 * (forward - 2.0), -2.0 + 2 * (reverse + 2.0)
    )  # twice the dissipation, four times the variance
    assert wrong.value == pytest.approx(0.5, abs=0.02) and wrong.high < 1
    apart = crooks(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    assert math.isnan(apart.value) and apart.low == -math.inf


def test_effective_numbers():
    assert effective(np.zeros(7)) == pytest.approx(7)
    assert effective(np.array([0.0, -800.0, -900.0])) == pytest.approx(1)
