"""Learns a Gaussian field in space and time from a series, gaps and all, and chooses its kind.

The covariance of the anomalies at every lag and offset is the mean over all pairs of measured values, whatever their
number, with the weights of a taper in time and in space, times the share of the pairs that the domain holds at that
offset. Where nothing is missing its cross-spectrum over wavenumber and frequency is that of the tapered series, and
never negative; else the nearest one of the same variance is taken, on a torus of 2 L frames. A window in time, itself
of non-negative transform, ends it at the lag L. Then it is one of

    separable       C(tau, r) = rho(tau) C(0, r), rho the correlation of all
    advected        C_k(tau) = f_k C_k(0) exp(-i omega_k tau - g_k tau) beyond lag 0, from lag 1, f_k from lags 1 and 2
    full            C(tau, r) as it is
    shrunk          0.85 of the full one and 0.15 of the advected one, which has less noise of sampling

each of fields in units of the standard deviation of their cell or not, or principal components with lagged covariances
of their coefficients, where the series is nearly complete. A share of the variance is white in space and time, errors
that nobody told of and what is finer than a cell and a step: it is taken from C before that is given a shape, and added
again (the nugget of geostatistics). The kind and the share that are taken are those under which what was hidden in the
last fifth of the series is most likely, given the rest of the last fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import fft
from scipy.ndimage import distance_transform_edt, gaussian_filter

from vecfield_diffusion import progress
from vecfield_diffusion.evaluation.covariance import principal_modes
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.spacetime import (
    Bools,
    Floats,
    PrincipalComponents,
    SpaceTime,
    Stationary,
    Sum,
    spectrum,
)

Shape = Literal["separable", "advected", "full", "shrunk"]
SHAPES: tuple[Shape, ...] = ("separable", "advected", "full", "shrunk")

_FEW = 20  # pairs of values below which a covariance of an offset and a lag counts less
_COMPLETE = 0.01  # the share of values that may be missing where principal components are taken
_SHRUNK = 0.15  # the share of the advected covariance in the shrunk one
REACH = 3  # frames before and after one whose hidden values are judged
WHITE = (0.0, 0.003, 0.01, 0.03, 0.1)  # shares of the variance that are tried
FIRST = (0.0, 0.03)  # of them, with all kinds: some bear noise badly, others the want of it
_SHARE = 0.1  # of the squared deviation of cells in the local variance: towards that of the whole


def mean_field(series: Floats, valid: Bools) -> Floats:
    """The time mean of every value, `(2, H, W)`, drawn to that of the whole where few were measured; 0 outside."""
    count = np.isfinite(series).sum(axis=0)
    total = np.nansum(series, axis=0)
    few = max(1.0, 0.02 * len(series))
    overall = (total.sum(axis=(1, 2)) / count.sum(axis=(1, 2)).clip(min=1))[:, None, None]
    return np.where(valid, (total + few * overall) / (count + few), 0.0)


def local_scale(anomalies: Floats, valid: Bools) -> Floats:
    """The standard deviation of every cell over that of all, `(2, H, W)`: smooth, of both components; 1 outside."""
    measured = np.isfinite(anomalies)
    square = np.where(measured, np.square(np.nan_to_num(anomalies)), 0.0).sum(axis=(0, 1))
    count = measured.sum(axis=(0, 1)).astype(np.float64)
    overall = square.sum() / max(count.sum(), 1.0)
    square, count = (gaussian_filter(np.where(valid, part, 0.0), 1.5) for part in (square, count))
    few = _SHARE * count.max()
    ratio = (square + few * overall) / ((count + few) * overall)
    return np.broadcast_to(np.where(valid, np.sqrt(ratio), 1.0), anomalies.shape[1:]).copy()


def taper(valid: Bools, periodic: tuple[bool, bool]) -> Floats:
    """A weight of every cell `(H, W)`, 0 outside, that rises over half the width of the domain from its borders.

    The share of the pairs at an offset then falls with its square. Without it, it falls with the offset itself, which
    makes the field rougher than it is at small distances: all that it does between close measurements.
    """
    sides = [(size, size) for size in valid.shape]
    wide = valid
    for axis, closed in enumerate(periodic):
        width = [sides[k] if k == axis else (0, 0) for k in range(2)]
        wide = np.pad(wide, width, mode="wrap" if closed else "constant")
    if wide.all():
        return np.ones(valid.shape)
    depth = distance_transform_edt(wide)[sides[0][0] : 2 * sides[0][0], sides[1][0] : 2 * sides[1][0]]
    return np.where(valid, np.sin(np.pi / 2 * depth / depth.max().clip(min=1.0)), 0.0)


def lagged_products(anomalies: Floats, valid: Bools, periodic: tuple[bool, bool], lags: int) -> Floats:
    """C(tau, r) `(lags, 2, 2, Ht, Wt)` of anomalies `(T, 2, H, W)` with NaN where not measured.

    With the taper h(t, p), sin(pi (t + 1/2) / T) times that of the cells, it is the mean of the products over the
    measured pairs with the weights h(t + tau, p + r) h(t, p), times the share that all pairs of the offset and of the
    lag have in those of offset and lag 0: where nothing is missing the sum of tapered products, whose cross-spectrum is
    a mean of squares.
    """
    torus = tuple(n if close else 2 * n for n, close in zip(valid.shape, periodic, strict=True))
    in_time = np.sin(np.pi * (np.arange(len(anomalies)) + 0.5) / len(anomalies))[:, None, None, None]
    in_space = taper(valid, periodic)
    weights = in_time * in_space
    measured = np.isfinite(anomalies) & valid
    sums = _correlated(np.where(measured, weights * np.nan_to_num(anomalies), 0.0), torus, lags)
    whole = _correlated(in_time, (1, 1), lags) * _correlated(in_space[None, None], torus, 1)
    if not (measured == valid).all():
        pairs = _correlated(weights * measured, torus, lags)
        enough = pairs > _FEW
        sums = np.where(enough, sums / np.where(enough, pairs, 1.0), sums / (pairs.clip(min=0) + _FEW)) * whole
    return sums / whole[0, 0, 0, 0, 0]


def _correlated(fields: Floats, torus: Sequence[int], lags: int) -> Floats:
    """sum over t and p of f_c(t + tau, p + r) f_d(t, p), `(lags, C, C, Ht, Wt)`."""
    count = fields.shape[1]
    waves = fft.rfft2(fields, s=torus)
    size = fft.next_fast_len(len(fields) + lags - 1)
    out = np.empty((lags, count, count, *waves.shape[2:]), dtype=np.complex128)
    for row in range(waves.shape[2]):
        line = fft.fft(waves[:, :, row], n=size, axis=0)
        for c in range(count):
            for d in range(count):
                out[:, c, d, row] = fft.ifft(line[:, c] * line[:, d].conj(), axis=0)[:lags]
    return fft.irfft2(out, s=tuple(torus))


def non_negative(lags: Floats) -> Floats:
    """The nearest C(tau, r) of the same variance whose cross-spectrum, on a torus of twice as many frames, is >= 0.

    That is the projection of its eigenvalues upon those of one sum that are not negative: all are lowered by the same
    and the negative ones left out. What noise adds to some of them it takes from others, so that to leave these out
    alone would raise the power of small scales, where there is little.
    """
    size = 2 * len(lags)
    power = spectrum(lags, size)
    a, d, b = power[0, 0].real, power[1, 1].real, power[0, 1]
    middle, half = (a + d) / 2, np.sqrt(np.square((a - d) / 2) + np.square(np.abs(b)))
    values = np.stack((middle - half, middle + half))
    kept = (values - _floor(values, lags.shape[-1])).clip(min=0.0)
    # The matrix with these values and the same vectors: a multiple of itself and one of the identity.
    slope = np.where(half > 0, (kept[1] - kept[0]) / np.where(half > 0, 2 * half, 1.0), 1.0)
    shift = kept.mean(axis=0) - slope * middle
    power *= slope
    power[0, 0] += shift
    power[1, 1] += shift
    out = fft.irfftn(power, s=(size, *lags.shape[-2:]), axes=(2, 3, 4))
    return np.ascontiguousarray(np.moveaxis(out[:, :, : len(lags)], 2, 0))


def _floor(values: Floats, width: int) -> float:
    """By how much values `(..., width / 2 + 1)` of a real transform are lowered, so that their positive parts have
    their sum; 0 where none is negative, or the sum is not positive."""
    counts = np.full(values.shape[-1], 2.0)
    counts[0] = counts[-1] = 1.0
    if width % 2:
        counts[-1] = 2.0 if len(counts) > 1 else 1.0
    total = (values * counts).sum()
    if values.min() >= 0 or total <= 0:
        return 0.0
    order = np.argsort(values, axis=None)[::-1]
    sums = np.cumsum((values * counts).ravel()[order])
    number = np.cumsum(np.broadcast_to(counts, values.shape).ravel()[order])
    levels = (sums - total) / number
    return float(levels[np.flatnonzero(values.ravel()[order] > levels)[-1]])


def window(lags: int) -> Floats:
    """Parzen's lag window (1961, Technometrics 3, 167): 1 at 0, 0 from `lags` on, of non-negative transform."""
    u = np.arange(lags) / lags
    return np.where(u < 0.5, 1 - 6 * u**2 * (1 - u), 2 * (1 - u) ** 3)


def shaped(lags: Floats, shape: Shape) -> Floats:
    """C(tau, r) of one of the shapes, not yet windowed."""
    count = len(lags)
    if shape == "full":
        return non_negative(lags)
    if shape == "shrunk":
        return (1 - _SHRUNK) * shaped(lags, "full") + _SHRUNK * shaped(lags, "advected")
    still = non_negative(lags[:1])[0]
    if shape == "separable":
        trace = np.trace(lags[:, :, :, 0, 0], axis1=1, axis2=2)
        rho = _positive(trace / trace[0])
        return rho[:, None, None, None, None] * still
    power = np.trace(fft.fft2(still), axis1=0, axis2=1).real
    lagged = np.trace(fft.fft2(lags[: min(3, count)]), axis1=1, axis2=2)
    (size, later), lagged = np.abs(lagged[[min(1, count - 1), -1]]), lagged[min(1, count - 1)]
    known = power > 1e-6 * power.max()
    # A wave that fades evenly had size^2 / later at lag 0. What most waves have beyond is white, and no decay.
    before = np.where(later > 0, np.square(size) / np.where(later > 0, later, 1.0), 0.0)
    lasting = np.maximum(power - max(np.median(power - before), 0.0), size)
    lasting = np.where(known, np.minimum(np.maximum(lasting, size / 0.999), power), 1.0)
    turn = np.where(known, lagged / lasting, 0.0)
    turn *= 0.999 / np.maximum(np.abs(turn), 0.999)
    moved = np.where(known, lasting / np.where(known, power, 1.0), 0.0) * turn ** np.arange(count)[:, None, None]
    moved[0] = 1.0
    return fft.ifft2(moved[:, None, None] * fft.fft2(still)).real


def _positive(rho: Floats) -> Floats:
    """A sequence of correlations `(L,)` made non-negative definite on a ring of twice its length."""
    ring = np.concatenate((rho, [0.0], rho[:0:-1]))
    kept = fft.ifft(fft.fft(ring).real.clip(min=0.0)).real
    return kept[: len(rho)] / kept[0]


@dataclass(frozen=True)
class Estimator:
    """Learns one kind of field.

    Arguments:
        periodic: Whether y and x close on themselves.
        lags: The lag L where correlations end, at most; two thirds of the series at most. It is also the resolution in
            frequency: a window that ends sooner takes from the correlation of neighbouring frames.
        nugget: The share of the variance that is added to it as white, so that errors of 0 are possible; with 1e-4
            dense systems take several times the steps.
        white: The share of the variance that is white.
        noise: The variance of the errors of what was measured, which is no part of the field's.
    """

    periodic: tuple[bool, bool] = (False, False)
    lags: int = 160
    nugget: float = 1e-3
    white: float = 0.0
    noise: float = 0.0

    def learn(self, series: Floats, valid: Bools, kind: str) -> SpaceTime:
        """The field of a kind by its name: `full`, `full, local variance`, `8 components`..."""
        if kind.endswith("components"):
            return self.components(series, valid, int(kind.split()[0]))
        shape, _, local = kind.partition(", ")
        return self.stationary(series, valid, shape, bool(local))

    def stationary(self, series: Floats, valid: Bools, shape: Shape, local: bool = False) -> Stationary:
        """The homogeneous field of a series `(T, 2, H, W)` with NaN where not measured.

        Arguments:
            series: The training fields, at equal steps.
            valid: The cells of the domain, `(H, W)`.
            shape: See the module.
            local: Whether the standard deviation differs from cell to cell.
        """
        return self.family(series, valid, local)(shape)

    def family(self, series: Floats, valid: Bools, local: bool) -> Callable[[Shape], Stationary]:
        """What makes the field of a shape: those of all shapes are learnt from the same products."""
        mean = mean_field(series, valid)
        anomalies = series - mean
        scale = local_scale(anomalies, valid) if local else np.ones_like(mean)
        count = self._count(len(series))
        raw = lagged_products(anomalies / scale, valid, self.periodic, count)
        variance = raw[0, [0, 1], [0, 1], 0, 0]
        errors = np.minimum(self.noise / np.square(scale[:, valid]).mean(), 0.9 * variance)
        white = self.white * (variance - errors)
        raw[0, [0, 1], [0, 1], 0, 0] -= errors + white

        def field(shape: Shape) -> Stationary:
            lags = shaped(raw, shape) * window(count)[:, None, None, None, None]
            lags[0, [0, 1], [0, 1], 0, 0] += white
            lags[0, [0, 1], [0, 1], 0, 0] *= 1 + self.nugget
            return Stationary(lags, mean, valid, scale)

        return field

    def components(self, series: Floats, valid: Bools, rank: int, shape: Shape = "advected") -> Sum:
        """The field of `rank` principal components, and a homogeneous one for what they leave.

        Arguments:
            series: The training fields, at equal steps; what is missing counts as the mean.
            valid: The cells of the domain, `(H, W)`.
            rank: The number of components.
            shape: That of the homogeneous field, of local variance.
        """
        mean = mean_field(series, valid)
        anomalies = np.nan_to_num(series - mean)[:, :, valid].reshape(len(series), -1)
        modes = principal_modes(anomalies)[0][:, :rank]
        coefficients = anomalies @ modes
        count = self._count(len(series))
        size = fft.next_fast_len(len(series) + count - 1)
        waves = fft.fft(coefficients, n=size, axis=0)
        # Sums over fewer pairs at longer lags, all over the same number, are non-negative as they are.
        lags = fft.ifft(waves[:, :, None] * waves[:, None].conj(), axis=0).real[:count] / len(series)
        fields = np.zeros((modes.shape[1], 2, *valid.shape))
        fields[:, :, valid] = modes.T.reshape(len(fields), 2, -1)
        large = PrincipalComponents(fields, lags * window(count)[:, None, None], mean, valid)
        rest = np.full_like(series, np.nan)
        rest[:, :, valid] = (anomalies - coefficients @ modes.T).reshape(len(series), 2, -1)
        return Sum(large, self.stationary(rest, valid, shape, local=True))

    def _count(self, frames: int) -> int:
        return max(2, min(self.lags, 2 * frames // 3))


@dataclass(frozen=True)
class Choice:
    """The field that was chosen.

    Attributes:
        field: Learnt from the whole series.
        name: Its kind.
        estimator: What learnt it, with the share of the variance that is white.
        scores: The mean logarithm of the density of a hidden value under every kind with the best share tried, nats.
        spread: The posterior's root mean square standard deviation of those values under the chosen kind, over that of
            its errors: 1 where it is calibrated.
    """

    field: SpaceTime
    name: str
    estimator: Estimator
    scores: dict[str, float]
    spread: float

    @property
    def words(self) -> str:
        """The kind, its white share, and the scores of all kinds, to be printed."""
        scores = "; ".join(f"{name} {score:.2f}" for name, score in self.scores.items())
        white = f", {100 * self.estimator.white:g} % white" if self.estimator.white else ""
        return f"{self.name}{white} (log density of hidden values: {scores})"


def choose(
    series: Floats,
    valid: Bools,
    estimator: Estimator,
    *,
    seed: int = 0,
    cases: int = 6,
    ranks: Sequence[int] = (8, 16, 32),
    local: Sequence[bool] = (False, True),
) -> Choice:
    """The kind of field under which hidden values of the last fifth of a series are most likely, learnt from all of it.

    All kinds are tried with nothing and with much that is white, and then all shares with the best of them.

    Arguments:
        series: The training fields `(T, 2, H, W)`, NaN where not measured.
        valid: The cells of the domain, `(H, W)`.
        estimator: How they are learnt, but for the white share.
        seed: Of what is hidden.
        cases: The number of frames in which something is hidden.
        ranks: The numbers of principal components that are tried.
        local: Whether fields of one variance and of local variance are tried.
    """
    split = len(series) - max(1, len(series) // 5)
    learn, judge = series[:split], series[split:]
    missing = 1 - np.isfinite(series[:, :, valid]).mean()
    measured = np.flatnonzero(np.isfinite(judge[:, :, valid]).any(axis=(1, 2)))
    frames = measured[np.linspace(0, len(measured) - 1, cases).astype(int)] if len(measured) else ()
    hidden = [
        (frame, hide(judge, valid, frame, kind, np.random.default_rng([seed, number])))
        for number, (frame, kind) in enumerate(zip(frames, ["pixels", "block"] * cases, strict=False))
    ]
    ranks = [rank for rank in ranks if missing <= _COMPLETE and rank < split // 2]

    def judged(field: SpaceTime) -> tuple[float, float]:
        bar.update(1)
        return log_score(field, judge, hidden, estimator.noise)

    def kinds(how: Estimator) -> Iterator[tuple[str, tuple[float, float]]]:
        # A field of 160 lags may take 200 MB: one after another, none is kept.
        for differs in local:
            field = how.family(learn, valid, differs)
            for shape in SHAPES:
                yield shape + (", local variance" if differs else ""), judged(field(shape))
            del field
        for rank in ranks:
            yield f"{rank} components", judged(how.components(learn, valid, rank))

    shares = {share: replace(estimator, white=share) for share in WHITE}
    with progress.bar(None, "fields", "choosing a field", leave=False) as bar:
        found = {(name, share): score for share in FIRST for name, score in kinds(shares[share])}
        best, _ = max(found, key=found.get)
        for share in shares.keys() - set(FIRST):
            found[best, share] = judged(shares[share].learn(learn, valid, best))
    best, share = max(found, key=found.get)
    scores: dict[str, float] = {}
    for (name, _), (score, _) in found.items():
        scores[name] = max(score, scores.get(name, -np.inf))
    return Choice(shares[share].learn(series, valid, best), best, shares[share], scores, found[best, share][1])


def hide(series: Floats, valid: Bools, frame: int, kind: str, generator: np.random.Generator) -> Bools:
    """What of all frames is hidden, `(T, H, W)`: nine tenths of the cells, or a block of half the sides of each.

    Drawn anew for every frame; only those of `frame` are judged.
    """
    shape = (len(series), *valid.shape)
    if kind == "pixels":
        return generator.random(shape) > 0.1
    height, width = valid.shape
    out = np.zeros(shape, dtype=bool)
    for field in out:
        top, left = generator.integers(height - height // 2 + 1), generator.integers(width - width // 2 + 1)
        field[top : top + height // 2, left : left + width // 2] = True
    return out


def log_score(
    field: SpaceTime, series: Floats, cases: Sequence[tuple[int, Bools]], noise: float = 0.0, most: int = 1000
) -> tuple[float, float]:
    """Of hidden values one by one under the posterior: the mean log density in nats, and spread over error.

    Arguments:
        field: The Gaussian field.
        series: `(T, 2, H, W)`, NaN where not measured.
        cases: Frames and what is hidden around them, `(T, H, W)`.
        noise: The variance of the errors of all values, hidden ones too.
        most: About how many measured values tell of them: of a window of the domain that has no more.
    """
    how = Interpolation(field, before=REACH, after=REACH)
    errors, variances = [], []
    for number, (frame, hidden) in enumerate(cases):
        shown = np.where(hidden[:, None], np.nan, series)
        judged = np.isfinite(series[frame]) & hidden[frame] & field.valid
        count = np.isfinite(shown[max(0, frame - REACH) : frame + REACH + 1]).sum()
        near = around(judged.any(axis=0), (most / max(count, most)) ** 0.5, np.random.default_rng(number))
        judged &= near
        wanted = np.zeros(series.shape, dtype=bool)
        wanted[frame] = judged
        shown[:, :, ~near] = np.nan
        filled = how.fill(shown, noise, frames=range(frame, frame + 1), with_variance=wanted)
        errors.append((series[frame] - filled.mean[0])[judged])
        variances.append(filled.variance[0][judged] + noise)
    error, variance = np.concatenate([[], *errors]), np.concatenate([[], *variances])
    if not len(error):
        return -np.inf, np.nan
    variance = variance.clip(min=1e-12 * np.square(error).mean() + 1e-300)
    density = -(np.square(error) / variance + np.log(2 * np.pi * variance)) / 2
    return float(density.mean()), float(np.sqrt(variance.mean() / np.square(error).mean()))


def around(cells: Bools, share: float, generator: np.random.Generator) -> Bools:
    """Returns a window of a share of each side about one of the cells `(H, W)` that are True, drawn at random."""
    out, places = np.zeros_like(cells), np.argwhere(cells)
    if share >= 1 or not len(places):
        return ~out
    sides = [max(1, round(share * size)) for size in cells.shape]
    middle = places[generator.integers(len(places))]
    window = [
        slice(start := int(np.clip(at - side // 2, 0, size - side)), start + side)
        for at, side, size in zip(middle, sides, cells.shape, strict=True)
    ]
    out[tuple(window)] = True
    return out
