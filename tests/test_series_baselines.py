"""Baselines of series against dense posteriors and series that they know exactly."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from test_spacetime import H, T, W, dense_posterior, fields, gappy, land, random

from vecfield_diffusion.evaluation import series as module
from vecfield_diffusion.evaluation.baseline import mean_field
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.series import (
    SERIES_BASELINES,
    ExtendedEOF,
    Law,
    ObservedSeries,
    SeriesBaseline,
    SpaceTimeDINEOF,
    SpaceTimeInterpolation,
    TimeInterpolation,
    fit_series,
)
from vecfield_diffusion.evaluation.spacetime import SpaceTime
from vecfield_diffusion.physics.grid import Grid

SEA = Grid(torch.ones(H, W, dtype=torch.bool))


def prepared(prior: SpaceTime, past: bool = False) -> SpaceTimeInterpolation:
    """Optimal interpolation with a field that is known, not learnt."""
    found = SpaceTimeInterpolation(past)
    found.grid, found.valid, found.field = SEA, prior.valid, prior
    return found


def filled(baseline: SeriesBaseline, y: np.ndarray, noise: np.ndarray | float = 0.0, *frames: int) -> list[Law]:
    """The laws of some frames, or of all."""
    return list(baseline.fill(ObservedSeries(y, np.broadcast_to(noise, y.shape), frames or range(len(y)))))


@pytest.mark.parametrize("prior", fields())
def test_optimal_interpolation_in_space_and_time_is_the_dense_posterior(prior: SpaceTime) -> None:
    """All frames are within reach of each other: what is observed of a frame, before and after it counts in full."""
    y, noise = gappy(prior)
    mean, covariance = dense_posterior(prior, y, noise)
    std = np.sqrt(covariance.diagonal()).reshape(mean.shape)
    laws = filled(prepared(prior), y, noise)
    for frame, law in enumerate(laws):
        assert law.members is None and np.isnan(law.mean[:, ~prior.valid]).all()
        np.testing.assert_allclose(law.mean[:, prior.valid], mean[frame][:, prior.valid], atol=1e-10)
        np.testing.assert_allclose(law.std[:, prior.valid], std[frame][:, prior.valid], atol=1e-10)


def test_past_alone_is_the_dense_posterior_of_what_is_earlier() -> None:
    prior = fields()[1]
    y, noise = gappy(prior)
    for frame, law in enumerate(filled(prepared(prior, past=True), y, noise)):
        known = np.where(np.arange(T)[:, None, None, None] <= frame, y, np.nan)
        mean, covariance = dense_posterior(prior, known, noise)
        std = np.sqrt(covariance.diagonal()).reshape(mean.shape)
        np.testing.assert_allclose(law.mean[:, prior.valid], mean[frame][:, prior.valid], atol=1e-10)
        np.testing.assert_allclose(law.std[:, prior.valid], std[frame][:, prior.valid], atol=1e-10)


def test_trajectories_are_those_of_the_interpolation_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law of a frame does not depend on whether members are drawn; two gaps make three blocks."""
    prior, frames = fields()[0], [0, 1, 3, 4]
    monkeypatch.setattr(module, "BLOCK", 2)
    y, noise = gappy(prior)
    laws = list(prepared(prior).fill(ObservedSeries(y, noise, frames), members=3, seed=8))
    blocks = [range(0, 2), range(3, 5)]
    parts = list(Interpolation(prior).parts(y, noise, blocks, members=3, seed=8))
    want = np.concatenate([part.members for part in parts], axis=1)
    np.testing.assert_array_equal(np.stack([law.members for law in laws], axis=1), want)
    for law, plain in zip(laws, filled(prepared(prior), y, noise, *frames), strict=True):
        np.testing.assert_array_equal(law.mean, plain.mean)
        np.testing.assert_array_equal(law.std, plain.std)


def test_the_field_in_space_and_time_is_learnt_from_training() -> None:
    """It fills as well as the true one but for what 600 frames leave uncertain, and far better than frame by frame."""
    prior = fields()[0]
    draw = prior.mean + prior.draw(630, np.random.default_rng(3))
    grid = Grid(torch.from_numpy(land()))
    found = SpaceTimeInterpolation().fit(np.where(prior.valid, draw[:600], np.nan), grid)
    assert "(log density of hidden values: separable " in found.learnt
    hidden = random(30, 1, H, W, seed=4) > 0
    y = np.where(hidden | ~prior.valid, np.nan, draw[600:])

    def error(means: Iterable[np.ndarray]) -> float:
        return float(np.nanmean(np.square(np.stack(list(means)) - draw[600:])[np.broadcast_to(hidden, y.shape)]))

    ours, best = (error(law.mean for law in filled(each, y, 1e-6)) for each in (found, prepared(prior)))
    alone = error(Interpolation(found.field, before=0, after=0).fill(y, 1e-6).mean)
    assert ours < 1.25 * best and ours < 0.8 * alone, (ours, best, alone)
    with pytest.raises(ValueError, match="fewer than 10"):
        SpaceTimeInterpolation().fit(draw[:9], grid)


def test_interpolation_in_time_is_exact_on_what_grows_evenly() -> None:
    """Between observations; beyond them the nearest one, and the training mean of cells that are never observed."""
    slope, start, training = random(2, H, W), random(2, H, W, seed=1), random(7, 2, H, W, seed=2)
    truth = start + slope * np.arange(8.0)[:, None, None, None]
    y = truth.copy()
    y[[0, 3, 4, 7]] = np.nan
    y[:, :, 0, 0] = np.nan
    both, last = (TimeInterpolation(past).fit(training, SEA) for past in (False, True))
    want = truth.copy()
    want[0], want[7] = truth[1], truth[6]
    want[:, :, 0, 0] = training.mean(axis=0)[:, 0, 0]
    np.testing.assert_allclose([law.mean for law in filled(both, y)], want, atol=1e-12)
    held = truth[[1, 1, 2, 2, 2, 5, 6, 6]]
    held[0] = training.mean(axis=0)
    held[:, :, 0, 0] = training.mean(axis=0)[:, 0, 0]
    np.testing.assert_allclose([law.mean for law in filled(last, y)], held, atol=1e-12)


def travelling_wave(frames: int, phase: float = 0.0) -> np.ndarray:
    """`(T, 2, H, W)`: one wave that travels along x, its components a quarter of a period apart."""
    angle = 2 * np.pi * np.arange(W) / W + 0.7 * np.arange(frames)[:, None] + phase
    amplitude = np.linspace(1, 2, H)[:, None]
    return np.stack((amplitude * np.cos(angle)[:, None], amplitude * np.sin(angle)[:, None]), axis=1)


def test_extended_eofs_know_how_a_wave_travels() -> None:
    """Windows of a wave are sums of two functions: a few cells of other frames say all about one without any."""
    training = travelling_wave(60)
    truth = travelling_wave(9, phase=1.234)
    y = np.where(random(9, 1, H, W, seed=5) > 0, truth, np.nan)
    y[4] = np.nan
    (law,) = filled(ExtendedEOF().fit(training, SEA), y, 1e-8, 4)
    np.testing.assert_allclose(law.mean, truth[4], atol=2e-3)
    (past,) = filled(ExtendedEOF(past=True).fit(training, SEA), y, 1e-8, 4)
    later = np.where(np.arange(9)[:, None, None, None] > 4, y + 1, y)
    np.testing.assert_array_equal(filled(ExtendedEOF(past=True).fit(training, SEA), later, 1e-8, 4)[0].mean, past.mean)
    np.testing.assert_allclose(past.mean, truth[4], atol=2e-2)
    gaps = training.copy()
    gaps[8::9] = np.nan
    with pytest.raises(ValueError, match="fewer than 10 windows of 9 training fields without a missing one"):
        ExtendedEOF().fit(gaps, SEA)


def test_dineof_completes_a_matrix_of_low_rank() -> None:
    """Frames that are sums of two functions, half of their cells hidden, beneath training fields of the same two."""
    grid = Grid(torch.ones(12, 15, dtype=torch.bool))
    functions = random(2, 2, 12, 15)
    training = np.einsum("tk,kchw->tchw", random(40, 2, seed=1), functions)
    truth = np.einsum("tk,kchw->tchw", random(12, 2, seed=2), functions) + mean_field(training)
    y = np.where(random(12, 1, 12, 15, seed=3) > 0, truth, np.nan)
    found = np.stack([law.mean for law in filled(SpaceTimeDINEOF().fit(training, grid), y)])
    known = np.isfinite(y)
    np.testing.assert_allclose(found[known], truth[known], atol=1e-12)
    assert np.sqrt(np.square(found - truth)[~known].mean()) < 0.02 * truth.std()


def test_all_baselines_of_series_fit_and_fill_with_land_and_missing_frames() -> None:
    grid = Grid(torch.from_numpy(land()))
    training = np.where(land(), travelling_wave(60), np.nan)
    training[5] = np.nan
    y = np.where(random(10, 1, H, W, seed=3) > 0, np.where(land(), travelling_wave(10), np.nan), np.nan)
    fitted, reasons = fit_series(list(SERIES_BASELINES), training, grid, past=False)
    assert reasons == {} and list(fitted) == list(SERIES_BASELINES)
    for baseline in fitted.values():
        for law in filled(baseline, y, 1e-4, 0, 9):
            assert (np.isfinite(law.mean) == land()).all() and (law.std is None or (law.std[:, land()] >= 0).all())
        (nothing,) = filled(baseline, np.full_like(y, np.nan), 0.0, 3)
        mean = baseline.field.mean if isinstance(baseline, SpaceTimeInterpolation) else baseline.mean
        if isinstance(baseline, ExtendedEOF):  # that of the middle of the windows
            mean = baseline.modes.mean[:, module.REACH * H : (module.REACH + 1) * H]
        np.testing.assert_allclose(nothing.mean[:, land()], mean[:, land()], atol=1e-12)
    fitted, reasons = fit_series(list(SERIES_BASELINES), training[:6], grid, past=True)
    assert list(fitted) == ["last_observed"]
    assert reasons.keys() == SERIES_BASELINES.keys() - fitted.keys()
    assert "it is last_observed" in reasons["linear_in_time"] and "fewer than 10" in reasons["oi_spacetime"]
