"""Algebraic multigrid for the Poisson equations of a grid with land.

One V-cycle of smoothed aggregation (Vanek, Mandel and Brezina 1996, Computing 56, 179) with damped Jacobi smoothing,

    x = w f;   x += P cycle(P^T (f - K x));   x += w (f - K x);       w = 4 / (3 |D^-1 K|) D^-1,   P = (1 - w K) P_0,

a symmetric positive definite approximation of K^+ that preconditions conjugate gradients. Each column of P_0 holds the
candidate, which K takes to zero, on one aggregate: a connected patch of up to 3x3 cells of one of the four sheets that
L L^T consists of (see `poisson`), so that the coarse cells again form four sheets.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

_PATCH = 3  # cells along the side of an aggregate
_STRONG = 0.05  # relative size of a coupling that may join an aggregate; a tenth of it on each further level
_COARSEST = 400  # cells of a level that is inverted directly
_NULL = 1e-11  # relative size of an eigenvalue that stands for zero


@dataclass(frozen=True)
class Matrix:
    """A sparse matrix with its transpose."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, coo: Tensor) -> Matrix:
        """From a coordinate matrix."""
        return cls(_compressed(coo), _compressed(coo.t()))

    @property
    def T(self) -> Matrix:  # noqa: N802
        """The transpose."""
        return Matrix(self.columns, self.rows)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.rows @ x


def coordinates(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns a coordinate matrix: entries of the same place are added, and those that cancel are dropped."""
    index = torch.stack((row, column))
    matrix = torch.sparse_coo_tensor(index, values, shape, check_invariants=True).coalesce()
    kept = matrix.values() != 0
    return torch.sparse_coo_tensor(
        matrix.indices()[:, kept], matrix.values()[kept], shape, is_coalesced=True, check_invariants=True
    )


def peak(values: Tensor) -> Tensor:
    """Returns the largest size of any of the values, 0 of none."""
    return values.abs().max() if values.numel() else values.new_zeros(())


def _compressed(coo: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # "in beta state"
        return coo.coalesce().to_sparse_csr()


def connected(row: Tensor, column: Tensor, count: int) -> Tensor:
    """Returns the connected parts of a symmetric graph of `count` nodes, numbered from 0."""
    label = torch.arange(count)
    while True:
        lowest = label.scatter_reduce(0, row, label[column], "amin")
        lowest = lowest[lowest]  # a jump to the label of the label
        if torch.equal(lowest, label):
            return torch.unique(label, return_inverse=True)[1]
        label = lowest


class Multigrid:
    """A cycle as a map of `(n, B)`.

    Arguments:
        matrix: K, a symmetric coordinate matrix on the CPU.
        candidate: The vector that K takes to zero wherever it has a null space, `(n,)`.
        cells: The row and column of each unknown on the grid, `(2, n)`.
        device: Where the fields are.
    """

    def __init__(self, matrix: Tensor, candidate: Tensor, cells: Tensor, device: torch.device) -> None:
        self.levels = []
        sheet, place = 2 * (cells[0] % 2) + cells[1] % 2, cells // 2
        while len(candidate) > _COARSEST and place.any():
            row, column = matrix.indices()
            damping = _damping(matrix)
            place = place // _PATCH
            patch = torch.unique(torch.cat((place, sheet[None])), dim=1, return_inverse=True)[1]
            aggregate = _aggregates(matrix, patch, _STRONG * 10.0 ** -len(self.levels))
            size = (len(candidate), int(aggregate.max()) + 1)
            rough = coordinates(torch.arange(size[0]), aggregate, candidate, size)
            smoother = coordinates(row, column, damping[row] * matrix.values(), matrix.shape)
            prolong = (rough - torch.sparse.mm(smoother, rough)).coalesce()
            self.levels.append(
                (Matrix.of(matrix.to(device)), Matrix.of(prolong.to(device)), damping[:, None].to(device))
            )
            matrix = torch.sparse.mm(prolong.t().coalesce(), torch.sparse.mm(matrix, prolong)).coalesce()
            member = torch.zeros(size[1], dtype=torch.long).index_put_((aggregate,), torch.arange(size[0]))
            sheet, place, candidate = sheet[member], place[:, member], torch.ones(size[1], dtype=candidate.dtype)
        self.coarsest = _solver(matrix).to(device)

    def __call__(self, f: Tensor, level: int = 0) -> Tensor:
        if level == len(self.levels):
            return self.coarsest @ f if self.coarsest.ndim == 2 else self.coarsest[:, None] * f
        matrix, prolong, damping = self.levels[level]
        x = damping * f
        x = x + prolong @ self(prolong.T @ (f - matrix @ x), level + 1)
        return x + damping * (f - matrix @ x)


def _solver(matrix: Tensor) -> Tensor:
    """Returns the pseudo-inverse; of a large matrix, the steps of the smoother.

    Coarse cells that stay many at the coarsest level are basins of their own: their equations are 0 = 0.
    """
    if len(matrix) > 4 * _COARSEST:
        return _damping(matrix)
    values, vectors = torch.linalg.eigh(matrix.to_dense())
    return (vectors * torch.where(values > _NULL * peak(values), 1 / values, 0.0)) @ vectors.T


def _diagonal(matrix: Tensor) -> Tensor:
    row, column = matrix.indices()
    own = row == column
    return torch.zeros(len(matrix), dtype=matrix.dtype).index_add_(0, row[own], matrix.values()[own])


def _damping(matrix: Tensor) -> Tensor:
    """Returns the step of the smoother for each unknown, `(n,)`; 0 where there is no equation."""
    diagonal = _diagonal(matrix)
    inverse = torch.where(diagonal > _NULL * diagonal.max(), 1 / diagonal, 0.0)
    largest = torch.zeros_like(diagonal).index_add_(0, matrix.indices()[0], matrix.values().abs())  # by Gershgorin
    return 4 / 3 / (inverse * largest).max() * inverse


def _aggregates(matrix: Tensor, patch: Tensor, least: float) -> Tensor:
    """Returns the parts of each patch that couplings of at least this relative size connect, `(n,)` from 0."""
    (row, column), diagonal = matrix.indices(), _diagonal(matrix)
    strong = matrix.values().abs() > least * (diagonal[row] * diagonal[column]).sqrt()
    strong &= patch[row] == patch[column]
    return connected(row[strong], column[strong], len(patch))
