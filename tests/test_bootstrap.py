"""Intervals in cases where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.bootstrap import bootstrap, resamples


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_resamples_are_runs_of_consecutive_cases() -> None:
    chosen = resamples(11, block=4, repeats=500)
    assert chosen.shape == (500, 11) and chosen.min() == 0 and chosen.max() == 10
    for start in (0, 4, 8):
        assert (chosen[:, start : start + 4].diff(dim=1) == 1).all()
    assert set(chosen[:, 0].tolist()) == set(range(8))
    assert (resamples(64, repeats=9)[:, :4].diff(dim=1) == 1).all()  # 4 = 64^(1/3)
    assert torch.equal(resamples(9, 2, 30, seed=3), resamples(9, 2, 30, seed=3))


def test_trivial_cases_are_exact() -> None:
    assert bootstrap(torch.full((7,), 2.5)) == (2.5, 2.5)
    assert bootstrap(torch.tensor([3.0])) == (3.0, 3.0)
    values = normal(8)
    missing = values.index_fill(0, torch.tensor([2, 5]), math.nan)
    rest = missing[missing.isfinite()].mean().item()
    assert bootstrap(missing, block=8) == pytest.approx((rest, rest))
    assert all(math.isnan(value) for value in bootstrap(torch.full((4,), math.nan)))


def test_two_cases_follow_the_binomial() -> None:
    """Values 0 and 1: the mean of two draws is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4."""
    values = torch.tensor([0.0, 1.0])
    assert bootstrap(values, block=1, level=0.6) == (0.0, 1.0)
    assert bootstrap(values, block=1, level=0.4) == (0.5, 0.5)


def test_independent_cases_give_the_interval_of_the_normal_law() -> None:
    values = normal(400)
    low, high = bootstrap(values, block=1, repeats=4000, level=0.9)
    mean, half = values.mean().item(), 1.6449 * values.std(correction=0).item() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_blocks_see_what_repeats_in_time() -> None:
    """Every value ten times in a row: blocks that hold them together give sqrt(10) times the width of single cases."""
    values = normal(100).repeat_interleave(10)
    widths = [high - low for low, high in (bootstrap(values, block=block, repeats=2000) for block in (1, 50))]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(10), rel=0.15)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"cases": 0}, "cases must be >= 1, got 0"),
        ({"cases": 5, "block": 6}, "block must be between 1 and the 5 cases, got 6"),
        ({"cases": 5, "repeats": 0}, "repeats must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            resamples(**arguments)
    with pytest.raises(ValueError, match="level must be above 0 and below 1, got 1"):
        bootstrap(torch.ones(3), level=1.0)
