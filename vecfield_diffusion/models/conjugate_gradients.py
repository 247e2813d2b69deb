"""The system A S A^T + R of many measured values, see `measured`, solved by preconditioned conjugate gradients.

The preconditioner has two levels: tiles of the domain, within which it is exact, and some functionals of the field
that the tiles have in common. It is also an approximation of the posterior covariance by itself, the partially
independent conditional of Snelson and Ghahramani (AISTATS 2007).
"""

from __future__ import annotations

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
