"""Time blocks: consecutive, apart by the guard, and a guard that finds the correlation time of an AR(1) process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.splits import TimeBlocks
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
    with pytest.raises(UserError, match="leave none for validation.*splits.guard=0"):
        TimeBlocks(guard=0).split(build(np.zeros((5, 2, 3, 3))))
    with pytest.raises(UserError, match="guard of 4"):
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
