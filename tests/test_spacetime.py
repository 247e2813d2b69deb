"""Gaussian fields in space and time against dense posteriors, closed forms and brute-force sums."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from vecfield_diffusion.evaluation import estimation, interpolation
from vecfield_diffusion.evaluation.estimation import Estimator, choose, lagged_products, non_negative, shaped, window
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.spacetime import PrincipalComponents, SpaceTime, Stationary, Sum, spectrum
from vecfield_diffusion.models.conjugate_gradients import Split
from vecfield_diffusion.models.measured import System
from vecfield_diffusion.models.stationary import Values

T, H, W, L = 5, 4, 5, 4
WAVES = np.meshgrid(np.fft.fftfreq(2 * H, 1 / (2 * H)), np.fft.fftfreq(W, 1 / W), indexing="ij")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def land() -> np.ndarray:
    valid = np.ones((H, W), dtype=bool)
    valid[1, 2:4] = valid[3, 0] = False
    return valid


def lags_of(turn: np.ndarray, count: int = L) -> np.ndarray:
    """C(tau, r) of waves whose power falls with the wavenumber, a 2 x 2 matrix each, and which turn by `turn` a step.

    On a torus of 2 H by W: closed along x alone.
    """
    y, x = WAVES
    power = 1 / (1 + x**2 + y**2) ** 1.5
    across = np.stack((-y, x)) / np.sqrt(1 + x**2 + y**2)
    matrix = power * (across[:, None] * across + 0.2 * np.eye(2)[..., None, None])
    moved = turn[None] ** np.arange(count)[:, None, None] * window(count)[:, None, None]
    return np.fft.ifft2(moved[:, None, None] * matrix).real * 10


def ornstein_uhlenbeck(count: int = L) -> np.ndarray:
    """Every wave forgets at a rate of its own."""
    return lags_of(np.exp(-0.2 * np.hypot(*WAVES)).astype(complex), count)


def travelling(count: int = L) -> np.ndarray:
    """Waves with a dispersion law, which drift and fade."""
    y, x = WAVES
    odd = x * (np.abs(x) < W / 2) / (1 + x**2 + y**2)
    return lags_of(np.exp(-0.1 - 2j * odd), count)


def components() -> PrincipalComponents:
    """Three fields whose coefficients are a moving average of noise."""
    shapes = np.linalg.qr(random(2 * H * W, 3))[0].T.reshape(3, 2, H, W)
    parts = random(L, 3, 3, seed=1)
    lags = np.stack([sum(parts[k + lag] @ parts[k].T for k in range(L - lag)) for lag in range(L)])
    return PrincipalComponents(shapes, lags, random(2, H, W, seed=2), np.ones((H, W), dtype=bool))


def fields() -> list[SpaceTime]:
    mean, scale = random(2, H, W, seed=1), 1 + 0.3 * random(2, H, W, seed=2) ** 2
    return [
        Stationary(ornstein_uhlenbeck(), mean, land()),
        Stationary(travelling(), mean, land(), scale),
        Sum(components(), Stationary(0.1 * travelling(), mean, np.ones((H, W), dtype=bool), scale)),
    ]


def dense(prior: SpaceTime, frames: int = T) -> np.ndarray:
    """The covariance of all values of all frames, entry by entry from its definition."""
    if isinstance(prior, Sum):
        return sum(dense(part, frames) for part in prior.parts)
    places = list(product(range(frames), range(2), range(H), range(W)))
    out = np.empty((len(places), len(places)))
    for (i, (t, c, y, x)), (j, (s, d, q, p)) in product(enumerate(places), enumerate(places)):
        lag = abs(t - s)
        if lag >= len(prior.lags):
            out[i, j] = 0.0
        elif isinstance(prior, Stationary):
            a, b, dy, dx = (c, d, y - q, x - p) if t >= s else (d, c, q - y, p - x)
            value = prior.lags[lag, a, b, dy % prior.lags.shape[-2], dx % prior.lags.shape[-1]]
            out[i, j] = value * prior.scale[c, y, x] * prior.scale[d, q, p]
        else:
            lagged = prior.lags[lag] if t >= s else prior.lags[lag].T
            out[i, j] = prior.fields[:, c, y, x] @ lagged @ prior.fields[:, d, q, p]
    return out


def gappy(prior: SpaceTime, frames: int = T) -> tuple[np.ndarray, np.ndarray]:
    """A series with cells, single components and a whole frame missing, and an error for every value."""
    generator = np.random.default_rng(5)
    seen = generator.random((frames, 1, H, W)) < 0.5
    seen = seen & (generator.random((frames, 2, H, W)) < 0.8) & prior.valid
    seen[2] = False
    return np.where(seen, random(frames, 2, H, W, seed=6), np.nan), 0.1 + generator.random((frames, 2, H, W))


def dense_posterior(prior: SpaceTime, series: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(T, 2, H, W)` and covariance of all values."""
    covariance, seen = dense(prior, len(series)), np.isfinite(series).ravel()
    gain = covariance[:, seen] @ np.linalg.inv(covariance[np.ix_(seen, seen)] + np.diag(noise.ravel()[seen]))
    mean = np.broadcast_to(prior.mean, series.shape)
    anomaly = gain @ (series - mean).ravel()[seen]
    return mean + anomaly.reshape(series.shape), covariance - gain @ covariance[seen]


@pytest.mark.parametrize("prior", fields())
@pytest.mark.parametrize("block", [1, 2, T])
def test_posterior_is_the_dense_one_over_all_frames(prior: SpaceTime, block: int) -> None:
    series, noise = gappy(prior)
    mean, covariance = dense_posterior(prior, series, noise)
    filled = Interpolation(prior, before=T, after=T, block=block).fill(series, noise, with_variance=True)
    inside = np.broadcast_to(prior.valid, series.shape)
    np.testing.assert_allclose(filled.mean[inside], mean[inside], atol=1e-9, rtol=0)
    variance = np.diag(covariance).reshape(series.shape)
    np.testing.assert_allclose(filled.variance[inside], variance[inside], atol=1e-9, rtol=0)
    assert np.isnan(filled.mean[~inside]).all() and np.isnan(filled.variance[~inside]).all()


@pytest.mark.parametrize("prior", fields())
def test_posterior_with_past_only_and_of_some_frames(prior: SpaceTime) -> None:
    """Frames after a block do not count; nor do those beyond the number that it is given."""
    series, noise = gappy(prior)
    for frame, first in ((4, 1), (3, 0), (1, 0)):  # frame 2 was not measured and is not counted
        shown = series.copy()
        shown[frame + 1 :] = np.nan
        shown[:first] = np.nan
        expected = dense_posterior(prior, shown, noise)[0][frame]
        found = Interpolation(prior, before=2, after=0).fill(series, noise, frames=range(frame, frame + 1)).mean[0]
        np.testing.assert_allclose(found[:, prior.valid], expected[:, prior.valid], atol=1e-9, rtol=0)


@pytest.mark.parametrize("prior", fields())
def test_frames_are_carried_to_any_others(prior: SpaceTime) -> None:
    """Also where differences of time are those of the call before, of other frames."""
    whole = torch.from_numpy(dense(prior)).view(T, 2 * H * W, T, 2 * H * W)
    for frames, onto in (([1, 2], [1]), ([1], [1, 0]), ([0, 3], [4, 1, 2])):
        given = torch.from_numpy(random(3, len(frames), 2, H, W))
        expected = torch.einsum("tisj,msj->mti", whole[onto][:, :, frames], given.flatten(2))
        found = prior.covariance.apply(given, frames, onto)
        torch.testing.assert_close(found.flatten(2), expected, rtol=0, atol=1e-10)


def test_forecast_in_closed_form() -> None:
    """An Ornstein-Uhlenbeck process in every cell by itself, seen now: r^h y and 1 - r^2h after h steps."""
    rho = 0.9 ** np.arange(12)
    lags = np.zeros((12, 2, 2, 2 * H, 2 * W))
    lags[:, [0, 1], [0, 1], 0, 0] = rho[:, None]
    prior = Stationary(lags, np.zeros((2, H, W)), np.ones((H, W), dtype=bool))
    series = random(11, 2, H, W)
    series[5:] = np.nan
    filled = Interpolation(prior, before=1, after=0, block=3).fill(series, with_variance=True)
    for h in range(1, 7):
        np.testing.assert_allclose(filled.mean[4 + h], 0.9**h * series[4], atol=1e-12)
        np.testing.assert_allclose(filled.variance[4 + h], 1 - 0.81**h, atol=1e-12)


class Column:
    """A source of noise that gives one unit vector, the columns one after the other."""

    def __init__(self, number: int) -> None:
        self.number, self.drawn = number, 0

    def standard_normal(self, shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
        values = np.zeros(int(np.prod(shape)), dtype=dtype)
        if 0 <= self.number - self.drawn < len(values):
            values[self.number - self.drawn] = 1
        self.drawn += len(values)
        return values.reshape(shape)


@pytest.mark.parametrize("prior", fields())
def test_trajectories_have_the_covariance(prior: SpaceTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw is linear in its noise: the sum over unit vectors is the covariance, without any chance."""
    monkeypatch.setattr(Stationary, "PRECISION", np.float64)
    first = Column(0)
    draws = [prior.draw(T, first).ravel()]
    draws = np.stack([*draws, *(prior.draw(T, Column(number)).ravel() for number in range(1, first.drawn))])
    np.testing.assert_allclose(draws.T @ draws, dense(prior), atol=1e-10)


@pytest.mark.parametrize("prior", fields())
def test_members_have_the_posterior_covariance(prior: SpaceTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member is affine in its draw of trajectory and errors: again without any chance."""
    series, noise = gappy(prior)
    values, vectors = np.linalg.eigh(dense(prior))
    columns = (vectors * np.sqrt(values.clip(min=0))).T.reshape(-1, *series.shape)
    errors = (np.sqrt(noise.ravel()) * np.eye(noise.size)).reshape(-1, *series.shape)
    zero = np.zeros_like(series)
    draws = [*((x, zero) for x in columns), *((zero, n) for n in errors)]
    monkeypatch.setattr(Interpolation, "_draw", lambda self, *arguments: draws[arguments[-1]])
    how = Interpolation(prior, before=T, after=T, block=2)
    filled = how.fill(series, noise, members=len(draws))
    inside = np.broadcast_to(prior.valid, series.shape).ravel()
    away = (filled.members - filled.mean).reshape(len(draws), -1)[:, inside]
    expected = dense_posterior(prior, series, noise)[1][np.ix_(inside, inside)]
    np.testing.assert_allclose(away.T @ away, expected, atol=1e-9)


def test_one_seed_gives_one_trajectory() -> None:
    prior = fields()[0]
    series, noise = gappy(prior)
    whole, parts = (
        Interpolation(prior, before=T, after=T, block=b).fill(series, noise, members=3, seed=7) for b in (T, 1)
    )
    np.testing.assert_allclose(whole.members, parts.members, atol=1e-9)
    some = Interpolation(prior, before=T, after=T).fill(series, noise, members=1, seed=7, frames=range(1, 3))
    np.testing.assert_allclose(some.members[0], whole.members[0, 1:3], atol=1e-9)
    other = Interpolation(prior, before=T, after=T).fill(series, noise, members=1, seed=8)
    assert np.nanmax(np.abs(other.members[0] - whole.members[0])) > 0.1


def test_exact_values_are_kept() -> None:
    prior = fields()[0]
    series = np.where(land(), random(T, 2, H, W), np.nan)
    series[1:, :, 0, 0] = np.nan
    filled = Interpolation(prior, before=1, after=1).fill(series, members=2, with_variance=True)
    seen = np.isfinite(series)
    np.testing.assert_allclose(filled.mean[seen], series[seen], atol=1e-12)
    np.testing.assert_allclose(filled.members[1][seen], series[seen], atol=1e-12)
    assert (filled.variance[seen] == 0).all() and filled.variance[1:, :, 0, 0].min() > 1e-6


@pytest.mark.parametrize("prior", fields())
def test_all_of_many_values_count(prior: SpaceTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are more than one system takes: mean and members are as exact, the variance is that of draws."""
    series, noise = gappy(prior)
    how = Interpolation(prior, before=T, after=T, block=2, draws=400)
    exact = how.fill(series, noise, members=2, with_variance=True)
    monkeypatch.setattr(interpolation, "SPARSE", 0)
    monkeypatch.setattr(Split, "TOLERANCE", 1e-13)
    found = how.fill(series, noise, members=2, with_variance=True)
    np.testing.assert_allclose(found.mean, exact.mean, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found.members, exact.members, atol=1e-9, rtol=0)
    ratio = (found.variance / exact.variance)[np.isfinite(exact.variance)]
    assert abs(ratio.mean() - 1) < 0.03 and ratio.std() < 2 * (2 / 400) ** 0.5


def test_hidden_values_are_judged_in_a_window_about_one_of_them() -> None:
    cells = random(30, 40) > 2
    for number in range(20):
        near = estimation.around(cells, 0.3, np.random.default_rng(number))
        assert near.sum() == 9 * 12 and (near & cells).any()
        rows, columns = near.any(axis=1), near.any(axis=0)
        assert rows.sum() == 9 and columns.sum() == 12
    assert estimation.around(cells, 1.0, np.random.default_rng(0)).all()


@pytest.mark.parametrize("gaps", [False, True])
def test_products_are_means_over_the_measured_pairs(gaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every lag and offset, with the weights of the taper, times the share of the whole that has both."""
    monkeypatch.setattr(estimation, "_FEW", 1e-9)
    series = np.where(land(), random(9, 2, H, W), np.nan)
    if gaps:
        series[random(9, 2, H, W, seed=3) > 0.5] = np.nan
    found = lagged_products(series, land(), (False, True), 3)
    across = estimation.taper(land(), (False, True))
    assert (across[land()] > 0).all() and not across[~land()].any()
    for lag, c, d, dy, dx in product(range(3), range(2), range(2), range(1 - H, H), range(W)):
        total = count = share = 0.0
        taper = np.sin(np.pi * (np.arange(9) + 0.5) / 9)
        for y, x in product(range(H), range(W)):
            q, p = y + dy, (x + dx) % W
            if not (0 <= q < H and land()[y, x] and land()[q, p]):
                continue
            both = across[y, x] * across[q, p]
            share += both * (taper[lag:] * taper[: 9 - lag]).sum() / np.square(across).sum() / np.square(taper).sum()
            for t in range(9 - lag):
                pair, weight = series[t + lag, c, q, p] * series[t, d, y, x], both * taper[t + lag] * taper[t]
                total, count = total + weight * np.nan_to_num(pair), count + weight * np.isfinite(pair)
        assert found[lag, c, d, dy, dx] == pytest.approx(share * total / max(count, 1e-9), abs=1e-7)


@pytest.mark.parametrize("shape", estimation.SHAPES)
def test_shapes_are_non_negative_on_any_number_of_frames(shape: str) -> None:
    raw = lagged_products(random(12, 2, H, W), np.ones((H, W), dtype=bool), (False, True), 4)
    lags = shaped(raw, shape) * window(4)[:, None, None, None, None]
    values = np.linalg.eigvalsh(dense(Stationary(lags, np.zeros((2, H, W)), np.ones((H, W), dtype=bool)), 9))
    assert values[0] > -1e-12 * values[-1]
    assert raw[0, 0, 0, 0, 0] > 0.1 and values[-1] > 0.1


def test_a_whole_series_needs_no_mending() -> None:
    """The cross-spectrum of a tapered series is a mean of squares: what is measured is kept, however few the frames."""
    raw = lagged_products(np.where(land(), random(7, 2, H, W), np.nan), land(), (False, True), 7)
    np.testing.assert_allclose(non_negative(raw), raw, atol=1e-12)


def test_what_is_non_negative_stays_as_it_is() -> None:
    lags = travelling(6)
    assert np.linalg.eigvalsh(np.moveaxis(spectrum(lags, 12), (0, 1), (-2, -1))).min() > 0
    np.testing.assert_allclose(non_negative(lags), lags, atol=1e-12)


def simulated(prior: Stationary, frames: int, seed: int = 0) -> np.ndarray:
    return prior.draw(frames, np.random.default_rng(seed)) + prior.mean


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_waves_that_travel_are_learnt_as_such(missing: float) -> None:
    """From a long series, gaps or none: the covariance within its sampling error, and never as separable."""
    valid = np.ones((H, W), dtype=bool)
    truth = Stationary(travelling(24), np.zeros((2, H, W)), valid)
    series = simulated(truth, 3000)
    series[np.random.default_rng(1).random((3000, 1, H, W)).repeat(2, 1) < missing] = np.nan
    estimator = Estimator((False, True), lags=24)
    found = estimator.stationary(series, valid, "advected")
    here = np.ix_(range(4), range(2), range(2), range(2), range(W))
    rows = estimation.taper(valid, (False, True))[:, 0]
    share = np.array([1.0, (rows[1:] * rows[:-1]).sum() / np.square(rows).sum()])[:, None]
    size = truth.lags[0, 0, 0, 0, 0]
    assert np.abs(found.lags[here] - share * truth.lags[here]).max() < 0.08 * size
    choice = choose(series[:400], valid, estimator, cases=8, ranks=(2,))
    assert choice.name.startswith(("advected", "full", "shrunk"))
    assert choice.scores["separable"] < choice.scores[choice.name] - 0.05
    assert 0.8 < choice.spread < 1.25
    assert ("2 components" in choice.scores) == (missing == 0)


def drifting(shape: tuple[int, int] = (8, 12), frames: int = 120, noise: float = 0.8, seed: int = 0) -> np.ndarray:
    """Waves that drift and never fade, longer than the domain or shorter, and white noise."""
    generator = np.random.default_rng(seed)
    time, y, x = np.meshgrid(np.arange(frames), *(np.arange(size) for size in shape), indexing="ij")
    out = noise * generator.standard_normal((frames, 2, *shape))
    for kx, ky in product((1, 2), (0, 1)):
        phase = 3.4 * np.pi * (kx * x / shape[1] + ky * y / shape[0]) - (0.5 * kx + 0.2 * ky) * time
        for component in range(2):
            amplitude, start = generator.standard_normal() / kx, generator.uniform(0, 2 * np.pi)
            out[:, component] += amplitude * np.cos(phase + start)
    return out


def test_noise_does_not_make_drifting_waves_fade() -> None:
    """In closed form: what a step ends of a wave is noise, alike in all waves, and the rest goes on as it turned."""
    turn = np.zeros((2 * H, W), dtype=complex)
    y, x = WAVES
    moving = (np.hypot(y, x) > 0) & (np.hypot(y, x) < 2)
    turn[moving] = 0.99 * np.exp(-0.7j * np.sign(x + 0.1 * y) * np.hypot(y, x))[moving]
    power, noise = np.where(moving, 4 / (1 + x**2 + y**2), 0.0), 1.5
    lags = power * turn ** np.arange(6)[:, None, None]
    lags[0] += noise
    given = np.fft.ifft2(lags[:, None, None] * np.eye(2)[..., None, None]).real
    assert moving.mean() < 0.5
    np.testing.assert_allclose(shaped(given, "advected"), given, atol=1e-12)


def test_noisy_waves_that_drift_are_learnt_as_advected() -> None:
    series, valid = drifting(), np.ones((8, 12), dtype=bool)
    choice = choose(series, valid, Estimator(lags=60), ranks=(), local=(False,))
    assert choice.name == "advected" and choice.scores["separable"] < choice.scores["advected"] - 0.05


def test_flows_that_differ_from_place_to_place_ask_for_components_or_a_local_variance() -> None:
    valid = np.ones((8, 10), dtype=bool)
    time = np.arange(120)[:, None, None, None]
    shapes = random(3, 2, 8, 10)
    series = sum(s * np.cos(0.3 * (k + 1) * time + k) for k, s in enumerate(shapes)) + 0.01 * random(120, 2, 8, 10)
    choice = choose(series, valid, Estimator(lags=40), ranks=(6, 12))
    assert choice.name == "6 components" and isinstance(choice.field, Sum)
    loud = np.where(np.arange(10) < 5, 0.1, 3.0)
    noisy = loud * random(150, 2, 8, 10, seed=4)
    choice = choose(noisy, valid, Estimator(lags=10), ranks=())
    assert choice.name.endswith("local variance")
    ratio = choice.field.scale[0, 4, 9] / choice.field.scale[0, 4, 0]
    assert 4 < ratio < 40


def test_errors_that_nobody_told_of_are_white() -> None:
    """A smooth field and noise of 3 % of its variance: such is found, less if told of it, none without."""
    size, share, fades = 12, 0.03, 0.95 ** np.arange(24) * estimation.window(24)
    y = np.fft.fftfreq(2 * size, 1 / (2 * size))
    still = np.fft.ifft2(np.exp(-(y[:, None] ** 2 + y[None] ** 2) / 4)).real
    lags = fades[:, None, None, None, None] * np.eye(2)[None, ..., None, None] * still / still[0, 0]
    valid = np.ones((size, size), dtype=bool)
    smooth = simulated(Stationary(lags, np.zeros((2, size, size)), valid), 200)
    noisy = smooth + np.sqrt(share) * random(*smooth.shape, seed=5)
    found, told, none = (
        choose(values, valid, Estimator(lags=24, noise=noise), ranks=(), local=(False,), cases=8)
        for values, noise in ((noisy, 0.0), (noisy, share), (smooth, 0.0))
    )
    assert 0.01 <= found.estimator.white <= 0.1 and "% white" in found.words
    assert told.estimator.white < found.estimator.white and none.estimator.white == 0 and "white" not in none.words
    assert told.field.lags[0, 0, 0, 0, 0] < found.field.lags[0, 0, 0, 0, 0] - 0.5 * share
    assert abs(told.scores[told.name] - found.scores[found.name]) < 0.05


def test_what_it_cannot_be() -> None:
    prior = fields()[0]
    with pytest.raises(ValueError, match=r"^series must be \(T, 2, 4, 5\), got \(5, 2, 4, 6\)"):
        Interpolation(prior).fill(np.zeros((5, 2, 4, 6)))
    with pytest.raises(ValueError, match="^noise must be >= 0"):
        Interpolation(prior).fill(np.zeros((5, 2, 4, 5)), -1.0)
    with pytest.raises(ValueError, match="^block must be >= 1, got 0"):
        Interpolation(prior, block=0)


def test_single_values_are_found_again() -> None:
    seen = torch.from_numpy(np.isfinite(gappy(fields()[0])[0]))
    values, series = Values.where(seen, first=3), torch.from_numpy(random(T, 2, H, W))
    assert values.frame.min() >= 3
    assert torch.equal(values.of(series, 3), series[seen])
    few = values.at(torch.arange(4))
    system = System(fields()[0].covariance, few, few.errors(torch.ones(3 + T, 1, H, W)))
    assert system.factor.shape == (4, 4)


@pytest.mark.parametrize("prior", fields())
def test_nothing_measured_is_the_prior(prior: SpaceTime) -> None:
    filled = Interpolation(prior).fill(np.full((3, 2, H, W), np.nan), members=1, with_variance=True)
    inside = np.broadcast_to(prior.valid, (3, 2, H, W))
    np.testing.assert_allclose(filled.mean[inside], np.broadcast_to(prior.mean, inside.shape)[inside])
    np.testing.assert_allclose(
        filled.variance[inside], np.broadcast_to(prior.covariance.variance(), inside.shape)[inside]
    )
    assert np.isfinite(filled.members[0][inside]).all()
