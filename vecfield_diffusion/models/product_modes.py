"""A Gaussian field in space and time that is stationary in time, and its posterior given noisy fields and measurements.

A field x = m + a xi of T frames has the standard deviation a of every cell and a xi of covariance C(tau, r), stationary
in time and homogeneous in space, to which principal components with lagged covariances G_ij(tau) may be added; C need
not be separable. The posterior is taken in two steps, one for y and one for z,

    g = m_y + C_y A^T (A C_y A^T + s^2)^-1 (z - A m_y),        A = restriction to the valid cells.

The mean m_y = E[x | y] and the covariance C_y = Cov[x | y] have neither level nor member. They are those of the system
of all measured values (`models/measured.py`), solved once an observation and remembered. Of C_y, the step for z
takes what it is among K modes, V^T C_y V: products psi_p(t) phi_i(y) chi_j(x), in each component, of the eigenvectors
of the covariance along each axis alone, waves where an axis is periodic (`models/products.py`). One eigendecomposition,

    V^T C_y V = L L^T,    L^T (V^T A^T A V) L = U diag(nu) U^T,    X = L U,

serves all levels: the posterior covariance of the modes is X diag(1 / (1 + nu / s^2)) X^T. Few modes reach from hidden
cells to measured ones, where V X is therefore cut to the error of what was measured. The rest counts as independent of
them and of each other, as if y had measured each of its coefficients with the same error: one that leaves of their
variance what C_y has. It is estimated by its Wiener filter from what the modes leave of z, and the modes once more from
what it leaves. So g is exact at high noise, and at any level where all modes are taken: with land, missing frames and
an error of each cell alike. Its Jacobian by z is symmetric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.models.measured import SPARSE, Known, interpolate, some_of
from vecfield_diffusion.models.modes import MeanVariance, Modes
from vecfield_diffusion.models.products import Table
from vecfield_diffusion.models.stationary import Covariance, Values


class ProductModes(Modes):
    """A field that is stationary in time; see the top of this module. It computes in float64.

    Fields are `(B, T, 2, H, W)`; with T = 1 those of snapshots, `(B, 2, H, W)`, are taken, too.

    Arguments:
        lags: C(tau, r) for tau from 0 to T - 1, `(T, 2, 2, Ht, Wt)`, on a torus that is as long as the field along an
            axis that is periodic, else twice as long.
        shape: `(H, W)`.
        mean: m, `(2, H, W)`; 0 if None.
        scale: a, `(H, W)`; 1 if None.
        components: Principal components, `(r, 2, H, W)`, in the units of x; none if None.
        component_lags: G(tau) of their coefficients, `(T, r, r)`.
        modes: The number K at most; those that carry 1e-4 of the variance together are left out in any case.
    """

    keeps = "observations"
    #: The number of modes K that is taken, at most, and the share of the variance that they may leave out.
    MODES, LEFT_OUT = 300, 1e-4
    #: Values whose variance is computed, at most, of those that were measured and of those that were not.
    POINTS = 128
    #: Observations that are remembered, at most.
    REMEMBERED = 256

    def __init__(
        self,
        lags: Tensor | None = None,
        shape: Sequence[int] = (1, 1),
        *,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        components: Tensor | None = None,
        component_lags: Tensor | None = None,
        modes: int = MODES,
    ) -> None:
        super().__init__()
        lags = torch.zeros(1, 2, 2, 2, 2) if lags is None else lags
        given = {
            "lags": lags,
            "mean": torch.zeros(2, *shape) if mean is None else mean,
            "scale": torch.ones(*shape) if scale is None else scale,
            "components": torch.zeros(0, 2, *shape) if components is None else components,
            "component_lags": torch.zeros(len(lags), 0, 0) if component_lags is None else component_lags,
        }
        for name, value in given.items():
            self.register_buffer(name, value.to(torch.float64).contiguous())
        self.register_buffer("modes", torch.tensor(modes))
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._prior: Prior | None = None
        self.remembered: dict[bytes, Posterior] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A network that changes its precision leaves the field in its own: half would make gradients of what has none.
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(self.get_buffer(name).device))
        self._forget()
        return self

    def prior(self) -> Prior:
        """Returns what follows from the covariance of xi, on the device of the field."""
        if self._prior is None:
            parts = (self.lags, self.components / self.scale, self.component_lags)
            self._prior = Prior.of(Covariance(*parts), int(self.modes), self.LEFT_OUT)
        return self._prior

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See `Modes`."""
        if z.ndim == 4:
            frames = (part if part.ndim < 4 else part.unsqueeze(1) for part in (z, s, y, observed, error, valid))
            mean, variance = self(*frames)
            return mean[:, 0], variance
        table, square = self.prior().table, self.scale.square()
        known = torch.where(observed, (y.double() - self.mean) / self.scale, 0.0)
        noise = torch.where(observed, blocks(error.double()) / square, 0.0)
        posteriors = [self.posterior(*parts) for parts in zip(known, observed, noise, valid, strict=True)]
        if all(each is posteriors[0] for each in posteriors):  # members of one observation share what it says
            posteriors = posteriors[:1]
        first, roots, gains, bound, rate, share, claim = (torch.stack(parts) for parts in zip(*posteriors, strict=True))
        level = column(s.double().square(), z)
        left = 1 / (1 + gains / level.view(-1, 1))

        def step(field: Tensor) -> Tensor:
            """What noisy fields, 0 outside the domain, say by the modes."""
            right = table.coefficients(bound * square * field / level)[:, None]
            return torch.where(valid, bound * table.field((((right @ roots) * left[:, None]) @ roots.mT)[:, 0]), 0.0)

        innovation = torch.where(valid, (z.double() - self.mean) / self.scale - first, 0.0)
        rest, cells = table.rest / (1 + column(rate, z) * table.rest), total(valid).clamp(min=1)
        mean_square = column(total(valid * square) / cells, z)
        # What y tells of a cell is in its mean: there z is worth no more than beside it.
        own = noise.narrow(-3, 0, min(noise.shape[-3], 2))
        worth = torch.where(observed, own / (own + level / square), 1.0).sqrt() * valid
        worth = worth * self._louder(rest, level, mean_square) * self.scale
        small = worth * (innovation - step(innovation))
        small = worth / square * table.filtered(small, rest * mean_square / (rest * mean_square + level))
        mean = first + small + step(innovation - small)
        beside = share * (mean_square * rest * level / (mean_square * rest + level)).mean(dim=(1, 2, 3, 4))
        # Their trace over the valid values, that of X^T (V^T A^T A V) X / (1 + nu / s^2) = nu / (1 + nu / s^2).
        trace = claim * (gains * left).sum(dim=1) / (2 * cells)
        return torch.where(valid, self.mean + self.scale * mean, 0.0).to(z.dtype), (trace + beside).to(z.dtype)

    def _louder(self, rest: Tensor, level: Tensor, mean_square: Tensor) -> Tensor:
        """Returns the root of what the filter of the rest is for a cell of its own variance a^2, over that of all.

        By the largest variance r among the rest, of which a^2 r / (a^2 r + s^2) is the filter: so none exceeds 1, where
        a sampler would no longer be stable.
        """
        square, most = self.scale.square(), rest.amax(dim=(1, 2, 3, 4), keepdim=True)
        return (square / mean_square * (mean_square * most + level) / (square * most + level)).sqrt()

    def posterior(self, y: Tensor, observed: Tensor, noise: Tensor, valid: Tensor) -> Posterior:
        """Returns what is remembered of one observation, in units of xi; shapes as for a sample of `Modes`."""
        parts = (y, observed, noise, valid)
        told = b"".join(part.detach().cpu().contiguous().numpy().tobytes() for part in parts)
        key = hashlib.sha256(told).digest()
        found = self.remembered.pop(key, None)
        if found is None:
            seen, level, inside = (part.expand(len(y), -1, *y.shape[-2:]) for part in parts[1:])
            known = Known(y, seen[:, 0], level, inside[:, 0])
            found = self.prior().given(known, self.scale.square(), SPARSE, self.POINTS)
        self.remembered[key] = found
        for old in list(self.remembered)[: -self.REMEMBERED]:
            del self.remembered[old]
        return found


class Posterior(NamedTuple):
    """What is remembered of an observation; see the top of this module.

    Arguments:
        mean: m_y, `(T, 2, H, W)`.
        roots: X, `(K, K)`.
        gains: nu, `(K,)`, of the modes times `bound`.
        bound: The factor on the modes at every cell, `(T, 1, H, W)`; 1 where nothing was measured.
        rate: What y adds to the precision of each coefficient of the rest where nothing was measured, a number.
        share: The mean variance of the rest over that where nothing was measured, a number.
        claim: The share of the variance of the modes that there is, a number.
    """

    mean: Tensor
    roots: Tensor
    gains: Tensor
    bound: Tensor
    rate: Tensor
    share: Tensor
    claim: Tensor


@dataclass(frozen=True)
class Prior:
    """What follows from a covariance.

    Arguments:
        covariance: Of xi.
        table: The modes.
        across: S V, `(K, T, 2, H, W)`.
        among: V^T S V, `(K, K)`.
    """

    covariance: Covariance
    table: Table
    across: Tensor
    among: Tensor

    #: Fields that a covariance is applied to at once.
    CHUNK = 16

    @classmethod
    def of(cls, covariance: Covariance, modes: int, left_out: float) -> Self:
        """With the strongest modes."""
        table = Table.of(covariance, modes, left_out)
        parts = torch.eye(2 * len(table.chosen), dtype=torch.float64, device=table.rest.device).split(cls.CHUNK)
        across = torch.cat([covariance.apply(table.field(part)) for part in parts])
        among = torch.cat([table.coefficients(part) for part in across.split(cls.CHUNK)])
        return cls(covariance, table, across, (among + among.mT) / 2)

    def given(self, known: Known, square: Tensor, most: int, points: int) -> Posterior:
        """Returns the posterior given what is known, for the squared scale of every cell, `(H, W)`."""
        table, hidden = self.table, known.valid & ~known.observed
        parts = [some_of(Values.where(cells[:, None].expand_as(known.y)), points) for cells in (hidden, known.observed)]
        some = Values(*(torch.cat(both) for both in zip(*parts, strict=True)))
        found = interpolate(self.covariance, known, some, self.across, self.among, most=most)
        values, vectors = torch.linalg.eigh(found.among)
        root = vectors * values.clamp(min=0.0).sqrt()
        mean, variance = found.mean, found.variance
        bound = self.bound(root, known)
        left = variance - (some.of(bound.expand_as(mean))[:, None] * (table.rows(some) @ root)).square().sum(dim=1)
        gains, turned = torch.linalg.eigh(root.T @ table.gram(known.valid * square * bound[:, 0].square()) @ root)
        weight = some.of(square.expand_as(mean))
        lengths = [len(part.frame) for part in parts]
        free, kept = (part.sum() for part in (weight * left).split(lengths))
        over, others = (part.sum() for part in weight.split(lengths))
        # Where nothing was measured the rest is nearly free; the mean over all values would have it small there, too.
        rate = precision(table.rest, free / over if lengths[0] else kept / others)
        every = (hidden.sum() / max(lengths[0], 1), known.observed.sum() / max(lengths[1], 1))
        every = every[0] * free + every[1] * kept
        whole = (known.valid * square).sum() * (table.rest / (1 + rate * table.rest)).mean()
        share = every.clamp(min=0.0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        gains = gains.clamp(min=0.0)
        # Modes that reach from hidden cells to measured ones may claim more than the whole variance.
        claim = (1 + every.clamp(max=0.0) / gains.sum().clamp(min=torch.finfo(whole.dtype).tiny)).clamp(min=0.0)
        return Posterior(mean, root @ turned, gains, bound, rate, share, claim)

    def bound(self, root: Tensor, known: Known) -> Tensor:
        """Returns the factor on the modes, `(T, 1, H, W)`, so that no measured cell varies by more than its error."""
        claimed = self.table.spread(root @ root.T)
        share = known.level / claimed.clamp(min=torch.finfo(claimed.dtype).tiny)
        return torch.where(known.observed, share.clamp(max=1.0).sqrt(), 1.0)[:, None]


def precision(variances: Tensor, mean: Tensor) -> Tensor:
    """Returns the w >= 0 for which variances v become v / (1 + w v) of a given mean, by bisection of its logarithm."""
    whole = variances.mean()
    if not whole > 0 or mean >= whole:
        return torch.zeros_like(whole)
    low, high = torch.zeros_like(whole), torch.full_like(whole, 40.0)
    for _ in range(40):
        middle = (low + high) / 2
        more = (variances / (1 + (middle.exp() - 1) * variances)).mean() > mean
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low.exp() - 1
