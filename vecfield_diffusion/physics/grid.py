"""The grid that a field lives on: spacing, boundaries, valid cells.

Arrays are `(..., H, W)`; row index grows along y (north), column index along x (east). A descending latitude has a
negative `dy`, so that a derivative with respect to the row index divided by `dy` is the derivative along north.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

EARTH_RADIUS = 6_371_000.0
BOUNDARIES = ("periodic", "wall", "open")


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
            if not bool((spacing.isfinite() & (spacing != 0)).all()):
                raise ValueError(f"Grid.{name} must be finite and not zero, got {spacing.unique().tolist()}")
            object.__setattr__(self, name, spacing)

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)`."""
        return tuple(self.valid.shape)

    @property
    def periodic(self) -> tuple[bool, bool]:
        """Whether y and x close on themselves, in the order of the array axes."""
        return self.boundary_y == "periodic", self.boundary_x == "periodic"

    def to(self, device: torch.device | str) -> Grid:
        """The same grid with its tensors on `device`."""
        if self.valid.device == torch.device(device):
            return self  # what is kept for a grid is found again
        return replace(self, valid=self.valid.to(device), dx=self.dx.to(device), dy=self.dy.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings, as a checkpoint stores them; `Grid(**state)` reads them back."""
        return {
            "valid": self.valid.cpu(),
            "dx": self.dx.cpu(),
            "dy": self.dy.cpu(),
            "boundary_x": self.boundary_x,
            "boundary_y": self.boundary_y,
        }

    @classmethod
    def from_degrees(cls, lon: Tensor, lat: Tensor, valid: Tensor, **boundaries: str) -> Grid:
        """The grid of regular longitudes `(W,)` and latitudes `(H,)` in degrees; a closed circle is periodic.

        Spacing is R cos(lat) dlon along x and R dlat along y, with the sign of the row order.
        """
        lon, lat = lon.double(), lat.double()
        step = (lon[-1] - lon[0]) / (len(lon) - 1)
        closed = bool((step.abs() * len(lon) - 360.0).abs() < 0.5 * step.abs())
        boundaries.setdefault("boundary_x", "periodic" if closed else "open")
        radians = torch.deg2rad(lat)
        # A row at a pole is a point: it is given the width of the circle a quarter of a row away.
        narrowest = torch.sin(torch.gradient(radians)[0].abs() / 4)
        dx = EARTH_RADIUS * torch.maximum(torch.cos(radians), narrowest) * torch.deg2rad(step)
        dy = EARTH_RADIUS * torch.gradient(radians)[0]
        return cls(valid=valid, dx=dx, dy=dy, **boundaries)
