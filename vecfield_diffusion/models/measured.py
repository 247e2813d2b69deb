"""The posterior of a stationary field given what was measured of it: optimal interpolation in space and time.

With S the covariance and A what picks the measured values y = A x + n, n ~ N(0, R), R diagonal but for the
covariance of the errors of both components of a cell,

    x^ = S A^T (A S A^T + R)^-1 y        Cov = S - S A^T (A S A^T + R)^-1 A S.

S is applied to fields by Fourier transforms on the torus of its lags. Fields are `(T, 2, H, W)`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The least variance of an error beside that of the field: what float64 leaves room for.
ROUNDED = 1e-9
#: Measured values of one system: all if they are at most `SPARSE`, as sparse measurements are, whose system takes
#: seconds; of more, which are dense, the `DENSE` ones that tell most.
SPARSE, DENSE = 6000, 3000
#: Values whose covariance with the measured ones is held at once.
CHUNK = 4096


def budget(count: int) -> int:
    """Returns how many of `count` measured values enter a system, at most."""
    return SPARSE if count <= SPARSE else DENSE


class Values(NamedTuple):
    """Single values of a series: their frame, component and cell (row and column), integers `(n,)` each."""

    frame: Tensor
    component: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def where(cls, chosen: Tensor, first: int = 0) -> Values:
        """The values that are True in `(T, 2, H, W)`, whose first frame has the number `first`."""
        frame, component, row, column = chosen.nonzero().unbind(1)
        return cls(frame + first, component, row, column)

    def at(self, chosen: Tensor) -> Values:
        """Those of an index or of a mask `(n,)`."""
        return Values(self.frame[chosen], self.component[chosen], self.row[chosen], self.column[chosen])

    def of(self, fields: Tensor, first: int = 0) -> Tensor:
        """What series `(..., T, 2, H, W)`, whose first frame has the number `first`, have there, `(..., n)`."""
        return fields[..., self.frame - first, self.component, self.row, self.column]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Where u and v of one cell are among those of `where`, `(p,)` each."""
        cells = torch.stack([self.frame, self.row, self.column], dim=1)
        both, place, count = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
        first, second = (
            torch.full((len(both),), -1, device=place.device).index_copy(0, place[chosen], chosen.nonzero()[:, 0])
            for chosen in (self.component == 0, self.component == 1)
        )
        return first[count == 2], second[count == 2]

    def errors(self, noise: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """The variance of their errors `(n,)`, and of u and v of a cell the covariance, one a pair of `pairs`.

        Arguments:
            noise: The variance of both components, of each, or these and their covariance, `(T, C, H, W)`.
            first: The number of the first frame of `noise`.
        """
        entries = noise.shape[1]
        own = self.of(noise.narrow(1, 0, min(entries, 2)).expand(-1, 2, -1, -1), first)
        if entries < 3:
            return own, None
        u = self.at(self.pairs()[0])
        return own, noise[u.frame - first, 2, u.row, u.column]


class Covariance:
    """A covariance that is stationary in time: homogeneous in space, with principal components beside it.

    The field is a xi + sum_i b_i(t) v_i, with E xi_c(t + tau, p + r) xi_d(t, p) = C_cd(tau, r) and
    E b_i(t + tau) b_j(t) = G_ij(tau); both vanish beyond the lags that are given.

    Arguments:
        lags: C(tau, r), `(L, 2, 2, Ht, Wt)`, on a torus that is as long as the field along an axis that is periodic,
            else twice as long.
        components: v, `(r, 2, H, W)`; none with r = 0.
        component_lags: G(tau), `(L, r, r)`; as many lags as are known of them.
        scale: a, `(2, H, W)`; 1 if None.
    """

    def __init__(
        self, lags: Tensor, components: Tensor, component_lags: Tensor, scale: Tensor | None = None
    ) -> None:  # fmt: skip
        self.lags, self.components, self.component_lags, self.scale = lags, components, component_lags, scale
        self.waves = torch.fft.rfft2(lags)
        self._tables: dict[int, Tensor] = {}
        self._blocks: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """H and W."""
        return tuple(self.components.shape[-2:])

    def table(self, reach: int) -> Tensor:
        """Returns C of the lags and offsets from -reach, -(H - 1), -(W - 1) on, so that indices are sums."""
        if reach not in self._tables:
            rows, columns = (torch.arange(1 - n, n, device=self.lags.device) for n in self.shape)
            torus = self.lags.shape[-2:]
            later = self.lags[: reach + 1, ..., (rows % torus[0])[:, None], columns % torus[1]]
            earlier = later[1:].flip(0, -2, -1).transpose(1, 2)
            self._tables = {reach: torch.cat([earlier, later]).contiguous()}
        return self._tables[reach]

    def between(self, a: Values, b: Values) -> Tensor:
        """Returns the covariance of values, `(len(a), len(b))`."""
        if not (len(a.frame) and len(b.frame)):
            return self.lags.new_zeros(len(a.frame), len(b.frame))
        farthest = max(int(a.frame.max() - b.frame.min()), int(b.frame.max() - a.frame.min()), 0)
        reach, (height, width) = min(farthest, len(self.lags) - 1), self.shape
        table = self.table(reach)
        frame, left, right, row, _ = table.stride()
        ours = a.frame * frame + a.component * left + a.row * row + a.column
        first = reach * frame + (height - 1) * row + width - 1
        theirs = first - b.frame * frame + b.component * right - b.row * row - b.column
        index, far = ours[:, None] + theirs, None
        if farthest > reach:
            far = (a.frame[:, None] - b.frame).abs() > reach
            index[far] = 0
        out = table.view(-1).index_select(0, index.view(-1)).view_as(index)
        if self.scale is not None:
            out.mul_(self._scales(a)[:, None]).mul_(self._scales(b))
        if far is not None:
            out[far] = 0.0
        if len(self.components):
            self._add_components(out, a, b)
        return out

    def _scales(self, values: Values) -> Tensor:
        return self.scale[values.component, values.row, values.column]

    def _add_components(self, out: Tensor, a: Values, b: Values) -> None:
        """Adds to the covariance of values what the principal components have of it."""
        ours, theirs = (self.components[:, v.component, v.row, v.column].T for v in (a, b))
        columns = [(early, (b.frame == early).nonzero()[:, 0]) for early in b.frame.unique().tolist()]
        for late in a.frame.unique().tolist():
            rows = (a.frame == late).nonzero()[:, 0]
            for early, places in columns:
                out[rows[:, None], places] += ours[rows] @ self.lag(late - early) @ theirs[places].T

    def lag(self, lag: int) -> Tensor:
        """Returns G at a lag, `(r, r)`."""
        if abs(lag) >= len(self.component_lags):
            return torch.zeros_like(self.component_lags[0])
        return self.component_lags[lag] if lag >= 0 else self.component_lags[-lag].T

    def lags_between(self, onto: Sequence[int], frames: Sequence[int]) -> Tensor:
        """Returns G of pairs of frames, `(len(onto), len(frames), r, r)`."""
        return torch.stack([torch.stack([self.lag(late - early) for early in frames]) for late in onto])

    def variance(self) -> Tensor:
        """Returns the variance of every value, `(2, H, W)`."""
        own = self.lags[0, :, :, 0, 0].diagonal()[:, None, None]
        own = own if self.scale is None else own * self.scale.square()
        return own + torch.einsum("icyx,ij,jcyx->cyx", self.components, self.component_lags[0], self.components)

    def apply(self, fields: Tensor, frames: Sequence[int] | None = None, onto: Sequence[int] | None = None) -> Tensor:
        """Returns S times series, `(M, len(onto), 2, H, W)`.

        Arguments:
            fields: The series `(M, T, 2, H, W)`.
            frames: The numbers of their frames; 0 to T - 1 if None.
            onto: The numbers of the frames of the result; the same if None.
        """
        frames = range(fields.shape[1]) if frames is None else frames
        onto, (height, width), torus = frames if onto is None else onto, self.shape, self.lags.shape[-2:]
        scaled = fields if self.scale is None else fields * self.scale
        waves = torch.fft.rfft2(scaled, s=torus)
        line = waves.flatten(3).flatten(1, 2).permute(2, 1, 0)
        line = (self._pairs(onto, frames) @ line).permute(2, 1, 0)
        waves = line.reshape(len(fields), len(onto), 2, *waves.shape[-2:])
        out = torch.fft.irfft2(waves, s=torus)[..., :height, :width]
        out = out if self.scale is None else out * self.scale
        if len(self.components):
            inner = torch.einsum("icyx,mtcyx->mti", self.components, fields)
            drive = torch.einsum("tsij,msj->mti", self.lags_between(onto, frames), inner)
            out = out + torch.einsum("mti,icyx->mtcyx", drive, self.components)
        return out

    def _pairs(self, onto: Sequence[int], frames: Sequence[int]) -> Tensor:
        """C_k of all pairs of frames and components, `(Ht (Wt / 2 + 1), 2 len(onto), 2 len(frames))`."""
        lags = torch.tensor([[late - early for early in frames] for late in onto], device=self.lags.device)
        if self._blocks is None or not torch.equal(self._blocks[0], lags):
            found = self.waves[lags.abs().clamp(max=len(self.lags) - 1)]  # (onto, frames, 2, 2, Ht, Wt / 2 + 1)
            ahead, far = (part[..., None, None, None, None] for part in (lags >= 0, lags.abs() >= len(self.lags)))
            found = torch.where(ahead, found, found.transpose(2, 3).conj()).masked_fill(far, 0.0)
            found = found.flatten(4).permute(4, 0, 2, 1, 3)
            self._blocks = lags, found.flatten(3).flatten(1, 2).contiguous()
        return self._blocks[1]

    def lengths(self) -> tuple[float, float]:
        """Returns over how many cells and frames correlations fall to a half."""
        trace, (height, width) = self.lags.diagonal(dim1=1, dim2=2).sum(-1), self.shape
        length, in_time = min(height, width), trace[:, 0, 0]
        if len(self.components):  # they carry most, and say nothing of distance
            in_time = self.component_lags.diagonal(dim1=1, dim2=2).sum(-1)
        return _half(trace[0, :length, 0] + trace[0, 0, :length]), _half(in_time)


def _half(covariance: Tensor) -> float:
    """Where a covariance first falls below half of its first value, in steps: at least 1, at most to its end."""
    below = (covariance < covariance[0] / 2).nonzero()
    return float(max(1, int(below[0]) if len(below) else len(covariance)))


class System:
    """The system A S A^T + R of measured values, factorised once for all that is asked of it.

    Arguments:
        covariance: Of the field.
        values: Which values were measured.
        noise: The variance of their errors, `(n,)`.
        across: The covariance of the errors of u and v of a cell, `(p,)`, see `Values.errors`; 0 if None.
    """

    def __init__(
        self, covariance: Covariance, values: Values, noise: Tensor, across: Tensor | None = None
    ) -> None:  # fmt: skip
        self.covariance, self.values = covariance, values
        system = covariance.between(values, values)
        system.diagonal().add_(noise)
        if across is not None:
            u, v = values.pairs()
            system[u, v] += across
            system[v, u] += across
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
    """The measured values of one sequence, in the units of the covariance.

    Arguments:
        y: The values `(T, 2, H, W)`, 0 where there are none.
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
    covariance: Covariance, known: Known, some: Values, across: Tensor, prior: Tensor, *, most: int
) -> Estimate:
    """Returns the posterior given what is known: the exact one, where no more than `most` values were measured.

    Arguments:
        covariance: Of the field.
        known: The measured values.
        some: Values whose variance is computed.
        across: S V, the covariance of the field with the functionals, `(K, T, 2, H, W)`.
        prior: V^T S V, `(K, K)`.
        most: Values that count at most: those nearest to what was not measured.
    """
    used = nearest(known.observed, known.valid & ~known.observed, most // 2, covariance.lengths())
    values = Values.where(used[:, None].expand_as(known.y))
    variance = some.of(covariance.variance().expand_as(known.y))
    if not len(values.frame):
        return Estimate(used, torch.zeros_like(known.y), prior, variance)
    noise, between = values.errors(known.noise)
    system = System(covariance, values, noise.clamp(min=ROUNDED * covariance.variance().max()), between)
    mean = system.correct(values.of(known.y)[None], range(len(known.y)))[0]
    right = torch.cat([values.of(across).mT, covariance.between(values, some)], dim=1)
    functionals, single = system.half(right).split([len(across), len(variance)], dim=1)
    return Estimate(used, mean, prior - functionals.mT @ functionals, variance - single.square().sum(dim=0))


def nearest(observed: Tensor, hidden: Tensor, count: int, lengths: tuple[float, float]) -> Tensor:
    """Returns the measured cells that count, `(T, H, W)`, `count` at most: those nearest to a hidden one.

    Arguments:
        observed: The measured cells, `(T, H, W)`.
        hidden: What is to be found, `(T, H, W)`.
        count: How many count.
        lengths: The units of distance in space and time, in cells and frames.
    """
    if int(observed.sum()) <= count:
        return observed
    space, time = lengths
    away = distances(hidden, (1 / time, 1 / space, 1 / space)) if hidden.any() else torch.zeros(hidden.shape)
    # Cells at the same distance are taken in a random order, always the same, not from one side.
    chance = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0))
    rank = away.to(observed.device) + chance.to(observed.device) / space
    chosen = torch.where(observed, rank, torch.inf).flatten().argsort()[:count]
    used = torch.zeros_like(observed).flatten()
    used[chosen] = True
    return used.view_as(observed)


def distances(hidden: Tensor, sides: Sequence[float]) -> Tensor:
    """Returns the distance of every cell from the nearest one that is True in `(T, H, W)`, for cells of these sides."""
    squares = torch.where(hidden, 0.0, torch.inf)
    for axis, side in enumerate(sides):
        places = side * torch.arange(hidden.shape[axis], device=hidden.device)
        lines = squares.movedim(axis, -1)
        squares = torch.stack([(lines + (places - place).square()).amin(-1) for place in places], dim=axis)
    return squares.sqrt()


def some_of(values: Values, count: int) -> Values:
    """Returns values at random, always the same, `count` at most."""
    n = len(values.frame)
    if n <= count:
        return values
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]
    return values.at(chosen.to(values.frame.device))
