"""The grid that a field lives on: spacing, boundaries, valid cells.

Arrays are `(..., H, W)`; row index grows along y (north), column index along x (east). A descending latitude has a
negative `dy`, so that a derivative with respect to the row index divided by `dy` is the derivative along north.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

EARTH_RADIUS = 6_371_000.0
BOUNDARIES = ("periodic", "wall", "open")

_CAP = 0.29  # width of a row over that of the next one: 1/4 at a pole, 1/3 and more in a row beside it


@dataclass(frozen=True)
class Grid:
    """Spacing, boundaries and valid cells of an `(H, W)` field.

    Arguments:
        valid: The cells that belong to the domain (False = land, solid, outside), boolean `(H, W)`.
        dx: The spacing along x of every row, in metres, `(H,)`; a number is expanded.
        dy: The spacing along y of every row, in metres, `(H,)`; negative where rows run southward.
        boundary_x: `periodic`, `wall` (no flow through) or `open`.
        boundary_y: Likewise along y.

    Raises:
        ValueError: A boundary of another name, a spacing that is zero or not finite, or a wrong shape.
    """

    valid: Tensor
    dx: Tensor | float = 1.0
    dy: Tensor | float = 1.0
    boundary_x: str = "open"
    boundary_y: str = "open"

    def __post_init__(self) -> None:
        if self.valid.ndim != 2 or self.valid.dtype != torch.bool:
            raise ValueError(f"Grid.valid must be boolean (H, W), got {self.valid.dtype} {tuple(self.valid.shape)}")
        for name in ("boundary_x", "boundary_y"):
            if getattr(self, name) not in BOUNDARIES:
                raise ValueError(f"Grid.{name} must be one of {', '.join(BOUNDARIES)}, got {getattr(self, name)!r}")
        for name in ("dx", "dy"):
            spacing = torch.as_tensor(getattr(self, name), dtype=torch.float64).expand(self.valid.shape[0])
            wrong = spacing[~(spacing.isfinite() & (spacing != 0))]
            if len(wrong):
                raise ValueError(f"Grid.{name} must be finite and not zero, got {wrong[0].item()}")
            object.__setattr__(self, name, spacing)

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)`."""
        return tuple(self.valid.shape)

    @property
    def periodic(self) -> tuple[bool, bool]:
        """Whether y and x close on themselves, in the order of the array axes."""
        return self.boundary_y == "periodic", self.boundary_x == "periodic"

    @cached_property
    def poles(self) -> tuple[bool, bool]:
        """Whether the first and the last row lie at a pole, as `from_degrees` makes them.

        Such a row is one point, written W times: with the width sin(dlat / 4) in place of the cosine, its cells are the
        sectors of a cap, and no other row of a closed circle is as narrow beside its neighbour.
        """
        if not self.periodic[1] or len(self.dx) < 3:
            return False, False
        dx = self.dx.abs()
        return bool(dx[0] < _CAP * dx[1]), bool(dx[-1] < _CAP * dx[-2])

    def to(self, device: torch.device | str) -> Grid:
        """Returns the same grid with its tensors on `device`."""
        if self.valid.device == torch.device(device):
            return self  # what is kept for a grid is found again
        return replace(self, valid=self.valid.to(device), dx=self.dx.to(device), dy=self.dy.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Returns plain tensors and strings, as a checkpoint stores them; `Grid(**state)` reads them back."""
        return {
            "valid": self.valid.cpu(),
            "dx": self.dx.cpu(),
            "dy": self.dy.cpu(),
            "boundary_x": self.boundary_x,
            "boundary_y": self.boundary_y,
        }

    @classmethod
    def from_degrees(cls, lon: Tensor, lat: Tensor, valid: Tensor, **boundaries: str) -> Grid:
        """Returns the grid of regular longitudes `(W,)` and latitudes `(H,)` in degrees; a closed circle is periodic.

        Spacing is R cos(lat) dlon along x and R dlat along y, with the sign of the row order.
        """
        lon, lat = lon.double(), lat.double()
        step = (lon[-1] - lon[0]) / (len(lon) - 1)
        closed = bool((step.abs() * len(lon) - 360.0).abs() < 0.5 * step.abs())
        boundaries.setdefault("boundary_x", "periodic" if closed else "open")
        radians = torch.deg2rad(lat)
        dy = spacing(radians)
        # A row at a pole is a point. Balances over the cap around it need its area, W cells of dlat / 4 by dlat.
        narrowest = torch.sin(dy.abs() / 4)
        dx = EARTH_RADIUS * torch.maximum(torch.cos(radians), narrowest) * torch.deg2rad(step)
        return cls(valid=valid, dx=dx, dy=EARTH_RADIUS * dy, **boundaries)


def spacing(coordinate: Tensor) -> Tensor:
    """Returns the spacing of a coordinate `(n,)` at each of its values: its derivative by the index, of second order.

    These are the differences that `operators` takes of a field, so that linear fields on uneven rows are differentiated
    exactly, one-sidedly at the edges too. Where the steps at an edge grow threefold, their formula has no meaning, and
    the first step counts.
    """
    steps = coordinate.diff()
    if len(steps) < 2:
        return torch.gradient(coordinate)[0]
    found = torch.gradient(coordinate, edge_order=2)[0]
    for edge, step in ((0, steps[0]), (-1, steps[-1])):
        if found[edge] * step <= 0:
            found[edge] = step
    return found
