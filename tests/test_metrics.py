"""Scores against closed forms, brute force and calibrated draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.metrics import (
    coverage,
    crps,
    divergence_rms,
    rank_histogram,
    scores,
    table,
)
from vecfield_diffusion.physics.grid import Grid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everywhere(truth: Tensor) -> Tensor:
    return torch.ones_like(truth[:, :1], dtype=torch.bool)


def test_hand_computed() -> None:
    """Members (1, 0) and (3, 0) of one cell against (4, 2): mean (2, 0), error (2, 2), variance (2, 0)."""
    members = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64).view(2, 1, 2, 1, 1)
    truth = torch.tensor([4.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
    result = scores(members, truth, everywhere(truth))
    assert result["rmse_component"] == pytest.approx(2)
    assert result["rmse_vector"] == pytest.approx(math.sqrt(8))
    assert result["relative_l2"] == pytest.approx(math.sqrt(8 / 20))
    assert result["spread"] == pytest.approx(1)
    assert result["spread_skill"] == pytest.approx(math.sqrt(3 / 2) / 2)
    assert result["crps"] == pytest.approx(((3 + 1) / 2 - 2 / 2 + 2) / 2)


def test_fair_crps_is_the_double_sum() -> None:
    x, y = normal(7, 4, 5), normal(4, 5, seed=1)
    pairs = (x[:, None] - x[None, :]).abs().sum((0, 1))
    torch.testing.assert_close(crps(x, y), (x - y).abs().mean(0) - pairs / (2 * 7 * 6))
    torch.testing.assert_close(crps(x[:1], y), (x[0] - y).abs())


def test_crps_of_a_gaussian() -> None:
    """CRPS(N(0,1), y) = y erf(y/sqrt2) + 2 phi(y) - 1/sqrt(pi) (Gneiting & Raftery 2007), already for small M: fair."""
    y = torch.tensor([-1.5, 0.0, 0.3, 2.0], dtype=torch.float64)
    phi = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    exact = y * torch.erf(y / math.sqrt(2)) + 2 * phi - 1 / math.sqrt(math.pi)
    torch.testing.assert_close(crps(normal(200_000, 4), y), exact, rtol=0, atol=0.01)
    few = crps(normal(3, 100_000, 4), y).mean(0)
    torch.testing.assert_close(few, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("m", [2, 8, 32])
def test_calibrated_ensemble(m: int) -> None:
    """Members and truth from one skewed distribution per cell: spread-skill 1, coverage nominal, flat ranks."""
    draws = normal(m + 1, 200, 2, 10, 20)
    centre, width = normal(200, 2, 10, 20, seed=1), 0.5 + normal(200, 2, 10, 20, seed=2).abs()
    draws = centre + width * (0.5 * draws).exp()
    result = scores(draws[1:], draws[0], everywhere(draws[0]))
    assert result["spread_skill"] == pytest.approx(1, abs=0.03)
    assert result["coverage_50"] == pytest.approx(0.5, abs=0.01)
    assert result["coverage_90"] == pytest.approx(0.9, abs=0.01)
    shares = rank_histogram(draws[1:], draws[0])
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / (m + 1)), rtol=0, atol=0.006)


def test_coverage_of_a_narrow_ensemble() -> None:
    """Members with half the standard deviation of the truth cover P(|Z| < z/2): 0.264 and 0.589 for large M."""
    truth, members = normal(20_000), 0.5 * normal(199, 20_000, seed=1)
    assert coverage(members, truth, 0.5) == pytest.approx(math.erf(0.5 * 0.674490 / math.sqrt(2)), abs=0.01)
    assert coverage(members, truth, 0.9) == pytest.approx(math.erf(0.5 * 1.644854 / math.sqrt(2)), abs=0.01)


def test_coverage_by_hand() -> None:
    """Three members 0, 1, 2 span 50 %, from 0 to 2: two of four truths lie inside; 75 % is halfway to all of them."""
    x = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(3, 4)
    y = torch.tensor([-5.0, 0.5, 1.5, 9.0])
    assert coverage(x, y, 0.5) == pytest.approx(0.5)
    assert coverage(x, y, 0.75) == pytest.approx(0.75)
    assert coverage(x, y, 0.25) == pytest.approx(0.25)
    assert coverage(x, torch.full((4,), 1.5), 0.5) == pytest.approx(1)
    assert coverage(x, torch.full((4,), 9.0), 0.5) == pytest.approx(0)


def test_only_known_cells_of_the_region_count() -> None:
    grid = Grid(torch.ones(6, 7, dtype=torch.bool), 2.0, 3.0, "periodic", "periodic")
    members, truth = normal(5, 3, 2, 6, 7), normal(3, 2, 6, 7, seed=1)
    where = torch.zeros(3, 1, 6, 7, dtype=torch.bool)
    where[:, :, 1:4, 2:6] = True
    truth[1, 1, 2, 3] = math.nan
    expected = scores(members, truth, where)
    outside = ~(where & truth.isfinite().all(1, keepdim=True))
    dirty = torch.where(outside, math.nan, members), torch.where(outside, math.nan, truth)
    assert scores(*dirty, where) == expected
    inside = where[:, 0] & truth.isfinite().all(1)
    by_hand = torch.cat([(members.mean(0) - truth)[:, c][inside] for c in range(2)]).square().mean().sqrt()
    assert expected["rmse_component"] == pytest.approx(by_hand.item())
    assert "divergence_rms" in scores(members, truth, where, grid)


def test_divergence_of_a_linear_field() -> None:
    """u = 3 x, v = -y on land-marked NaN: divergence 2 s^-1 in every member."""
    valid = torch.ones(6, 9, dtype=torch.bool)
    valid[:, :2] = False
    grid = Grid(valid, 2.0, 0.5)
    x, y = torch.meshgrid(torch.arange(9) * 2.0, torch.arange(6) * 0.5, indexing="xy")
    velocity = torch.where(valid, torch.stack((3 * x, -y)), math.nan).expand(4, 2, 2, 6, 9)
    where = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    where[..., 4:] = True
    assert divergence_rms(velocity, grid, where) == pytest.approx(2)


def test_empty_region_and_single_member() -> None:
    members, truth = normal(1, 2, 2, 4, 5), normal(2, 2, 4, 5, seed=1)
    empty = scores(members, truth, ~everywhere(truth))
    assert all(math.isnan(value) for value in empty.values())
    single = scores(members, truth, everywhere(truth))
    assert single["crps"] == pytest.approx((members[0] - truth).abs().mean().item())
    assert all(math.isnan(single[name]) for name in ("spread", "spread_skill", "coverage_50", "coverage_90"))


def test_wrong_shapes() -> None:
    truth = normal(2, 2, 4, 5)
    with pytest.raises(ValueError, match=r"where \(N, 1, H, W\)"):
        scores(truth[None], truth, everywhere(truth)[:, 0])


def test_table() -> None:
    rows = [{"method": "linear", "rmse": 0.123456, "cases": 50}, {"method": "oi", "rmse": math.nan}]
    assert table(rows) == ("method    rmse  cases\n------  ------  -----\nlinear  0.1235     50\noi           -      -")
    assert table(rows, ["rmse"]).splitlines()[2] == "0.1235"


def test_members_that_do_not_differ_have_no_spread_to_judge() -> None:
    truth = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    values = scores(truth.expand(8, -1, -1, -1, -1) + 1e-9, truth, torch.ones(3, 1, 4, 5, dtype=torch.bool))
    assert values["spread"] == 0 and values["rmse_component"] < 1e-6
    assert all(math.isnan(values[name]) for name in ("spread_skill", "coverage_50", "coverage_90"))
