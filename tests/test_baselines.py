"""Interpolators on fields they must reproduce, optimal interpolation against dense Gaussian conditioning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from vecfield_diffusion.evaluation.baselines import (
    BASELINES,
    Baseline,
    Biharmonic,
    Climatology,
    Cubic,
    Linear,
    Nearest,
    OptimalInterpolation,
    Persistence,
    fit_baselines,
    unsuited,
)
from vecfield_diffusion.evaluation.covariance import Homogeneous, LowRank
from vecfield_diffusion.evaluation.modes import DINEOF, GappyPOD
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, gradient, rotated_gradient

H, W = 14, 22
METHODS = [
    Climatology,
    Persistence,
    Nearest,
    Linear,
    Cubic,
    Biharmonic,
    GappyPOD,
    DINEOF,
    OptimalInterpolation,
    lambda: OptimalInterpolation("homogeneous"),
    lambda: OptimalInterpolation("pca"),
]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def domain(boundary_x: str = "open", boundary_y: str = "open", land: bool = False, dx: float = 2.0) -> Grid:
    valid = torch.ones(H, W, dtype=torch.bool)
    if land:
        valid[5:8, 9:14] = valid[:2, -4:] = False
    return Grid(valid, dx, 0.5, boundary_x, boundary_y)


def smooth_fields(n: int, grid: Grid, seed: int = 0) -> np.ndarray:
    """Correlated periodic fields with different components, NaN on land."""
    wave = np.hypot(*np.meshgrid(np.fft.fftfreq(W) * W, np.fft.fftfreq(H) * H))
    waves = np.fft.fft2(draw(n, 2, H, W, seed=seed)) / (1 + wave) ** 2
    waves[:, 1] = 0.5 * waves[:, 1] + 0.4j * waves[:, 0]
    fields = np.fft.ifft2(waves).real + np.array([0.3, -0.1])[:, None, None]
    return np.where(grid.valid.numpy(), fields, np.nan)


def pixels(share: float, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((H, W)) < share


def hole() -> np.ndarray:
    observed = np.ones((H, W), dtype=bool)
    observed[4:9, 6:13] = False
    return observed


def coordinates(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(W) * grid.dx[0].item(), np.arange(H) * grid.dy[0].item()
    return np.meshgrid(x, y)


def filled(method: Baseline, field: np.ndarray, observed: np.ndarray, grid: Grid) -> np.ndarray:
    return method.fit(smooth_fields(12, grid), grid).fill(np.where(observed, field, np.nan), observed)


@pytest.mark.parametrize("make", METHODS)
def test_observed_cells_stay_and_land_is_empty(make: object) -> None:
    grid = domain("periodic", land=True)
    field, valid = smooth_fields(1, grid, seed=9)[0], grid.valid.numpy()
    method = make().fit(smooth_fields(30, grid), grid)
    for observed in (pixels(0.15), pixels(0.9), hole(), pixels(0) | (np.indices((H, W)).sum(0) == 7), valid):
        found = method.fill(np.where(observed, field, np.nan), observed)
        seen = observed & valid
        np.testing.assert_allclose(found[:, seen], field[:, seen], rtol=0, atol=1e-9)
        assert np.isnan(found[:, ~valid]).all() and np.isfinite(found[:, valid]).all()
        dirty = np.where(valid, field, 1e6)
        np.testing.assert_array_equal(method.fill(np.where(observed, dirty, np.nan), observed), found)


@pytest.mark.parametrize("make", METHODS)
def test_without_observations_the_training_mean(make: object) -> None:
    grid = domain(land=True)
    train = smooth_fields(30, grid)
    found = make().fit(train, grid).fill(np.full((2, H, W), np.nan), np.zeros((H, W), dtype=bool))
    np.testing.assert_allclose(found, train.mean(axis=0), rtol=1e-12)


def test_climatology_skips_gaps() -> None:
    grid = domain()
    train = draw(4, 2, H, W)
    train[1, :, 3, 4] = np.nan
    train[:, :, 6, 6] = np.nan
    found = Climatology().fit(train, grid).fill(np.zeros((2, H, W)), np.zeros((H, W), dtype=bool))
    np.testing.assert_allclose(found[:, 3, 4], train[[0, 2, 3], :, 3, 4].mean(0))
    np.testing.assert_allclose(found[0, 6, 6], np.nanmean(train[:, 0]))


def test_nearest_knows_spacing_and_period() -> None:
    """Two stations at columns 2 and 19 of 22: across the seam column 21 is 3 from column 2 and 2 from column 19."""
    grid = domain("periodic", dx=1.0)
    observed = np.zeros((H, W), dtype=bool)
    observed[0, [2, 19]] = observed[4, 2] = True
    field = np.zeros((2, H, W))
    field[:, 0, 2], field[:, 0, 19], field[:, 4, 2] = 1, 2, 3
    found = filled(Nearest(), field, observed, grid)[0]
    assert found[0, 21] == 2 and found[0, 0] == 1 and found[0, 10] == 1 and found[0, 11] == 2
    assert found[1, 2] == 1 and found[3, 2] == 3 and found[13, 2] == 3
    assert filled(Nearest(), field, observed, domain(dx=1.0))[0][0, 21] == 2
    stretched = filled(Nearest(), field, observed, domain(dx=0.01))[0]
    assert stretched[3, 21] == 3  # 1.5 rows are nearer than 2 rows, 19 short columns hardly count


def test_linear_is_exact_on_linear_fields_inside_the_hull() -> None:
    grid = domain()
    x, y = coordinates(grid)
    field = np.stack((1 + 0.2 * x - y, 3 * y + 0.1 * x))
    observed = pixels(0.1)
    observed[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    np.testing.assert_allclose(filled(Linear(), field, observed, grid), field, atol=1e-12)


def test_linear_closes_a_periodic_axis() -> None:
    """Known at columns 0, 8 and 16 of 22: between 16 and 22 = 0 the line falls back to the first value."""
    grid = domain("periodic")
    observed = np.zeros((H, W), dtype=bool)
    observed[:, [0, 8, 16]] = True
    values = np.interp(np.arange(W), [0, 8, 16, 22], [1.0, 3.0, 4.0, 1.0])
    field = np.broadcast_to(values, (2, H, W))
    np.testing.assert_allclose(filled(Linear(), field, observed, grid), field, atol=1e-12)


def test_persistence_is_the_previous_field() -> None:
    """Where both of its components are known; elsewhere the training mean; measured values stand."""
    grid = domain(land=True)
    valid, observed = grid.valid.numpy(), pixels(0.2)
    train, (field, before) = smooth_fields(12, grid), smooth_fields(2, grid, seed=9)
    method = Persistence().fit(train, grid)
    before[1, 2, 3] = np.nan
    found = method.fill(np.where(observed, field, np.nan), observed, previous=before)
    expected = np.where(np.isfinite(before).all(axis=0), before, train.mean(axis=0))
    np.testing.assert_array_equal(found, np.where(valid, np.where(observed, field, expected), np.nan))
    nothing = np.zeros_like(observed)
    np.testing.assert_array_equal(method.fill(field, nothing, previous=before), np.where(valid, expected, np.nan))
    np.testing.assert_array_equal(method.fill(field, nothing), Climatology().fit(train, grid).fill(field, nothing))
    with pytest.raises(ValueError, match=r"expected previous \(2, H, W\) of shape \(2, 14, 22\), got \(14, 22\)"):
        method.fill(field, nothing, previous=before[0])


def test_cubic_is_exact_on_linear_fields_and_better_on_curved_ones() -> None:
    grid = domain()
    x, y = coordinates(grid)
    observed = pixels(0.2)
    observed[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    plane = np.stack((1 + 0.2 * x - y, 3 * y + 0.1 * x))
    np.testing.assert_allclose(filled(Cubic(), plane, observed, grid), plane, atol=1e-4)
    curved = np.stack((np.sin(x / 8) * y, np.cos(y / 2) + x**2 / 200))
    errors = [np.abs(filled(method, curved, observed, grid) - curved).mean() for method in (Cubic(), Linear())]
    assert errors[0] < 0.5 * errors[1]


def test_cubic_takes_the_nearest_value_outside_the_hull() -> None:
    grid, field, observed = domain(), draw(2, H, W), pixels(0.1)
    observed[:, :9] = observed[:, -5:] = False
    ours, nearest = (filled(method, field, observed, grid) for method in (Cubic(), Nearest()))
    np.testing.assert_array_equal(ours[:, :, :9], nearest[:, :, :9])
    assert np.abs(ours[:, :, 11:15] - nearest[:, :, 11:15]).max() > 0.1


def test_linear_with_few_or_aligned_stations_is_nearest() -> None:
    grid, field = domain(), draw(2, H, W)
    observed = np.zeros((H, W), dtype=bool)
    observed[3, 4] = True
    np.testing.assert_array_equal(filled(Linear(), field, observed, grid), filled(Nearest(), field, observed, grid))
    observed[3, :] = True
    np.testing.assert_array_equal(filled(Linear(), field, observed, grid), filled(Nearest(), field, observed, grid))


def test_biharmonic_continues_harmonic_polynomials_into_a_hole() -> None:
    grid = domain(dx=0.7)
    x, y = coordinates(grid)
    field = np.stack((1 + x - 2 * y + 3 * x * y + (x**2 - y**2), x**3 - 3 * x * y**2 + y))
    found = filled(Biharmonic(), field, hole(), grid)
    np.testing.assert_allclose(found, field, atol=1e-7 * np.abs(field).max())
    quartic = np.stack((x**4, y**4))  # not biharmonic, so that the smoothest continuation is another
    error = filled(Biharmonic(), quartic, hole(), grid) - quartic
    assert np.abs(error).max() > 1e-3 * np.abs(quartic[:, ~hole()]).max()


def test_biharmonic_is_exact_on_linear_fields_from_scattered_cells() -> None:
    grid = domain(land=True)
    x, y = coordinates(grid)
    field = np.where(grid.valid.numpy(), np.stack((1 + 0.2 * x - y, 3 * y + 0.1 * x)), np.nan)
    np.testing.assert_allclose(filled(Biharmonic(), field, pixels(0.15), grid), field, atol=1e-7)


def test_biharmonic_solves_the_discrete_equation_on_the_torus() -> None:
    grid = domain("periodic", "periodic")
    observed = pixels(0.4)
    found = filled(Biharmonic(), draw(2, H, W), observed, grid)

    def laplacian(f: np.ndarray) -> np.ndarray:
        along_x = np.roll(f, 1, -1) - 2 * f + np.roll(f, -1, -1)
        along_y = np.roll(f, 1, -2) - 2 * f + np.roll(f, -1, -2)
        return along_x / 4 + along_y / 0.25

    residual = laplacian(laplacian(found))
    assert np.abs(residual[:, ~observed]).max() < 1e-8 * np.abs(residual).max()


def test_biharmonic_fills_a_lake_without_observations() -> None:
    grid = domain()
    grid.valid[:, 10] = False
    observed = pixels(0.3) & (np.arange(W) < 10)
    field = np.where(grid.valid.numpy(), 2.5, np.nan) * np.ones((2, 1, 1))
    np.testing.assert_allclose(filled(Biharmonic(), field, observed, grid), field, rtol=1e-4)


def dense(covariance: Homogeneous | LowRank) -> np.ndarray:
    """The covariance matrix of all values, from its definition."""
    if isinstance(covariance, LowRank):
        modes = covariance.modes
        return modes @ np.diag(covariance.variances) @ modes.T + covariance.nugget * np.eye(len(modes))
    height, width = covariance.spectrum.shape[-2:]
    offsets = np.fft.ifft2(covariance.spectrum).real
    h, w = covariance.valid.shape
    cells = [(c, i, j) for c in range(2) for i in range(h) for j in range(w)]
    return np.array([[offsets[c, d, (i - k) % height, (j - m) % width] for d, k, m in cells] for c, i, j in cells])


def condition(
    prior: np.ndarray, y: np.ndarray, seen: np.ndarray, noise: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Textbook Gaussian conditioning: K = S A^T (A S A^T + R)^-1, mean K y, covariance S - K A S; R or its diagonal."""
    noise = noise if np.ndim(noise) == 2 else noise * np.eye(seen.sum())
    gain = prior[:, seen] @ np.linalg.inv(prior[np.ix_(seen, seen)] + noise)
    return gain @ y[seen], np.diag(prior - gain @ prior[seen])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("boundaries", [("periodic", "periodic"), ("open", "periodic"), ("open", "open")])
def test_homogeneous_posterior_is_exact(boundaries: tuple[str, str], share: float) -> None:
    grid = domain(*boundaries)
    field, train, sigma = smooth_fields(1, grid, seed=9)[0], smooth_fields(40, grid), 0.05
    method = OptimalInterpolation("homogeneous").fit(train, grid)
    observed = pixels(share)
    seen = np.tile(observed.ravel(), 2)
    mean, variance = condition(dense(method.covariance), (field - method.mean).ravel(), seen, sigma**2)
    found_mean, found_std = method.posterior(np.where(observed, field, np.nan), observed, sigma)
    np.testing.assert_allclose(found_mean - method.mean, mean.reshape(2, H, W), atol=1e-8)
    np.testing.assert_allclose(found_std**2, variance.reshape(2, H, W), atol=1e-8)
    np.testing.assert_allclose(method.fill(field, observed, sigma), found_mean, atol=1e-12)


def cellwise(least: float, seed: int = 7) -> np.ndarray:
    """Errors that differ: a third of the cells have the least, others up to ten times as much."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((H, W)) < 1 / 3, least, (least + 0.03) * (1 + 9 * rng.random((H, W))))


@pytest.mark.parametrize("least", [0.0, 0.03])
@pytest.mark.parametrize("kind", ["homogeneous", "pca"])
def test_posterior_with_an_error_of_every_cell(kind: str, least: float) -> None:
    """Against dense conditioning with that diagonal R; both ways to solve; a number is a constant field."""
    grid = domain("periodic", "periodic")
    train, field = smooth_fields(60, grid), smooth_fields(1, grid, seed=9)[0]
    method = OptimalInterpolation(kind, nugget=1e-4).fit(train, grid)
    observed, sigma = pixels(0.7), cellwise(least)
    noise = np.tile((sigma**2).ravel(), 2)
    seen = np.tile(observed.ravel(), 2)
    mean, variance = condition(dense(method.covariance), (field - method.mean).ravel(), seen, np.diag(noise[seen]))
    found_mean, found_std = method.posterior(field, observed, np.where(observed, sigma, np.nan))
    np.testing.assert_allclose((found_mean - method.mean).ravel(), mean, atol=1e-8)
    np.testing.assert_allclose((found_std**2).ravel(), variance, atol=1e-8)
    if kind == "homogeneous":
        anomaly = np.where(observed, field - method.mean, 0.0)
        for solve in (method.covariance.by_observations, method.covariance.by_hidden):
            one, spread = solve(anomaly, observed, sigma**2, with_variance=True)
            np.testing.assert_allclose(one.ravel(), mean, atol=1e-8)
            np.testing.assert_allclose(spread.ravel(), variance, atol=1e-8)
    constant = method.fill(field, observed, np.full((H, W), 0.1))
    np.testing.assert_allclose(constant, method.fill(field, observed, 0.1), atol=1e-12)


@pytest.mark.parametrize("make", [*METHODS, lambda: OptimalInterpolation(divergence_free=True)])
def test_errors_of_hidden_cells_do_not_matter(make: object) -> None:
    grid = domain(land=True)
    field, observed, sigma = smooth_fields(1, grid, seed=9)[0], pixels(0.4), cellwise(0.02)
    method = make().fit(smooth_fields(30, grid), grid)
    clean = method.fill(field, observed, sigma)
    np.testing.assert_array_equal(method.fill(field, observed, np.where(observed, sigma, np.nan)), clean)
    assert np.isfinite(clean[:, grid.valid.numpy()]).all()


@pytest.mark.parametrize("boundaries", [("periodic", "periodic"), ("open", "open")])
@pytest.mark.parametrize("kind", ["homogeneous", "pca"])
@pytest.mark.parametrize("solenoidal", [False, True])
def test_covariances_are_positive(kind: str, boundaries: tuple[str, str], solenoidal: bool) -> None:
    """All eigenvalues above 0; without divergence none below, and above 0 once the error is added."""
    grid = domain(*boundaries, land=boundaries[0] == "open")
    method = OptimalInterpolation(kind, divergence_free=solenoidal).fit(smooth_fields(20, grid), grid)
    matrix = dense(method.covariance)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    values = np.linalg.eigvalsh(matrix)
    assert values[0] > (-1e-12 * values[-1] if solenoidal else 1e-7 * np.trace(matrix) / len(matrix))
    assert method.unresolved > 0 or not solenoidal


def divergence_of(field: np.ndarray, grid: Grid) -> np.ndarray:
    return divergence(torch.from_numpy(field)[None], grid)[0, 0].numpy()


@pytest.mark.parametrize("case", ["torus", "basin"])
def test_estimates_without_divergence(case: str) -> None:
    """To rounding by the stencil of the grid, whatever the share of cells; and the dense posterior with their R."""
    grid = domain("periodic", "periodic") if case == "torus" else domain("open", "wall", land=True)
    valid, train = grid.valid.numpy(), smooth_fields(40, grid)
    method = OptimalInterpolation(divergence_free=True).fit(train, grid)
    assert isinstance(method.covariance, Homogeneous if case == "torus" else LowRank)
    field, sigma = smooth_fields(1, grid, seed=9)[0], cellwise(0.0)
    scale = np.abs(divergence_of(np.nan_to_num(field), grid)).max()
    for share in (0.1, 0.8, 1.1):
        observed = pixels(share) & valid
        found = method.fill(field, observed, sigma)
        assert np.abs(divergence_of(found, grid)).max() < 1e-10 * scale
        anomaly, seen = (field - method.mean)[:, valid].ravel(), np.tile(observed[valid], 2)
        noise = np.tile((sigma**2)[valid], 2)[seen] + method.unresolved
        mean, variance = condition(dense(method.covariance), anomaly, seen, np.diag(noise))
        np.testing.assert_allclose((found - method.mean)[:, valid].ravel(), mean, atol=1e-8)
        std = method.posterior(field, observed, sigma)[1]
        np.testing.assert_allclose((std**2)[:, valid].ravel(), variance, atol=1e-8)


def test_only_the_divergent_part_is_left_out() -> None:
    """Fields of a stream function lose their half of the nugget, those of a potential everything but it."""
    grid = domain("periodic", "periodic")
    waves = torch.from_numpy(smooth_fields(30, grid)[:, :1])
    for operator, share in ((rotated_gradient, 0.0), (gradient, 1.0)):
        train = operator(waves, grid).numpy()
        plain, free = (OptimalInterpolation(nugget=1e-9, divergence_free=f).fit(train, grid) for f in (False, True))
        variance = np.trace(np.fft.ifft2(plain.covariance.spectrum).real[..., 0, 0]) / 2
        assert free.unresolved == pytest.approx(share * variance, abs=1e-8 * variance)
        expected = (1 - share) * plain.covariance.spectrum
        np.testing.assert_allclose(
            free.covariance.spectrum, expected, atol=1e-8 * np.abs(plain.covariance.spectrum).max()
        )


def test_waves_that_the_stencil_does_not_see_stay() -> None:
    """The mean and waves of two cells, of which central differences find no divergence; others keep one direction."""
    grid, train = domain("periodic", "periodic"), draw(30, 2, H, W)
    plain, free = (OptimalInterpolation(divergence_free=f).fit(train, grid).covariance.spectrum for f in (False, True))
    blind = np.zeros((H, W), dtype=bool)
    blind[np.ix_([0, H // 2], [0, W // 2])] = True
    np.testing.assert_array_equal(free[:, :, blind], plain[:, :, blind])
    smallest = np.linalg.eigvalsh(np.moveaxis(free, (0, 1), (-2, -1)))[..., 0]
    assert np.abs(smallest[~blind]).max() < 1e-12 * np.abs(plain).max() < smallest[blind].min()


def test_what_modes_leave_out() -> None:
    """The nugget of fields of a stream function; of a potential, all their variance and their squared mean too."""
    grid = domain("periodic", "periodic")
    waves = torch.from_numpy(smooth_fields(30, grid)[:, :1])
    for operator, share in ((rotated_gradient, 0.0), (gradient, 1.0)):
        train = operator(waves, grid).numpy()
        plain, free = (OptimalInterpolation("pca", divergence_free=f).fit(train, grid) for f in (False, True))
        lost = np.square(plain.mean).mean() + plain.covariance.variances.sum() / plain.mean.size
        assert free.unresolved == pytest.approx(plain.covariance.nugget + share * lost)
        assert free.covariance.nugget == 0 and np.abs(free.mean - (1 - share) * plain.mean).max() < 1e-10


@pytest.mark.parametrize("sigma", [0.0, 0.03, 0.3])
def test_both_ways_to_solve_are_the_same(sigma: float) -> None:
    grid = domain("periodic", "periodic")
    covariance = OptimalInterpolation(nugget=1e-4).fit(smooth_fields(40, grid), grid).covariance
    observed, y = pixels(0.6), draw(2, H, W)
    small = covariance.by_observations(y, observed, sigma**2, with_variance=True)
    large = covariance.by_hidden(y, observed, sigma**2, with_variance=True)
    scale = np.abs(small[0]).max()
    np.testing.assert_allclose(small[0], large[0], atol=1e-8 * scale)
    np.testing.assert_allclose(small[1], large[1], atol=1e-8)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_low_rank_posterior_is_exact(sigma: float) -> None:
    grid = domain(land=True)
    valid = grid.valid.numpy()
    field, train = smooth_fields(1, grid, seed=9)[0], smooth_fields(60, grid)
    method = OptimalInterpolation("pca").fit(train, grid)
    observed = pixels(0.3) & valid
    anomaly = (field - method.mean)[:, valid].ravel()
    mean, variance = condition(dense(method.covariance), anomaly, np.tile(observed[valid], 2), sigma**2)
    found_mean, found_std = method.posterior(np.where(observed, field, np.nan), observed, sigma)
    np.testing.assert_allclose((found_mean - method.mean)[:, valid].ravel(), mean, atol=1e-8)
    np.testing.assert_allclose((found_std**2)[:, valid].ravel(), variance, atol=1e-8)


def test_homogeneous_covariance_is_that_of_all_translations() -> None:
    grid = domain("periodic", "periodic")
    train = smooth_fields(3, grid)
    method = OptimalInterpolation(nugget=1e-9).fit(train, grid)
    anomalies = train - train.mean(axis=(0, 2, 3), keepdims=True)
    shifted = [np.roll(anomalies, (i, j), (2, 3)).reshape(3, -1) for i in range(H) for j in range(W)]
    samples = np.concatenate(shifted)
    expected = samples.T @ samples / len(samples)
    np.testing.assert_allclose(dense(method.covariance), expected, atol=1e-8)


def test_padded_covariance_tapers_with_the_pairs_at_an_offset() -> None:
    """White rows of a fully correlated field: at an offset of k columns W - k of W pairs exist."""
    train = draw(4000, 2, 1, 1) * np.ones((H, W))
    method = OptimalInterpolation("homogeneous", nugget=1e-9).fit(train, domain())
    offsets = np.fft.ifft2(method.covariance.spectrum).real
    expected = np.square(train - train.mean(0)).mean(axis=(0, 2, 3))[0] * (1 - np.arange(W) / W)
    np.testing.assert_allclose(offsets[0, 0, 0, :W], expected, atol=1e-7)
    assert np.linalg.eigvalsh(np.moveaxis(method.covariance.spectrum, (0, 1), (-2, -1))).min() > 0


def test_posterior_std_is_the_error_on_gaussian_fields() -> None:
    grid = domain("periodic", "periodic")
    method = OptimalInterpolation().fit(smooth_fields(2000, grid), grid)
    observed, sigma = hole() & pixels(0.5), 0.02
    fields = smooth_fields(200, grid, seed=3)
    noisy = fields + sigma * draw(*fields.shape, seed=4)
    errors = np.array([method.fill(y, observed, sigma) - x for x, y in zip(fields, noisy, strict=True)])
    _, std = method.posterior(noisy[0], observed, sigma)
    assert np.sqrt(np.square(errors / std).mean()) == pytest.approx(1, abs=0.04)
    others = []
    for make in (Climatology, Nearest, Linear, Biharmonic):
        error = make().fit(fields, grid).fill(noisy[0], observed) - fields[0]
        others.append(np.square(error[:, ~observed]).mean())
    assert np.square(errors[0][:, ~observed]).mean() < min(others)


def test_auto_takes_the_kind_that_fits_the_domain() -> None:
    torus, basin = domain("periodic", "periodic"), domain(land=True)
    assert isinstance(OptimalInterpolation().fit(smooth_fields(30, torus), torus).covariance, Homogeneous)
    assert isinstance(OptimalInterpolation().fit(smooth_fields(30, basin), basin).covariance, Homogeneous)
    standing = draw(2, H, W) * draw(60, 1, 1, 1) + 0.5 * draw(2, H, W, seed=1) * draw(60, 1, 1, 1, seed=2)
    assert isinstance(OptimalInterpolation().fit(standing, basin).covariance, LowRank)


def test_many_observations_beyond_the_limit_use_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = domain()
    field, train, observed = smooth_fields(1, grid, seed=9)[0], smooth_fields(60, grid), hole()
    method = OptimalInterpolation("homogeneous").fit(train, grid)
    exact = method.fill(field, observed, 0.02)
    monkeypatch.setattr("vecfield_diffusion.evaluation.covariance._LARGEST", 120)
    near = method.fill(field, observed, 0.02)
    assert np.abs(near - exact)[:, ~observed].max() < 0.05 * np.abs(exact).max()
    assert (near != exact).any()
    _, std = method.posterior(field, observed, 0.02)
    assert std[0, 0, 0] == pytest.approx(0.02)


def test_posterior_with_nothing_or_everything_observed() -> None:
    grid = domain("periodic", "periodic")
    method, field = OptimalInterpolation().fit(smooth_fields(30, grid), grid), smooth_fields(1, grid, seed=9)[0]
    mean, std = method.posterior(field, np.zeros((H, W), dtype=bool))
    np.testing.assert_allclose(mean, method.mean)
    prior = np.fft.ifft2(method.covariance.spectrum).real[[0, 1], [0, 1], 0, 0]
    np.testing.assert_allclose(std**2, prior[:, None, None] * np.ones((2, H, W)))
    mean, std = method.posterior(field, np.ones((H, W), dtype=bool))
    np.testing.assert_allclose(mean, field, atol=1e-12)
    assert np.abs(std).max() < 1e-6


def test_bad_arguments() -> None:
    grid = domain()
    with pytest.raises(ValueError, match="kind must be auto, homogeneous or pca, got 'best'"):
        OptimalInterpolation("best")
    with pytest.raises(ValueError, match="nugget must be above 0, got 0"):
        OptimalInterpolation(nugget=0)
    with pytest.raises(ValueError, match=r"expected fields \(N, 2, 14, 22\), got \(3, 2, 22, 14\)"):
        Linear().fit(draw(3, 2, W, H), grid)
    with pytest.raises(ValueError, match="expected y"):
        Linear().fit(draw(3, 2, H, W), grid).fill(draw(2, W, H), hole())
    for sigma in (-0.1, np.full((H, W), np.nan)):
        with pytest.raises(ValueError, match="sigma_obs must be finite and not negative at observed cells"):
            Linear().fit(draw(3, 2, H, W), grid).fill(draw(2, H, W), hole(), sigma)
    with pytest.raises(ValueError, match="training fields that vary, got 1 without"):
        OptimalInterpolation("pca").fit(draw(1, 2, H, W), grid)


def test_leading_eigenvectors_of_a_rectangle_are_those_of_the_dense_covariance():
    """On a domain with one periodic axis and borders; the nugget is what the trace leaves."""
    rng = np.random.default_rng(3)
    fields = gaussian_filter(rng.standard_normal((40, 2, 9, 8)), (0, 0, 1, 1), mode="wrap")
    covariance = Homogeneous.of(fields, np.zeros((2, 9, 8)), np.ones((9, 8), dtype=bool), (False, True), 0.0)
    offsets = np.fft.ifft2(covariance.spectrum).real
    for shape in ((9, 8), (5, 6)):
        row, column = (each.ravel() for each in np.indices(shape))
        down, right = (row[:, None] - row) % 18, (column[:, None] - column) % 8
        dense = np.block([[offsets[c, d][down, right] for d in range(2)] for c in range(2)])
        modes, variances, nugget = covariance.leading(12, shape)
        flat = modes.reshape(12, -1)
        np.testing.assert_allclose(variances, np.linalg.eigvalsh(dense)[::-1][:12], rtol=1e-10)
        np.testing.assert_allclose(flat @ flat.T, np.eye(12), atol=1e-10)
        np.testing.assert_allclose(dense @ flat.T, flat.T * variances, atol=1e-10)
        assert nugget == pytest.approx((np.trace(dense) - variances.sum()) / len(dense), rel=1e-10)


def test_gaps_do_not_whiten_the_homogeneous_covariance():
    """Half of the cells missing at random: the covariance is that of whole fields to sampling error, with borders, too.

    Without the correction the correlation of neighbours would be half of what it is.
    """
    rng = np.random.default_rng(5)
    for periodic in ((True, True), (False, False)):
        fields = gaussian_filter(rng.standard_normal((300, 2, 12, 14)), (0, 0, 2, 2), mode="wrap")
        gappy = np.where(rng.random((300, 1, 12, 14)) < 0.5, fields, np.nan)
        given = (np.zeros((2, 12, 14)), np.ones((12, 14), dtype=bool), periodic, 1e-9)
        whole, holes = (np.fft.ifft2(Homogeneous.of(each, *given).spectrum).real for each in (fields, gappy))
        scale = whole[0, 0, 0, 0]
        assert abs(holes - whole).max() < 0.06 * scale
        assert abs(holes[0, 0, 0, 1] / holes[0, 0, 0, 0] - whole[0, 0, 0, 1] / scale) < 0.04
        assert np.linalg.eigvalsh(np.moveaxis(Homogeneous.of(gappy, *given).spectrum, (0, 1), (-2, -1))).min() > 0


# The table.


def test_every_baseline_of_the_table_fits_and_fills() -> None:
    grid = Grid(torch.ones(8, 8, dtype=torch.bool), 1.0, 1.0, "periodic", "periodic")
    training = np.random.default_rng(0).standard_normal((30, 2, 8, 8))
    fitted = fit_baselines(list(BASELINES), training, grid)
    assert list(fitted) == list(BASELINES)
    observed = np.random.default_rng(1).random((8, 8)) < 0.4
    for key, baseline in fitted.items():
        mean, std = baseline.posterior(training[0], observed, 0.1, training[1])
        assert mean.shape == (2, 8, 8) and np.isfinite(mean).all()
        assert (std is not None) == key.startswith("oi"), key
        other = baseline.posterior(-training[0], observed, 0.1, training[1])[0]
        assert np.array_equal(mean[:, ~observed], other[:, ~observed]) == BASELINES[key].blind, key
        later = baseline.posterior(training[0], observed, 0.1, training[2])[0]
        assert np.array_equal(mean, later) != BASELINES[key].needs_previous, key


def test_a_law_is_asked_for_not_known_by_its_class() -> None:
    grid = Grid(torch.ones(8, 8, dtype=torch.bool), 1.0, 1.0, "periodic", "periodic")
    training = np.random.default_rng(0).standard_normal((30, 2, 8, 8))
    observed = np.eye(8, dtype=bool)
    linear = Linear().fit(training, grid)
    mean, std = linear.posterior(training[0], observed)
    np.testing.assert_array_equal(mean, linear.fill(training[0], observed))
    assert std is None


def test_what_does_not_suit_the_data_is_named_with_its_reason() -> None:
    assert unsuited(list(BASELINES), divergence_share=0.1, persistence=0.3) == {}
    reasons = unsuited(list(BASELINES), divergence_share=0.3, persistence=0.1)
    assert reasons == {
        "persistence": "the correlation with the snapshot before is 0.1",
        "oi_solenoidal": "the divergence of the data is 0.3 of their vorticity",
    }
    assert list(unsuited(["persistence", "oi"], divergence_share=0.3, persistence=math.nan)) == ["persistence"]


def test_a_label_takes_a_note() -> None:
    assert BASELINES["persistence"].named("6 hours before") == "persistence (6 hours before)"
    assert BASELINES["oi"].named() == "optimal interpolation"
