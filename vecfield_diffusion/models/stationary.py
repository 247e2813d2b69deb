"""The covariance S of a field that is stationary in time, of single values of it, and R, that of their errors.

S is applied to fields by Fourier transforms on the torus of its lags. Fields are `(T, 2, H, W)`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Entries of a matrix that are looked up at once, and of fields that are transformed at once, some 30 MB.
ENTRIES = 1 << 22


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
        # A local name: several threads may ask.
        if (found := self._tables.get(reach)) is None:
            rows, columns = (torch.arange(1 - n, n, device=self.lags.device) for n in self.shape)
            torus = self.lags.shape[-2:]
            later = self.lags[: reach + 1, ..., (rows % torus[0])[:, None], columns % torus[1]]
            earlier = later[1:].flip(0, -2, -1).transpose(1, 2)
            found = torch.cat([earlier, later]).contiguous()
            self._tables = {reach: found}
        return found

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

    def common(self, frames: Sequence[int], most: int) -> Tensor:
        """Returns F `(K, T, 2, H, W)`: F F^T is the covariance of the components in frames, without its weakest."""
        among = self.lags_between(frames, frames).transpose(1, 2).flatten(0, 1).flatten(1)
        values, vectors = torch.linalg.eigh(among)
        roots = (vectors * values.clamp(min=0.0).sqrt())[:, -most:]
        roots = roots.view(len(frames), len(self.components), roots.shape[1])
        return torch.einsum("tik,icyx->ktcyx", roots, self.components)

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
        most = max(1, ENTRIES // (2 * fields.shape[1] * torus[0] * torus[1]))
        if len(fields) > most:
            return torch.cat([self.apply(part, frames, onto) for part in fields.split(most)])
        scaled = fields if self.scale is None else fields * self.scale
        waves = torch.fft.rfft2(scaled, s=torus)
        # Copied to the order in which they are multiplied: torch takes several times as long for any other.
        line = waves.flatten(3).flatten(0, 2).mT.contiguous().unflatten(1, (len(fields), -1))
        line = (line @ self._pairs(onto, frames).mT).flatten(1).mT.contiguous()
        waves = line.view(len(fields), len(onto), 2, *waves.shape[-2:])
        out = torch.fft.irfft(torch.fft.ifft(waves, dim=-2)[..., :height, :], n=torus[1])[..., :width]
        out = out if self.scale is None else out * self.scale
        if len(self.components):
            inner = torch.einsum("icyx,mtcyx->mti", self.components, fields)
            drive = torch.einsum("tsij,msj->mti", self.lags_between(onto, frames), inner)
            out = out + torch.einsum("mti,icyx->mtcyx", drive, self.components)
        return out

    def _pairs(self, onto: Sequence[int], frames: Sequence[int]) -> Tensor:
        """C_k of all pairs of frames and components, `(Ht (Wt / 2 + 1), 2 len(onto), 2 len(frames))`."""
        lags = torch.tensor([[late - early for early in frames] for late in onto], device=self.lags.device)
        known = self._blocks
        if known is None or not torch.equal(known[0], lags):
            found = self.waves[lags.abs().clamp(max=len(self.lags) - 1)]  # (onto, frames, 2, 2, Ht, Wt / 2 + 1)
            ahead, far = (part[..., None, None, None, None] for part in (lags >= 0, lags.abs() >= len(self.lags)))
            found = torch.where(ahead, found, found.transpose(2, 3).conj()).masked_fill(far, 0.0)
            found = found.flatten(4).permute(4, 0, 2, 1, 3)
            known = self._blocks = lags, found.flatten(3).flatten(1, 2).contiguous()
        return known[1]
