"""Scores of an ensemble x_1 .. x_M against the truth y, over the cells of one region.

All cells of all cases weigh the same; the two components are pooled. What each score is stands in `scores`; here are
the sums that they are made of. The fair CRPS is unbiased for the CRPS of the distribution that the members are drawn
from (Ferro 2014),

    CRPS = 1/M sum_i |x_i - y| - 1/(2 M (M-1)) sum_ij |x_i - x_j|,   sum_ij |x_i - x_j| = 2 sum_i (2 i - M - 1) x_(i)

with x_(1) <= .. <= x_(M), i from 1. The energy score (Gneiting & Raftery 2007, eq. 22) is the same formula with the
norm of the whole field of K cells in place of |.|, here over sqrt(2 K): it sees the structure in space, and of M = 1 it
is the RMSE of the field. Where members equal y its rank is any of several: each gets its share, the expectation of
ranks drawn at random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.physical import divergence_squares
from vecfield_diffusion.evaluation.scores import derive
from vecfield_diffusion.physics.grid import Grid


def scores(
    members: Tensor, truth: Tensor, where: Tensor, grid: Grid | None = None, climatology: Tensor | None = None
) -> dict[str, float]:
    """Returns all scores of `members` over the region `where`.

    Arguments:
        members: The ensemble in physical units, `(M, N, 2, H, W)`; M = 1 serves for a deterministic method, whose
            CRPS is its mean absolute error and whose spread, spread-skill, coverage and reliability are NaN. Members
            that do not differ, as on cells observed exactly, have none of the last three either.
        truth: The fields `(N, 2, H, W)`, NaN where unknown; such cells are left out.
        where: The region, boolean `(N, 1, H, W)`.
        grid: If given, `divergence_rms` of the members in s^-1 is added (per unit of length of the grid).
        climatology: If given, `(2, H, W)` or `(N, 2, H, W)` finite over the region, the `skill` against it is added.

    Returns:
        Numbers by name, NaN where the region holds no cell.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    found = sums(members, truth, where, grid, climatology)
    return {name: float(value) for name, value in derive({k: v.sum(dim=0) for k, v in found.items()}).items()}


def sums(
    members: Tensor, truth: Tensor, where: Tensor, grid: Grid | None = None, climatology: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums what the scores are made of over the cells of every case; arguments as for `scores`.

    Returns:
        Sums by name, `(N,)` each, of the ranks `(N, M + 1)`; float64.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    _check(members, truth, where)
    known = where & truth.isfinite().all(dim=1, keepdim=True)
    case, n = known[:, 0].nonzero()[:, 0], len(truth)
    x, y = _select(members, known), _select(truth, known)
    found = _pointwise(x, y)
    if climatology is not None:
        found["climatology"] = (_select(climatology.expand_as(truth), known) - y).square().sum(dim=0)
    totals = {name: value.new_zeros(n).index_add_(0, case, value) for name, value in found.items()}
    totals["ranks"] = _ranks(x, y, case.expand_as(y), n)
    totals["energy"] = totals["cells"] * energy_score(members, truth, known).nan_to_num()
    if grid is not None:
        totals["divergence"], totals["divergence_cells"] = divergence_squares(members, grid, where)
    return totals


def _check(members: Tensor, truth: Tensor, where: Tensor) -> None:
    n, _, height, width = truth.shape
    if members.shape[1:] != truth.shape or where.shape != (n, 1, height, width):
        shapes = f"{tuple(members.shape)}, {tuple(truth.shape)}, {tuple(where.shape)}"
        raise ValueError(f"expected members (M, N, 2, H, W), truth (N, 2, H, W), where (N, 1, H, W), got {shapes}")


def _select(fields: Tensor, where: Tensor) -> Tensor:
    """The values `(..., 2, K)` of fields `(..., N, 2, H, W)` in the K cells of `where` `(N, 1, H, W)`, as float64."""
    return fields.movedim(-3, -4)[..., where[:, 0]].double()


def _pointwise(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What every cell adds, `(K,)` each, of members `(M, 2, K)` and truth `(2, K)`."""
    mean = x.mean(dim=0)
    along, across = (y * mean).sum(dim=0), y[0] * mean[1] - y[1] * mean[0]
    turns = (y != 0).any(dim=0) & (mean != 0).any(dim=0)
    variance = x.var(dim=0) if len(x) > 1 and y.numel() else torch.full_like(y, math.nan)
    return {
        "cells": torch.ones_like(along),
        "error": (mean - y).square().sum(dim=0),
        "truth": y.square().sum(dim=0),
        "mean": mean.square().sum(dim=0),
        "along": along,
        "across": across,
        "angle": torch.rad2deg(torch.atan2(across, along)).abs().where(turns, 0.0),
        "angles": turns.double(),
        "crps": crps(x, y).sum(dim=0),
        "variance": variance.sum(dim=0),
    }


def crps(x: Tensor, y: Tensor) -> Tensor:
    """Returns the fair CRPS of members `(M, ...)` against `(...)`, in O(M log M); the absolute error where M = 1."""
    m = len(x)
    accuracy = (x - y).abs().mean(dim=0)
    if m == 1:
        return accuracy
    rank = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    weights = (2 * rank - m - 1) / (m * (m - 1))
    return accuracy - torch.tensordot(weights, x.sort(dim=0).values, dims=1)


def energy_score(members: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """Returns the fair energy score of every case `(N,)`, over sqrt(2 K) of its K cells; NaN without a cell.

    Arguments:
        members: `(M, N, 2, H, W)`.
        truth: `(N, 2, H, W)`, finite over the region.
        where: The region, boolean `(N, 1, H, W)`.
    """
    m = len(members)
    found = []
    for case, cells in enumerate(where[:, 0]):  # one at a time: a case is M + 1 points of 2 K dimensions
        x, y = members[:, case, :, cells].double().flatten(1), truth[case][:, cells].double().flatten()
        accuracy = (x - y).norm(dim=1).mean()
        pairs = torch.pdist(x).sum() / (m * (m - 1)) if m > 1 else 0.0
        found.append((accuracy - pairs) / math.sqrt(y.numel()) if y.numel() else accuracy.new_tensor(math.nan))
    return torch.stack(found) if found else truth.new_zeros(0, dtype=torch.float64)


def _ranks(x: Tensor, y: Tensor, case: Tensor, n: int) -> Tensor:
    """The counts of the ranks of y `(...)` among members `(M, ...)`, by the number of the case, `(n, M + 1)`."""
    lowest, highest = (x < y).sum(dim=0), (x <= y).sum(dim=0)
    share = 1 / (highest - lowest + 1).double()
    width = len(x) + 2
    opens, closes = (
        torch.bincount((case * width + at).flatten(), share.flatten(), n * width) for at in (lowest, highest + 1)
    )
    return (opens - closes).double().view(n, width).cumsum(dim=1)[:, :-1]  # bincount of nothing counts in integers
