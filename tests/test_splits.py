"""Time blocks: consecutive, apart by the guard, and a guard that finds the correlation time of an AR(1) process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.splits import TimeBlocks, autocorrelation, compare_blocks, independent
from vecfield_diffusion.errors import UserError


def build(velocity: np.ndarray) -> Fields:
    return open_fields(xr.Dataset({"velocity": (("time", "channel", "y", "x"), velocity.astype(np.float32))}))


def process(memory: float, n: int, seed: int = 0) -> np.ndarray:
    """A stationary AR(1) process in every cell: correlation memory^L at lag L, on a mean that varies in space."""
    noise = np.random.default_rng(seed).standard_normal((n, 2, 6, 8))
    state = [noise[0]]
    for innovation in noise[1:]:
        state.append(memory * state[-1] + math.sqrt(1.0 - memory**2) * innovation)
    return np.stack(state) + 5.0 * np.arange(8)


@pytest.mark.parametrize("memory", [0.5, 0.8, 0.9])
def test_the_guard_is_the_lag_at_which_the_correlation_falls_below_a_fifth(memory: float) -> None:
    expected = math.ceil(math.log(0.2) / math.log(memory))
    assert TimeBlocks().guard_of(build(process(memory, 2000))) == pytest.approx(expected, abs=1)


def test_independent_snapshots_need_no_guard_and_a_long_memory_takes_a_tenth() -> None:
    assert TimeBlocks().guard_of(build(process(0.0, 300))) == 0
    drift = np.linspace(0, 1, 100)[:, None, None, None] * np.ones((1, 2, 3, 3))
    assert TimeBlocks().guard_of(build(drift)) == 10
    assert TimeBlocks(guard=3).guard_of(build(drift)) == 3
    assert TimeBlocks().guard_of(build(np.ones((100, 2, 3, 3)))) == 10


def test_gaps_do_not_count_as_values() -> None:
    velocity = process(0.8, 2000)
    gappy = velocity.copy()
    hidden = np.random.default_rng(1).random((2000, 1, 6, 8)) < 0.5
    gappy[np.broadcast_to(hidden, gappy.shape)] = np.nan
    assert TimeBlocks().guard_of(build(gappy)) == pytest.approx(TimeBlocks().guard_of(build(velocity)), abs=1)


def test_blocks_are_consecutive_and_apart_by_the_guard() -> None:
    fields = build(process(0.0, 104))
    assert TimeBlocks(guard=2).split(fields) == {
        "train": range(0, 80),
        "validation": range(82, 92),
        "test": range(94, 104),
    }
    assert TimeBlocks(0.5, 0.1, 0.2, guard=0).split(build(process(0.0, 10))) == {
        "train": range(0, 5),
        "validation": range(5, 6),
        "test": range(6, 8),
    }


@pytest.mark.parametrize("n", [10, 17, 99, 365, 1000])
def test_with_shares_of_one_all_but_the_guards_is_used(n: int) -> None:
    split = TimeBlocks(0.7, 0.2, 0.1, guard=1).split(build(np.zeros((n, 2, 3, 3))))
    assert sum(map(len, split.values())) == n - 2 and split["test"].stop == n


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"leave none for validation .*Give more snapshots or larger shares$"):
        TimeBlocks(guard=0).split(build(np.zeros((5, 2, 3, 3))))
    with pytest.raises(UserError, match=r"guard of 4 .*a smaller guard, e.g. splits.guard=0$"):
        TimeBlocks(guard=4).split(build(np.zeros((8, 2, 3, 3))))
    with pytest.raises(UserError, match="train and validation"):
        TimeBlocks().split(build(np.zeros((1, 2, 3, 3))))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"train": 1.2}, r"^train must be in \[0, 1\], got 1.2"),
        ({"train": 0.9}, "^train must be at most 1 together with validation and test, got"),
        ({"guard": -1}, "^guard must .* got -1"),
        ({"guard": "none"}, "^guard must be 'auto' or an integer"),
    ],
)
def test_numbers_out_of_range(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TimeBlocks(**arguments)


def test_the_correlation_is_that_of_its_definition() -> None:
    """Sums over pairs of values that are both measured, written out."""
    velocity = process(0.8, 60)
    velocity[np.random.default_rng(1).random((60, 1, 6, 8)).repeat(2, axis=1) < 0.3] = np.nan
    values = velocity.astype(np.float32).reshape(60, -1).astype(float)
    a = values - np.nanmean(values, axis=0)
    products = [np.nanmean(a[lag:] * a[: 60 - lag]) for lag in range(60)]
    expected = np.clip(np.array(products) / products[0], -1, 1)
    np.testing.assert_allclose(autocorrelation(build(velocity)), expected, atol=1e-6)


def test_trajectories_are_no_series() -> None:
    """Two runs, of which the second is the first again: its correlation is that of one."""
    one = process(0.7, 50)
    both = build(np.concatenate([one, one]))
    both.runs = np.repeat([0, 1], 50)
    rho, alone = autocorrelation(both), autocorrelation(build(one))
    np.testing.assert_allclose(rho[:50], alone, atol=1e-6)
    assert (rho[50:] == 0).all()
    assert independent(both) == pytest.approx(2 * independent(build(one)), rel=1e-6)
    assert independent(both, range(50)) == pytest.approx(independent(build(one)), rel=1e-6)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_independent_fields_of_an_autoregressive_process(memory: float) -> None:
    """rho(L)^2 = memory^(2 L), so that n are worth n (1 - memory^2) / (1 + memory^2)."""
    fields = build(process(memory, 2000))
    factor = (1 - memory**2) / (1 + memory**2)
    assert independent(fields) == pytest.approx(2000 * factor, rel=0.08)
    assert independent(fields, range(1500, 1700)) == pytest.approx(200 * factor, rel=0.08)
    assert independent(fields, range(0, 2000, 100)) == pytest.approx(20, rel=0.02)  # far apart
    assert independent(fields, [7]) == pytest.approx(1.0) and independent(fields, []) == 0.0


def tide(n: int, period: float = 12.42) -> np.ndarray:
    """A wave that runs through the domain, u = cos(k x - w t) and v = 0."""
    x, t = np.arange(8) / 8, np.arange(n)[:, None]
    u = np.cos(2 * math.pi * (x - t / period))
    return np.stack([u, 0 * u], axis=1)[:, :, None].repeat(6, axis=2)


@pytest.mark.parametrize("n", [200, 1000, 3000])
def test_a_tide_is_worth_two_fields_however_long_it_is_watched(n: int) -> None:
    """rho = cos(w L) has the mean square 1/2, though its first zero is at a quarter of the period."""
    assert independent(build(tide(n))) == pytest.approx(2.0, rel=0.02)
    assert independent(build(tide(n)), range(n // 10)) == pytest.approx(2.0, rel=0.1)


def test_the_guard_counts_correlation_that_comes_back() -> None:
    """Half of the variance is a tide: rho is above 0.2 near every period, to the longest guard."""
    velocity = tide(400) + process(0.0, 400) - 5.0 * np.arange(8)
    assert TimeBlocks().guard_of(build(velocity)) in range(37, 41)  # 3 * 12.42 = 37.3
    assert TimeBlocks().guard_of(build(process(0.0, 400))) == 0


@pytest.mark.parametrize(
    ("factor", "shift", "said"), [(1.0, 0.0, False), (5.0, 0.0, True), (0.2, 0.0, True), (1.0, 3.0, True)]
)
def test_blocks_that_are_unlike(factor: float, shift: float, said: bool) -> None:
    """The test block has anomalies of other size, or another mean."""
    velocity = process(0.0, 200) - 5.0 * np.arange(8)
    split = {"train": range(160), "validation": range(160, 180), "test": range(180, 200)}
    velocity[180:] = factor * velocity[180:] + shift
    notes = compare_blocks(build(velocity), split)
    assert len(notes) == said
    mean = velocity[:160].mean(axis=0)
    sizes = [math.sqrt(((velocity[block] - mean) ** 2).mean()) for block in (range(180, 200), range(160))]
    if said:
        assert (
            f"the test snapshots are unlike those of training: their RMS about its mean is {sizes[0]:.3g}" in notes[0]
        )
        assert f"{sizes[0] / sizes[1]:.2g} times that of training, {sizes[1]:.3g}" in notes[0]
