"""Scores against closed forms, brute force and calibrated draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.metrics import crps, energy_score, scores, sums
from vecfield_diffusion.evaluation.physical import divergence_rms
from vecfield_diffusion.evaluation.scores import covered, derive, reliability_index
from vecfield_diffusion.physics.grid import Grid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everywhere(truth: Tensor) -> Tensor:
    return torch.ones_like(truth[:, :1], dtype=torch.bool)


def rank_histogram(x: Tensor, y: Tensor) -> Tensor:
    """The shares of the ranks of values `(K,)` among members `(M, K)`, of two components that are the same."""
    truth = torch.stack((y, y))[None, :, None]
    ranks = sums(torch.stack((x, x), dim=1)[:, None, :, None], truth, everywhere(truth))["ranks"].sum(0)
    return ranks / ranks.sum()


def coverage(x: Tensor, y: Tensor, level: float) -> float:
    return float(covered(rank_histogram(x, y), level))


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
    shares = rank_histogram(draws[1:].flatten(1), draws[0].flatten())
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / (m + 1)), rtol=0, atol=0.006)


def test_coverage_of_a_narrow_ensemble() -> None:
    """Members with half the standard deviation of the truth cover P(|Z| < z/2): 0.264 and 0.589 for large M."""
    truth, members = normal(20_000), 0.5 * normal(99, 20_000, seed=1)
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


def test_a_turned_field_is_correlated_by_its_angle() -> None:
    """m = 0.3 R(140 deg) y: correlation 1 and that angle, counterclockwise; half of the cells back: its cosine."""
    truth = normal(3, 2, 6, 7)
    angle = torch.tensor(140.0).deg2rad().double()
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    turned = 0.3 * torch.einsum("cd,ndhw->nchw", turn, truth)
    result = scores(turned[None], truth, everywhere(truth))
    assert (result["correlation"], result["veering"], result["angular_error"]) == pytest.approx((1, 140, 140))
    unit = truth / truth.norm(dim=1, keepdim=True)
    both = torch.cat((unit, unit)), torch.cat((turn.mT @ unit.flatten(2), turn @ unit.flatten(2))).view(6, 2, 6, 7)
    result = scores(both[1][None], both[0], everywhere(both[0]))
    assert result["correlation"] == pytest.approx(-math.cos(angle)) and result["angular_error"] == pytest.approx(140)
    assert abs(result["veering"]) == pytest.approx(180)


def test_directions_of_calm_cells_do_not_count() -> None:
    truth, members = normal(1, 2, 2, 2), normal(1, 1, 2, 2, 2, seed=1)
    truth[0, :, 0, 0] = 0
    members[0, 0, :, 1, 1] = 0
    w = [torch.complex(field[0], field[1]) for field in (truth[0], members[0, 0])]
    turns = torch.rad2deg((w[1] * w[0].conj()).angle().abs())[[0, 1], [1, 0]]
    assert scores(members, truth, everywhere(truth))["angular_error"] == pytest.approx(turns.mean().item())


def test_energy_score_is_the_double_sum_over_the_field() -> None:
    members, truth = normal(7, 4, 2, 5, 3), normal(4, 2, 5, 3, seed=1)
    where = torch.rand(4, 1, 5, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    where[3] = False
    found = energy_score(members, truth, where)
    for case in range(3):
        x, y = members[:, case][..., where[case, 0]].flatten(1), truth[case][..., where[case, 0]].flatten()
        pairs = sum((a - b).norm() for a in x for b in x)
        expected = ((x - y).norm(dim=1).mean() - pairs / (2 * 7 * 6)) / math.sqrt(len(y))
        assert found[case].item() == pytest.approx(expected.item())
    assert found[3].isnan()
    cells = where[:3].sum(dim=(1, 2, 3))
    pooled = scores(members, truth, where)["energy_score"]
    assert pooled == pytest.approx(((found[:3] * cells).sum() / cells.sum()).item())
    single = energy_score(members[:1], truth, where)[0].item()
    assert single == pytest.approx(scores(members[:1, :1], truth[:1], where[:1])["rmse_component"])


def test_energy_score_of_one_value_is_the_crps() -> None:
    """With v = 0 everywhere and one cell the norm is |u|: the fair CRPS over sqrt 2."""
    u, y = normal(9, 30), normal(30, seed=1)
    members, truth = (torch.stack((t, 0 * t), dim=-1)[..., None, None] for t in (u, y))
    torch.testing.assert_close(energy_score(members, truth, everywhere(truth)), crps(u, y) / math.sqrt(2))


def test_ties_share_their_ranks() -> None:
    """y = 0 among (-1, 0, 0, 2): rank 1, 2 or 3 with a third each; one y below all."""
    x = torch.tensor([-1.0, 0.0, 0.0, 2.0])[:, None].expand(4, 2)
    shares = rank_histogram(x, torch.tensor([0.0, -5.0]))
    torch.testing.assert_close(shares, torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64) / 6)


def test_rounded_values_of_a_calibrated_ensemble_have_flat_ranks() -> None:
    """Rain-like values, many of them equal: the ranks are flat only because ties are shared."""
    draws = normal(6, 40_000).clamp(min=0).mul(2).round()
    shares = rank_histogram(draws[1:], draws[0])
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 6), rtol=0, atol=0.006)
    assert reliability_index(shares) < 0.02


def test_reliability_index() -> None:
    assert reliability_index(torch.tensor([0.25, 0.25, 0.25, 0.25])) == 0
    assert reliability_index(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(2 * 3 / 4)
    members, truth = normal(9, 50, 2, 8, 8), normal(50, 2, 8, 8, seed=1)
    narrow = scores(0.3 * members, truth, everywhere(truth))
    shares = rank_histogram(0.3 * members.flatten(1), truth.flatten())
    assert narrow["reliability_index"] == pytest.approx(reliability_index(shares).item())
    assert narrow["reliability_index"] > 0.5 > 0.05 > scores(members, truth, everywhere(truth))["reliability_index"]


def test_skill_against_climatology() -> None:
    truth, climatology = normal(4, 2, 3, 5), normal(2, 3, 5, seed=1)
    halfway = (truth + climatology) / 2
    for estimate, skill in ((truth, 1.0), (halfway, 0.75), (climatology.expand_as(truth), 0.0)):
        found = scores(estimate[None], truth, everywhere(truth), climatology=climatology)
        assert found["skill"] == pytest.approx(skill)


def test_cases_pool_to_the_whole() -> None:
    grid = Grid(torch.ones(6, 7, dtype=torch.bool), 2.0, 3.0)
    members, truth, climatology = normal(5, 4, 2, 6, 7), normal(4, 2, 6, 7, seed=1), normal(2, 6, 7, seed=3)
    where = torch.rand(4, 1, 6, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    where[2] = False
    truth[0, 1, 2, 3] = math.nan
    pooled = scores(members, truth, where, grid, climatology)
    found = sums(members, truth, where, grid, climatology)
    cases = {**derive(found), "cells": found["cells"]}
    for case in range(4):
        alone = scores(members[:, [case]], truth[[case]], where[[case]], grid, climatology)
        expected = torch.tensor([alone[name] for name in alone], dtype=torch.float64)
        each = torch.stack([cases[name][case] for name in alone])
        torch.testing.assert_close(each, expected, equal_nan=True)
        assert cases["cells"][case] == (where[case, 0] & truth[case].isfinite().all(0)).sum()
    has, share = cases["cells"] > 0, cases["cells"] / cases["cells"].sum()
    for name, power in (("crps", 1), ("energy_score", 1), ("rmse_component", 2), ("spread", 2)):
        assert (share * cases[name] ** power)[has].sum().item() == pytest.approx(pooled[name] ** power), name
    two = [sums(members[:, part], truth[part], where[part], grid, climatology) for part in (slice(0, 1), slice(1, 4))]
    joined = derive({name: torch.cat([part[name] for part in two]).sum(0) for name in two[0]})
    assert {name: float(value) for name, value in joined.items()} == pytest.approx(pooled)


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
    nothing = sums(normal(3, 2, 2, 4, 5), truth, ~everywhere(truth))
    assert {value.dtype for value in nothing.values()} == {torch.float64} and nothing["ranks"].tolist() == 2 * [4 * [0]]
    single = scores(members, truth, everywhere(truth))
    assert single["crps"] == pytest.approx((members[0] - truth).abs().mean().item())
    assert all(math.isnan(single[name]) for name in ("spread", "spread_skill", "coverage_50", "reliability_index"))


def test_wrong_shapes() -> None:
    truth = normal(2, 2, 4, 5)
    with pytest.raises(ValueError, match=r"where \(N, 1, H, W\)"):
        scores(truth[None], truth, everywhere(truth)[:, 0])


def test_members_that_do_not_differ_have_no_spread_to_judge() -> None:
    truth = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    values = scores(truth.expand(8, -1, -1, -1, -1) + 1e-9, truth, torch.ones(3, 1, 4, 5, dtype=torch.bool))
    assert values["spread"] == 0 and values["rmse_component"] < 1e-6
    assert all(math.isnan(values[name]) for name in ("spread_skill", "coverage_50", "coverage_90"))
