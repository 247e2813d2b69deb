"""Super-observations: the mean of the values in a block of cells stands for them, with its error.

The n values of a block with errors e_i ~ N(0, R_i), R_i = L_i L_i^T (`ellipses.py`), become one in its place,

    y = P sum_i W_i y_i,    P = (sum_i W_i)^-1,    W_i = S_i^T (S_i R_i S_i^T)^-1 S_i,

S_i what is measured of a cell: both components or one. For independent errors it is the estimate of least variance, and
where the field hardly changes within a block its posterior is that of the n values. Errors are correlated over a length
L, rho_ij = exp(-r_ij / L), as those of points are (`data/points.py`): that leaves the weights and widens the error,

    Cov = P [ sum_ij rho_ij (W_i L_i) (W_j L_j)^T ] P

(Lorenc 1981, Mon. Weather Rev. 109, 701). It stands in the measured cell nearest to the centre of its values, so that
what is hidden stays hidden. Errors of different blocks are taken as independent: blocks are no smaller than L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfield_diffusion.ellipses import at_least, deviations, of_sum, root
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.physics.grid import Grid

#: The least error of a value beside the largest: weights are finite.
LEAST = 1e-6


@dataclass(frozen=True)
class Thinning:
    """How values become super-observations.

    Arguments:
        grid: The grid of the values.
        side: The sides of a block in metres; None where `most` says it.
        most: Blocks with a value that a snapshot has at most: the smallest blocks that keep to it.
        length: L in metres; None for independent errors.
    """

    grid: Grid
    side: float | None = None
    most: int | None = None
    length: float | None = None

    def __call__(self, cases: Cases) -> Cases:
        """Returns the same cases observed by super-observations: `y`, their errors, and where they stand."""
        y, sigma = self.means(cases.y, cases.sigma_obs)
        measured, channels = y.isfinite(), max(2, cases.sigma_obs.shape[-3])
        observed = measured.all(dim=-3, keepdim=True)
        return replace(
            cases, y=y, observed=observed, single=measured & ~observed, sigma_obs=sigma.narrow(-3, 0, channels)
        )

    def means(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns super-observations `(..., 2, H, W)`, NaN where there is none, and their errors `(..., 3, H, W)`.

        Arguments:
            y: The values `(..., 2, H, W)`, NaN where nothing was measured.
            sigma: Their errors, which broadcast to `(..., C, H, W)`, as `ellipses.py` has them.
        """
        lead = y.shape[:-3]
        sigma = sigma.expand(*lead, *sigma.shape[-3:-2], *self.grid.shape).flatten(0, -4)
        values = y.flatten(0, -4)
        sizes = [self.size(known) for known in values.isfinite()]
        means, errors = torch.full_like(values, torch.nan), values.new_zeros(len(values), 3, *self.grid.shape)
        for size in set(sizes):
            chosen = torch.tensor([own == size for own in sizes])
            found = of_blocks(values[chosen], sigma[chosen], self.grid, size, self.length)
            means[chosen], errors[chosen] = (part.to(values) for part in found)
        return means.unflatten(0, lead), errors.unflatten(0, lead)

    def size(self, known: Tensor) -> tuple[int, int]:
        """Returns the rows and columns of a block of a snapshot with the values `known` `(2, H, W)`."""
        steps = [float(step.abs().mean()) for step in (self.grid.dy, self.grid.dx)]
        cells = known.any(dim=0)[None].float()
        side = min(steps) if self.side is None else self.side
        while True:
            size = tuple(min(max(1, round(side / step)), n) for step, n in zip(steps, self.grid.shape, strict=True))
            if self.most is None or size == self.grid.shape:
                return size
            if F.max_pool2d(cells, size, ceil_mode=True).sum() <= self.most:
                return size
            side += min(steps)


def of_blocks(
    y: Tensor, sigma: Tensor, grid: Grid, size: tuple[int, int], length: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the means of blocks, `(N, 2, H, W)`, and their errors, `(N, 3, H, W)`, 0 where there is none.

    Arguments:
        y: The values `(N, 2, H, W)`, NaN where nothing was measured.
        sigma: Their errors `(N, C, H, W)`.
        grid: The grid.
        size: The rows and columns of a block.
        length: L in metres; None for independent errors.
    """
    shape = tuple(-(-n // side) * side for n, side in zip(grid.shape, size, strict=True))
    seen = _gathered(y.isfinite(), shape, size)  # (N, h, w, P, 2): h x w blocks of P cells
    y = torch.where(seen, _gathered(y.double(), shape, size), 0.0)
    both = seen[..., :, None] & seen[..., None, :]
    lower, identity = _lower(_gathered(_positive(sigma), shape, size)), torch.eye(2, dtype=torch.float64)
    weight = torch.linalg.inv(torch.where(both, lower @ lower.mT, identity)).masked_fill(~both, 0.0)
    there = seen.any(dim=-2)
    covariance = torch.linalg.inv(weight.sum(dim=-3) + torch.diag_embed((~there).double()))
    mean = (covariance @ (weight @ y[..., None]).sum(dim=-3))[..., 0]
    if length is not None:
        covariance = covariance @ of_sum(weight @ lower, places(grid, size, length)) @ covariance
    variance = covariance.diagonal(dim1=-2, dim2=-1).masked_fill(~there, 0.0)
    entries = torch.cat([variance, covariance[..., 0, 1:]], dim=-1)
    at = _nearest(seen, weight.diagonal(dim1=-2, dim2=-1).sum(-1), size)
    values, errors = (mean.new_full((len(mean), n, *grid.shape), empty) for n, empty in ((2, torch.nan), (3, 0.0)))
    some = there.any(dim=-1)
    values[at[0], :, at[1], at[2]] = mean.masked_fill(~there, torch.nan)[some]
    errors[at[0], :, at[1], at[2]] = root(*entries[some][..., None, None].split(1, dim=-3))[..., 0, 0]
    return values, errors


def _positive(sigma: Tensor) -> Tensor:
    """Errors of three channels, none of which is 0, in float64."""
    sigma = sigma.double().nan_to_num(0.0)
    sigma = at_least(sigma, LEAST * max(sigma.max().item(), LEAST))
    own = sigma.expand(-1, 2, -1, -1) if sigma.shape[1] == 1 else sigma
    return own if own.shape[1] == 3 else torch.cat([own, torch.zeros_like(own[:, :1])], dim=1)


def _lower(root: Tensor) -> Tensor:
    """L `(..., 2, 2)` of L_uu, L_vv and L_vu `(..., 3)`."""
    u, v, across = root.unbind(-1)
    return torch.stack([torch.stack([u, torch.zeros_like(u)], -1), torch.stack([across, v], -1)], -2)


def places(grid: Grid, size: tuple[int, int], length: float) -> Tensor:
    """Returns where and when the cells of a block are, `(h, 1, P, 3)` for every row of blocks, in units of a length."""
    beyond = -len(grid.dy) % size[0]
    steps = [F.pad(step.abs()[None], (0, beyond), mode="replicate")[0] for step in (grid.dy, grid.dx)]
    north, width = steps[0].cumsum(0).view(-1, size[0]), steps[1].view(-1, size[0]).mean(dim=1)
    row, column = (part.flatten() for part in torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"))
    north, east = north[:, None, row], (column * width[:, None])[:, None]
    return torch.stack([north / length, east / length, torch.zeros_like(east)], dim=-1)


def _gathered(fields: Tensor, shape: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Fields `(N, C, H, W)` by blocks, `(N, h, w, P, C)`; 0 beyond the edges."""
    height, width = fields.shape[-2:]
    padded = F.pad(fields, (0, shape[1] - width, 0, shape[0] - height))
    apart = padded.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0]))  # (N, C, h, sy, w, sx)
    return apart.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def _nearest(seen: Tensor, weight: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The snapshot, row and column of the measured cell nearest to the centre of each block that has one."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=weight.dtype) for n in size), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], dim=-1)  # (P, 2)
    measured = seen.any(dim=-1)
    number, row, column = measured.any(dim=-1).nonzero().unbind(1)
    own, measured = weight[number, row, column], measured[number, row, column]
    centre = (own @ place) / own.sum(dim=-1, keepdim=True)
    away = (place - centre[:, None]).square().sum(dim=-1)
    nearest = away.masked_fill(~measured, torch.inf).argmin(dim=-1)
    return number, row * size[0] + nearest // size[1], column * size[1] + nearest % size[1]


class Tally:
    """How many measured cells there are before and after the thinning, and the mean square of their errors."""

    def __init__(self) -> None:
        self.cells, self.values, self.squares = [0, 0], [0, 0], [0.0, 0.0]

    def add(self, *cases: Cases) -> None:
        """Takes in cases before and after."""
        for place, own in enumerate(cases):
            known = (own.observed | own.single).expand_as(own.y)
            self.cells[place] += int(known.any(dim=-3).sum())
            self.values[place] += int(known.sum())
            self.squares[place] += float(deviations(own.sigma_obs).expand_as(own.y)[known].double().square().sum())

    def words(self, thinning: Thinning, units: str) -> str:
        """Returns the line; `units` are those of the errors."""
        before, after = ((square / max(1, n)) ** 0.5 for square, n in zip(self.squares, self.values, strict=True))
        kind = "independent" if thinning.length is None else f"correlated over {thinning.length / 1e3:g} km"
        return (
            f"super-observations: {self.cells[0]} measured cells became {self.cells[1]}; errors of {before:.3g} "
            f"{units}, taken as {kind}, became {after:.3g}"
        )
