"""Scores of an ensemble x_1 .. x_M against the truth y, over the cells of one region.

All cells of all cases weigh the same; the two components are pooled. With the ensemble mean m and the unbiased
variance s^2 of a cell,

    rmse_component = sqrt(mean (m - y)^2)         rmse_vector = sqrt(mean |m - y|^2) = sqrt(2) rmse_component
    spread         = sqrt(mean s^2)               spread_skill = sqrt((M+1)/M) spread / rmse_component

A calibrated ensemble has spread_skill 1: there y is one more draw, so E (m - y)^2 = (1 + 1/M) Var.

The fair CRPS is unbiased for the CRPS of the distribution that the members are drawn from (Ferro 2014),

    CRPS = 1/M sum_i |x_i - y| - 1/(2 M (M-1)) sum_ij |x_i - x_j|,   sum_ij |x_i - x_j| = 2 sum_i (2 i - M - 1) x_(i)

with x_(1) <= .. <= x_(M), i from 1.

Coverage is read off the rank r of y among the members. If y is one more draw, the interval from x_(k) to x_(M+1-k)
holds it with probability (M + 1 - 2k) / (M + 1), whatever the distribution; the levels between those are interpolated
linearly (k = 0 is the whole line), which keeps the expectation exact for every M, where sample quantiles do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence

SCORES = (
    "rmse_component",
    "rmse_vector",
    "relative_l2",
    "crps",
    "spread",
    "spread_skill",
    "coverage_50",
    "coverage_90",
)


def scores(members: Tensor, truth: Tensor, where: Tensor, grid: Grid | None = None) -> dict[str, float]:
    """All scores of `members` over the region `where`.

    Arguments:
        members: The ensemble in physical units, `(M, N, 2, H, W)`; M = 1 serves for a deterministic method, whose
            CRPS is its mean absolute error and whose spread, spread-skill and coverage are NaN. Members that do not
            differ, as on cells observed exactly, have no spread-skill and coverage either.
        truth: The fields `(N, 2, H, W)`, NaN where unknown; such cells are left out.
        where: The region, boolean `(N, 1, H, W)`.
        grid: If given, `divergence_rms` of the members in s^-1 is added (per unit of length of the grid).

    Returns:
        Numbers by name, NaN where the region holds no cell.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    _check(members, truth, where)
    known = where & truth.isfinite().all(dim=1, keepdim=True)
    x, y = _select(members, known), _select(truth, known)
    names = (*SCORES, "divergence_rms") if grid is not None else SCORES
    if y.numel() == 0:
        return dict.fromkeys(names, math.nan)
    result = _pointwise(x, y)
    spreads = result["spread"] > 0
    result |= {f"coverage_{level}": coverage(x, y, level / 100) if spreads else math.nan for level in (50, 90)}
    if grid is not None:
        result["divergence_rms"] = divergence_rms(members, grid, where)
    return {name: float(result[name]) for name in names}


def _check(members: Tensor, truth: Tensor, where: Tensor) -> None:
    n, _, height, width = truth.shape
    if members.shape[1:] != truth.shape or where.shape != (n, 1, height, width):
        shapes = f"{tuple(members.shape)}, {tuple(truth.shape)}, {tuple(where.shape)}"
        raise ValueError(f"expected members (M, N, 2, H, W), truth (N, 2, H, W), where (N, 1, H, W), got {shapes}")


def _select(fields: Tensor, where: Tensor) -> Tensor:
    """The values `(..., 2, K)` of fields `(..., N, 2, H, W)` in the K cells of `where` `(N, 1, H, W)`, as float64."""
    return fields.movedim(-3, -4)[..., where[:, 0]].double()


def _pointwise(x: Tensor, y: Tensor) -> dict[str, Tensor | float]:
    """The scores that are means over cells, of members `(M, ...)` and truth `(...)`."""
    m = len(x)
    error = x.mean(dim=0) - y
    rmse = error.square().mean().sqrt()
    spread = x.var(dim=0).mean().sqrt() if m > 1 else math.nan
    return {
        "rmse_component": rmse,
        "rmse_vector": math.sqrt(2) * rmse,
        "relative_l2": error.norm() / y.norm(),
        "crps": crps(x, y).mean(),
        "spread": spread,
        "spread_skill": math.sqrt((m + 1) / m) * spread / rmse if spread > 0 else math.nan,
    }


def crps(x: Tensor, y: Tensor) -> Tensor:
    """The fair CRPS of members `(M, ...)` against `(...)`, in O(M log M); the absolute error where M = 1."""
    m = len(x)
    accuracy = (x - y).abs().mean(dim=0)
    if m == 1:
        return accuracy
    rank = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    weights = (2 * rank - m - 1) / (m * (m - 1))
    return accuracy - torch.tensordot(weights, x.sort(dim=0).values, dims=1)


def rank_histogram(x: Tensor, y: Tensor) -> Tensor:
    """How often y is larger than exactly r of the M members, r = 0 .. M, as shares `(M + 1,)`."""
    ranks = (x < y).sum(dim=0).flatten()
    return torch.bincount(ranks, minlength=len(x) + 1).double() / len(ranks)


def coverage(x: Tensor, y: Tensor, level: float) -> float:
    """The share of y inside the central interval of probability `level` of its members; `level` if calibrated.

    NaN where M = 1. Below M = (1 + level) / (1 - level) members (19 for 90 %) the interval reaches past the outermost
    member, and the estimate is partly the level itself.
    """
    m = len(x)
    if m == 1:
        return math.nan
    shares = rank_histogram(x, y)
    outside = torch.cumsum(shares + shares.flip(0), dim=0)[: (m + 1) // 2]
    inside = [1.0, *(1 - outside).tolist()]
    nominal = [1 - 2 * k / (m + 1) for k in range(len(inside))]
    if m % 2 == 0:
        inside, nominal = [*inside, 0.0], [*nominal, 0.0]
    k = next(k for k in range(1, len(nominal)) if nominal[k] <= level + 1e-12)
    part = (level - nominal[k]) / (nominal[k - 1] - nominal[k])
    return inside[k] + part * (inside[k - 1] - inside[k])


def divergence_rms(fields: Tensor, grid: Grid, where: Tensor) -> float:
    """The RMS divergence of `fields` `(..., N, 2, H, W)` over `where` `(N, 1, H, W)`, in s^-1.

    Cells that are NaN in any field take no part, as if they were land.
    """
    flat = fields.reshape(-1, *fields.shape[-3:])
    measured = flat.isfinite().all(dim=1).all(dim=0)
    valid = grid.valid.to(flat.device) & measured
    values = divergence(flat.double(), replace(grid.to(flat.device), valid=valid))
    where = (where & valid).expand(*fields.shape[:-3], 1, *fields.shape[-2:]).reshape(-1, 1, *fields.shape[-2:])
    return float(values[where].square().mean().sqrt())


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned plain text: numbers with four significant digits to the right, words to the left, `-` if absent.

    Arguments:
        rows: Values by column.
        columns: Which columns, in this order; those of the first row if not given.
    """
    columns = list(rows[0]) if columns is None and rows else list(columns or ())
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(_pad(*part) for part in zip(line, widths, words, strict=True)).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pad(text: str, width: int, word: bool) -> str:
    return text.ljust(width) if word else text.rjust(width)
