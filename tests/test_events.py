"""Chances that the speed is above a threshold: those of laws against scipy, and scores that chance does not bias."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from scipy.stats import ncx2
from test_report import H, W, found, noise, setting

from vecfield_diffusion.evaluation.comparison import Estimate
from vecfield_diffusion.evaluation.events import BINS, chances, event_sums

EVERYWHERE = torch.ones(1, 1, 1, 1, dtype=torch.bool)


def one_cell(*speeds: float) -> torch.Tensor:
    """Members `(M, 1, 2, 1, 1)` of one cell, which flow along x."""
    return torch.tensor([[speed, 0.0] for speed in speeds], dtype=torch.float64)[:, None, :, None, None]


@pytest.mark.parametrize("mean", [(0.0, 0.0), (0.6, -0.8), (2.0, 0.5)])
@pytest.mark.parametrize("std", [0.2, 0.7])
def test_the_chance_of_a_gaussian_law_is_that_of_a_noncentral_chi(mean: tuple[float, float], std: float) -> None:
    law = torch.tensor(mean, dtype=torch.float64).view(1, 1, 2, 1, 1)
    got = chances(law, torch.full((1, 2, 1, 1), std, dtype=torch.float64), 1.0)
    size = (mean[0] ** 2 + mean[1] ** 2) / std**2
    assert float(got) == pytest.approx(ncx2.sf(1 / std**2, 2, max(size, 1e-12)), abs=2e-3)


def test_without_spread_it_happens_or_not() -> None:
    law = torch.tensor([[1.2, 0.0], [0.3, 0.4]], dtype=torch.float64).T.reshape(1, 1, 2, 1, 2)
    assert chances(law, torch.zeros(1, 2, 1, 2), 1.0).flatten().tolist() == pytest.approx([1, 0])
    assert float(chances(one_cell(0.5, 1.5, -2.0, 0.9), None, 1.0)) == 0.5


@pytest.mark.parametrize("truth", [0.5, 1.5])
def test_the_score_of_few_members_has_the_expectation_of_their_law(truth: float) -> None:
    """Over all draws of three members of a law that is above with 1/2: (1/2 - o)^2 = 1/4, as of the law itself."""
    scores = [
        float(event_sums(one_cell(*drawn), None, one_cell(truth)[0], EVERYWHERE, 1.0)[0])
        for drawn in product((0.5, 1.5), repeat=3)
    ]
    assert sum(scores) / len(scores) == pytest.approx(0.25, rel=1e-12)
    (one, _), (other, _) = (
        event_sums(one_cell(speed), None, one_cell(truth)[0], EVERYWHERE, 1.0) for speed in (0.5, 1.5)
    )
    assert {float(one), float(other)} == {0.0, 1.0}


def test_cells_are_counted_by_their_chance_where_the_truth_is_known() -> None:
    members = torch.stack([torch.full((2, 2, 1, 3), 1.0 + 0.1 * k) for k in range(10)])  # speeds of 1.41 and more
    truth = torch.full((2, 2, 1, 3), 2.0)
    truth[0, 1, 0, 0], truth[1] = math.nan, 0.1
    where = torch.tensor([True, True, True, True, False, True]).view(2, 1, 1, 3)
    total, bins = event_sums(members, None, truth, where, math.sqrt(2) * 1.65)
    assert bins.shape == (3, BINS) and bins[0].tolist() == [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    assert bins[:, 3].tolist() == pytest.approx([4, 4 * 0.3, 2])
    fair = 0.3 * 0.7 / 9
    assert total.tolist() == pytest.approx([2 * (0.49 - fair), 2 * (0.09 - fair)])


def test_methods_are_scored() -> None:
    """The truth and the members are draws of one law: reliable, and a Brier score of p (1 - p) of that law."""
    truth, members = noise(6, 2, H, W, seed=1), noise(40, 6, 2, H, W, seed=2)
    given = setting(truth, 40)
    ours, law = (
        found(Estimate(members), given),
        found(Estimate(members.mean(0, keepdim=True) * 0, truth * 0 + 1), given),
    )
    chance = math.exp(-1)  # of a speed above sqrt(2)
    assert given.threshold == math.sqrt(2)
    for scored in (ours, law):
        assert scored.scores["hidden"]["brier"].value == pytest.approx(chance * (1 - chance), abs=0.02)
        assert scored.reliability[0].sum() == scored.scores["hidden"]["brier"].cells
    shares = ours.reliability[1:, 2:6] / ours.reliability[0, 2:6]
    assert float((ours.reliability[2].sum() - ours.reliability[1].sum()).abs() / ours.reliability[0].sum()) < 0.03
    assert shares.isfinite().all()
