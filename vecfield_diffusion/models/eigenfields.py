"""Any Gaussian field on a rectangle of cells, by the leading eigenvectors of its covariance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.ellipses import axes, back, turned
from vecfield_diffusion.models.modes import MeanVariance, Modes, alike, least, of_samples, signs

#: Products of modes that float32 leaves, at most.
ROUNDED = 1e-5


class Eigenfields(Modes):
    """Any field on a rectangle of cells: modes of its covariance, and a white part beside them in every cell.

    The posterior is exact, but that float32 leaves measurements an error of 1e-3 of the largest mode. In each cell y
    and z together are one value m of the variance p = 1 / (1/s^2 + 1/error^2); it measures the modes with the variance
    nugget + p, and what is left of it is shared between the white part and the noise. With C the posterior covariance
    of the coefficients and D = p / (nugget + p), that of the field is

        D V C V^T D + nugget p / (nugget + p).

    Its trace over the valid cells is exact up to `EXACT` modes, and without bias, to a few hundredths, beyond. Where
    errors of u and v are correlated this holds along the axes of their ellipses, to which V, y and z are turned.

    Arguments:
        modes: V, `(K, 2, H, W)`, orthonormal.
        variances: The diagonal of L, `(K,)`.
        nugget: The white variance.
    """

    draws = True
    #: The number of modes K that is taken.
    MODES = 500
    #: The number of modes up to which the trace is exact, and the random vectors that estimate it beyond.
    EXACT, VECTORS = 128, 16
    #: Products of modes over the cells of a mask that are remembered, at most.
    REMEMBERED = 32

    def __init__(self, modes: Tensor | None = None, variances: Tensor | None = None, nugget: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("modes", torch.zeros(1, 2, 1, 1) if modes is None else modes)
        self.register_buffer("variances", torch.zeros(1) if variances is None else variances)
        self.register_buffer("nugget", torch.tensor(nugget, dtype=torch.float32))
        #: Whether c is the deviation over the valid cells. Networks trained before that was so keep what they learned
        #: with: the mean trace over all cells, land included, by 16 probes, times the mean D^2.
        self.register_buffer("over_valid", torch.tensor(True))
        self.before = False
        self.remembered: dict[tuple[torch.dtype, bytes, bytes], Tensor] = {}
        self.restricted: dict[bytes, tuple[Tensor, Tensor]] = {}

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state.setdefault(f"{prefix}over_valid", torch.tensor(False))
        super()._load_from_state_dict(state, prefix, *rest)
        self.before = not bool(self.over_valid)
        flat = self.modes.flatten(1).double()
        miss = (flat @ flat.T - torch.eye(len(flat), dtype=flat.dtype, device=flat.device)).abs().max()
        if miss > ROUNDED:  # stored in half precision: what is solved counts on V^T V = I
            vectors, triangle = torch.linalg.qr(flat.T)
            upright = (vectors * triangle.diagonal().sign()).T.reshape(self.modes.shape)
            self.modes = upright.to(self.modes)

    def _forget(self) -> None:
        super()._forget()
        self.remembered, self.restricted = {}, {}

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See `Modes`."""
        angle, error = axes(error)
        if angle is None:
            return self._posterior(self.modes, z, s, y, observed, error, valid)
        parts, (kinds, which) = (z, y, observed, error, valid), torch.unique(angle, dim=0, return_inverse=True)
        mean, variance = torch.zeros_like(z), torch.zeros_like(s)
        for number, kind in enumerate(kinds):
            own = which == number
            z_own, y_own, *rest = (part[own] for part in parts)
            fields = (turned(part, kind) for part in (self.modes, z_own))
            along = self._posterior(*fields, s[own], turned(y_own, kind), *rest, seen=kind.cpu().numpy().tobytes())
            mean[own], variance[own] = back(along[0], kind), along[1]
        return mean, variance

    def _posterior(
        self,
        modes: Tensor,
        z: Tensor,
        s: Tensor,
        y: Tensor,
        observed: Tensor,
        error: Tensor,
        valid: Tensor,
        seen: bytes = b"",
    ) -> MeanVariance:
        """Returns the posterior for errors of one or two channels; `seen` tells modes that were turned from others."""
        noise, square = s[:, None, None, None].square(), error.square()
        p = torch.where(observed, noise * square / (noise + square), noise)
        m = torch.where(observed, (square * z + noise * y) / (noise + square), z)
        nugget, modes, variances = (value.to(z.dtype) for value in (self.nugget, modes, self.variances))
        total = (nugget + p).clamp(min=least(variances))
        weight, white = (torch.where(valid, share, 0.0) for share in (1 / total, nugget / total))
        kept = torch.where(valid, 1 - white, 0.0)
        values = (part.expand(-1, 2, -1, -1).flatten(1) for part in (weight, kept))
        kinds, which = alike(torch.cat([*values], dim=1))
        basis = modes.flatten(1)
        right = (weight * m).flatten(1) @ basis.T
        factor, trace = self.systems(kinds, lambda rows: self.system(basis, variances, rows, seen), seen)
        coefficients, trace = self.solve(factor, variances, right, which), of_samples(trace, which)
        smooth = (coefficients @ basis).unflatten(1, z.shape[1:])
        mean = smooth + white * (m - smooth)
        cells = valid.sum(dim=(1, 2, 3)).clamp(min=1)
        beside = (white * p).sum(dim=(1, 2, 3)) / (white.shape[1] * cells)
        spread = trace * kept.square().sum(dim=(1, 2, 3)) / (kept.shape[1] * cells) if self.before else trace
        return torch.where(valid, mean, 0.0), spread / (2 * cells) + beside

    def system(self, basis: Tensor, variances: Tensor, rows: Tensor, seen: bytes) -> tuple[Tensor, Tensor]:
        """Returns the factor and the trace of systems, by the weights and D of the values, `(U, 4 H W)`."""
        weight, kept = rows.chunk(2, dim=1)
        factor = self.factorised(self.gram(basis, weight, seen), variances)
        return factor, self.trace(factor, variances) if self.before else self.spread(factor, variances, basis, kept)

    def draw(self, noise: Tensor, leaked: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """See `Modes`; a measurement sees the field itself."""
        nugget, modes, variances = (value.to(noise.dtype) for value in (self.nugget, self.modes, self.variances))
        basis, white = modes.flatten(1), nugget.sqrt()
        more = (variances + nugget).sqrt() - white
        field = white * noise + ((more * (noise.flatten(1) @ basis.T)) @ basis).view_as(noise)
        return field, field

    def whiten(self, z: Tensor, s: Tensor, valid: Tensor) -> Tensor:
        """See `Modes`."""
        rows, noise, parts = z.flatten(1), s[:, None].square() + self.nugget.to(z.dtype), []
        white = noise.rsqrt()
        for k, (basis, variances) in enumerate(self.inside(valid, z)):
            share = (variances + noise[k]).rsqrt() - white[k]
            parts.append(white[k] * rows[k] + ((rows[k] @ basis.T) * share) @ basis)
        return torch.stack(parts).view_as(z)

    def log_determinant(self, s: Tensor, valid: Tensor) -> Tensor:
        """See `Modes`."""
        noise, sums = s.double().square() + self.nugget.double(), []
        values = 2 * valid.flatten(1).sum(dim=1)
        for k, (_, variances) in enumerate(self.inside(valid, noise)):
            sums.append((variances + noise[k]).log().sum() + (values[k] - len(variances)) * noise[k].log())
        return torch.stack(sums)

    def inside(self, valid: Tensor, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the modes `(K, 2 H W)` in the cells of each sample and their variances, in the type of `like`."""
        kinds, which = alike(valid.expand(-1, 2, -1, -1).flatten(1))
        found = [tuple(part.to(like) for part in self.eigen(row)) for row in kinds]
        return [found[k] for k in (range(len(kinds)) if which is None else which.tolist())]

    def eigen(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the orthonormal modes of V L V^T in the cells marked True, and their variances, in float64."""
        key = cells.cpu().numpy().tobytes()
        if key not in self.restricted:
            basis, variances = self.modes.flatten(1).double(), self.variances.double()
            if not bool(cells.all()):
                part = variances.sqrt()[:, None] * torch.where(cells, basis, 0.0)
                _, sizes, basis = torch.linalg.svd(part, full_matrices=False)
                kept = min(len(sizes), int(cells.sum()))
                basis, variances = basis[:kept], sizes[:kept].square()
            self.restricted = {**dict(list(self.restricted.items())[-self.REMEMBERED :]), key: (basis, variances)}
        return self.restricted[key]

    def spread(self, factor: Tensor, variances: Tensor, basis: Tensor, kept: Tensor) -> Tensor:
        """Returns the trace of D V C V^T D, `(U,)`, for V^T `(K, 2 H W)` and D `(U, 2 H W)`."""
        d = variances.sqrt()
        if len(d) <= self.EXACT:
            probes = torch.eye(len(d), dtype=d.dtype, device=d.device)
        else:
            probes = signs(len(d), self.VECTORS, d.dtype, d.device) / self.VECTORS**0.5
        # C = X X^T for X = d R^-T, R the factor: a sum of squares, from which nothing is subtracted.
        roots = d[:, None] * torch.linalg.solve_triangular(factor.mT, probes.expand(len(factor), -1, -1), upper=True)
        energy = (basis.T @ roots).square().sum(dim=2)
        return (energy * kept.square()).sum(dim=1)

    def gram(self, basis: Tensor, weight: Tensor, seen: bytes = b"") -> Tensor:
        """Returns V^T w V, `(U, K, K)`, for V^T `(K, 2 H W)` and weights `(U, 2 H W)`; `seen` as in `_posterior`."""
        if basis.device.type != "cpu":
            return torch.stack([(basis * row) @ basis.T for row in weight])
        gram = torch.zeros(len(weight), len(basis), len(basis), dtype=basis.dtype)
        for row, into in zip(weight, gram, strict=True):
            # V^T V is the identity: only cells of another weight than most take work.
            most = row.mode().values
            values = row.unique()
            if len(values) <= 3:
                for value in values[values != most]:
                    into.add_(self.product(basis, row == value, seen), alpha=float(value - most))
            else:
                other = row != most
                part = basis[:, other]
                torch.mm(part * (row - most)[other], part.T, out=into)
            into.diagonal().add_(most)
        return gram

    def product(self, basis: Tensor, values: Tensor, seen: bytes = b"") -> Tensor:
        """Returns V^T V over the values marked True in `(2 H W,)`, `(K, K)`; `seen` as in `_posterior`.

        It is remembered while nothing is trained: the mask of an observation is the same at each step of a sampler,
        though the weights are not.
        """
        key = (basis.dtype, np.packbits(values.numpy()).tobytes(), seen)
        if (product := self.remembered.get(key)) is None:
            part = basis[:, values]
            product = part @ part.T
            if not self.training:
                self.remembered[key] = product
                for old in list(self.remembered)[: -self.REMEMBERED]:
                    del self.remembered[old]
        return product
