"""Gaussian fields: two covariances learnt from training fields, each with its exact conditional distribution.

Optimal interpolation (Gandin 1963; kriging, Gaussian process regression) is the posterior mean of x ~ N(m, S) given
y = A x + n, n ~ N(0, R), R = sigma^2 I, where A picks the observed values,

    x^ = m + S A^T (A S A^T + R)^-1 (y - A m)        Cov = S - S A^T (A S A^T + R)^-1 A S

It is the best estimate of all for Gaussian fields and the best linear one for others, given the right S.

Homogeneous: the covariance depends on the offset alone. Its Fourier transform is the mean 2 x 2 cross-periodogram of
the components over the torus that the grid forms where its axes are periodic, or that doubling them forms,
P(k) = mean F(k) F(k)^H / (valid cells) of the anomalies, 0 in gaps: non-negative by construction, at the price of a
taper with the share of pairs that the domain holds at an offset. The estimate solves a system of the size of the
observations, as above, or of all other values of the torus: with Q = (S + sigma^2 I)^-1, which is circulant like S,
z = x + noise obeys z^_o = y, z^_h = -Q_hh^-1 Q_ho y (anomalies), and x^ = z^ - sigma^2 Q z^,
Cov_hh = Q_hh^-1 - sigma^2 I. The smaller is taken.

LowRank: S = V L V^T + nugget I with the leading eigenvectors of the empirical covariance about the mean field (Tipping
& Bishop 1999). The nugget is the variance that the modes of the first four fifths of the training fields leave
unexplained in the last fifth, and their number is the one under which that fifth is most likely. For the coefficients,
c^ = C V_o^T (y - A m) / (nugget + sigma^2) with C = (L^-1 + V_o^T V_o / (nugget + sigma^2))^-1.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh, solve_triangular
from scipy.ndimage import distance_transform_edt

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PCA_SNAPSHOTS = 2000
_LARGEST = 2048  # cells in a dense system: 4096 unknowns, most of a second


class Homogeneous:
    """A covariance of the offset alone, diagonal in the Fourier space of a torus but for the 2 x 2 component blocks.

    Arguments:
        spectrum: P(k), Hermitian positive definite, `(2, 2, Ht, Wt)` complex; an axis of the torus is as long as that
            of the field if periodic, else twice as long.
        valid: The cells of the domain, `(H, W)`.
    """

    def __init__(self, spectrum: NDArray[np.complex128], valid: Bools) -> None:
        self.spectrum, self.valid = spectrum, valid
        self.inside = self._embed(np.ones_like(valid))

    @classmethod
    def of(
        cls, fields: NDArray[np.floating], mean: Floats, valid: Bools, periodic: tuple[bool, bool], nugget: float
    ) -> Self:
        """Of training fields `(N, 2, H, W)`, with a white part of `nugget` times their variance."""
        torus = [size if close else 2 * size for size, close in zip(valid.shape, periodic, strict=True)]
        spectrum, cells = np.zeros((2, 2, *torus), dtype=np.complex128), 0
        for start in range(0, len(fields), 256):
            part = fields[start : start + 256]
            measured = np.isfinite(part).all(axis=1, keepdims=True) & valid
            waves = np.fft.fft2(np.where(measured, part - mean, 0.0), torus)
            spectrum += np.einsum("nchw,ndhw->cdhw", waves, waves.conj())
            cells += int(measured.sum())
        spectrum /= cells
        variance = np.trace(spectrum).real.mean() / 2
        return cls(spectrum + nugget * variance * np.eye(2)[:, :, None, None], valid)

    def condition(
        self, y: Floats, observed: Bools, noise: float, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """Posterior mean and variance `(2, H, W)` of the anomaly given `y` (0 where hidden) with noise variance.

        Exact where at most 2048 cells are observed, or hidden on the torus. Beyond that the 2048 observed cells
        nearest to hidden ones enter, and the others keep their values.
        """
        used, torus = self._embed(observed), self._embed(y)
        if used.size - used.sum() <= min(used.sum(), _LARGEST):
            mean, variance = self.by_hidden(torus, used, noise, with_variance)
        else:
            used = self._embed(_nearest_to(self.valid & ~observed, observed, _LARGEST, self._periodic()))
            mean, variance = self.by_observations(torus, used, noise, with_variance)
        rest = observed & ~self._crop(used)
        mean = np.where(rest, y, self._crop(mean))
        return mean, None if variance is None else np.where(rest, noise, self._crop(variance))

    def _periodic(self) -> tuple[bool, ...]:
        return tuple(np.equal(self.spectrum.shape[-2:], self.valid.shape))

    def _embed(self, field: NDArray) -> NDArray:
        """`field` `(..., H, W)` in the corner of the torus, 0 elsewhere."""
        torus = np.zeros((*field.shape[:-2], *self.spectrum.shape[-2:]), dtype=field.dtype)
        torus[..., : field.shape[-2], : field.shape[-1]] = field
        return torus

    def _crop(self, torus: NDArray) -> NDArray:
        height, width = self.valid.shape
        return torus[..., :height, :width]

    def by_observations(
        self, y: Floats, observed: Bools, noise: float, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """`condition` on the whole torus by a system of the size of the observations."""
        offsets = np.fft.ifft2(self.spectrum).real
        system = _block(offsets, observed, observed)
        system[np.diag_indices_from(system)] += noise
        factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
        weights = np.zeros_like(y)
        weights[:, observed] = cho_solve(factor, y[:, observed].ravel(), check_finite=False).reshape(2, -1)
        mean = _apply(self.spectrum, weights)
        if not with_variance:
            return mean, None
        cross = _block(offsets, observed, self.inside)
        explained = np.square(solve_triangular(factor[0], cross, lower=True, check_finite=False)).sum(axis=0)
        variance = np.zeros_like(y)
        variance[:, self.inside] = np.diagonal(offsets[:, :, 0, 0])[:, None] - explained.reshape(2, -1)
        return mean, variance

    def by_hidden(
        self, y: Floats, observed: Bools, noise: float, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """`condition` on the whole torus by a system of the size of its hidden values, with Q = (S + noise I)^-1."""
        precision = _inverse(self.spectrum, noise)
        offsets = np.fft.ifft2(precision).real
        hidden, complete = ~observed, np.where(observed, y, 0.0)
        system = _block(offsets, hidden, hidden)
        factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False) if system.size else (system, True)
        if system.size:
            pull = _apply(precision, complete)[:, hidden].ravel()
            complete[:, hidden] = -cho_solve(factor, pull, check_finite=False).reshape(2, -1)
        mean = complete - noise * _apply(precision, complete)
        if not with_variance:
            return mean, None
        return mean, self._variance_by_hidden(offsets, factor[0], observed, noise)

    @staticmethod
    def _variance_by_hidden(offsets: Floats, factor: Floats, observed: Bools, noise: float) -> Floats:
        """diag(Q_hh^-1) - noise at hidden cells, noise - noise^2 diag(Q_oo - Q_oh Q_hh^-1 Q_ho) at observed ones."""
        hidden, variance = ~observed, np.empty((2, *observed.shape))
        cross = _block(offsets, hidden, observed)
        known = np.diagonal(offsets[:, :, 0, 0])[:, None].repeat(observed.sum(), axis=1)
        if factor.size:
            half = solve_triangular(factor, np.eye(len(factor)), lower=True, check_finite=False)
            variance[:, hidden] = np.square(half).sum(axis=0).reshape(2, -1) - noise
            known = known - np.square(half @ cross).sum(axis=0).reshape(2, -1)
        variance[:, observed] = noise - noise**2 * known
        return variance


class LowRank:
    """S = V L V^T + nugget I over the values of the valid cells.

    Arguments:
        modes: V with orthonormal columns, `(2 n, r)`, component by component.
        variances: The diagonal of L, `(r,)`.
        nugget: The white variance, above 0.
        valid: The n valid cells, `(H, W)`.
    """

    def __init__(self, modes: Floats, variances: Floats, nugget: float, valid: Bools) -> None:
        self.modes, self.variances, self.nugget, self.valid = modes, variances, nugget, valid

    @classmethod
    def of(cls, fields: NDArray[np.floating], mean: Floats, valid: Bools) -> Self:
        """Of training fields `(N, 2, H, W)`, gaps counting as the mean; at most 2000 of them, evenly spread."""
        fields = fields[:: -(-len(fields) // _PCA_SNAPSHOTS)]
        anomalies = np.nan_to_num((fields - mean)[:, :, valid].reshape(len(fields), -1))
        rank, nugget = _rank_and_nugget(anomalies)
        modes, variances = _principal_modes(anomalies)
        return cls(modes[:, :rank], variances[:rank], nugget, valid)

    def condition(
        self, y: Floats, observed: Bools, noise: float, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """Posterior mean and variance `(2, H, W)` of the anomaly given `y` (0 where hidden) with noise variance."""
        seen = np.tile(observed[self.valid], 2)
        basis, values = self.modes[seen], y[:, self.valid].ravel()[seen]
        white = self.nugget + noise
        system = basis.T @ basis / white + np.diag(1 / self.variances)
        factor = cho_factor(system, lower=True, check_finite=False)
        smooth = self.modes @ cho_solve(factor, basis.T @ values / white, check_finite=False)
        share = np.where(seen, self.nugget / white, 0.0)
        smooth[seen] += share[seen] * (values - smooth[seen])
        if not with_variance:
            return self._on_grid(smooth), None
        half = solve_triangular(factor[0], self.modes.T, lower=True, check_finite=False)
        variance = (1 - share) ** 2 * np.square(half).sum(axis=0) + np.where(seen, share * noise, self.nugget)
        return self._on_grid(smooth), self._on_grid(variance)

    def _on_grid(self, values: Floats) -> Floats:
        field = np.zeros((2, *self.valid.shape))
        field[:, self.valid] = values.reshape(2, -1)
        return field


def _nearest_to(hidden: Bools, observed: Bools, count: int, periodic: tuple[bool, ...]) -> Bools:
    """The `count` observed cells that are nearest to a hidden one, or all where there are not more."""
    if observed.sum() <= count:
        return observed
    pads = [(size // 2, size // 2) if close else (0, 0) for size, close in zip(hidden.shape, periodic, strict=True)]
    distance = distance_transform_edt(~np.pad(hidden, pads, mode="wrap"))
    distance = distance[pads[0][0] :, pads[1][0] :][: hidden.shape[0], : hidden.shape[1]]
    ranked = np.where(observed, distance, np.inf).ravel()
    chosen = np.zeros(observed.size, dtype=bool)
    chosen[np.argsort(ranked, kind="stable")[:count]] = True
    return chosen.reshape(observed.shape)


def _block(offsets: Floats, rows: Bools, columns: Bools) -> Floats:
    """The matrix of entries `offsets[c, d, r - s]`, cells r of `rows`, s of `columns`, component by component."""
    height, width = rows.shape
    (y1, x1), (y2, x2) = np.nonzero(rows), np.nonzero(columns)
    flat = (y1[:, None] - y2) % height * width + (x1[:, None] - x2) % width
    blocks = [[offsets[c, d].ravel()[flat] for d in range(2)] for c in range(2)]
    return np.block(blocks)


def _apply(spectrum: NDArray[np.complex128], field: Floats) -> Floats:
    """The circulant matrix of `spectrum` `(2, 2, H, W)` times `field` `(2, H, W)`."""
    return np.fft.ifft2(np.einsum("cdhw,dhw->chw", spectrum, np.fft.fft2(field))).real


def _inverse(spectrum: NDArray[np.complex128], noise: float) -> NDArray[np.complex128]:
    """The spectrum of (S + noise I)^-1."""
    blocks = np.moveaxis(spectrum, (0, 1), (-2, -1)) + noise * np.eye(2)
    return np.moveaxis(np.linalg.inv(blocks), (-2, -1), (0, 1))


def _principal_modes(anomalies: Floats) -> tuple[Floats, Floats]:
    """Eigenvectors `(d, r)` and eigenvalues `(r,)` of the covariance of `(N, d)`, largest first."""
    n, d = anomalies.shape
    if n < d:
        values, vectors = eigh(anomalies @ anomalies.T / n)
        kept = values > 1e-10 * values[-1]
        modes = anomalies.T @ (vectors[:, kept] / np.sqrt(n * values[kept]))
    else:
        values, vectors = eigh(anomalies.T @ anomalies / n)
        kept = values > 1e-10 * values[-1]
        modes = vectors[:, kept]
    return modes[:, ::-1], values[kept][::-1]


def _rank_and_nugget(anomalies: Floats) -> tuple[int, float]:
    """How many modes to keep and the variance of the rest, by the likelihood of the last fifth of `(N, d)`."""
    split = len(anomalies) - max(1, len(anomalies) // 5)
    learn, judge = anomalies[:split], anomalies[split:]
    modes, variances = _principal_modes(learn)
    d, ranks = anomalies.shape[1], np.arange(1, min(len(variances), anomalies.shape[1] - 1) + 1)
    energy = np.square(judge @ modes).mean(axis=0)
    rest = np.square(judge).sum(axis=1).mean() - np.cumsum(energy)[: len(ranks)]
    nugget = np.maximum(rest / (d - ranks), 1e-6 * np.square(anomalies).mean())
    total = variances[: len(ranks)] + nugget[:, None]  # (rank, mode)
    inside = np.tril(np.log(total) + energy[: len(ranks)] / total).sum(axis=1)
    best = int(np.argmin(inside + (d - ranks) * np.log(nugget) + rest / nugget))
    return int(ranks[best]), float(nugget[best])
