"""The system A S A^T + R of many measured values, see `measured`, solved by preconditioned conjugate gradients.

The preconditioner has two levels: tiles of the domain, within which it is exact, and some functionals of the field
that the tiles have in common. It is also an approximation of the posterior covariance by itself, the partially
independent conditional of Snelson and Ghahramani (AISTATS 2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vecfield_diffusion.models.stationary import Covariance, Errors, Values


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
        known: A F, `(n, K)`; all is computed in its type.
        side: Of a tile, in cells.
        shift: By how many cells the tiles are moved.
    """

    def __init__(
        self, covariance: Covariance, values: Values, errors: Errors, known: Tensor, side: int, shift: int = 0
    ) -> None:
        self.covariance, self.values, self.errors, self.known = covariance, values, errors, known
        self.side, self.shift = side, shift
        self.numbers, counts = self._tile(values).unique(return_counts=True)
        self.places = self._tile(values).argsort(stable=True).split(counts.tolist())
        # Inverses: a product with many columns takes less time than two triangular systems.
        self.inverses = [self._inverse(places) for places in self.places]
        self.weighed = self._local(self.known)  # D^-1 A F
        inner = self.known.mT @ self.weighed
        inner.diagonal().add_(1.0)
        self.xi = torch.cholesky_inverse(torch.linalg.cholesky(inner))

    def _tile(self, values: Values) -> Tensor:
        row, column = ((part + self.shift) // self.side for part in (values.row, values.column))
        return row * (self.covariance.shape[1] + self.side) + column

    def _inverse(self, places: Tensor) -> Tensor:
        some, known = self.values.at(places), self.known[places]
        block = self.covariance.between(some, some)
        self.errors.at(places).add_to(block)
        block = torch.addmm(block.to(known.dtype), known, known.mT, alpha=-1.0)
        # No eigenvalue is less than what rounding takes away.
        block.diagonal().add_(torch.finfo(block.dtype).eps * block.diagonal().sum())
        return torch.cholesky_inverse(torch.linalg.cholesky(block))

    def _local(self, right: Tensor) -> Tensor:
        """D^-1 times columns `(n, M)`."""
        # As rows in the order of the tiles: so each tile is read once, as it lies in memory.
        order = torch.cat(self.places)
        rows = right.mT[:, order].split([len(places) for places in self.places], dim=1)
        out = torch.empty_like(right)
        out[order] = torch.cat([row @ inverse for row, inverse in zip(rows, self.inverses, strict=True)], dim=1).mT
        return out

    def solve(self, right: Tensor) -> Tensor:
        """M^-1 times columns `(n, M)`, in their type."""
        own = right.to(self.known.dtype)
        # As rows: torch takes twice as long for products of few columns.
        common = own.mT.contiguous() @ self.weighed @ self.xi @ self.weighed.mT
        return (self._local(own) - common.mT).to(right.dtype)

    def variance(self, values: Values, rows: Tensor) -> Tensor:
        """Returns the posterior variance of single values by M, `(len(values),)`, for what these have of F."""
        left = self.covariance.variance()[values.component, values.row, values.column] - rows.square().sum(dim=1)
        tiles, rows = self._tile(values), rows.clone()
        for tile, places, inverse in zip(self.numbers, self.places, self.inverses, strict=True):
            here = (tiles == tile).nonzero()[:, 0]
            known, mine = self.known[places], rows[here]
            cross = self.covariance.between(self.values.at(places), values.at(here)) - known @ mine.mT
            gain = inverse @ cross
            left[here] -= (gain * cross).sum(dim=0)
            rows[here] = mine - gain.mT @ known
        return left.clamp(min=0.0) + ((rows @ self.xi) * rows).sum(dim=1)


class Split:
    """The system B = A S A^T + R of many measured values, solved by conjugate gradients.

    They are preconditioned by the mean of M^-1 for two sets of tiles, half a tile apart: neighbours that one set parts
    are together in the other. The other has no functions in common and is taken in float32, as it only preconditions.

    Arguments:
        covariance: Of the field.
        values: Which values were measured.
        errors: R.
        functions: F, `(K, T, 2, H, W)`; with K = 0 the tiles have nothing in common.
        frames: The numbers of those T frames, in their order; 0 to T - 1 if None.
    """

    #: Values of a tile, about, and the entries of all of a set, some 500 MB, at most.
    TILE, MOST = 500, 6e7
    #: The residual beside the right side at which iterations end, in the norm of M^-1.
    TOLERANCE, STEPS = 5e-3, 200

    def __init__(
        self,
        covariance: Covariance,
        values: Values,
        errors: Errors,
        functions: Tensor,
        frames: Sequence[int] | None = None,
    ) -> None:
        self.covariance, self.values, self.errors, self.functions = covariance, values, errors, functions
        self.frames = list(range(functions.shape[1]) if frames is None else frames)
        height, width = covariance.shape
        count = len(values.frame)
        side = max(1, round((min(self.TILE, self.MOST / count) * height * width / count) ** 0.5))
        self._places = self._placed(values)
        known = self._places.of(self.functions).mT.contiguous()
        self.tiles = Tiles(covariance, values, errors, known, side)
        self.others = Tiles(covariance, values, errors, known[:, :0].float(), side, side // 2)

    def _placed(self, values: Values) -> Values:
        """Those values by the places of their frames among all."""
        return values._replace(frame=torch.searchsorted(values.frame.new_tensor(self.frames), values.frame))

    @property
    def xi(self) -> Tensor:
        """Xi of M, `(K, K)`: the posterior covariance of the functionals by M, in units of their prior one."""
        return self.tiles.xi

    def variance(self, values: Values) -> Tensor:
        """Returns the posterior variance of single values by M, `(len(values),)`."""
        return self.tiles.variance(values, self._placed(values).of(self.functions).mT)

    def _field(self, weights: Tensor, onto: Sequence[int]) -> Tensor:
        """S A^T times columns `(n, M)`, `(M, len(onto), 2, H, W)`."""
        sources = weights.new_zeros(weights.shape[1], *self.functions.shape[1:])
        sources[(slice(None), *self._places)] = weights.mT
        return self.covariance.apply(sources, self.frames, onto)

    def _near(self, right: Tensor) -> Tensor:
        return (self.tiles.solve(right) + self.others.solve(right)) / 2

    def correct(self, innovations: Tensor, onto: Sequence[int] | None = None) -> Tensor:
        """Returns S A^T B^-1 d for d `(M, n)` in some of the frames, all if None, `(M, len(onto), 2, H, W)`."""
        residual = innovations.mT.clone()
        weights, near = torch.zeros_like(residual), self._near(residual)
        size = (residual * near).sum(dim=0)
        step = near[:, size > 0]
        least = self.TOLERANCE**2 * size
        for _ in range(self.STEPS):
            going = (size > least).nonzero()[:, 0]  # the others are solved
            if not len(going):
                break
            moved = self._places.of(self._field(step, self.frames)).mT + self.errors.times(step)
            length = size[going] / (step * moved).sum(dim=0)
            weights[:, going] += length * step
            residual[:, going] -= length * moved
            near = self._near(residual[:, going])
            before, size[going] = size[going], (residual[:, going] * near).sum(dim=0)
            step = (near + size[going] / before * step)[:, size[going] > least[going]]
        return self._field(weights, self.frames if onto is None else onto)
