"""The posterior of a stationary field given what was measured of it: optimal interpolation in space and time.

With S the covariance and A what picks the measured values y = A x + n, n ~ N(0, R),

    x^ = S A^T (A S A^T + R)^-1 y        Cov = S - S A^T (A S A^T + R)^-1 A S.

S is applied to fields by Fourier transforms on the torus of its lags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

#: The least variance of an error beside that of the field: what float64 leaves room for.
ROUNDED = 1e-9


class Values(NamedTuple):
    """Single values of a sequence: their frame, component, row and column, integers `(n,)` each."""

    frame: Tensor
    component: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def where(cls, chosen: Tensor) -> Values:
        """Both components of the cells that are True in `(T, H, W)`: all of u, then all of v."""
        frame, row, column = chosen.nonzero().unbind(1)
        component = torch.arange(2, device=chosen.device).repeat_interleave(len(frame))
        return cls(frame.repeat(2), component, row.repeat(2), column.repeat(2))

    def at(self, index: Tensor) -> Values:
        """Those of an index or mask."""
        return Values(self.frame[index], self.component[index], self.row[index], self.column[index])

    def of(self, fields: Tensor) -> Tensor:
        """What a sequence `(T, 2, H, W)` has there, `(n,)`."""
        return fields[self.frame, self.component, self.row, self.column]


@dataclass(frozen=True)
class Covariance:
    """A covariance that is stationary in time: homogeneous in space, with principal components beside it.

    Arguments:
        lags: C(tau, r), `(T, 2, 2, Ht, Wt)`; see `ProductModes`.
        components: Principal components, `(r, 2, H, W)`.
        component_lags: G(tau) of their coefficients, `(T, r, r)`.
        table: C of the lags and offsets from -(T - 1), -(H - 1), -(W - 1) on, `(2 T - 1, 2, 2, 2 H - 1, 2 W - 1)`.
        blocks: C_k of all pairs of frames and components, `(Ht (Wt / 2 + 1), 2 T, 2 T)`.
    """

    lags: Tensor
    components: Tensor
    component_lags: Tensor
    table: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, lags: Tensor, components: Tensor, component_lags: Tensor) -> Self:
        """From the lags and the components."""
        height, width = components.shape[-2:]
        rows, columns = (torch.arange(1 - n, n, device=lags.device) for n in (height, width))
        later = lags[..., (rows % lags.shape[-2])[:, None], columns % lags.shape[-1]]
        earlier = later[1:].flip(0, -2, -1).transpose(1, 2)
        waves, frames = torch.fft.rfft2(lags), range(len(lags))
        both = torch.cat([waves[1:].flip(0).transpose(1, 2).conj(), waves])
        blocks = torch.stack([torch.stack([both[late - early + len(lags) - 1] for early in frames]) for late in frames])
        blocks = blocks.permute(4, 5, 0, 2, 1, 3).flatten(0, 1).flatten(3).flatten(1, 2)
        return cls(lags, components, component_lags, torch.cat([earlier, later]), blocks)

    def between(self, a: Values, b: Values) -> Tensor:
        """Returns the covariance of values, `(len(a), len(b))`."""
        frames, (height, width) = len(self.lags), self.components.shape[-2:]
        frame, left, right, row, _ = self.table.stride()
        ours = a.frame * frame + a.component * left + a.row * row + a.column
        first = (frames - 1) * frame + (height - 1) * row + width - 1
        theirs = b.frame * frame - b.component * right + b.row * row + b.column
        out = self.table.flatten()[ours[:, None] + (first - theirs)]
        if len(self.components):
            out += self._between(a, b)
        return out

    def _between(self, a: Values, b: Values) -> Tensor:
        """Returns what the principal components add to the covariance of values."""
        ours, theirs = (self.components[:, v.component, v.row, v.column].T for v in (a, b))
        out = ours.new_zeros(len(ours), len(theirs))
        for late in a.frame.unique():
            for early in b.frame.unique():
                rows, columns = (a.frame == late).nonzero()[:, 0], (b.frame == early).nonzero()[:, 0]
                out[rows[:, None], columns] = ours[rows] @ self.lag(int(late - early)) @ theirs[columns].T
        return out

    def lag(self, lag: int) -> Tensor:
        """Returns G at a lag, `(r, r)`."""
        return self.component_lags[lag] if lag >= 0 else self.component_lags[-lag].T

    def variance(self) -> Tensor:
        """Returns the variance of every value, `(2, H, W)`."""
        own = self.lags[0, :, :, 0, 0].diagonal()[:, None, None]
        return own + torch.einsum("icyx,ij,jcyx->cyx", self.components, self.component_lags[0], self.components)

    def apply(self, fields: Tensor) -> Tensor:
        """Returns S times sequences `(M, T, 2, H, W)`."""
        torus, (height, width) = self.lags.shape[-2:], fields.shape[-2:]
        waves = torch.fft.rfft2(fields, s=torus)
        shape = waves.shape
        waves = self.blocks @ waves.flatten(3).flatten(1, 2).permute(2, 1, 0)
        waves = waves.permute(2, 1, 0).reshape(shape)
        out = torch.fft.irfft2(waves, s=torus)[..., :height, :width]
        if len(self.components):
            inner = torch.einsum("icyx,mtcyx->mti", self.components, fields)
            frames = range(fields.shape[1])
            lags = torch.stack([torch.stack([self.lag(late - early) for early in frames]) for late in frames])
            out = out + torch.einsum("tsij,msj,icyx->mtcyx", lags, inner, self.components)
        return out


@dataclass(frozen=True)
class Known:
    """The measured values of one sequence, in the units of the covariance.

    Arguments:
        y: The values `(T, 2, H, W)`, 0 where there are none.
        observed: Their cells, `(T, H, W)`.
        noise: The variance of their error, `(T, H, W)`.
        valid: The cells of the domain, `(T, H, W)`.
    """

    y: Tensor
    observed: Tensor
    noise: Tensor
    valid: Tensor


class Estimate(NamedTuple):
    """What measured values say of a sequence, and of some linear functionals V^T x of it.

    Arguments:
        used: The measured cells that counted, `(T, H, W)`.
        mean: The posterior mean `(T, 2, H, W)`.
        among: The posterior covariance of the functionals, `(K, K)`.
        variance: The posterior variance of single values.
    """

    used: Tensor
    mean: Tensor
    among: Tensor
    variance: Tensor


def interpolate(
    covariance: Covariance, known: Known, some: Values, across: Tensor, prior: Tensor, *, budget: int
) -> Estimate:
    """Returns the posterior given what is known: the exact one, where no more than `budget` values were measured.

    Arguments:
        covariance: Of the field.
        known: The measured values.
        some: Values whose variance is computed.
        across: S V, the covariance of the field with the functionals, `(K, T, 2, H, W)`.
        prior: V^T S V, `(K, K)`.
        budget: Values that count at most: those nearest to what was not measured.
    """
    used = nearest(known.observed, known.valid & ~known.observed, budget // 2)
    values = Values.where(used)
    variance = some.of(covariance.variance().expand_as(known.y))
    if not len(values.frame):
        return Estimate(used, torch.zeros_like(known.y), prior, variance)
    system = covariance.between(values, values)
    noise = values.of(known.noise[:, None].expand_as(known.y))
    system.diagonal().add_(noise.clamp(min=ROUNDED * system.diagonal().max()))
    factor = torch.linalg.cholesky(system)
    sources = torch.zeros_like(known.y)
    sources[values] = torch.cholesky_solve(values.of(known.y)[:, None], factor)[:, 0]
    mean = covariance.apply(sources[None])[0]
    right = torch.cat([values.of(across.permute(1, 2, 3, 4, 0)), covariance.between(values, some)], dim=1)
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    functionals, single = half.split([len(across), len(variance)], dim=1)
    return Estimate(used, mean, prior - functionals.T @ functionals, variance - single.square().sum(dim=0))


def nearest(observed: Tensor, hidden: Tensor, count: int) -> Tensor:
    """Returns the measured cells that count, `(T, H, W)`: those with the fewest steps to a hidden one, in any axis."""
    if int(observed.sum()) <= count:
        return observed
    steps, reached = torch.zeros_like(observed, dtype=torch.float32), hidden
    while hidden.any() and not reached.all():
        steps += ~reached
        reached = F.max_pool3d(reached[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    # Cells at the same distance are taken in a random order, always the same, not from one side.
    steps += torch.rand(steps.shape, generator=torch.Generator().manual_seed(0)).to(steps)
    ranked = torch.where(observed, steps, torch.inf).flatten().argsort()[:count]
    used = torch.zeros_like(observed).flatten()
    used[ranked] = True
    return used.view_as(observed)


def some_of(values: Values, count: int) -> Values:
    """Returns values at random, always the same, `count` at most."""
    n = len(values.frame)
    if n <= count:
        return values
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]
    return values.at(chosen.to(values.frame.device))
