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

from vecfield_diffusion.models.modes import signs

#: The least variance of an error beside that of the field: what float64 leaves room for.
ROUNDED = 1e-9
#: Measured values of a system that is factorised, which takes seconds, at most: more, as dense observations are, are
#: solved for by conjugate gradients (`Split`). Where that takes too long, `DENSE` of them count, those that tell most.
SPARSE, DENSE = 6000, 3000
#: Random fields that estimate the posterior variance of what is hidden, to a few hundredths.
PROBES = 4
#: Values whose covariance with the measured ones is held at once, and entries of a matrix that are looked up at once:
#: some 50 MB beside the system.
CHUNK, ENTRIES = 1024, 1 << 22


def budget(count: int) -> int:
    """Returns how many of `count` measured values enter a system that is factorised, at most."""
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

    def errors(self, noise: Tensor, first: int = 0) -> Errors:
        """Returns the covariance of their errors; a value counts by itself where the other component is not among them.

        Arguments:
            noise: The variance of both components, of each, or these and their covariance, `(T, C, H, W)`.
            first: The number of the first frame of `noise`.
        """
        entries, none = noise.shape[1], self.frame.new_empty(0)
        own = self.of(noise.narrow(1, 0, min(entries, 2)).expand(-1, 2, -1, -1), first)
        if entries < 3:
            return Errors(own, none, none, own.new_empty(0))
        cells = torch.stack([self.frame, self.row, self.column], dim=1)
        both, place, count = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
        u, v = (
            torch.full((len(both),), -1, device=place.device).index_copy(0, place[chosen], chosen.nonzero()[:, 0])
            for chosen in (self.component == 0, self.component == 1)
        )
        u, v = u[count == 2], v[count == 2]
        cell = self.at(u)
        return Errors(own, u, v, noise[cell.frame - first, 2, cell.row, cell.column])


class Errors(NamedTuple):
    """R, the covariance of the errors of measured values.

    Arguments:
        variance: Of each, `(n,)`.
        u: Which of them have an error that belongs together with another, `(p,)`.
        v: That other, `(p,)`.
        covariance: Of both, `(p,)`.
    """

    variance: Tensor
    u: Tensor
    v: Tensor
    covariance: Tensor

    def at_least(self, variance: Tensor) -> Errors:
        """R with variances that are no smaller."""
        return self._replace(variance=self.variance.clamp(min=variance))

    def at(self, chosen: Tensor) -> Errors:
        """Those of an index `(m,)` of values, which has both of a pair or none."""
        place = torch.full_like(self.variance, -1, dtype=torch.long)
        place[chosen] = torch.arange(len(chosen), device=place.device)
        inside = place[self.u] >= 0
        return Errors(
            self.variance[chosen], place[self.u[inside]], place[self.v[inside]], self.covariance[inside]
        )  # fmt: skip

    def add_to(self, system: Tensor) -> None:
        """Adds R to a matrix `(n, n)`, in place."""
        system.diagonal().add_(self.variance)
        system[self.u, self.v] += self.covariance
        system[self.v, self.u] += self.covariance

    def times(self, right: Tensor) -> Tensor:
        """Returns R times columns `(n, M)`."""
        out = self.variance[:, None] * right
        out[self.u] += self.covariance[:, None] * right[self.v]
        out[self.v] += self.covariance[:, None] * right[self.u]
        return out


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
        out, flat = table.new_empty(len(ours), len(theirs)), table.view(-1)
        for rows in torch.arange(len(ours), device=table.device).split(max(1, ENTRIES // len(theirs))):
            part, index = out[rows[0] : rows[-1] + 1], ours[rows, None] + theirs
            if farthest > reach:
                far = (a.frame[rows, None] - b.frame).abs() > reach
                part.copy_(flat[index.masked_fill_(far, 0)]).masked_fill_(far, 0.0)
            else:
                torch.index_select(flat, 0, index.view(-1), out=part.view(-1))
        if self.scale is not None:
            out.mul_(self._scales(a)[:, None]).mul_(self._scales(b))
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


class Tiles:
    """A system M near to that of many measured values, A S A^T + R, which is easily solved.

    It is that but for what values of different tiles of the domain have in common beside some functionals V^T x of the
    field. With F = S V (V^T S V)^-1/2, S' = S - F F^T, which is never negative, and D what S' and R are among the
    values of one tile, all frames of it, and 0 between those of two,

        M = A F F^T A^T + D,    Xi = (I + F^T A^T D^-1 A F)^-1,    M^-1 = D^-1 - D^-1 A F Xi F^T A^T D^-1.

    Arguments:
        covariance: Of the field.
        values: Which values were measured.
        errors: R.
        functions: F, `(K, T, 2, H, W)`.
        side: Of a tile, in cells.
        shift: By how many cells the tiles are moved.
    """

    def __init__(
        self, covariance: Covariance, values: Values, errors: Errors, functions: Tensor, side: int, shift: int = 0
    ) -> None:
        self.covariance, self.values, self.errors, self.functions = covariance, values, errors, functions
        self.side, self.shift = side, shift
        self.known = values.of(functions).mT.contiguous()  # A F
        tiles = self._tile(values)
        self.places = {int(tile): (tiles == tile).nonzero()[:, 0] for tile in tiles.unique()}
        self.factors = {tile: self._factor(places) for tile, places in self.places.items()}
        self.weighed = self._local(self.known)  # D^-1 A F
        inner = self.known.mT @ self.weighed
        inner.diagonal().add_(1.0)
        self.xi = torch.cholesky_inverse(torch.linalg.cholesky(inner))

    def _tile(self, values: Values) -> Tensor:
        row, column = ((part + self.shift) // self.side for part in (values.row, values.column))
        return row * (self.covariance.shape[1] + self.side) + column

    def _factor(self, places: Tensor) -> Tensor:
        some, known = self.values.at(places), self.known[places]
        block = self.covariance.between(some, some) - known @ known.mT
        self.errors.at(places).add_to(block)
        return torch.linalg.cholesky(block)

    def _local(self, right: Tensor) -> Tensor:
        """D^-1 times columns `(n, M)`."""
        out = torch.empty_like(right)
        for tile, places in self.places.items():
            out[places] = torch.cholesky_solve(right[places], self.factors[tile])
        return out

    def solve(self, right: Tensor) -> Tensor:
        """M^-1 times columns `(n, M)`."""
        return self._local(right) - self.weighed @ (self.xi @ (self.weighed.mT @ right))

    def variance(self, values: Values) -> Tensor:
        """Returns the posterior variance of single values by M, `(len(values),)`."""
        rows = values.of(self.functions).mT
        left = self.covariance.variance()[values.component, values.row, values.column] - rows.square().sum(dim=1)
        tiles, rows = self._tile(values), rows.clone()
        for tile, places in self.places.items():
            here = (tiles == tile).nonzero()[:, 0]
            known, mine = self.known[places], rows[here]
            cross = self.covariance.between(self.values.at(places), values.at(here)) - known @ mine.mT
            gain = torch.cholesky_solve(cross, self.factors[tile])
            left[here] -= (gain * cross).sum(dim=0)
            rows[here] = mine - gain.mT @ known
        return left.clamp(min=0.0) + ((rows @ self.xi) * rows).sum(dim=1)


class Split:
    """The system B = A S A^T + R of many measured values, solved by conjugate gradients.

    They are preconditioned by the mean of M^-1 for two sets of tiles, half a tile apart: neighbours that one set parts
    are together in the other.

    Arguments:
        covariance: Of the field.
        values: Which values were measured.
        errors: R.
        across: S V, `(K, T, 2, H, W)`.
        prior: V^T S V, `(K, K)`.
    """

    #: Values of a tile, about, and the residual beside the right side at which iterations end, in the norm of M^-1.
    TILE, TOLERANCE, STEPS = 600, 1e-2, 200

    def __init__(self, covariance: Covariance, values: Values, errors: Errors, across: Tensor, prior: Tensor) -> None:
        self.covariance, self.values, self.errors = covariance, values, errors
        sizes, vectors = torch.linalg.eigh(prior)
        sizes = sizes.clamp(min=torch.finfo(sizes.dtype).eps * sizes.max()).sqrt()
        functions, self.root = torch.einsum("ki,ktcyx->itcyx", vectors / sizes, across), vectors * sizes
        height, width = covariance.shape
        side = max(1, round((self.TILE * height * width / len(values.frame)) ** 0.5))
        self.tiles = [Tiles(covariance, values, errors, functions, side, shift) for shift in {0, side // 2}]

    @property
    def among(self) -> Tensor:
        """The posterior covariance of V^T x by M, `(K, K)`."""
        return self.root @ self.tiles[0].xi @ self.root.mT

    def variance(self, values: Values) -> Tensor:
        """Returns the posterior variance of single values by M, `(len(values),)`."""
        return self.tiles[0].variance(values)

    def _field(self, weights: Tensor) -> Tensor:
        """S A^T times columns `(n, M)`, `(M, T, 2, H, W)`."""
        sources = weights.new_zeros(weights.shape[1], *self.tiles[0].functions.shape[1:])
        sources[(slice(None), *self.values)] = weights.mT
        return self.covariance.apply(sources)

    def _near(self, right: Tensor) -> Tensor:
        return sum(tiles.solve(right) for tiles in self.tiles) / len(self.tiles)

    def correct(self, innovations: Tensor) -> Tensor:
        """Returns S A^T B^-1 d for d `(M, n)`, `(M, T, 2, H, W)`."""
        residual = innovations.mT.clone()
        weights, near = torch.zeros_like(residual), self._near(residual)
        size = (residual * near).sum(dim=0)
        step = near[:, size > 0]
        least = self.TOLERANCE**2 * size
        for _ in range(self.STEPS):
            going = (size > least).nonzero()[:, 0]  # the others are solved
            if not len(going):
                break
            moved = self.values.of(self._field(step)).mT + self.errors.times(step)
            length = size[going] / (step * moved).sum(dim=0)
            weights[:, going] += length * step
            residual[:, going] -= length * moved
            near = self._near(residual[:, going])
            before, size[going] = size[going], (residual[:, going] * near).sum(dim=0)
            step = (near + size[going] / before * step)[:, size[going] > least[going]]
        return self._field(weights)


class Estimate(NamedTuple):
    """What measured values say of a sequence, and of some linear functionals V^T x of it.

    Arguments:
        mean: The posterior mean `(T, 2, H, W)`.
        among: The posterior covariance of the functionals, `(K, K)`.
        variance: The posterior variance of single values.
    """

    mean: Tensor
    among: Tensor
    variance: Tensor


def interpolate(
    covariance: Covariance, known: Known, some: Values, across: Tensor, prior: Tensor, *, most: int
) -> Estimate:
    """Returns the posterior given what is known: the exact mean, and its covariance by `Split` where there is much.

    Arguments:
        covariance: Of the field.
        known: The measured values.
        some: Values whose variance is computed.
        across: S V, the covariance of the field with the functionals, `(K, T, 2, H, W)`.
        prior: V^T S V, `(K, K)`.
        most: Values of a system that is solved at once, and whose covariance is exact.
    """
    values = Values.where(known.observed[:, None].expand_as(known.y))
    variance = some.of(covariance.variance().expand_as(known.y))
    if not len(values.frame):
        return Estimate(torch.zeros_like(known.y), prior, variance)
    errors = values.errors(known.noise).at_least(ROUNDED * covariance.variance().max())
    y = values.of(known.y)[None]
    if len(values.frame) > most:
        return _of_many(Split(covariance, values, errors, across, prior), known, some, y)
    system = System(covariance, values, errors)
    mean = system.correct(y, range(len(known.y)))[0]
    right = torch.cat([values.of(across).mT, covariance.between(values, some)], dim=1)
    functionals, single = system.half(right).split([len(across), len(variance)], dim=1)
    return Estimate(mean, prior - functionals.mT @ functionals, variance - single.square().sum(dim=0))


def _of_many(split: Split, known: Known, some: Values, y: Tensor) -> Estimate:
    """The posterior given many values.

    The covariance by M is too large, for it forgets what tiles have in common. It is scaled to the variance of the
    hidden values by B, whose trace is that of C = S - S A^T B^-1 A S in random signs v: the mean of v^T C v.
    """
    hidden = (known.valid & ~known.observed)[:, None].expand_as(known.y)
    probes = signs(known.y.numel(), PROBES, known.y.dtype, known.y.device).mT.reshape(-1, *known.y.shape) * hidden
    before = split.covariance.apply(probes)
    found = split.correct(torch.cat([y, split.values.of(before)]))
    trace, variance = (probes * (before - found[1:])).sum() / PROBES, split.variance(some)
    inside = some.of(hidden)
    factor = torch.ones_like(trace)
    if inside.any():
        factor = (trace / hidden.sum() / variance[inside].mean()).clamp(min=0.0)
    variance = torch.where(inside, factor * variance, variance)
    return Estimate(found[0], factor * split.among, variance)


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
