"""The products of functions along time, y and x as a basis of fields, and what a covariance is in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from vecfield_diffusion.models.stationary import Covariance, Values

#: One of time, one of y, and one of x.
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Table:
    """A basis, its strongest functions, and their prior.

    Arguments:
        axes: The functions of time, y and x, a row each: `(T, T)`, `(H, H)`, `(W, W)`.
        chosen: Where the K / 2 strongest functions are among the `(T, H, W)`, `(n,)`; each is a mode in each component.
        rest: The variances of all functions that are not among the modes, `(T, 2, H, W)`, else 0.
        pairs: Of each axis, the products of two of its functions that are in use, `(pairs, length)`.
        place: Where the pair of two of the strongest is among all pairs of pairs, `(n, n)`.
        few: Of each axis, the functions that are in use, a row each.
        among: Where the strongest are among the products of these, `(n,)`.
    """

    axes: Three
    chosen: Tensor
    rest: Tensor
    pairs: Three
    place: Tensor
    few: Three
    among: Tensor

    @classmethod
    def of(cls, covariance: Covariance, modes: int, left_out: float) -> Self:
        """The K strongest, `modes` at most, or those that leave the share `left_out` of the variance."""
        axes = functions(covariance)
        variances = homogeneous_variances(covariance.lags, axes) + component_variances(covariance, axes)
        strength = variances.sum(dim=1).flatten()
        ranked = strength.argsort(descending=True, stable=True)
        enough = int((strength[ranked].cumsum(0) < (1 - left_out) * strength.sum()).sum()) + 1
        chosen = ranked[: min(enough, max(modes // 2, 1))].sort().values
        keep = torch.ones_like(strength)
        keep[chosen] = 0.0
        shape, places, pairs, few, among = variances[:, 0].shape, [], [], [], torch.zeros_like(chosen)
        for axis, rows in zip(axes, torch.unravel_index(chosen, shape), strict=True):
            used, local = rows.unique(return_inverse=True)
            few.append(axis[used])
            among = among * len(used) + local
            first, second = torch.triu_indices(len(used), len(used), device=rows.device)
            number = torch.zeros(len(used), len(used), dtype=torch.long, device=rows.device)
            number[first, second] = number[second, first] = torch.arange(len(first), device=rows.device)
            pairs.append(axis[used[first]] * axis[used[second]])
            places.append(number[local[:, None], local])
        place = (places[0] * len(pairs[1]) + places[1]) * len(pairs[2]) + places[2]
        rest = variances * keep.view(shape)[:, None]
        return cls(axes, chosen, rest, tuple(pairs), place, tuple(few), among)

    def to(self, dtype: torch.dtype) -> Self:
        """Returns the same in another type."""
        axes, pairs, few = (tuple(part.to(dtype) for part in three) for three in (self.axes, self.pairs, self.few))
        return replace(self, axes=axes, pairs=pairs, few=few, rest=self.rest.to(dtype))

    def gram(self, weight: Tensor) -> Tensor:
        """Returns V^T w V, `(K, K)`, for weights of the cells `(T, H, W)`."""
        of_time, of_y, of_x = self.pairs
        sums = of_y @ (weight.to(of_y) @ of_x.mT)  # (T, pairs of y, pairs of x)
        one = (of_time @ sums.flatten(1)).flatten()[self.place]
        return torch.block_diag(one, one)

    def spread(self, among: Tensor) -> Tensor:
        """Returns the variance of every cell, the mean of both components, `(T, H, W)`, of modes of covariance `among`.

        It is half the adjoint of `gram`.
        """
        of_time, of_y, of_x = self.pairs
        n = len(self.chosen)
        sums = among.new_zeros(len(of_time) * len(of_y) * len(of_x))
        sums.index_add_(0, self.place.flatten(), (among[:n, :n] + among[n:, n:]).flatten() / 2)
        sums = of_time.mT @ sums.view(len(of_time), -1)
        return of_y.mT @ sums.view(-1, len(of_y), len(of_x)) @ of_x

    def rows(self, values: Values) -> Tensor:
        """Returns the rows of V of single values, `(len(values), K)`."""
        places = torch.unravel_index(self.chosen, self.rest[:, 0].shape)
        here = (values.frame, values.row, values.column)
        time, y, x = (axis[place][:, cell].T for axis, place, cell in zip(self.axes, places, here, strict=True))
        one, second = time * y * x, values.component[:, None] == 1
        return torch.cat([one * ~second, one * second], dim=1)

    def coefficients(self, field: Tensor) -> Tensor:
        """Returns V^T of fields `(B, T, 2, H, W)`, `(B, K)`: all modes of u, then of v."""
        return forward(self.few, field).transpose(1, 2).flatten(2)[:, :, self.among].flatten(1)

    def field(self, coefficients: Tensor) -> Tensor:
        """Returns V times coefficients `(B, K)`, `(B, T, 2, H, W)`."""
        n, (frames, *shape) = len(coefficients), (len(axis) for axis in self.few)
        whole = coefficients.new_zeros(n, 2, frames * shape[0] * shape[1])
        whole = whole.index_copy(2, self.among, coefficients.unflatten(1, (2, -1)))
        return back(self.few, whole.view(n, 2, frames, *shape).transpose(1, 2))

    def filtered(self, field: Tensor, share: Tensor) -> Tensor:
        """Returns fields with the coefficient of each function times its share, `(B, T, 2, H, W)`."""
        return back(self.axes, forward(self.axes, field) * share)


def forward(axes: Three, field: Tensor) -> Tensor:
    """Returns the coefficients of products of functions, `(B, t, 2, y, x)`, of fields `(B, T, 2, H, W)`."""
    time, y, x = axes
    inner = y @ (field @ x.mT)
    return (time @ inner.flatten(2)).unflatten(2, inner.shape[2:])


def back(axes: Three, coefficients: Tensor) -> Tensor:
    """Returns fields `(B, T, 2, H, W)` from coefficients of products of functions, `(B, t, 2, y, x)`."""
    time, y, x = axes
    inner = (time.mT @ coefficients.flatten(2)).unflatten(2, coefficients.shape[2:])
    return y.mT @ (inner @ x)


def functions(covariance: Covariance) -> Three:
    """Returns the eigenvectors of the covariance along time, y and x, those of most variance first, a row each."""
    lags, components, still = covariance.lags, covariance.components, covariance.component_lags[0]
    height, width = components.shape[-2:]
    trace = lags.diagonal(dim1=1, dim2=2).sum(-1)

    def along(line: Tensor, length: int, cells: int) -> Tensor:
        places = torch.arange(length, device=line.device)
        return cells * line[(places[:, None] - places).abs()]

    norms = torch.einsum("icyx,jcyx->ij", components, components)
    lagged = torch.einsum("tij,ij->t", covariance.component_lags, norms)
    time = along(trace[:, 0, 0], len(lags), height * width) + along(lagged, len(lags), 1)
    y = along(trace[0, :, 0], height, width) + torch.einsum("icyx,ij,jczx->yz", components, still, components)
    x = along(trace[0, 0, :], width, height) + torch.einsum("icyx,ij,jcyz->xz", components, still, components)
    return tuple(torch.linalg.eigh((part + part.mT) / 2)[1].flip(1).mT.contiguous() for part in (time, y, x))


def homogeneous_variances(lags: Tensor, axes: Three) -> Tensor:
    """Returns the variance of every function under C, `(T, 2, H, W)`."""
    own = [
        torch.fft.irfft(torch.fft.rfft(axis, n=size).abs().square(), n=size)
        for axis, size in zip(axes, (2 * len(lags), *lags.shape[-2:]), strict=True)
    ]
    in_time = 2 * own[0][:, : len(lags)]
    in_time[:, 0] /= 2
    return torch.einsum("pt,tyxc,iy,jx->pcij", in_time, lags.diagonal(dim1=1, dim2=2), own[1], own[2])


def component_variances(covariance: Covariance, axes: Three) -> Tensor:
    """Returns the variance of every function under the principal components, `(T, 2, H, W)`."""
    time, y, x = axes
    frames = range(len(time))
    among = torch.einsum("pt,tsij,ps->pij", time, covariance.lags_between(frames, frames), time)
    inner = torch.einsum("iy,rcyx,jx->rcij", y, covariance.components, x)
    return torch.einsum("rcij,prq,qcij->pcij", inner, among, inner)
