"""Where drifters may be: regions that hold them with a probability, and the probability that they come to a place.

The density of the ends of drifters is estimated by Gaussian kernels of the shape of their covariance C, scaled to
n^(-1/6) of its size (Scott's rule in two dimensions; Silverman 1986, section 4.3). The region of probability p is where
the density is at least that at the end of rank (1 - p) (n + 1), each end under the density of the others: one more end
of the same law then lies inside with probability p, whatever the law, but for the n-th part that it would add itself.
Ends of one member come from one field: they are left out together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.lagrangian import distances
from vecfield_diffusion.physics.grid import Grid

#: Ends below which there is no region.
FEWEST = 10
#: Kernels that are computed together, for the sake of memory.
AT_ONCE = 2**21
#: The least width of a kernel, as a share of the longest: drifters on a line have a region with some width.
THIN = 1e-3


@dataclass(frozen=True, eq=False)
class Dispersal:
    """The density of the ends of drifters.

    Arguments:
        ends: `(n, 2)` in any unit of length.
        group: The member that each belongs to, `(n,)`; each is one by itself if None.

    Raises:
        ValueError: Fewer ends than ten, or all at one place.
    """

    ends: Tensor
    group: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.ends) < FEWEST:
            raise ValueError(f"regions need {FEWEST} drifters that are not lost, got {len(self.ends)}")
        if not (self.ends != self.ends[0]).any():
            raise ValueError("regions need drifters at different places")

    @cached_property
    def _white(self) -> Tensor:
        """From places to places where the kernels are unit normal, `(2, 2)`."""
        covariance = self.ends.double().T.cov()
        values, axes = torch.linalg.eigh(covariance)
        values = values.clamp(min=float(values[-1]) * THIN**2)
        return axes / values.sqrt() * len(self.ends) ** (1 / 6)

    def density(self, places: Tensor) -> Tensor:
        """Returns the probability density `(...)` at places `(..., 2)`, per area in the unit of the ends."""
        flat = places.double().reshape(-1, 2).split(max(1, AT_ONCE // len(self.ends)))
        return torch.cat([self._kernels(part).mean(dim=1) for part in flat]).view(places.shape[:-1])

    def _kernels(self, places: Tensor) -> Tensor:
        """The kernel of each end at each place, `(places, n)`."""
        away = torch.cdist(places @ self._white, self.ends.double() @ self._white).square()
        return torch.exp(-away / 2) * self._white.det().abs() / (2 * math.pi)

    @cached_property
    def _own(self) -> Tensor:
        """The density at each end of those of other members, `(n,)`, from the least."""
        group = torch.arange(len(self.ends)) if self.group is None else self.group
        others = (group[:, None] != group).double()
        kernels = self._kernels(self.ends.double()) * others
        return (kernels.sum(dim=1) / others.sum(dim=1).clamp(min=1)).sort().values

    def level(self, probability: float) -> float:
        """Returns the density at the edge of the region of a probability."""
        count = len(self._own)
        rank = min(max((1 - probability) * (count + 1) - 1, 0.0), count - 1.0)
        low = math.floor(rank)
        pair = self._own[[low, min(low + 1, count - 1)]]
        return float(pair[0] + (rank - low) * (pair[1] - pair[0]))

    def holds(self, places: Tensor, probability: float) -> Tensor:
        """Returns whether places `(..., 2)` lie in the region of a probability, boolean `(...)`."""
        return self.density(places) >= self.level(probability)

    def area(self, probability: float, points: int = 100) -> float:
        """Returns the area of the region of a probability, in squared units, on a grid of `points` a side."""
        x, y = self.window(points)
        cell = float((x[1] - x[0]) * (y[1] - y[0]))
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return cell * int(self.holds(places, probability).sum())

    def window(self, points: int) -> tuple[Tensor, Tensor]:
        """Returns the axes, of `points` each, of a box around all regions."""
        reach = 3 * torch.linalg.inv(self._white).norm(dim=0)
        low, high = self.ends.double().amin(dim=0) - reach, self.ends.double().amax(dim=0) + reach
        x, y = (torch.linspace(float(low[k]), float(high[k]), points, dtype=torch.float64) for k in range(2))
        return x, y


@dataclass(frozen=True, eq=False)
class Goal:
    """A place that drifters may come to.

    Arguments:
        edge: Its edge, `(n, 2)` in cells.
        words: What drifters do that come to it.
        holds: Whether places `(..., 2)` in cells lie in it, boolean `(...)`; false where a drifter is lost.
    """

    edge: Tensor
    words: str
    holds: Callable[[Tensor], Tensor]

    @classmethod
    def disc(cls, centre: Tensor, kilometres: float, grid: Grid) -> Goal:
        """Returns what lies within so many kilometres on the ground of a place `(2,)`."""
        angle, row = torch.linspace(0, 2 * math.pi, 90).double(), int(centre[1].round())
        sides = torch.stack((grid.dx[row], grid.dy[row]))
        edge = centre + 1000 * kilometres * torch.stack((angle.cos(), angle.sin()), dim=1) / sides
        return cls(
            edge,
            f"come within {kilometres:g} km of the place",
            lambda at: distances(centre.expand_as(at), at, grid) <= 1000 * kilometres,
        )

    @classmethod
    def box(cls, first: Tensor, last: Tensor, grid: Grid) -> Goal:
        """Returns the box between two corners `(2,)`; along an axis that is periodic it goes upwards from the first."""
        size, periodic = (torch.tensor(values[::-1]) for values in (grid.shape, grid.periodic))
        low = torch.where(periodic, first, torch.minimum(first, last))
        width = torch.where(periodic, (last - first) % size, (last - first).abs())
        corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])

        def holds(at: Tensor) -> Tensor:
            away = at - low
            return ((torch.where(periodic, away % size, away) - width / 2).abs() <= width / 2).all(dim=-1)

        return cls(low + corners * width, "come into the box", holds)

    def arrivals(self, tracks: Tensor) -> Tensor:
        """Returns the share of drifters with the ways `(..., T, n, 2)` in cells that came to it at any frame, `(...)`.

        One that is lost may have arrived before.
        """
        return self.holds(tracks).any(dim=-2).double().mean(dim=-1)
