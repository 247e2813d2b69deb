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
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft

from vecfield_diffusion.models.stationary import Covariance

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class SpaceTime(ABC):
    """A Gaussian field in space and time.

    Attributes:
        mean: The mean field, `(2, H, W)`.
        valid: The cells of the domain, `(H, W)`.
    """

    mean: Floats
    valid: Bools

    @property
    @abstractmethod
    def covariance(self) -> Covariance:
        """That of its anomalies."""

    @abstractmethod
    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        """A trajectory of anomalies, `(frames, 2, H, W)`; what it holds outside the domain means nothing."""


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
    def covariance(self) -> Covariance:
        none = torch.zeros(0, 2, *self.valid.shape, dtype=torch.float64), torch.zeros(1, 0, 0, dtype=torch.float64)
        return Covariance(_tensor(self.lags), *none, _tensor(self.scale))

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


class PrincipalComponents(SpaceTime):
    """Principal components in space whose coefficients are stationary in time.

    Arguments:
        fields: v, `(r, 2, H, W)`, orthonormal over the valid cells.
        lags: G(tau), `(L, r, r)`.
        mean: The mean field, `(2, H, W)`.
        valid: The cells of the domain, `(H, W)`.
    """

    def __init__(self, fields: Floats, lags: Floats, mean: Floats, valid: Bools) -> None:
        self.fields, self.lags, self.mean, self.valid = fields, lags, mean, valid

    @cached_property
    def covariance(self) -> Covariance:
        rows, columns = self.valid.shape
        nothing = torch.zeros(1, 2, 2, 2 * rows, 2 * columns, dtype=torch.float64)
        return Covariance(nothing, _tensor(self.fields), _tensor(self.lags))

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


class Sum(SpaceTime):
    """The sum of two independent fields on one domain, by components and homogeneous; its mean is that of the first."""

    def __init__(self, first: PrincipalComponents, second: Stationary) -> None:
        self.parts, self.mean, self.valid = (first, second), first.mean, first.valid

    @cached_property
    def covariance(self) -> Covariance:
        large, rest = (part.covariance for part in self.parts)
        return Covariance(rest.lags, large.components, large.component_lags, rest.scale)

    def draw(self, frames: int, generator: np.random.Generator) -> Floats:
        return self.parts[0].draw(frames, generator) + self.parts[1].draw(frames, generator)


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.require(values, np.float64, "CW"))


def spectrum(lags: Floats, size: int) -> NDArray[np.complex128]:
    """P(k, omega) of C(tau, r) on a torus of `size` frames, `(2, 2, size, Ht, Wt / 2 + 1)`: Hermitian in (c, d)."""
    wrapped = np.zeros((2, 2, size, *lags.shape[-2:]))
    wrapped[:, :, : len(lags)] = np.moveaxis(lags, 0, 2)
    mirrored = np.roll(lags[:0:-1, ..., ::-1, ::-1], (1, 1), axis=(-2, -1))
    wrapped[:, :, size - len(lags) + 1 :] += np.moveaxis(mirrored.swapaxes(1, 2), 0, 2)
    return fft.rfftn(wrapped, axes=(2, 3, 4))
