"""Sparse factorisations of the equations of a grid, which are kept: on a CPU the fastest way to solve them.

K = L L^T of a grid with land takes constants and more to zero, so K + s D is factorised, with the diagonal D of K and a
small s. As the preconditioner of conjugate gradients it leaves a condition of 1 + s / l, with the least eigenvalue l of
D^-1 K that is not zero: 1e-5 for 256x256 cells, hence a handful of iterations to any tolerance. What K takes to zero is
amplified by 1 / s in rounding, and removed by the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

from vecfield_diffusion.physics.multigrid import coordinates

#: s of the equations of a grid, and of those with held cells, of which nobody removes what is amplified.
SHIFT, HELD_SHIFT = 1e-7, 1e-5
#: The most cells whose equations are factorised: 256 x 256. The time and memory of it grow faster than the cells.
MOST = 256 * 256
#: Masks whose factorisations are kept.
KEPT = 8


class Factored:
    """(K + s D)^-1 as a map of `(n, B)`, on the CPU; or (K + s d)^-1 with the mean d of D.

    Arguments:
        matrix: K, a symmetric semi-definite coordinate matrix `(n, n)` in float64.
        shift: s.
        even: Whether d is taken: then the map takes what is orthogonal to the null space of K to what is.
    """

    def __init__(self, matrix: Tensor, shift: float = SHIFT, even: bool = False) -> None:
        (row, column), values = matrix.indices(), matrix.values()
        diagonal = torch.zeros(len(matrix), dtype=values.dtype)
        diagonal[row[row == column]] = values[row == column]
        # A cell without an equation has one of its own.
        some = diagonal > 0
        scale = diagonal[some].mean().expand_as(diagonal) if even else diagonal
        added = torch.where(some, shift * scale, 1.0)
        every = torch.arange(len(matrix))
        places = torch.cat((row, every)).numpy(), torch.cat((column, every)).numpy()
        shifted = csc_matrix((torch.cat((values, added)).numpy(), places), shape=tuple(matrix.shape))
        # Symmetric and definite: no pivots need be looked for, and the order keeps what fills in small.
        self.factors = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})

    def __call__(self, b: Tensor) -> Tensor:
        return torch.from_numpy(self.factors.solve(b.detach().contiguous().numpy()))


class Held:
    """(L_f L_f^T + s D)^-1 for masks of cells that are free to change, kept for those used last.

    Arguments:
        divergence: L, a coordinate matrix `(n, 2n)` on the CPU.
    """

    def __init__(self, divergence: Tensor) -> None:
        self.divergence = divergence
        self.kept: dict[bytes, Factored] = {}

    def solver(self, free: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Returns the map of `(n, B)` for the mask of each column of `free` `(n, B)`; None for many different ones."""
        if not free.numel():
            return None
        masks, column = torch.unique(free, dim=1, return_inverse=True)
        if masks.shape[1] > KEPT:
            return None
        factored = [self.factored(mask) for mask in masks.T]

        def solve(b: Tensor) -> Tensor:
            x = torch.empty_like(b)
            for number, solver in enumerate(factored):
                x[:, column == number] = solver(b[:, column == number])
            return x

        return solve

    def factored(self, free: Tensor) -> Factored:
        """Returns the factorisation for one mask `(n,)`."""
        key = np.packbits(free.numpy()).tobytes()
        solver = self.kept.pop(key, None) or self._made(free)
        self.kept[key] = solver  # the last one used is the last one dropped
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return solver

    def _made(self, free: Tensor) -> Factored:
        (row, column), values = self.divergence.indices(), self.divergence.values()
        there = free.repeat(2)[column]
        part = coordinates(row[there], column[there], values[there], tuple(self.divergence.shape))
        return Factored(torch.sparse.mm(part, part.t()).coalesce(), HELD_SHIFT, even=True)
