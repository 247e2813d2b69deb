"""Poisson equations of a grid: inverses of A A^T, for the divergence A = L and for A = R^T, R psi the field of psi.

Fields are packed into flat vectors of the valid cells, each value times the root of the area of its cell. Then the
energy of the grid, sum a (u^2 + v^2), is a plain sum of squares, adjoints are transposes, and land is not there at all.

Every value on a face is the mean of its two cells, so that L L^T joins each cell to the next but one: four interleaved
sheets, the parities of row and column, that meet only at coasts and walls, where a cell is joined to its neighbour.

Without land, L L^T = A_x / dx_j^2 + A_y, and multiplied by dx_j from both sides it is a sum of one matrix of x and one
of y: it is inverted directly in the product of their eigenvectors (Lynch, Rice and Thomas 1964, Numer. Math. 6, 185).
The eigenvectors are Fourier modes on a periodic axis, cosines between walls (sines for R^T), each by a fast transform
where the spacing is uniform; otherwise they are computed once, and the transform is a product with a matrix.

With land, conjugate gradients are preconditioned by a sparse factorisation on a CPU (`factored`), and by a cycle of
multigrid (`multigrid`) on a GPU and for large domains; `benchmarks/physics.py` measures both.

Equations with a null space (a constant in each closed basin, alternating signs on even periodic axes) are solved in the
sense of the pseudo-inverse, with nothing of it in source and solution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vecfield_diffusion.physics.factored import MOST, Factored, Held
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.matrices import areas, divergence_matrix, entries, points, stream_matrix
from vecfield_diffusion.physics.multigrid import Matrix, Multigrid, connected, peak
from vecfield_diffusion.physics.operators import along, flowing

Map = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-12  # of a residual, relative to the first one
_ROUNDING = 1e-14  # of a residual, relative to the size of the terms that it is the sum of
_ITERATIONS = 1000  # of conjugate gradients with multigrid, which take 30 to 150
_NULL = 1e-12  # relative size of an eigenvalue that stands for zero


class Equations:
    """The operators of a grid as matrices on flat fields, with their inverses.

    Arguments:
        grid: The grid.
        device: Where the fields are.

    Attributes:
        divergence: L, from velocities `(2n, B)` to scalars `(n, B)` of the n valid cells.
        stream: R, from stream functions `(n, B)` to velocities.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.grid, self.device = grid.to("cpu"), device
        self.valid = grid.valid.to(device)
        self._cells = self.grid.valid.flatten().nonzero()[:, 0]
        self._root = areas(self.grid).sqrt()[self._cells]
        self._scale = self._root.to(device)[:, None]
        self._coo = divergence_matrix(self.grid), stream_matrix(self.grid)
        self.divergence, self.stream = (Matrix.of(coo.to(device)) for coo in self._coo)
        self._held = Held(self._coo[0])

    def pack(self, fields: Tensor) -> Tensor:
        """Returns fields `(B, 2, H, W)` as `(2 n, B)` in float64; what invalid cells hold has no effect."""
        inside = fields[..., self.valid].double() * self._scale[:, 0]
        return inside.flatten(1).T

    def unpack(self, flat: Tensor) -> Tensor:
        """Returns fields `(B, 2, H, W)`, 0 in invalid cells; the inverse of `pack`."""
        inside = flat.T.reshape(flat.shape[1], 2, len(self._scale)) / self._scale[:, 0]
        fields = inside.new_zeros(flat.shape[1], 2, *self.valid.shape)
        return fields.masked_scatter(self.valid, inside)

    def holding(self, free: Tensor) -> Map | None:
        """Returns (L_f L_f^T)^-1 up to a small shift for each column, L_f being L on the cells that are free to change.

        None where that is not what is fast: on a GPU, on large domains, with many different cells held.

        Arguments:
            free: Those cells, boolean `(n, B)`.
        """
        return self._held.solver(free) if self.device.type == "cpu" and len(free) <= MOST else None

    @cached_property
    def poisson(self) -> Inverse:
        """(L L^T)^+."""
        return self._inverse(self.divergence, self._coo[0], transposed=False)

    @cached_property
    def vorticity(self) -> Inverse:
        """(R^T R)^+."""
        return self._inverse(self.stream.T, self._coo[1].t(), transposed=True)

    def _inverse(self, factor: Matrix, coo: Tensor, transposed: bool) -> Inverse:
        matrix = torch.sparse.mm(coo, coo.t()).coalesce()
        spots, first = points(self.grid, self._cells)
        spread = Matrix.of(spots.to(self.device)) if any(self.grid.poles) else None
        null = _NullSpace(matrix, self._cells, self.grid.shape[1], self._root, self.device, spread)
        if bool(self.grid.valid.all()):
            return Inverse(factor, _Separable(self.grid, transposed, self.device), null, direct=True)
        places = torch.stack((self._cells // self.grid.shape[1], self._cells % self.grid.shape[1]))
        if spread is None:
            return Inverse(factor, self._approximate(matrix, self._root, places), null, direct=False)
        reduced = torch.sparse.mm(spots.t(), torch.sparse.mm(matrix, spots)).coalesce()
        cycle = self._approximate(reduced, self._root[first], places[:, first])
        return Inverse(factor, lambda r: spread @ cycle(spread.T @ r), null, direct=False)

    def _approximate(self, matrix: Tensor, candidate: Tensor, places: Tensor) -> Map:
        """Returns an approximation of the inverse of a matrix; arguments: see `Multigrid`."""
        if self.device.type == "cpu" and len(matrix) <= MOST:
            return Factored(matrix)
        return Multigrid(matrix, candidate, places, self.device)


@lru_cache(maxsize=4)
def equations(grid: Grid, device: torch.device) -> Equations:
    """Returns the equations of a grid, kept for the grids used last."""
    return Equations(grid, device)


@dataclass(frozen=True)
class Inverse:
    """b -> (A A^T)^+ b.

    Arguments:
        factor: A.
        approximate: An approximation of the inverse, symmetric and definite; the inverse itself if `direct`.
        null: Removes the null space.
        direct: Whether there is nothing to iterate.
    """

    factor: Matrix
    approximate: Map
    null: _NullSpace
    direct: bool

    def __call__(self, b: Tensor, size: Tensor | None = None) -> Tensor:
        """Returns the solution for `b` `(n, B)`, whose terms had the norm `size` `(B,)`; by default that of `b`."""
        b = self.null(b)
        if self.direct:
            return self.null(self.approximate(b))
        return self.null(conjugate_gradients(self._matrix, self.approximate, b, size))

    def _matrix(self, p: Tensor) -> Tensor:
        return self.factor @ (self.factor.T @ p)


def conjugate_gradients(
    matrix: Map, precondition: Map, b: Tensor, size: Tensor | None = None, limit: int = _ITERATIONS
) -> Tensor:
    """Returns the solution of a symmetric consistent system for the columns of `b` `(n, B)`, each at its own pace.

    A column is finished at a residual of 1e-12 of its norm plus 1e-14 of `size`, what rounding errors are relative to.

    Warns:
        RuntimeWarning: A column had not converged after `limit` iterations.
    """
    first = b.norm(dim=0)
    goal = _TOLERANCE * first + _ROUNDING * (first if size is None else size)
    x, r = torch.zeros_like(b), b
    z = precondition(r)
    p, rz = z, (r * z).sum(0)
    for _ in range(limit):
        going = r.norm(dim=0) > goal
        if not going.any():
            return x
        q = matrix(p)
        # A finished column takes steps of length zero.
        step = _ratio(rz, (p * q).sum(0), going)
        x, r = x + step * p, r - step * q
        z = precondition(r)
        rz, previous = (r * z).sum(0), rz
        p = z + _ratio(rz, previous, going) * p
    worst = float((r.norm(dim=0) / first)[going].max())
    warnings.warn(f"no solution within {limit} iterations, residual {worst:.1e}", RuntimeWarning, stacklevel=2)
    return x


def least_squares(matrix: Map, transpose: Map, b: Tensor, limit: int, precondition: Map = lambda s: s) -> Tensor:
    """Returns a^+ b for the columns of `b`: of the x with the least |A x - b|, the shortest.

    Conjugate gradients on A^T A x = A^T b from zero (Hestenes and Stiefel 1952), which stay in the range of A^T; until
    |A^T (b - A x)| is 1e-12 of its first value, or `limit` iterations have passed.

    Arguments:
        matrix: A.
        transpose: A^T.
        b: `(m, B)`.
        limit: Of iterations.
        precondition: An approximation of (A^T A)^+ that stays in the range of A^T, too.
    """
    r, s = b, transpose(b)
    z = precondition(s)
    x, p, sz = torch.zeros_like(s), z, (s * z).sum(0)
    goal = _TOLERANCE**2 * s.square().sum(0)
    for _ in range(limit):
        going = s.square().sum(0) > goal
        if not going.any():
            break
        q = matrix(p)
        step = _ratio(sz, q.square().sum(0), going)
        x, r = x + step * p, r - step * q
        s = transpose(r)
        z = precondition(s)
        sz, previous = (s * z).sum(0), sz
        p = z + _ratio(sz, previous, going) * p
    return x


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    good = where & (b > 0)
    return torch.where(good, a / torch.where(good, b, 1.0), 0.0)


class _NullSpace:
    """Removes what a matrix takes to zero: in a connected part, the constant or the constant with alternating signs.

    Differences among the cells of a pole go first: `spread` makes the values of cells from those of points.
    """

    def __init__(
        self,
        matrix: Tensor,
        cells: Tensor,
        width: int,
        root: Tensor,
        device: torch.device,
        spread: Matrix | None = None,
    ) -> None:
        self.spread = spread
        self.part = connected(*matrix.indices(), len(cells)).to(device)
        sign = 1.0 - 2.0 * ((cells // width + cells % width) % 2)
        vectors = torch.stack((root, sign * root), 1)
        image = self.sums(torch.sparse.mm(matrix, vectors).square())
        length = self.sums(vectors.square())
        null = image <= (_NULL * peak(matrix.values())) ** 2 * length
        null[:, 1] &= ~null[:, 0]
        vectors = torch.where(null, length, torch.inf).rsqrt()[self.part.cpu()] * vectors
        self.vector = vectors.sum(1, keepdim=True).to(device)

    def sums(self, values: Tensor) -> Tensor:
        """Returns the sum over every connected part, in the order of their numbers."""
        part = self.part.to(values.device)
        return torch.zeros_like(values).index_add_(0, part, values)

    def __call__(self, b: Tensor) -> Tensor:
        if self.spread is not None:
            cells = self.spread.T @ torch.ones_like(b[:, :1])
            b = self.spread @ ((self.spread.T @ b) / cells)
        return b - self.vector * self.sums(self.vector * b)[self.part]


@dataclass(frozen=True)
class _Axis:
    """The eigenvectors of M M^T on an axis, as a transform of the last dimension."""

    forward: Map
    backward: Map
    eigenvalues: Tensor


class _Separable:
    """The inverse on a grid without land, in the product of the eigenvectors of its axes.

    The row of a pole takes part in the zonal mean alone (C), whose equations along y are its own; see `operators`.

    Arguments:
        grid: The grid, all valid.
        transposed: Whether the equations are those of R^T in place of L.
        device: Where the fields are.
    """

    def __init__(self, grid: Grid, transposed: bool, device: torch.device) -> None:
        self.shape = grid.shape
        self.dx = grid.dx[:, None].to(device)
        ratio = (grid.dx / grid.dy)[:, None]
        root = (grid.dx * grid.dy).abs().sqrt()[:, None]
        f_x, f_y = (_dense(grid, axis) for axis in (1, 0))
        # The part along y, times dx_j, on packed fields: F_y dx / (dx_j dy_j) of L, the transpose of F_y / dy_j of R.
        if transposed:
            f_x, m_y = f_x.T, (f_y * (root / grid.dy[:, None]) / root.T * grid.dx).T
        else:
            m_y = f_y * root / grid.dy[:, None] * (grid.dx / root[:, 0])
        uniform = bool((ratio == ratio[0]).all() and (grid.dx == grid.dx[0]).all())
        self.x = _axis(f_x, grid.boundary_x, 1.0, transposed, device)
        kept = flowing(grid)[:, 0].double()
        m_y = m_y * kept  # P: a column is a velocity, of L as of R^T
        waves, boundary = self.x.eigenvalues, grid.boundary_y if uniform else "open"
        self.parts = [(slice(None), _axis(m_y, boundary, float(ratio[0]) ** 2, transposed, device))]
        if any(grid.poles):
            inner = _axis(kept[:, None] * m_y, "open", 1.0, transposed, device)
            self.parts = [(slice(0, 2), self.parts[0][1]), (slice(2, None), inner)]
        totals = [axis.eigenvalues[:, None] + waves[part] for part, axis in self.parts]
        least = _NULL * max(float(total.max()) for total in totals if total.numel())
        self.inverses = [torch.where(total > least, 1 / total, 0.0) for total in totals]
        self.kept = kept[:, None].to(device)

    def __call__(self, b: Tensor) -> Tensor:
        modes = self.x.forward(self.dx * b.T.unflatten(1, self.shape)).mT
        solved = [
            axis.backward(axis.forward(modes[..., part, :]) * inverse.mT)
            for (part, axis), inverse in zip(self.parts, self.inverses, strict=True)
        ]
        modes = torch.cat(solved, dim=-2).mT
        if len(solved) > 1:
            modes = torch.cat((modes[..., :2], self.kept * modes[..., 2:]), dim=-1)
        return (self.dx * self.x.backward(modes)).flatten(1).T


def _dense(grid: Grid, axis: int) -> Tensor:
    """Returns F along an axis of a grid without land, `(length, length)`."""
    row, column, value = entries(along(grid, axis, sealed=True)[:, :1], (grid.shape[axis], 1))
    return torch.zeros(grid.shape[axis], grid.shape[axis]).double().index_put_((row, column), value, accumulate=True)


def _axis(matrix: Tensor, boundary: str, scale: float, transposed: bool, device: torch.device) -> _Axis:
    """Returns the axis of M M^T: fast transforms for the named boundaries, the eigenvectors of `matrix` for `open`."""
    count = len(matrix)
    if boundary == "periodic":
        # Real and imaginary parts of every mode have its eigenvalue; the parts that are always zero do no harm.
        angles = torch.arange(count // 2 + 1, dtype=torch.float64) * (2 * math.pi / count)
        waves = angles.sin().square().repeat_interleave(2)
        return _Axis(
            lambda x: torch.view_as_real(torch.fft.rfft(x)).flatten(-2),
            lambda x: torch.fft.irfft(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), n=count),
            (scale * waves).to(device),
        )
    if boundary == "wall":
        waves = (torch.arange(count, dtype=torch.float64) * (math.pi / count)).sin().square()
        # sin(pi (N - m)(n + 1/2) / N) = (-1)^n cos(pi m (n + 1/2) / N), with the eigenvalue of m.
        signs = 1.0 - 2.0 * (torch.arange(count, device=device) % 2) if transposed else torch.ones((), device=device)
        return _Axis(lambda x: dct(signs * x), lambda x: signs * inverse_dct(x), (scale * waves).to(device))
    values, vectors = (part.to(device) for part in torch.linalg.eigh(matrix @ matrix.T))
    return _Axis(lambda x: x @ vectors, lambda x: x @ vectors.T, values)


def dct(x: Tensor) -> Tensor:
    """Returns sum_n x_n cos(pi k (n + 1/2) / N) over the last axis, by one transform of length N (Makhoul 1980)."""
    count = x.shape[-1]
    shuffled = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), dim=-1)
    return (torch.fft.fft(shuffled) * _turns(count, -1, x)).real


def inverse_dct(modes: Tensor) -> Tensor:
    """Returns the inverse of `dct`."""
    count = modes.shape[-1]
    mirrored = torch.cat((torch.zeros_like(modes[..., :1]), modes[..., 1:].flip(-1)), dim=-1)
    shuffled = torch.fft.ifft(torch.complex(modes, -mirrored) * _turns(count, 1, modes)).real
    x = torch.empty_like(modes)
    x[..., ::2], x[..., 1::2] = shuffled[..., : (count + 1) // 2], shuffled[..., (count + 1) // 2 :].flip(-1)
    return x


def _turns(count: int, sign: int, like: Tensor) -> Tensor:
    angles = torch.arange(count, device=like.device).to(like) * (sign * math.pi / (2 * count))
    return torch.polar(torch.ones_like(angles), angles)
