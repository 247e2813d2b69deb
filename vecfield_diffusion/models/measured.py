"""The posterior of a stationary field given what was measured of it: optimal interpolation in space and time.

With S the covariance and A what picks the measured values y = A x + n, n ~ N(0, R), R diagonal but for the
covariance of the errors of both components of a cell,

    x^ = S A^T (A S A^T + R)^-1 y        Cov = S - S A^T (A S A^T + R)^-1 A S.

Fields are `(T, 2, H, W)`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vecfield_diffusion.models.conjugate_gradients import Split
from vecfield_diffusion.models.modes import signs
from vecfield_diffusion.models.stationary import Covariance, Errors, Values

#: The least variance of an error beside that of the field: what float64 leaves room for.
ROUNDED = 1e-9
#: Measured values of a system that is factorised, which takes seconds, at most: more, as dense observations are, are
#: solved for by conjugate gradients (`Split`).
SPARSE = 6000
#: Random fields that estimate the posterior variance of what is hidden, to a few hundredths.
PROBES = 4
#: Values whose covariance with the measured ones is held at once.
CHUNK = 1024


class System:
    """The system A S A^T + R of measured values, factorised once for all that is asked of it.

    Arguments:
        covariance: Of the field.
        values: Which values were measured.
        errors: R.
    """

    def __init__(self, covariance: Covariance, values: Values, errors: Errors) -> None:
        self.covariance, self.values = covariance, values
        system = covariance.between(values, values)
        errors.add_to(system)
        self.factor = torch.linalg.cholesky(system)

    def correct(self, innovations: Tensor, onto: Sequence[int]) -> Tensor:
        """Returns S A^T (A S A^T + R)^-1 d in some frames for d `(M, n)`: `(M, len(onto), 2, H, W)`."""
        weights = torch.cholesky_solve(innovations.mT, self.factor).mT
        frames, place = self.values.frame.unique(return_inverse=True)
        sources = weights.new_zeros(len(weights), max(len(frames), 1), 2, *self.covariance.shape)
        sources[:, place, self.values.component, self.values.row, self.values.column] = weights
        return self.covariance.apply(sources, frames.tolist() or [0], onto)

    def half(self, right: Tensor) -> Tensor:
        """Returns F^-1 times columns `(n, K)`, where the system is F F^T."""
        return torch.linalg.solve_triangular(self.factor, right, upper=False)

    def variance(self, values: Values) -> Tensor:
        """Returns the posterior variance of single values, `(len(values),)`."""
        before = self.covariance.variance()[values.component, values.row, values.column]
        explained = torch.zeros_like(before)
        for part in torch.arange(len(before), device=before.device).split(CHUNK):
            cross = self.covariance.between(self.values, values.at(part))
            explained[part] = self.half(cross).square().sum(dim=0)
        return before - explained


class Known(NamedTuple):
    """The measured values of one sequence, or of several that were measured alike, in the units of the covariance.

    Arguments:
        y: The values of M sequences, `(M, T, 2, H, W)`, 0 where there are none.
        observed: Their cells, `(T, H, W)`.
        noise: The covariance of their errors, `(T, C, H, W)`, see `Values.errors`.
        valid: The cells of the domain, `(T, H, W)`.
    """

    y: Tensor
    observed: Tensor
    noise: Tensor
    valid: Tensor

    @property
    def level(self) -> Tensor:
        """The variance of the error of a cell, the mean of both components, `(T, H, W)`."""
        return self.noise[:, :2].mean(dim=1)


class Estimate(NamedTuple):
    """What measured values say of the sequences, and of some linear functionals of them.

    Arguments:
        mean: The posterior mean of each, `(M, T, 2, H, W)`.
        among: The posterior covariance of the functionals, `(K, K)`, the prior one being I.
        variance: The posterior variance of single values.
    """

    mean: Tensor
    among: Tensor
    variance: Tensor


def interpolate(covariance: Covariance, known: Known, some: Values, functions: Tensor, *, most: int) -> Estimate:
    """Returns the posterior given what is known: the exact mean, and its covariance by `Split` where there is much.

    Arguments:
        covariance: Of the field.
        known: The measured values.
        some: Values whose variance is computed.
        functions: The covariance of the field with functionals of covariance I, `(K, T, 2, H, W)`.
        most: Values of a system that is solved at once, and whose covariance is exact.
    """
    values = Values.where(known.observed[:, None].expand_as(known.y[0]))
    variance, prior = some.of(covariance.variance().expand_as(known.y[0])), torch.eye(len(functions)).to(functions)
    if not len(values.frame):
        return Estimate(torch.zeros_like(known.y), prior, variance)
    errors = values.errors(known.noise).at_least(ROUNDED * covariance.variance().max())
    y = values.of(known.y)
    if len(values.frame) > most:
        return _of_many(Split(covariance, values, errors, functions), known, some, y)
    system = System(covariance, values, errors)
    mean = system.correct(y, range(known.y.shape[1]))
    right = torch.cat([values.of(functions).mT, covariance.between(values, some)], dim=1)
    functionals, single = system.half(right).split([len(functions), len(variance)], dim=1)
    return Estimate(mean, prior - functionals.mT @ functionals, variance - single.square().sum(dim=0))


def _of_many(split: Split, known: Known, some: Values, y: Tensor) -> Estimate:
    """The posterior given many values.

    The covariance by M is too large, for it forgets what tiles have in common. It is scaled to the variance of the
    hidden values by B, whose trace is that of C = S - S A^T B^-1 A S in random signs v: the mean of v^T C v.
    """
    hidden = (known.valid & ~known.observed)[:, None].expand_as(known.y[0])
    probes = signs(hidden.numel(), PROBES, y.dtype, y.device).mT.reshape(-1, *hidden.shape) * hidden
    before = split.covariance.apply(probes)
    mean, learnt = split.correct(torch.cat([y, split.values.of(before)])).split([len(y), PROBES])
    trace, variance = (probes * (before - learnt)).sum() / PROBES, split.variance(some)
    inside = some.of(hidden)
    factor = torch.ones_like(trace)
    if inside.any():
        factor = (trace / hidden.sum() / variance[inside].mean()).clamp(min=0.0)
    return Estimate(mean, factor * split.xi, torch.where(inside, factor * variance, variance))


def some_of(values: Values, count: int) -> Values:
    """Returns values at random, always the same, `count` at most."""
    n = len(values.frame)
    if n <= count:
        return values
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]
    return values.at(chosen.to(values.frame.device))
