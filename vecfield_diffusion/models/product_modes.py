"""A Gaussian field in space and time by products of functions along its axes, and its posterior.

A field x = m + a xi of T frames has the standard deviation a of every cell and a xi of covariance C(tau, r), stationary
in time and homogeneous in space, to which principal components with lagged covariances G_ij(tau) may be added; C need
not be separable. The modes are products psi_p(t) phi_i(y) chi_j(x), in each component, of the eigenvectors of the
covariance along each axis alone: waves where an axis is periodic. All of them together are an orthonormal basis, and
three small matrices transform a field.

The K strongest are estimated together, from z and y, by their dense prior covariance and the posterior precision

    L^-1 + V^T w V,    w = a^2 / s^2 where valid, and a^2 / (error^2 + a^2 e) more where observed.

The rest counts as independent of them and of each other, and is estimated by its Wiener filter from what they leave of
the data. To them it is a further error e of y. With all modes taken the posterior is exact, for land, missing frames
and an error of each cell alike. V^T w V is a table of sums over pairs of functions of each axis, so that its price does
not depend on what is observed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vecfield_diffusion.models.modes import MeanVariance, Modes, alike, of_samples, signs

#: The least eigenvalue of the prior covariance beside the largest: what rounding in float64 leaves room for.
FLAT = 1e-9


class System(NamedTuple):
    """The posterior of the coefficients of one observation at one level.

    Arguments:
        factor: The Cholesky factor of its precision, `(K, K)`.
        trace: The trace of its covariance in fields, over the valid values.
    """

    factor: Tensor
    trace: Tensor


class ProductModes(Modes):
    """A field that is stationary in time, by products of functions along its axes; see the top of this module.

    Fields are `(B, T, 2, H, W)`; with T = 1 snapshots `(B, 2, H, W)` are taken, too. It computes in float64.

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

    #: The number of modes K that is taken, at most, and the share of the variance that they may leave out.
    MODES, LEFT_OUT = 1000, 1e-4
    #: The number of modes up to which the trace is exact.
    EXACT = 128
    #: Systems that are remembered, at most: a sample of each slot of a batch may be used again.
    REMEMBERED = 32

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
        # In float64, as checkpoints keep it; see `Waves`.
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
        self.tables: dict[torch.device, Table] = {}
        self.remembered: dict[bytes, System] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A network that changes its precision leaves the field as it is.
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(self._buffers[name].device))
        self.tables, self.remembered = {}, {}
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.tables, self.remembered = {}, {}

    def table(self) -> Table:
        """Returns what follows from the covariance, on the device of the field."""
        device = self.lags.device
        if device not in self.tables:
            parts = (self.lags, self.components / self.scale, self.component_lags)
            self.tables[device] = Table.of(*(part.cpu() for part in parts), int(self.modes), self.LEFT_OUT).to(device)
        return self.tables[device]

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See `Modes`."""
        if z.ndim == 4:
            frames = (part.unsqueeze(1) if part.ndim == 4 else part for part in (z, y, observed, error, valid))
            z_, y_, observed, error, valid = frames
            mean, variance = self(z_, s, y_, observed, error, valid)
            return mean[:, 0], variance
        table, noise = self.table(), s.double().view(-1, 1, 1, 1, 1).square()
        x = torch.where(valid, (z.double() - self.mean) / self.scale, 0.0)
        known = torch.where(observed, (y.double() - self.mean) / self.scale, 0.0)
        square = self.scale.square()
        rest = table.rest * noise / (table.rest + noise)  # the variance of the rest, given z
        leak = self.leak(rest, observed)
        weights = torch.where(valid, square / noise, 0.0)
        more = torch.where(observed, 1 / ((error.double().square() / square) + leak).clamp(min=table.least), 0.0)
        right = table.coefficients(weights * x + more * known)
        kinds, which = alike(torch.cat([part.flatten(1) for part in (weights.expand_as(more), more)], dim=1))
        systems = [self.system(table, row.view(2, *more.shape[1:])) for row in kinds]
        solved = solve(systems, right, which)
        large = table.field(solved)
        # What is left of the data, of y where it tells more than z, is that of the rest.
        share = noise / (noise + (error.double() / self.scale).square())
        data = torch.where(observed, torch.lerp(x, known, share), x)
        left = torch.where(valid, data - large, 0.0)
        small = table.filtered(left, table.rest / (table.rest + noise))
        mean = torch.where(valid, self.mean + self.scale * (large + small), 0.0)
        trace = of_samples(torch.stack([system.trace for system in systems]), which)
        cells = valid.sum(dim=(1, 2, 3, 4)).clamp(min=1)
        beside = rest.mean(dim=(1, 2, 3, 4)) * (valid * square).sum(dim=(1, 2, 3, 4)) / cells
        return mean.to(z.dtype), (trace / (2 * cells) + beside).to(z.dtype)

    def leak(self, rest: Tensor, observed: Tensor) -> Tensor:
        """Returns e of every frame, `(B, T, 1, 1, 1)`, for the variances of the rest; see `Waves`."""
        share = observed.double().mean(dim=(-3, -2, -1), keepdim=True)
        mean, largest = (part(rest, dim=(1, 2, 3, 4), keepdim=True) for part in (torch.mean, torch.amax))
        return torch.lerp(mean, largest / 4, share)

    def system(self, table: Table, weights: Tensor) -> System:
        """Returns the system of weights of z and of y, `(2, T, 1, H, W)`; it is remembered."""
        key = hashlib.sha256(weights.cpu().numpy().tobytes()).digest() if weights.device.type == "cpu" else None
        if key is None or (system := self.remembered.pop(key, None)) is None:
            of_z, of_y = (table.gram(part[:, 0]) for part in weights)
            precision = torch.block_diag(of_z + of_y, of_z + of_y).add_(table.precision)
            factor = torch.linalg.cholesky(precision)
            size = len(factor)
            probes = (
                torch.eye(size, dtype=factor.dtype, device=factor.device)
                if size <= self.EXACT
                else signs(size, self.PROBES, factor.dtype, factor.device) / self.PROBES**0.5
            )
            roots = torch.linalg.solve_triangular(factor.mT, probes, upper=True)
            halves = roots.unflatten(0, (2, -1))
            noise = 1 / (weights[0] / self.scale.square()).max()
            system = System(factor, (halves * (of_z @ halves)).sum() * noise)
        if key is not None:
            self.remembered[key] = system
            for old in list(self.remembered)[: -self.REMEMBERED]:
                del self.remembered[old]
        return system


def solve(systems: Sequence[System], right: Tensor, which: Tensor | None) -> Tensor:
    """Returns the posterior mean of the coefficients, `(B, K)`; arguments as for `Modes.solve`."""
    if which is None:
        parts = [torch.cholesky_solve(row[:, None], system.factor) for row, system in zip(right, systems, strict=True)]
        return torch.stack(parts)[..., 0]
    members = [(which == number).nonzero()[:, 0] for number in range(len(systems))]
    parts = [
        torch.cholesky_solve(right[rows].mT, system.factor).mT for rows, system in zip(members, systems, strict=True)
    ]
    return torch.cat(parts)[torch.cat(members).argsort()]


@dataclass(frozen=True)
class Table:
    """What `ProductModes` computes with.

    Arguments:
        axes: The functions of time, y and x, a row each: `(T, T)`, `(H, H)`, `(W, W)`.
        chosen: Where the K / 2 functions are among the `(T, H, W)`, `(n,)`; each is one mode in either component.
        pairs: Of each axis, the products of the functions that are in use, `(pairs, length)`.
        place: Where the pair of two modes is in the table of all pairs, `(n, n)`.
        precision: L^-1, `(K, K)`.
        rest: The variances of all functions that are not among the modes, `(T, 2, H, W)`, else 0.
        least: The least variance of a measurement that rounding leaves room for.
    """

    axes: tuple[Tensor, Tensor, Tensor]
    chosen: Tensor
    pairs: tuple[Tensor, Tensor, Tensor]
    place: Tensor
    precision: Tensor
    rest: Tensor
    least: Tensor

    @classmethod
    def of(cls, lags: Tensor, components: Tensor, component_lags: Tensor, modes: int, left_out: float) -> Self:
        """From C `(T, 2, 2, Ht, Wt)`, components `(r, 2, H, W)` and their covariances `(T, r, r)`."""
        shape = (len(lags), *components.shape[-2:])
        axes = functions(lags, components, component_lags)
        variances = homogeneous_variances(lags, axes) + component_variances(components, component_lags, axes)
        strength = variances.sum(dim=1).flatten()
        ranked = strength.argsort(descending=True, stable=True)
        enough = int((strength[ranked].cumsum(0) < (1 - left_out) * strength.sum()).sum()) + 1
        chosen = ranked[: min(enough, max(modes // 2, 1))].sort().values
        index = torch.unravel_index(chosen, shape)
        prior = prior_covariance(lags, axes, index)
        prior += component_covariance(components, component_lags, axes, index)
        values, vectors = torch.linalg.eigh((prior + prior.mT) / 2)
        least = FLAT * values.max()
        rest = variances.clone()
        rest.transpose(0, 1).reshape(2, -1)  # the components first, so that one index serves both
        keep = torch.ones(len(strength), dtype=rest.dtype)
        keep[chosen] = 0.0
        places, pairs = [], []
        for axis, rows in zip(axes, index, strict=True):
            used, local = rows.unique(return_inverse=True)
            first, second = torch.triu_indices(len(used), len(used))
            number = torch.zeros(len(used), len(used), dtype=torch.long)
            number[first, second] = number[second, first] = torch.arange(len(first))
            pairs.append(axis[used[first]] * axis[used[second]])
            places.append(number[local[:, None], local])
        place = (places[0] * len(pairs[1]) + places[1]) * len(pairs[2]) + places[2]
        return cls(
            axes,
            chosen,
            tuple(pairs),
            place,
            (vectors / values.clamp(min=least)) @ vectors.mT,
            rest * keep.view(shape)[:, None],
            least,
        )

    def to(self, device: torch.device) -> Table:
        """On a device."""

        def moved(value: Any) -> Any:
            return tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)

        return Table(*(moved(getattr(self, name)) for name in self.__dataclass_fields__))

    def gram(self, weight: Tensor) -> Tensor:
        """Returns V^T w V of one component, `(n, n)`, for weights `(T, H, W)`."""
        of_time, of_y, of_x = self.pairs
        table = of_y @ (weight @ of_x.mT)  # (T, pairs of y, pairs of x)
        return (of_time @ table.flatten(1)).flatten()[self.place]

    def transform(self, field: Tensor) -> Tensor:
        """Returns the coefficients of all functions, `(B, T, 2, H, W)`, of fields of that shape."""
        time, y, x = self.axes
        return torch.einsum("pt,btn->bpn", time, (y @ (field @ x.mT)).flatten(2)).view_as(field)

    def back(self, coefficients: Tensor) -> Tensor:
        """Returns fields `(B, T, 2, H, W)` from the coefficients of all functions."""
        time, y, x = self.axes
        return torch.einsum("pt,bpn->btn", time, (y.mT @ (coefficients @ x)).flatten(2)).view_as(coefficients)

    def coefficients(self, field: Tensor) -> Tensor:
        """Returns V^T of fields `(B, T, 2, H, W)`, `(B, K)`: all modes of u, then of v."""
        return self.transform(field).transpose(1, 2).flatten(2)[:, :, self.chosen].flatten(1)

    def field(self, coefficients: Tensor) -> Tensor:
        """Returns V times coefficients `(B, K)`, `(B, T, 2, H, W)`."""
        (frames, _, *shape), n = self.rest.shape, len(coefficients)
        whole = coefficients.new_zeros(n, 2, frames * shape[0] * shape[1])
        whole = whole.index_copy(2, self.chosen, coefficients.unflatten(1, (2, -1)))
        return self.back(whole.view(n, 2, frames, *shape).transpose(1, 2).contiguous())

    def filtered(self, field: Tensor, share: Tensor) -> Tensor:
        """Returns fields with the coefficient of each function times its share, `(B, T, 2, H, W)`."""
        return self.back(self.transform(field) * share)


def functions(lags: Tensor, components: Tensor, component_lags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the eigenvectors of the covariance along time, y and x, those of most variance first, a row each."""
    height, width = components.shape[-2:]
    trace, still = lags.diagonal(dim1=1, dim2=2).sum(-1), component_lags[0]

    def along(line: Tensor, length: int, cells: int) -> Tensor:
        places = torch.arange(length)
        return cells * line[(places[:, None] - places).abs()]

    time = along(trace[:, 0, 0], len(lags), height * width)
    norms = torch.einsum("icyx,jcyx->ij", components, components)
    lagged = torch.einsum("tij,ij->t", component_lags, norms)
    y = along(trace[0, :, 0], height, width) + torch.einsum("icyx,ij,jczx->yz", components, still, components)
    x = along(trace[0, 0, :], width, height) + torch.einsum("icyx,ij,jcyz->xz", components, still, components)
    matrices = (time + along(lagged, len(lags), 1), y, x)
    return tuple(torch.linalg.eigh((matrix + matrix.mT) / 2)[1].flip(1).mT.contiguous() for matrix in matrices)


def shifted(rows: Tensor, others: Tensor, size: int) -> Tensor:
    """Returns sum over y of f(y + d) g(y) of functions `(n, length)` and `(m, length)`, `(n, m, size)`, on a torus."""
    waves = torch.fft.rfft(rows, n=size)[:, None] * torch.fft.rfft(others, n=size).conj()
    return torch.fft.irfft(waves, n=size)


def homogeneous_variances(lags: Tensor, axes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Returns the variance of every function under C, `(T, 2, H, W)`."""
    own = [
        torch.fft.irfft(torch.fft.rfft(axis, n=size).abs().square(), n=size)
        for axis, size in zip(axes, (2 * len(lags), *lags.shape[-2:]), strict=True)
    ]
    in_time = 2 * own[0][:, : len(lags)]
    in_time[:, 0] /= 2
    same = lags.diagonal(dim1=1, dim2=2)
    return torch.einsum("pt,tyxc,iy,jx->pcij", in_time, same, own[1], own[2])


def component_variances(components: Tensor, lags: Tensor, axes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Returns the variance of every function under the principal components, `(T, 2, H, W)`."""
    time, y, x = axes
    inner = torch.einsum("iy,rcyx,jx->rcij", y, components, x)
    return torch.einsum("rcij,prq,qcij->pcij", inner, coefficient_covariance(lags, time, time, True), inner)


def coefficient_covariance(lags: Tensor, first: Tensor, second: Tensor, same: bool = False) -> Tensor:
    """Returns the covariance of coefficients along functions of time, `(n, r, r)` of the `same`, or `(n, m, r, r)`."""
    both = torch.cat([lags.flip(0)[:-1].mT, lags])  # from the lag 1 - T on
    frames = torch.arange(len(lags))
    whole = both[frames[:, None] - frames + len(lags) - 1]
    return torch.einsum("pt,tsij,ps->pij" if same else "pt,tsij,qs->pqij", first, whole, second)


Index = tuple[Tensor, Tensor, Tensor]


def prior_covariance(lags: Tensor, axes: tuple[Tensor, Tensor, Tensor], index: Index) -> Tensor:
    """Returns L of the modes under C, `(K, K)`: one lag after another, by the pairs of functions along y and x."""
    n, size = len(index[0]), 2 * len(lags)
    used = [rows.unique(return_inverse=True) for rows in index]
    of_y, of_x = (
        shifted(axis[rows], axis[rows], length).flatten(0, 1)
        for axis, (rows, _), length in zip(axes[1:], used[1:], lags.shape[-2:], strict=True)
    )
    rows, columns = ((local[:, None] * len(names) + local).flatten() for names, local in used[1:])
    in_time = shifted(axes[0], axes[0], size)
    out = lags.new_zeros(2, 2, n, n)
    for lag in range(len(lags)):
        for c in range(2):
            for d in range(2):
                part = (of_y @ lags[lag, c, d] @ of_x.mT)[rows, columns].view(n, n)
                part = part * in_time[index[0][:, None], index[0], lag]
                out[c, d] += part
                if lag:
                    out[d, c] += part.mT
    return out.permute(0, 2, 1, 3).reshape(2 * n, 2 * n)


def component_covariance(
    components: Tensor, lags: Tensor, axes: tuple[Tensor, Tensor, Tensor], index: Index
) -> Tensor:
    """Returns what the principal components add to L, `(K, K)`."""
    time, y, x = axes
    inner = torch.einsum("iy,rcyx,jx->rcij", y, components, x)[:, :, index[1], index[2]]
    between = coefficient_covariance(lags, time, time)
    out = inner.new_zeros(2, len(index[0]), 2, len(index[0]))
    for p in index[0].unique():
        for q in index[0].unique():
            left, right = (index[0] == p).nonzero()[:, 0], (index[0] == q).nonzero()[:, 0]
            part = torch.einsum("rca,rs,sdb->cadb", inner[:, :, left], between[p, q], inner[:, :, right])
            for c in range(2):
                for d in range(2):
                    out[c, left[:, None], d, right] = part[c, :, d]
    return out.reshape(2 * len(index[0]), -1)
