"""Gaussian fields in space and time: covariances that are stationary in time, and the trajectories that they draw.

A series is one field `(T, 2, H, W)` at equal steps. Two covariances of its anomalies x about a mean field are here.

Homogeneous in space but for a standard deviation a of every value, x = a xi, with C the covariance of xi,

    E xi_c(t + tau, p + r) xi_d(t, p) = C_cd(tau, r)                C_cd(-tau, r) = C_dc(tau, -r)

on the torus that the grid forms where its axes are periodic, or that doubling them forms. C vanishes from the lag L on.
On a torus in time of L - 1 steps more than the series it is then circulant, and a trajectory is white noise times a
root of the cross-spectrum P(k, omega) >= 0, by fast Fourier transforms (Dietrich and Newsam 1997, SIAM J. Sci. Comput.
18, 1088).

By principal components, x = sum_i a_i(t) v_i, where the fields v are those of the data and the covariance of their
coefficients, G_ij(tau) = E a_i(t + tau) a_j(t), is the only thing that is stationary: for flows that differ from place
to place, as behind a body. Restricted to windows of time these are extended empirical orthogonal functions. What they
leave is a homogeneous field of its own: sums of independent fields are fields, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


class Values(NamedTuple):
    """Single values of a series: their frame, component and cell (row and column), integers `(n,)` each."""

    frame: Integers
    component: Integers
    row: Integers
    column: Integers

    @classmethod
    def where(cls, chosen: Bools, first: int = 0) -> Values:
        """The values that are True in `(T, 2, H, W)`, whose first frame has the number `first`."""
        frame, component, row, column = np.nonzero(chosen)
        return cls(frame + first, component, row, column)

    def __len__(self) -> int:  # of the values, not of the tuple
        return len(self.frame)

    def at(self, chosen: NDArray) -> Values:
        """Those of an index or of a mask `(n,)`."""
        return Values(*(part[chosen] for part in self._fields_of()))

    def of(self, fields: NDArray, first: int = 0) -> NDArray:
        """What a series `(..., T, 2, H, W)`, whose first frame is number `first`, has there: `(..., n)`."""
        return fields[..., self.frame - first, self.component, self.row, self.column]

    def _fields_of(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.frame, self.component, self.row, self.column


class SpaceTime(ABC):
    """A Gaussian field in space and time.

    Attributes:
        mean: The mean field, `(2, H, W)`.
        valid: The cells of the domain, `(H, W)`.
    """

    mean: Floats
    valid: Bools

    @abstractmethod
    def covariance(self, a: Values, b: Values) -> Floats:
        """The covariance of values, `(len(a), len(b))`."""

    @abstractmethod
    def variance(self) -> Floats:
        """The variance of every value, `(2, H, W)`."""

    @abstractmethod
    def apply(self, frames: Sequence[int], values: Values, weights: Floats) -> Floats:
        """The covariance of whole frames with values, times weights `(n, m)`: `(m, len(frames), 2, H, W)`."""

    @abstractmethod
    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        """A trajectory of anomalies, `(frames, 2, H, W)`; what it holds outside the domain means nothing."""

    @abstractmethod
    def correlation(self) -> tuple[Floats, Floats]:
        """Correlations by distance in cells `(D,)` and by lag `(L,)`, of all directions and both components."""


class Stationary(SpaceTime):
    """Homogeneous in space, stationary in time.

    Arguments:
        lags: C(tau, r), `(L, 2, 2, Ht, Wt)`; an axis of the torus is as long as that of the field if periodic, else
            twice as long.
        mean: The mean field, `(2, H, W)`.
        valid: The cells of the domain, `(H, W)`.
        scale: The standard deviation of every value in units of that of C, `(2, H, W)`; 1 if None.
    """

    def __init__(self, lags: Floats, mean: Floats, valid: Bools, scale: Floats | None = None) -> None:
        self.lags, self.mean, self.valid = lags, mean, valid
        self.scale = np.ones_like(mean) if scale is None else scale

    @cached_property
    def _waves(self) -> NDArray[np.complex128]:
        """C_k(tau), `(L, 2, 2, Ht, Wt / 2 + 1)`."""
        return fft.rfft2(self.lags)

    def _table(self, reach: int) -> Floats:
        """C at the lags from -reach and the offsets from -(H - 1) and -(W - 1) on, so that indices are sums."""
        if self._kept is None or len(self._kept) < 2 * reach + 1:
            height, width = self.valid.shape
            rows = np.arange(1 - height, height) % self.lags.shape[-2]
            columns = np.arange(1 - width, width) % self.lags.shape[-1]
            later = self.lags[: reach + 1, :, :, rows[:, None], columns]
            earlier = later[:0:-1, ..., ::-1, ::-1].swapaxes(1, 2)
            self._kept = np.ascontiguousarray(np.concatenate((earlier, later)))
        return self._kept

    _kept: Floats | None = None

    def covariance(self, a: Values, b: Values) -> Floats:
        first, last = a.frame.min(initial=0), a.frame.max(initial=0)
        farthest = max(last - b.frame.min(initial=last), b.frame.max(initial=first) - first)
        table = self._table(min(farthest, len(self.lags) - 1))
        reach, (height, width) = len(table) // 2, self.valid.shape
        frame, left, right, row = (stride // table.itemsize for stride in table.strides[:4])
        ours = a.frame * frame + a.component * left + a.row * row + a.column
        theirs = (reach - b.frame) * frame + b.component * right + (height - 1 - b.row) * row + width - 1 - b.column
        index = ours[:, None] + theirs
        far = np.abs(a.frame[:, None] - b.frame) > reach if farthest > reach else None
        if far is not None:
            index[far] = 0
        found = table.ravel().take(index)
        found *= self._scales(a)[:, None]
        found *= self._scales(b)
        if far is not None:
            found[far] = 0.0
        return found

    def _scales(self, values: Values) -> Floats:
        return self.scale[values.component, values.row, values.column]

    def variance(self) -> Floats:
        return np.diagonal(self.lags[0, :, :, 0, 0])[:, None, None] * np.square(self.scale)

    def apply(self, frames: Sequence[int], values: Values, weights: Floats) -> Floats:
        torus, (height, width) = self.lags.shape[-2:], self.valid.shape
        weights = weights * self._scales(values)[:, None]
        out = np.zeros((weights.shape[1], len(frames), *self._waves.shape[2:]), dtype=np.complex128)
        for time in np.unique(values.frame):
            here = values.frame == time
            field = np.zeros((2, *torus, weights.shape[1]))
            field[values.component[here], values.row[here], values.column[here]] = weights[here]
            waves = fft.rfft2(np.moveaxis(field, -1, 0))
            for i, frame in enumerate(frames):
                lag = frame - int(time)
                if abs(lag) >= len(self.lags):
                    continue
                c = self._waves[abs(lag)] if lag >= 0 else self._waves[-lag].swapaxes(0, 1).conj()
                for k in range(2):
                    out[:, i, k] += c[k, 0] * waves[:, 0] + c[k, 1] * waves[:, 1]
        return fft.irfft2(out, s=torus)[..., :height, :width] * self.scale

    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        size = fft.next_fast_len(frames + len(self.lags) - 1, real=True)
        root = self._root(size)
        shape = (size, *self.lags.shape[-2:])
        noise = np.stack([generator.standard_normal(shape, dtype=root[0].real.dtype) for _ in range(2)])
        waves = fft.rfftn(noise, axes=(1, 2, 3))
        waves[1] = root[1] * waves[0] + root[2] * waves[1]
        waves[0] *= root[0]
        height, width = self.valid.shape
        fields = fft.irfftn(waves, s=shape, axes=(1, 2, 3))[:, :frames, :height, :width]
        return np.moveaxis(fields, 0, 1) * self.scale

    #: A trajectory is drawn in single precision: its rounding is far below its noise.
    PRECISION = np.float32

    def _root(self, size: int) -> tuple[NDArray, NDArray, NDArray]:
        """The lower triangular roots of P(k, omega) on a torus of `size` frames: entries (0, 0), (1, 0), (1, 1)."""
        if self._roots is None or len(self._roots[0]) != size:
            power = spectrum(self.lags, size)
            first = np.sqrt(power[0, 0].real.clip(min=0.0))
            cross = power[1, 0] / np.where(first > 0, first, 1.0)
            second = np.sqrt((power[1, 1].real - np.square(np.abs(cross))).clip(min=0.0))
            kind = np.result_type(self.PRECISION, np.complex64)
            self._roots = first.astype(self.PRECISION), cross.astype(kind), second.astype(self.PRECISION)
        return self._roots

    _roots: tuple[NDArray, NDArray, NDArray] | None = None

    def correlation(self) -> tuple[Floats, Floats]:
        trace = np.trace(self.lags, axis1=1, axis2=2)
        height, width = self.valid.shape
        along = [trace[0, :height, 0], trace[0, 0, :width]]
        length = min(map(len, along))
        return sum(line[:length] for line in along) / (2 * trace[0, 0, 0]), trace[:, 0, 0] / trace[0, 0, 0]


class Components(SpaceTime):
    """Principal components in space whose coefficients are stationary in time.

    Arguments:
        fields: v, `(r, 2, H, W)`, orthonormal over the valid cells.
        lags: G(tau), `(L, r, r)`.
        mean: The mean field, `(2, H, W)`.
        valid: The cells of the domain, `(H, W)`.
    """

    def __init__(self, fields: Floats, lags: Floats, mean: Floats, valid: Bools) -> None:
        self.fields, self.lags, self.mean, self.valid = fields, lags, mean, valid

    def _lag(self, lag: int) -> Floats:
        if abs(lag) >= len(self.lags):
            return np.zeros_like(self.lags[0])
        return self.lags[lag] if lag >= 0 else self.lags[-lag].T

    def _basis(self, values: Values) -> Floats:
        return self.fields[:, values.component, values.row, values.column].T

    def covariance(self, a: Values, b: Values) -> Floats:
        out, left, right = np.zeros((len(a), len(b))), self._basis(a), self._basis(b)
        columns = [(early, np.flatnonzero(b.frame == early)) for early in np.unique(b.frame)]
        for late in np.unique(a.frame):
            rows = np.flatnonzero(a.frame == late)
            for early, places in columns:
                out[np.ix_(rows, places)] = left[rows] @ self._lag(int(late - early)) @ right[places].T
        return out

    def variance(self) -> Floats:
        return np.einsum("ichw,ij,jchw->chw", self.fields, self.lags[0], self.fields)

    def apply(self, frames: Sequence[int], values: Values, weights: Floats) -> Floats:
        basis, out = self._basis(values), np.zeros((weights.shape[1], len(frames), len(self.fields)))
        for time in np.unique(values.frame):
            here = values.frame == time
            drive = basis[here].T @ weights[here]
            for i, frame in enumerate(frames):
                out[:, i] += (self._lag(frame - int(time)) @ drive).T
        return np.einsum("mti,ichw->mtchw", out, self.fields, optimize=True)

    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        size = fft.next_fast_len(frames + len(self.lags) - 1, real=True)
        wrapped = np.zeros((size, *self.lags.shape[1:]))
        wrapped[: len(self.lags)] = self.lags
        wrapped[size - len(self.lags) + 1 :] = self.lags[:0:-1].swapaxes(1, 2)
        values, vectors = np.linalg.eigh(fft.rfft(wrapped, axis=0))
        waves = fft.rfft(generator.standard_normal((size, len(self.fields))), axis=0)
        turned = np.einsum("wji,wj->wi", vectors.conj(), waves)
        waves = np.einsum("wij,wj->wi", vectors, np.sqrt(values.clip(min=0.0)) * turned)
        coefficients = fft.irfft(waves, n=size, axis=0)[:frames]
        return np.einsum("ti,ichw->tchw", coefficients, self.fields, optimize=True)

    def correlation(self) -> tuple[Floats, Floats]:
        # Nothing is said by distance: observations count by time, and by cells where that is equal.
        power = np.trace(self.lags, axis1=1, axis2=2)
        return np.ones(min(self.valid.shape)), power / power[0]


class Sum(SpaceTime):
    """The sum of two independent fields on one domain; its mean is that of the first."""

    def __init__(self, first: SpaceTime, second: SpaceTime) -> None:
        self.parts, self.mean, self.valid = (first, second), first.mean, first.valid

    def covariance(self, a: Values, b: Values) -> Floats:
        first, second = (part.covariance(a, b) for part in self.parts)
        return np.add(first, second, out=first)

    def variance(self) -> Floats:
        return self.parts[0].variance() + self.parts[1].variance()

    def apply(self, frames: Sequence[int], values: Values, weights: Floats) -> Floats:
        return self.parts[0].apply(frames, values, weights) + self.parts[1].apply(frames, values, weights)

    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        return self.parts[0].draw(frames, generator) + self.parts[1].draw(frames, generator)

    def correlation(self) -> tuple[Floats, Floats]:
        return self.parts[1].correlation()[0], self.parts[0].correlation()[1]


def spectrum(lags: Floats, size: int) -> NDArray[np.complex128]:
    """P(k, omega) of C(tau, r) on a torus of `size` frames, `(2, 2, size, Ht, Wt / 2 + 1)`: Hermitian in (c, d)."""
    wrapped = np.zeros((2, 2, size, *lags.shape[-2:]))
    wrapped[:, :, : len(lags)] = np.moveaxis(lags, 0, 2)
    mirrored = np.roll(lags[:0:-1, ..., ::-1, ::-1], (1, 1), axis=(-2, -1))
    wrapped[:, :, size - len(lags) + 1 :] += np.moveaxis(mirrored.swapaxes(1, 2), 0, 2)
    return fft.rfftn(wrapped, axes=(2, 3, 4))
