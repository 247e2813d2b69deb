"""Rectangular parts of a domain: the fullest of a size, the largest without land, and their grids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.physics.grid import Grid

#: Rows and columns.
Part = tuple[slice, slice]


def fullest_part(valid: NDArray[np.bool_], side: int) -> Part:
    """Returns the rows and columns of the part of at most `side` cells each way that has the most valid cells."""
    (height, width), (h, w) = valid.shape, (min(size, side) for size in valid.shape)
    sums = np.zeros((height + 1, width + 1), dtype=np.int64)
    sums[1:, 1:] = valid.cumsum(axis=0).cumsum(axis=1)
    counts = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    row, column = (int(place) for place in np.unravel_index(counts.argmax(), counts.shape))
    return slice(row, row + h), slice(column, column + w)


def shifted(inner: slice, outer: slice) -> slice:
    """Returns a slice of a slice, as one of the whole."""
    return slice(inner.start + outer.start, inner.stop + outer.start)


def part_of(grid: Grid, rows: slice, columns: slice) -> Grid:
    """Returns a rectangle of a grid; the borders that cut through it are open."""
    valid = grid.valid[rows, columns]
    whole = [size == full for size, full in zip(valid.shape, grid.shape, strict=True)]
    return Grid(
        valid=valid,
        dx=grid.dx[rows],
        dy=grid.dy[rows],
        boundary_x=grid.boundary_x if whole[1] else "open",
        boundary_y=grid.boundary_y if whole[0] else "open",
    )


def largest_rectangle(cells: NDArray[np.bool_]) -> Part:
    """Returns rows and columns of the largest rectangle of True cells, row by row over the columns that end there."""
    best, size = (slice(0, 0), slice(0, 0)), 0
    heights = np.zeros(cells.shape[1] + 1, dtype=np.int64)
    for row, line in enumerate(cells):
        heights[:-1] = np.where(line, heights[:-1] + 1, 0)
        rising: list[tuple[int, int]] = []  # first column and height of the rectangles that are still open
        for column, height in enumerate(heights.tolist()):
            first = column
            while rising and rising[-1][1] >= height:
                first, tall = rising.pop()
                if tall * (column - first) > size:
                    size, best = tall * (column - first), (slice(row - tall + 1, row + 1), slice(first, column))
            rising.append((first, height))
    return best
