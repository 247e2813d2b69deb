"""Gaussian fields: two covariances learnt from training fields, each with its exact conditional distribution.

Optimal interpolation (Gandin 1963; kriging, Gaussian process regression) is the posterior mean of x ~ N(m, S) given
y = A x + n, n ~ N(0, R), R = sigma^2 I, where A picks the observed values,

    x^ = m + S A^T (A S A^T + R)^-1 (y - A m)        Cov = S - S A^T (A S A^T + R)^-1 A S

It is the best estimate of all for Gaussian fields and the best linear one for others, given the right S.

Here R is diagonal, of a variance that may differ from cell to cell, or has a 2x2 block of its own in each of them.

Homogeneous: the covariance depends on the offset alone. Its Fourier transform is the mean 2 x 2 cross-periodogram of
the components over the torus that the grid forms where its axes are periodic, or that doubling them forms,
P(k) = mean F(k) F(k)^H / (valid cells) of the anomalies: non-negative by construction, at the price of a taper with the
share of pairs that the domain holds at an offset. What gaps take away beyond that is put right offset by offset. The
estimate solves a system of the size of the observations, as above, or of all other values of the torus: let r be the
least variance of the noise, k the cells that have it and f all others. z = x + noise of variance r has the precision
Q = (S + r I)^-1, circulant like S; it is known in k, and in f measured with the rest of the noise, of precision
D = 1 / (r_i - r) (0 where hidden), so that

    z^_k = y_k        (Q_ff + D) z^_f = D y_f - Q_fk y_k        x^ = z^ - r Q z^
    Cov = r I - r^2 Q + G^T (Q_ff + D)^-1 G,   G = (I - r Q)_f

(anomalies throughout). The smaller system is taken.

LowRank: S = V L V^T + nugget I with the leading eigenvectors of the empirical covariance about the mean field (Tipping
& Bishop 1999). The nugget is the variance that the modes of the first four fifths of the training fields leave
unexplained in the last fifth, and their number is the one under which that fifth is most likely. For the coefficients,
c^ = C V_o^T N^-1 (y - A m) with C = (L^-1 + V_o^T N^-1 V_o)^-1 and N = nugget I + R.

Without divergence: the projection P onto fields that have none turns S into P S P^T, non-negative like S. For the
homogeneous covariance it is t t^T at every wavenumber, t the unit vector across (sin(k dx)/dx, sin(l dy)/dy), which is
what the central differences of `operators.divergence` see of a wave: the covariance of a random stream function. Waves
that they do not see (the mean, those of two cells) stay as they are. For modes P is `projection.leray`, on any grid.
The white part of modes goes as well. What P takes away is for R to hold, which must not be 0 then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh, solve_triangular
from scipy.ndimage import distance_transform_edt
from scipy.sparse.linalg import LinearOperator, eigsh

from vecfield_diffusion.ellipses import axes, back, root, turned
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.projection import leray

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
        white: Whether it has a white part, so that its inverse exists.
    """

    def __init__(self, spectrum: NDArray[np.complex128], valid: Bools, white: bool = True) -> None:
        self.spectrum, self.valid, self.white = spectrum, valid, white
        self.inside = self._embed(np.ones_like(valid))

    @classmethod
    def of(
        cls, fields: NDArray[np.floating], mean: Floats, valid: Bools, periodic: tuple[bool, bool], nugget: float
    ) -> Self:
        """Of training fields `(N, 2, H, W)`, with a white part of `nugget` times their variance."""
        torus = [size if close else 2 * size for size, close in zip(valid.shape, periodic, strict=True)]
        spectrum, pairs = np.zeros((2, 2, *torus), dtype=np.complex128), np.zeros(torus)
        for start in range(0, len(fields), 64):
            part = fields[start : start + 64]
            measured = np.isfinite(part).all(axis=1, keepdims=True) & valid
            waves = np.fft.fft2(np.where(measured, part - mean, 0.0), torus)
            spectrum += np.einsum("nchw,ndhw->cdhw", waves, waves.conj())
            pairs += np.square(np.abs(np.fft.fft2(measured[:, 0], torus))).sum(axis=0)
        domain = len(fields) * np.square(np.abs(np.fft.fft2(valid, torus)))
        if not np.allclose(pairs, domain):
            spectrum = _without_gaps(spectrum, pairs, domain)
        spectrum /= len(fields) * valid.sum()
        variance = np.trace(spectrum).real.mean() / 2
        return cls(spectrum + nugget * variance * np.eye(2)[:, :, None, None], valid)

    def solenoidal(self, grid: Grid) -> tuple[Self, float]:
        """The covariance of the same fields without their divergence, and the variance that was taken.

        Arguments:
            grid: Its mean spacing counts.
        """
        (dy, dx), sizes = (grid.dy.mean().item(), grid.dx.mean().item()), self.spectrum.shape[-2:]
        y, x = (np.sin(2 * np.pi * np.fft.fftfreq(size)) for size in sizes)
        y, x = (np.where(np.abs(sines) < 1e-12, 0.0, sines) for sines in (y, x))  # the sine of pi is not quite 0
        across = np.stack(np.broadcast_arrays(-y[:, None] / dy, x / dx))
        length = np.sqrt(np.square(across).sum(axis=0))
        t = across / np.where(length > 0, length, 1.0)
        power = np.einsum("chw,cdhw,dhw->hw", t, self.spectrum, t).real
        kept = np.where(length > 0, t[:, None] * t * power, self.spectrum)
        left_out = np.trace(self.spectrum - kept).real.mean() / 2
        return type(self)(kept, self.valid, white=False), float(left_out)

    def leading(self, count: int, shape: tuple[int, int]) -> tuple[Floats, Floats, float]:
        """The covariance on a rectangle of cells by eigenvectors: V L V^T + nugget I, the nugget all that they miss.

        Arguments:
            count: Eigenvectors, below the number of values of the rectangle.
            shape: `(h, w)`, at most that of the domain.

        Returns:
            Eigenvectors `(count, 2, h, w)`, eigenvalues `(count,)`, largest first, and the nugget.
        """
        h, w = shape
        torus = np.zeros((2, *self.spectrum.shape[-2:]))

        def product(field: Floats) -> Floats:
            torus[:, :h, :w] = field.reshape(2, h, w)
            return _apply(self.spectrum, torus)[:, :h, :w].ravel()

        operator = LinearOperator((2 * h * w, 2 * h * w), matvec=product, dtype=np.float64)
        values, vectors = eigsh(operator, k=count, v0=np.random.default_rng(0).standard_normal(2 * h * w))
        variance = np.fft.ifft2(np.einsum("cchw->chw", self.spectrum)).real[:, 0, 0].mean()
        modes = vectors.T[::-1].reshape(count, 2, h, w)
        values = values.clip(min=0.0)  # but for rounding
        return modes.copy(), values[::-1].copy(), float(max(variance - values.sum() / (2 * h * w), 0.0))

    def condition(
        self, y: Floats, observed: Bools, noise: float | Floats, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """Posterior mean and variance `(2, H, W)` of the anomaly given `y` (0 where hidden).

        Exact where at most 2048 cells are observed, or else not known up to the least noise on the torus. Beyond that
        the 2048 observed cells nearest to hidden ones enter, and the others keep their values if there is a white part.

        Arguments:
            y: Anomalies `(2, H, W)`.
            observed: `(H, W)`.
            noise: The variance of their error, a number or `(H, W)`, or the variances of both components and their
                covariance, `(3, H, W)`, for which the first system is taken whatever is observed.
            with_variance: Whether the second result is wanted.
        """
        ellipses = np.ndim(noise) == 3
        noise = noise if ellipses else np.broadcast_to(noise, observed.shape)
        used, torus, level = self._embed(observed), self._embed(y), self._embed(noise)
        free = used.size
        if observed.any() and not ellipses:
            free -= (noise[observed] == noise[observed].min()).sum()
        if free <= min(used.sum(), _LARGEST):
            mean, variance = self.by_hidden(torus, used, level, with_variance)
        else:
            used = self._embed(_nearest_to(self.valid & ~observed, observed, _LARGEST, self._periodic()))
            mean, variance = self.by_observations(torus, used, level, with_variance)
        rest = observed & ~self._crop(used) & self.white
        mean = np.where(rest, y, self._crop(mean))
        return mean, None if variance is None else np.where(
            rest, noise[:2] if ellipses else noise, self._crop(variance)
        )

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
        self, y: Floats, observed: Bools, noise: float | Floats, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """`condition` on the whole torus by a system of the size of the observations."""
        offsets = np.fft.ifft2(self.spectrum).real
        system = _block(offsets, observed, observed)
        _add_noise(system, noise if np.ndim(noise) == 3 else np.broadcast_to(noise, observed.shape), observed)
        factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
        weights = np.zeros_like(y)
        weights[:, observed] = cho_solve(factor, y[:, observed].ravel(), check_finite=False).reshape(2, -1)
        mean = _apply(self.spectrum, weights)
        if not with_variance:
            return mean, None
        variance = np.zeros_like(y)
        for cells in _parts(self.inside):
            half = solve_triangular(factor[0], _block(offsets, observed, cells), lower=True, check_finite=False)
            explained = np.square(half).sum(axis=0).reshape(2, -1)
            variance[:, cells] = np.diagonal(offsets[:, :, 0, 0])[:, None] - explained
        return mean, variance

    def by_hidden(
        self, y: Floats, observed: Bools, noise: float | Floats, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """`condition` on the whole torus by a system of the size of what is hidden, or measured with more noise."""
        noise = np.broadcast_to(noise, observed.shape)
        least = noise[observed].min()
        known = observed & (noise == least)
        free, complete = ~known, np.where(known, y, 0.0)
        weight = np.where(observed & free, 1 / np.where(noise > least, noise - least, 1.0), 0.0)[free]
        precision = _inverse(self.spectrum, least)
        offsets = np.fft.ifft2(precision).real
        system = _block(offsets, free, free)
        system[np.diag_indices_from(system)] += np.tile(weight, 2)
        factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False) if system.size else (system, True)
        if system.size:
            pull = weight * y[:, free] - _apply(precision, complete)[:, free]
            complete[:, free] = cho_solve(factor, pull.ravel(), check_finite=False).reshape(2, -1)
        mean = complete - least * _apply(precision, complete)
        if not with_variance:
            return mean, None
        variance = np.zeros_like(y)
        for cells in _parts(self.inside):
            variance[:, cells] = self._variance_by_hidden(offsets, factor[0], free, least, cells)
        return mean, variance

    def _variance_by_hidden(self, offsets: Floats, factor: Floats, free: Bools, least: float, cells: Bools) -> Floats:
        """The diagonal of r I - r^2 Q + G^T (Q_ff + D)^-1 G in the n cells `cells`, `(2, n)`."""
        diagonal = np.diagonal(offsets[:, :, 0, 0])[:, None]
        known = np.broadcast_to(least - least**2 * diagonal, (2, cells.sum()))
        if not factor.size:
            return known
        onto = -least * _block(offsets, free, cells)
        same = np.flatnonzero(free)[:, None] == np.flatnonzero(cells)
        onto += np.kron(np.eye(2), same)
        half = solve_triangular(factor, onto, lower=True, check_finite=False)
        return known + np.square(half).sum(axis=0).reshape(2, -1)


class LowRank:
    """S = V L V^T + nugget I over the values of the valid cells.

    Arguments:
        modes: V, `(2 n, r)`, component by component.
        variances: The diagonal of L, `(r,)`.
        nugget: The white variance; 0 only where all noise is above 0.
        valid: The n valid cells, `(H, W)`.
    """

    def __init__(self, modes: Floats, variances: Floats, nugget: float, valid: Bools) -> None:
        self.modes, self.variances, self.nugget, self.valid = modes, variances, nugget, valid

    @classmethod
    def of(cls, fields: NDArray[np.floating], mean: Floats, valid: Bools) -> Self:
        """Of training fields `(N, 2, H, W)`, gaps counting as the mean; at most 2000 of them, evenly spread."""
        fields = fields[:: -(-len(fields) // _PCA_SNAPSHOTS)]
        anomalies = np.nan_to_num((fields - mean)[:, :, valid].reshape(len(fields), -1))
        nuggets, deviance = unexplained(anomalies)
        modes, variances = principal_modes(anomalies)
        rank = int(np.argmin(deviance)) + 1
        return cls(modes[:, :rank], variances[:rank], float(nuggets[rank - 1]), valid)

    def solenoidal(self, grid: Grid) -> tuple[Self, float]:
        """The covariance of the same fields without divergence and white part, and the variance that was taken."""
        fields = np.zeros((len(self.variances), 2, *self.valid.shape))
        fields[:, :, self.valid] = self.modes.T.reshape(-1, 2, self.valid.sum())
        modes = without_divergence(fields, grid)[:, :, self.valid].reshape(len(fields), -1).T
        left_out = self.nugget + float((np.square(self.modes - modes) @ self.variances).mean())
        return type(self)(modes, self.variances, 0.0, self.valid), left_out

    def condition(
        self, y: Floats, observed: Bools, noise: float | Floats, with_variance: bool = False
    ) -> tuple[Floats, Floats | None]:
        """Posterior mean and variance `(2, H, W)` of the anomaly given `y` (0 where hidden); as for `Homogeneous`."""
        if np.ndim(noise) == 3:
            return self._by_axes(y, observed, noise, with_variance)
        return self._condition(self.modes, y, observed, np.broadcast_to(noise, y.shape), with_variance)

    def _by_axes(
        self, y: Floats, observed: Bools, noise: Floats, with_variance: bool
    ) -> tuple[Floats, Floats | None]:  # fmt: skip
        """`condition` along the axes of the error ellipses, to which the modes are turned, and the results back."""
        block = np.where(observed, noise, np.array([1.0, 1.0, 0.0])[:, None, None])
        u, v, both = (torch.from_numpy(part[None]) for part in block)
        angle, lengths = axes(root(u, v, both))
        modes = np.zeros((len(self.variances), 2, *self.valid.shape))
        modes[:, :, self.valid] = self.modes.T.reshape(len(modes), 2, -1)
        modes, y = (turned(torch.from_numpy(part), angle).numpy() for part in (modes, y))
        modes = modes[:, :, self.valid].reshape(len(modes), -1).T
        mean, covariance = self._condition(
            modes, y, observed, lengths.square().numpy(), with_variance, angle.numpy()[0]
        )
        return back(torch.from_numpy(mean), angle).numpy(), covariance

    def _condition(
        self,
        modes: Floats,
        y: Floats,
        observed: Bools,
        noise: Floats,
        with_variance: bool,
        angle: Floats | None = None,
    ) -> tuple[Floats, Floats | None]:
        """`condition` for the variances of single values, `(2, H, W)`.

        The variance is that of u and v, where modes and values are turned by an angle `(H, W)`.
        """
        seen = np.tile(observed[self.valid], 2)
        basis, values = modes[seen], y[:, self.valid].ravel()[seen]
        noise = noise[:, self.valid].ravel()
        white = self.nugget + noise[seen]
        weighted = basis / white[:, None]
        system = weighted.T @ basis + np.diag(1 / self.variances)
        factor = cho_factor(system, lower=True, check_finite=False)
        smooth = modes @ cho_solve(factor, weighted.T @ values, check_finite=False)
        share = np.zeros(len(seen))
        share[seen] = self.nugget / white
        smooth[seen] += share[seen] * (values - smooth[seen])
        if not with_variance:
            return self._on_grid(smooth), None
        half = (1 - share) * solve_triangular(factor[0], modes.T, lower=True, check_finite=False)
        beside = np.where(seen, share * noise, self.nugget)
        if angle is not None:  # of Q (H H^T + diag) Q^T, what stands on the diagonal
            c, s = np.cos(angle[self.valid]), np.sin(angle[self.valid])
            first, second = half.reshape(len(half), 2, -1).swapaxes(0, 1)
            half = np.concatenate([c * first - s * second, s * first + c * second], axis=1)
            first, second = beside.reshape(2, -1)
            beside = np.concatenate([c**2 * first + s**2 * second, s**2 * first + c**2 * second])
        return self._on_grid(smooth), self._on_grid(np.square(half).sum(axis=0) + beside)

    def _on_grid(self, values: Floats) -> Floats:
        field = np.zeros((2, *self.valid.shape))
        field[:, self.valid] = values.reshape(2, -1)
        return field


def without_divergence(fields: Floats, grid: Grid) -> Floats:
    """The nearest fields `(N, 2, H, W)` that `operators.divergence` finds none in; 0 outside the domain."""
    return leray(torch.from_numpy(np.array(fields)), grid.to("cpu")).numpy()


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


def _parts(cells: Bools, size: int = 1024) -> Iterator[Bools]:
    """`cells` in parts of at most `size` cells: a matrix of all of them would take gigabytes."""
    places = np.flatnonzero(cells)
    for first in range(0, len(places), size):
        part = np.zeros(cells.size, dtype=bool)
        part[places[first : first + size]] = True
        yield part.reshape(cells.shape)


def _block(offsets: Floats, rows: Bools, columns: Bools) -> Floats:
    """The matrix of entries `offsets[c, d, r - s]`, cells r of `rows`, s of `columns`, component by component."""
    height, width = rows.shape
    (y1, x1), (y2, x2) = np.nonzero(rows), np.nonzero(columns)
    flat = (y1[:, None] - y2) % height * width + (x1[:, None] - x2) % width
    blocks = [[offsets[c, d].ravel()[flat] for d in range(2)] for c in range(2)]
    return np.block(blocks)


def _add_noise(system: Floats, noise: Floats, observed: Bools) -> None:
    """Adds the covariance of errors `(H, W)` or `(3, H, W)` to that of observed values, component by component."""
    if noise.ndim == 2:
        system[np.diag_indices_from(system)] += np.tile(noise[observed], 2)
        return
    u, v, both = noise[:, observed]
    system[np.diag_indices_from(system)] += np.concatenate([u, v])
    first, second = np.arange(len(u)), len(u) + np.arange(len(u))
    system[first, second] += both
    system[second, first] += both


def _apply(spectrum: NDArray[np.complex128], field: Floats) -> Floats:
    """The circulant matrix of `spectrum` `(2, 2, H, W)` times `field` `(2, H, W)`."""
    return np.fft.ifft2(np.einsum("cdhw,dhw->chw", spectrum, np.fft.fft2(field))).real


def _without_gaps(spectrum: NDArray[np.complex128], pairs: Floats, domain: Floats) -> NDArray[np.complex128]:
    """The spectrum that fields without gaps would have: sums over the pairs of the domain, not over the measured ones.

    At offsets with less than a hundredth of their pairs the sum stays as it is. Eigenvalues that this makes negative
    are set to 0.

    Arguments:
        spectrum: Of the sums of products at every offset, `(2, 2, H, W)`.
        pairs: The spectrum of the number of measured pairs, `(H, W)`.
        domain: That of the pairs of the domain.
    """
    pairs, domain = np.fft.ifft2(pairs).real, np.fft.ifft2(domain).real
    enough = pairs > np.maximum(0.01 * domain, 0.5)
    ratio = np.where(enough, domain / np.where(enough, pairs, 1.0), 1.0)
    whole = np.fft.fft2(np.fft.ifft2(spectrum) * ratio)
    values, vectors = np.linalg.eigh(np.moveaxis(whole, (0, 1), (-2, -1)))
    blocks = np.einsum("hwci,hwi,hwdi->cdhw", vectors, values.clip(min=0.0), vectors.conj())
    return blocks


def _inverse(spectrum: NDArray[np.complex128], noise: float) -> NDArray[np.complex128]:
    """The spectrum of (S + noise I)^-1."""
    blocks = np.moveaxis(spectrum, (0, 1), (-2, -1)) + noise * np.eye(2)
    return np.moveaxis(np.linalg.inv(blocks), (-2, -1), (0, 1))


def principal_modes(anomalies: Floats) -> tuple[Floats, Floats]:
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


def unexplained(anomalies: Floats) -> tuple[Floats, Floats]:
    """By the number of modes, 1 and more: the white variance that they leave, and how unlikely they are, `(R,)` both.

    Of the modes of the first four fifths of `(N, d)` in the last fifth; the second is minus twice the log likelihood.
    """
    split = len(anomalies) - max(1, len(anomalies) // 5)
    learn, judge = anomalies[:split], anomalies[split:]
    modes, variances = principal_modes(learn)
    d, ranks = anomalies.shape[1], np.arange(1, min(len(variances), anomalies.shape[1] - 1) + 1)
    energy = np.square(judge @ modes).mean(axis=0)
    rest = np.square(judge).sum(axis=1).mean() - np.cumsum(energy)[: len(ranks)]
    nugget = np.maximum(rest / (d - ranks), 1e-6 * np.square(anomalies).mean())
    total = variances[: len(ranks)] + nugget[:, None]  # (rank, mode)
    inside = np.tril(np.log(total) + energy[: len(ranks)] / total).sum(axis=1)
    return nugget, inside + (d - ranks) * np.log(nugget) + rest / nugget
