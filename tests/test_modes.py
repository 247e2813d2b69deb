"""Filling by modes, on fields inside and outside their span."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vecfield_diffusion.evaluation.baselines import Climatology
from vecfield_diffusion.evaluation.covariance import unexplained
from vecfield_diffusion.evaluation.modes import DINEOF, GappyPOD, fill_gaps
from vecfield_diffusion.physics.grid import Grid

H, W, K = 12, 16, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def domain() -> Grid:
    valid = torch.ones(H, W, dtype=torch.bool)
    valid[3:6, 9:13] = False
    return Grid(valid)


PATTERNS, MEAN = draw(K, 2, H, W), draw(2, H, W, seed=1)


def of_the_span(n: int, grid: Grid, seed: int = 2) -> np.ndarray:
    """Fields MEAN + K patterns, each weaker than the one before, NaN on land."""
    weights = draw(n, K, seed=seed) * 0.7 ** np.arange(K)
    return np.where(grid.valid.numpy(), MEAN + np.einsum("nk,kchw->nchw", weights, PATTERNS), np.nan)


def pixels(share: float, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((H, W)) < share


@pytest.mark.parametrize("make", [GappyPOD, lambda: DINEOF(tolerance=1e-12, iterations=20_000)])
def test_fields_of_the_span_are_recovered(make: object) -> None:
    grid = domain()
    method, field = make().fit(of_the_span(60, grid), grid), of_the_span(1, grid, seed=9)[0]
    for observed in (pixels(0.1), pixels(0.5), (np.arange(H) < 4)[:, None] & np.ones((H, W), dtype=bool)):
        found = method.fill(np.where(observed, field, np.nan), observed)
        np.testing.assert_allclose(found, field, atol=2e-5)


def test_dineof_ends_at_its_tolerance() -> None:
    """Looser tolerances end further from the field; one repetition is the second projection of the filled field."""
    grid = domain()
    train, field, observed = of_the_span(60, grid), of_the_span(1, grid, seed=9)[0], pixels(0.15)
    errors = []
    for tolerance in (0.3, 1e-2, 1e-4, 1e-6):
        method = DINEOF(tolerance, 10_000).fit(train, grid)
        errors.append(np.nanmax(np.abs(method.fill(np.where(observed, field, np.nan), observed) - field)))
    assert all(after < 0.3 * before for before, after in zip(errors[:-1], errors[1:], strict=True))
    method = DINEOF(1e-9, 1).fit(train, grid)
    valid = grid.valid.numpy()
    filled = np.where(observed, field - method.mean, 0.0)[:, valid].ravel()
    for _ in range(2):  # the start is the first projection, the one repetition the second
        projected = method.modes @ method.modes.T @ filled
        filled = np.where(np.tile(observed[valid], 2), filled, projected)
    found = method._complete(np.where(observed, field - method.mean, 0.0), observed, 0 * valid, len(method.variances))
    np.testing.assert_allclose(found[:, valid].ravel(), projected, atol=1e-12)


def test_dineof_is_the_plain_least_squares_in_the_end() -> None:
    grid = domain()
    train = of_the_span(60, grid) + 0.3 * draw(60, 2, H, W, seed=3)
    method, observed, valid = DINEOF(1e-13, 100_000).fit(train, grid), pixels(0.3), grid.valid.numpy()
    anomaly = np.where(observed & valid, draw(2, H, W, seed=7), 0.0)
    found = method._complete(anomaly, observed & valid, 0 * valid, 3)[:, valid].ravel()
    seen, modes = np.tile(observed[valid], 2), method.modes[:, :3]
    expected = np.linalg.lstsq(modes[seen], anomaly[:, valid].ravel()[seen], rcond=None)[0]
    np.testing.assert_allclose(found, modes @ expected, atol=1e-9)


def test_gappy_pod_is_the_posterior_of_its_modes() -> None:
    """The dense Gaussian posterior with the nugget of that number of modes and the error of every cell."""
    grid = domain()
    train = of_the_span(60, grid) + 0.3 * draw(60, 2, H, W, seed=3)
    method, observed, valid = GappyPOD().fit(train, grid), pixels(0.3) & domain().valid.numpy(), grid.valid.numpy()
    sigma = np.where(observed, 0.1 + np.random.default_rng(1).random((H, W)), 0.0)
    field = train[3] - method.mean
    rank = method._rank(np.where(observed, field, 0.0), observed, sigma)
    prior = (method.modes[:, :rank] * method.variances[:rank]) @ method.modes[:, :rank].T
    prior += method.nuggets[rank - 1] * np.eye(len(prior))
    seen, noise = np.tile(observed[valid], 2), np.tile((sigma**2)[valid], 2)
    gain = prior[:, seen] @ np.linalg.inv(prior[np.ix_(seen, seen)] + np.diag(noise[seen]))
    expected = gain @ field[:, valid].ravel()[seen]
    found = (method.fill(train[3], observed, sigma) - method.mean)[:, valid].ravel()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_cell_of_large_error_is_ignored() -> None:
    grid = domain()
    method, field, observed = GappyPOD().fit(of_the_span(60, grid), grid), of_the_span(1, grid, seed=9)[0], pixels(0.2)
    observed[0, 0] = True
    wrong, sigma = field.copy(), np.full((H, W), 1e-3)
    wrong[:, 0, 0] += 50.0
    assert np.nanmax(np.abs(method.fill(wrong, observed, sigma) - field)) > 1
    sigma[0, 0] = 1e4
    assert np.nanmax(np.abs(method.fill(wrong, observed, sigma) - field)) < 0.01


@pytest.mark.parametrize("make", [GappyPOD, DINEOF])
def test_as_many_modes_as_the_field_holds(make: object) -> None:
    """Fields of four modes under noise: more are fitted to noise, fewer miss some; the fill is near the best of all."""
    grid = domain()
    noise = 0.2 * draw(160, 2, H, W, seed=3)
    train = of_the_span(160, grid) + noise
    method, observed = make().fit(train, grid), pixels(0.4) & grid.valid.numpy()
    fields = of_the_span(20, grid, seed=9)
    seen = fields + 0.2 * draw(20, 2, H, W, seed=4)
    ranks, errors = [], []
    for field, y in zip(fields, seen, strict=True):
        anomaly = np.where(observed, y - method.mean, 0.0)
        ranks.append(method._rank(anomaly, observed, 0 * MEAN[0]))
        found = method.fill(np.where(observed, y, np.nan), observed)
        errors.append(np.square(found - field)[:, grid.valid.numpy() & ~observed].mean())
    assert 3 <= np.median(ranks) <= 6
    prior = Climatology().fit(train, grid).fill(seen[0], np.zeros((H, W), dtype=bool))
    assert np.sqrt(np.mean(errors)) < 0.15 * np.nanstd(fields - prior)


def test_gaps_of_the_training_fields_are_filled() -> None:
    """A matrix of rank 3 with 30 % of its values missing comes back, in clouds or at random."""
    exact = draw(50, 3) * [3.0, 2.0, 1.0] @ draw(3, 200, seed=1)
    known = np.random.default_rng(2).random(exact.shape) < 0.7
    found = fill_gaps(np.where(known, exact, np.nan), tolerance=1e-6, iterations=300)
    np.testing.assert_array_equal(found[known], exact[known])
    np.testing.assert_allclose(found, exact, atol=1e-3)
    grid = domain()
    train = of_the_span(80, grid)
    clouds = np.kron(np.random.default_rng(3).random((80, 1, H // 4, W // 4)) < 0.3, np.ones((1, 1, 4, 4))) > 0
    method = GappyPOD().fit(np.where(clouds, np.nan, train), grid)
    field, observed = of_the_span(1, grid, seed=9)[0], pixels(0.3)
    error = np.sqrt(np.nanmean(np.square(method.fill(np.where(observed, field, np.nan), observed) - field)))
    assert error < 0.1 * np.nanstd(field - MEAN)
    zeros = np.nan_to_num(np.where(clouds, np.nan, train) - method.mean)[:, :, grid.valid.numpy()].reshape(80, -1)
    assert method.nuggets[3] < 0.1 * unexplained(zeros)[0][3]


def test_nuggets_are_what_new_fields_keep_beyond_the_modes() -> None:
    """White noise of variance v under four modes: from the fourth mode on the nugget is v."""
    grid = domain()
    method = GappyPOD().fit(of_the_span(400, grid) + 0.3 * draw(400, 2, H, W, seed=3), grid)
    assert method.nuggets[3] == pytest.approx(0.09, rel=0.05) and method.nuggets[2] > 1.5 * method.nuggets[3]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        DINEOF(0)
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        DINEOF(iterations=0)
    for method in (GappyPOD(), DINEOF()):
        with pytest.raises(ValueError, match=f"{type(method).__name__} needs training fields that vary, got 3 without"):
            method.fit(np.ones((3, 2, H, W)), domain())
