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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.models.measured import SPARSE, Known, interpolate, some_of
from vecfield_diffusion.models.modes import MeanVariance, Modes
from vecfield_diffusion.models.products import Table
from vecfield_diffusion.models.stationary import Covariance, Values
from vecfield_diffusion.pool import one_each

#: What tells an observation from others: what was measured how well, and the values.
Key = tuple[bytes, bytes]


class ProductModes(Modes):
    """A field that is stationary in time; see the top of this module.

    What y says is solved for in float64; what z says follows from it in the type of z.

    Fields are `(B, T, 2, H, W)`; with T = 1 those of snapshots, `(B, 2, H, W)`, are taken, too. One that is the same
    everywhere is one on any rectangle, and takes fields of other sizes, up to `largest`.

    Arguments:
        lags: C(tau, r) for tau from 0 to T - 1, `(T, 2, 2, Ht, Wt)`, on a torus that is as long as the field along an
            axis that is periodic, else twice as long or longer.
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
    #: Observations that are remembered, at most: all windows of a long series, some MB each.
    REMEMBERED = 1024
    #: Noisy fields that are answered at once, about, where observations have few: no more than caches hold.
    FIELDS = 16
    #: Observations that are solved for at once, one on each thread, at most: dense ones take 0.6 GB each.
    AT_ONCE = 4

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
        self._tables: dict[torch.dtype, Table] = {}
        self.remembered: dict[Key, Posterior] = {}
        self._others: dict[tuple[int, ...], ProductModes] = {}

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
            lags = on_rectangle(self.lags, self.scale.shape)
            parts = (lags, self.components / self.scale, self.component_lags)
            self._prior = Prior.of(Covariance(*parts), int(self.modes), self.LEFT_OUT)
        return self._prior

    @property
    def largest(self) -> tuple[int, int]:
        """The largest fields that it takes, `(H, W)`: as large as its covariance is known if it is homogeneous."""
        shape = tuple(self.scale.shape)
        if len(self.components) or self.mean.any() or not (self.scale == 1).all():
            return shape
        return tuple(max(size, torus // 2) for size, torus in zip(shape, self.lags.shape[-2:], strict=True))

    def on(self, shape: tuple[int, ...]) -> ProductModes:
        """Returns the same field on a rectangle of cells.

        Raises:
            ValueError: It is larger than `largest`, or smaller than a field that is not the same everywhere.
        """
        own, largest = tuple(self.scale.shape), self.largest
        if shape == own:
            return self
        if largest == own or any(size > most for size, most in zip(shape, largest, strict=True)):
            raise ValueError(f"fields must be of {own} cells, or up to {largest}, got {shape}")
        if shape not in self._others:
            self._others[shape] = ProductModes(self.lags, shape, modes=int(self.modes)).to(self.lags.device)
        return self._others[shape]

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See `Modes`."""
        if (field := self.on(tuple(z.shape[-2:]))) is not self:
            return field(z, s, y, observed, error, valid)
        if z.ndim == 4:
            frames = (part if part.ndim < 4 else part.unsqueeze(1) for part in (z, s, y, observed, error, valid))
            mean, variance = self(*frames)
            return mean[:, 0], variance
        dtype = torch.promote_types(z.dtype, torch.float32)
        # Members of an observation follow one another, and share what it says.
        runs = [list(same) for _, same in groupby(self.posteriors(y, observed, error, valid, dtype), key=id)]
        means, variances, done = [], [], 0
        for alike in together(runs, self.FIELDS):
            given = Posterior(*(torch.stack(parts) for parts in zip(*(run[0] for run in alike), strict=True)))
            here = slice(done, done := done + len(alike) * len(alike[0]))
            mean, variance = self.of_noisy(given, *(part[here].unflatten(0, (len(alike), -1)) for part in (z, s)))
            means.append(mean.flatten(0, 1))
            variances.append(variance.flatten())
        return torch.cat(means).to(z.dtype), torch.cat(variances).to(z.dtype)

    def of_noisy(self, given: Posterior, z: Tensor, s: Tensor) -> MeanVariance:
        """Returns the means and the variances for the noisy fields of some observations.

        Arguments:
            given: What is remembered of N observations, each part with an axis for them before its own.
            z: M noisy fields of each, `(N, M, T, 2, H, W)`.
            s: Their levels, `(N, M)`.
        """
        table, scale, roots = self.table(given.mean.dtype), self.scale.to(given.mean), given.roots
        given = Posterior(*(part.unsqueeze(1) for part in given))  # the same for all fields of an observation
        variance, flat = scale.square(), s.to(scale).square()[..., None]
        level, square = flat[..., None, None, None], given.square[..., None, None, None, None]

        def step(fields: Tensor) -> Tensor:
            """What noisy fields, 0 outside the domain, say by the modes."""
            right = table.coefficients((given.bound * variance * fields).flatten(0, 1)).unflatten(0, s.shape) @ roots
            right = right / (flat + given.gains) @ roots.mT
            return given.bound * table.field(right.flatten(0, 1)).unflatten(0, s.shape)

        innovation = (z - given.mean) / scale
        share = given.rest / (given.rest + level)
        # What y tells of a cell is in its mean: there z is worth no more than beside it. The filter of the rest is for
        # a cell of its own variance a^2 over that of all, by the largest variance r among the rest, of which
        # a^2 r / (a^2 r + s^2) is the filter: so none exceeds 1, where a sampler would no longer be stable.
        most, own = given.rest.amax(dim=(2, 3, 4, 5), keepdim=True), variance / square
        louder = (own * (most + level) / (own * most + level)).sqrt() * scale
        worth = (1 + level * given.precise).rsqrt() * louder
        left = worth * (innovation - step(innovation))
        small = worth / variance * table.filtered(left.flatten(0, 1), share.flatten(0, 1)).unflatten(0, s.shape)
        mean = given.mean + scale * (small + step(innovation - small))
        # The trace over the valid values, that of X^T (V^T A^T A V) X / (1 + nu / s^2) = nu / (1 + nu / s^2).
        trace = given.claim * (given.gains * flat / (flat + given.gains)).sum(dim=2) / (2 * given.cells)
        return mean, trace + given.share * (share * level).mean(dim=(2, 3, 4, 5))

    def table(self, dtype: torch.dtype) -> Table:
        """Returns the modes in a type."""
        if dtype not in self._tables:
            self._tables[dtype] = self.prior().table.to(dtype)
        return self._tables[dtype]

    def posteriors(
        self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> list[Posterior]:
        """Returns what is remembered of each of some observations, in a type; shapes as for `Modes`.

        Those of the same cells with the same errors are solved for together, in little more time than one.
        """
        keys: list[Key] = []
        new: dict[bytes, dict[Key, int]] = {}
        for number, (values, *seen) in enumerate(zip(y, observed, error, valid, strict=True)):
            before = (part[number - 1] for part in (y, observed, error, valid))
            if number and all(map(torch.equal, (values, *seen), before)):
                keys.append(keys[-1])
                continue
            keys.append((digest(*seen, kind=str(dtype)), digest(values)))
            if keys[-1] not in self.remembered:
                new.setdefault(keys[-1][0], {})[keys[-1]] = number
        found = {key: self.remembered[key] for key in keys if key in self.remembered}
        if new:
            self.prior()  # before several threads ask for it

            def solved(alike: dict[Key, int]) -> dict[Key, Posterior]:
                numbers = list(alike.values())
                parts = (part[numbers[0]] for part in (observed, error, valid))
                return dict(zip(alike, self.solved_for(y[numbers], *parts, dtype), strict=True))

            several = len(new) > 1 and y.device.type == "cpu"
            with one_each(self.AT_ONCE) if several else nullcontext(map) as mapped:
                for group in mapped(solved, new.values()):
                    found |= group
            # Those used last are last.
            self.remembered = {key: kept for key, kept in self.remembered.items() if key not in found} | found
            for old in list(self.remembered)[: -max(self.REMEMBERED, len(found))]:
                self.remembered.pop(old, None)
        return [found[key] for key in keys]

    def solved_for(
        self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> Iterator[Posterior]:
        """Yields the posteriors given values `(M, T, 2, H, W)` of the same cells, in a type.

        The other shapes are those of a sample of `Modes`.
        """
        square = self.scale.square()
        noise = torch.where(observed, blocks(error.double()) / square, 0.0)
        seen, noise, inside = (part.expand(y.shape[1], -1, *y.shape[-2:]) for part in (observed, noise, valid))
        anomaly = torch.where(seen, (y.double() - self.mean) / self.scale, 0.0)
        given = self.prior().given(Known(anomaly, seen[:, 0], noise, inside[:, 0]), square, SPARSE, self.POINTS)
        means = torch.where(inside, self.mean + self.scale * given.mean, 0.0)
        shared = Posterior(*(part.to(dtype) for part in given))
        return (shared._replace(mean=mean) for mean in means.to(dtype))

    def prepare(self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> None:
        """See `Modes`."""
        parts = (part.to(self.mean.device) for part in (y, observed, error, valid))
        self.posteriors(*parts, torch.promote_types(y.dtype, torch.float32))


def digest(*parts: Tensor, kind: str = "") -> bytes:
    """Returns a number that tells tensors from others."""
    told = b"".join(part.detach().cpu().contiguous().numpy().tobytes() for part in parts)
    return hashlib.sha256(kind.encode() + told).digest()


class Posterior(NamedTuple):
    """What is remembered of an observation; see the top of this module.

    Arguments:
        mean: m + a m_y, `(T, 2, H, W)`, 0 outside the domain.
        roots: X, `(K, K)`.
        gains: nu, `(K,)`, of the modes times `bound`.
        bound: The factor on the modes at every cell, `(T, 1, H, W)`; 1 where nothing was measured, 0 outside the
            domain.
        precise: What y adds to the precision of each value, over a^2, `(T, C, H, W)`, infinite outside the domain.
        rest: The variances of the rest where nothing was measured, in the units of the field, `(T, 2, H, W)`.
        share: The mean variance of the rest over that where nothing was measured, a number.
        claim: The share of the variance of the modes that there is, a number.
        square: The mean of a^2, a number.
        cells: Those of the domain, a number.
    """

    mean: Tensor
    roots: Tensor
    gains: Tensor
    bound: Tensor
    precise: Tensor
    rest: Tensor
    share: Tensor
    claim: Tensor
    square: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Prior:
    """What follows from a covariance.

    Arguments:
        covariance: Of xi.
        table: The modes.
        root: Of V^T S V, `(K, K)`.
        functions: S V root^-T, `(K, T, 2, H, W)`.
    """

    covariance: Covariance
    table: Table
    root: Tensor
    functions: Tensor

    #: Fields that a covariance is applied to at once.
    CHUNK = 16

    @classmethod
    def of(cls, covariance: Covariance, modes: int, left_out: float) -> Self:
        """With the strongest modes."""
        table = Table.of(covariance, modes, left_out)
        parts = torch.eye(2 * len(table.chosen), dtype=torch.float64, device=table.rest.device).split(cls.CHUNK)
        across = torch.cat([covariance.apply(table.field(part)) for part in parts])
        among = torch.cat([table.coefficients(part) for part in across.split(cls.CHUNK)])
        sizes, vectors = torch.linalg.eigh((among + among.mT) / 2)
        sizes = sizes.clamp(min=torch.finfo(sizes.dtype).eps * sizes.max()).sqrt()
        functions = torch.einsum("ki,ktcyx->itcyx", vectors / sizes, across)
        return cls(covariance, table, vectors * sizes, functions)

    def given(self, known: Known, square: Tensor, most: int, points: int) -> Posterior:
        """Returns the posterior given what is known, for the squared scale of every cell, `(H, W)`.

        The mean is that of each of the sequences, `(M, T, 2, H, W)`, which have all else in common.
        """
        table, hidden, one = self.table, known.valid & ~known.observed, known.y[0]
        parts = [some_of(Values.where(cells[:, None].expand_as(one)), points) for cells in (hidden, known.observed)]
        some = Values(*(torch.cat(both) for both in zip(*parts, strict=True)))
        found = interpolate(self.covariance, known, some, self.functions, most=most)
        values, vectors = torch.linalg.eigh(self.root @ found.among @ self.root.mT)
        root = vectors * values.clamp(min=0.0).sqrt()
        bound = self.bound(root, known)
        left = some.of(bound.expand_as(one))[:, None] * (table.rows(some) @ root)
        left = found.variance - left.square().sum(dim=1)
        gains, turned = torch.linalg.eigh(root.T @ table.gram(known.valid * square * bound[:, 0].square()) @ root)
        weight = some.of(square.expand_as(one))
        lengths = [len(part.frame) for part in parts]
        free, kept = (part.sum() for part in (weight * left).split(lengths))
        over, others = (part.sum() for part in weight.split(lengths))
        # Where nothing was measured the rest is nearly free; the mean over all values would have it small there, too.
        rate = precision(table.rest, free / over if lengths[0] else kept / others)
        every = (hidden.sum() / max(lengths[0], 1), known.observed.sum() / max(lengths[1], 1))
        every = every[0] * free + every[1] * kept
        whole = (known.valid * square).sum() * (table.rest / (1 + rate * table.rest)).mean()
        # Where no modes are left out that is 0 of 0, in float32 as well.
        share = every.clamp(min=0.0) / whole.clamp(min=torch.finfo(torch.float32).tiny)
        gains = gains.clamp(min=0.0)
        # Modes that reach from hidden cells to measured ones may claim more than the whole variance.
        claim = (1 + every.clamp(max=0.0) / gains.sum().clamp(min=torch.finfo(whole.dtype).tiny)).clamp(min=0.0)
        cells = known.valid.sum().clamp(min=1)
        mean_square = (known.valid * square).sum() / cells
        precise = torch.where(known.observed[:, None], 1 / (known.noise[:, :2] * square), 0.0)
        precise = precise.masked_fill(~known.valid[:, None], torch.inf)
        rest = mean_square * table.rest / (1 + rate * table.rest)
        bound = bound * known.valid[:, None]
        return Posterior(found.mean, root @ turned, gains, bound, precise, rest, share, claim, mean_square, cells)

    def bound(self, root: Tensor, known: Known) -> Tensor:
        """Returns the factor on the modes, `(T, 1, H, W)`, so that no measured cell varies by more than its error."""
        claimed = self.table.spread(root @ root.T)
        share = known.level / claimed.clamp(min=torch.finfo(claimed.dtype).tiny)
        return torch.where(known.observed, share.clamp(max=1.0).sqrt(), 1.0)[:, None]


def on_rectangle(lags: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns C(tau, r) on a torus that is twice as long as a rectangle at most."""
    for axis, size in zip((-2, -1), shape, strict=True):
        if lags.shape[axis] > 2 * size:
            near = torch.arange(-size, size, device=lags.device).roll(-size)
            lags = lags.index_select(axis % lags.ndim, near % lags.shape[axis])
    return lags


def together(runs: list[list[Posterior]], fields: int) -> Iterator[list[list[Posterior]]]:
    """Yields runs of one length that follow one another, as many at once as have `fields` noisy fields, or one."""
    for length, same in groupby(runs, key=len):
        alike, count = list(same), max(1, fields // length)
        yield from (alike[first : first + count] for first in range(0, len(alike), count))


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
