"""The operators of a grid as sparse matrices between packed fields: values of valid cells times the root of their area.

They are `operators.divergence` and `operators.rotated_gradient`, entry by entry from the same weights of the faces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.multigrid import coordinates
from vecfield_diffusion.physics.operators import REACH, along, flowing


def areas(grid: Grid) -> Tensor:
    """Returns |dx_j dy_j| of every cell, flat."""
    return (grid.dx * grid.dy).abs().repeat_interleave(grid.shape[1])


def differences(grid: Grid, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sealed differences of face values along an array axis: row cells, column cells, values."""
    return entries(along(grid, axis, sealed=True), (grid.shape[1], 1) if axis else (1, grid.shape[1]))


def entries(weights: Tensor, strides: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `differences` from the `face_weights` of lines and the strides of lines and of cells along them."""
    weights, length = weights.double(), weights.shape[-1] - 1
    k, line, face = weights.nonzero(as_tuple=True)
    cell = (face + k - REACH) % length  # past the ends only where the axis is periodic
    value = weights[k, line, face]
    far, near = face > 0, face < length  # the face is the far one of the cell before it
    row = torch.cat(((line * strides[0] + (face - 1) * strides[1])[far], (line * strides[0] + face * strides[1])[near]))
    column = line * strides[0] + cell * strides[1]
    return row, torch.cat((column[far], column[near])), torch.cat((value[far], -value[near]))


def _assembled(grid: Grid, row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns the coordinate matrix on valid cells, of entries numbered by all cells (`shape` blocks of them)."""
    valid = grid.valid.flatten()
    count = int(valid.sum())
    number = valid.cumsum(0) - 1
    number = torch.cat((number, number + count))
    keep = valid.repeat(2)[row] & valid.repeat(2)[column]
    return coordinates(number[row[keep]], number[column[keep]], value[keep], (shape[0] * count, shape[1] * count))


def _poles(grid: Grid) -> tuple[Tensor, Tensor]:
    """Returns the cell that stands for each cell in the equations, the first valid one for all of a pole, and C^T."""
    (height, width), valid = grid.shape, grid.valid.flatten()
    cells = valid.nonzero()[:, 0]
    stands, number = torch.arange(height * width), torch.arange(len(cells))
    column, value = number.clone(), torch.ones(len(cells), dtype=torch.float64)
    for at, pole in zip((0, height - 1), grid.poles, strict=True):
        inside = number[cells // width == at]
        if pole and len(inside):
            stands[at * width : (at + 1) * width] = cells[inside[0]]
            column[inside], value[inside] = inside[0], 1 / len(inside)
    return stands, coordinates(number, column, value, (len(cells), len(cells)))


def points(grid: Grid, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the map from points to `cells`, where a pole is one point, and the first cell of each point."""
    line = cells // grid.shape[1]
    place = cells.clone()
    for at, pole in zip((0, grid.shape[0] - 1), grid.poles, strict=True):
        if pole:
            place[line == at] = at * grid.shape[1]
    point = torch.unique(place, return_inverse=True)[1]
    number = torch.arange(len(cells))
    shape = (len(cells), int(point.max()) + 1 if len(cells) else 0)
    first = torch.full((shape[1],), len(cells)).scatter_reduce(0, point, number, "amin")
    return coordinates(number, point, torch.ones(len(cells), dtype=torch.float64), shape), first


def divergence_matrix(grid: Grid) -> Tensor:
    """Returns L: F_x / dx_j and F_y dx / (dx_j dy_j), between packed fields; C^T L P where rows lie at poles."""
    width, (i, j, x), (k, m, y) = grid.shape[1], differences(grid, 1), differences(grid, 0)
    dx, dy, root = grid.dx.repeat_interleave(width), grid.dy.repeat_interleave(width), areas(grid).sqrt()
    values = torch.cat((x / dx[i], y * dx[m] / (dx[k] * dy[k]) * root[k] / root[m]))
    row, column = torch.cat((i, k)), torch.cat((j, m + len(dx)))
    values = values * flowing(grid).flatten().repeat(2)[column]
    if not any(grid.poles):
        return _assembled(grid, row, column, values, (1, 2))
    stands, caps = _poles(grid)
    return torch.sparse.mm(caps, _assembled(grid, stands[row], column, values, (1, 2))).coalesce()


def stream_matrix(grid: Grid) -> Tensor:
    """Returns R: -F_y / dy_j and F_x / dx_j, between packed fields; P R C where rows lie at poles."""
    width, (i, j, x), (k, m, y) = grid.shape[1], differences(grid, 1), differences(grid, 0)
    dx, dy, root = grid.dx.repeat_interleave(width), grid.dy.repeat_interleave(width), areas(grid).sqrt()
    values = torch.cat((-y / dy[k] * root[k] / root[m], x / dx[i]))
    row, column = torch.cat((k, i + len(dx))), torch.cat((m, j))
    values = values * flowing(grid).flatten().repeat(2)[row]
    if not any(grid.poles):
        return _assembled(grid, row, column, values, (2, 1))
    stands, caps = _poles(grid)
    return torch.sparse.mm(_assembled(grid, row, stands[column], values, (2, 1)), caps.t().coalesce()).coalesce()
