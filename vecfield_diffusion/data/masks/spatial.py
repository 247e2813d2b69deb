"""Masks of simple shapes: scattered cells, a rectangle, a frame along the edge, nothing and everything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.data.masks.base import (
    Mask,
    Still,
    Time,
    draw_cells,
    folded,
    integers,
    interval,
    uniform,
    velocities,
)
from vecfield_diffusion.errors import UserError


class Pixels(Mask):
    """Scattered cells, each observed independently.

    Arguments:
        fraction: The share observed; a range is drawn evenly in its logarithm.
        time: How it goes through a sequence: `anew`, or `fixed` as moorings are.

    Raises:
        ValueError: A fraction outside [0, 1].
    """

    def __init__(self, fraction: float | list[float] = 0.1, time: Still = "auto") -> None:
        super().__init__(time)
        self.fraction = interval("fraction", fraction, 0.0, 1.0)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        fraction = uniform(n, self.fraction, generator, log=True).view(n, 1, 1)
        return torch.rand(n, *valid.shape, generator=generator, device=generator.device) < fraction


class Block(Mask):
    """A rectangle is hidden and all else observed. It holds a random valid cell and lies inside the domain.

    Moving, it goes on along a straight line and is reflected at the edges of the domain.

    Arguments:
        fraction: The share of all cells that is hidden.
        aspect: The largest ratio of its sides, in cells.
        speed: Where it moves, in cells per frame, or a range; in any direction.
        time: How it goes through a sequence; `auto` is `moving`.

    Raises:
        ValueError: A fraction outside [0, 1], an aspect below 1, or a negative speed.
    """

    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(
        self,
        fraction: float | list[float] = 0.25,
        aspect: float = 2.0,
        speed: float | list[float] | tuple[float, float] = (0.0, 1.0),
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        self.fraction = interval("fraction", fraction, 0.0, 1.0)
        if not aspect >= 1.0:
            raise ValueError(f"aspect must be at least 1, got {aspect}")
        self.aspect = aspect
        self.speed = interval("speed", speed, 0.0, math.inf)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        first, sides = self._rectangles(n, valid, generator)
        rows, columns = (_within(*line) for line in zip(first, sides, valid.shape, strict=True))
        return ~(rows.unsqueeze(-1) & columns.unsqueeze(-2))

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        first, sides = self._rectangles(n, valid.any(dim=0), generator)
        frame = torch.arange(len(valid), device=valid.device)
        inside = []
        for start, side, size, velocity in zip(
            first, sides, valid.shape[1:], reversed(velocities(n, self.speed, generator)), strict=True
        ):
            way = start.view(n, 1) + velocity.view(n, 1) * frame
            inside.append(_within(folded(way, (size - side).view(n, 1)).round(), side.view(n, 1), size))
        return ~(inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2))

    def _rectangles(
        self, n: int, valid: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The first row and column of n rectangles and their height and width, `(n,)` each."""
        height, width = valid.shape
        area = uniform(n, self.fraction, generator) * height * width
        aspect = uniform(n, (1.0 / self.aspect, self.aspect), generator, log=True)
        wide = (area * aspect).sqrt().clamp(max=width)
        high = (area / wide.clamp(min=1.0)).clamp(max=height)
        wide = (area / high.clamp(min=1.0)).clamp(max=width).round()
        high = high.round()
        centre = draw_cells(valid, (n,), generator)
        rows = torch.minimum((centre // width - high // 2).clamp(min=0), height - high)
        columns = torch.minimum((centre % width - wide // 2).clamp(min=0), width - wide)
        return (rows, columns), (high, wide)


def _within(first: Tensor, side: Tensor, size: int) -> Tensor:
    """The cells of a line of `size` that lie in intervals `(...)`, `(..., size)`."""
    index = torch.arange(size, device=first.device)
    return (index >= first.unsqueeze(-1)) & (index < (first + side).unsqueeze(-1))


class Border(Mask):
    """A frame along the edge of the domain is observed.

    Arguments:
        width: The width of the frame in cells, or a range of it, which ends where a domain has no cell left to fill.
        time: How it goes through a sequence: `fixed`, or `anew` with a width of its own in each frame.

    Raises:
        ValueError: A width below 1.
    """

    natural = "fixed"

    def __init__(self, width: int | list[int] = 4, time: Still = "auto") -> None:
        super().__init__(time)
        self.width = interval("width", width, 1, math.inf)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`.

        Raises:
            UserError: The frame covers the whole domain.
        """
        height, width = valid.shape
        most = (min(height, width) - 1) // 2
        thinnest, widest = self.width
        if thinnest > most:
            raise UserError(
                f"a border {thinnest:g} cells wide leaves nothing to fill of {height} x {width} cells; expected "
                f"at most {most}: mask.width=..."
            )
        frame = integers(n, (thinnest, min(widest, most)), generator).view(n, 1, 1)
        y = torch.arange(height, device=valid.device).view(1, -1, 1)
        x = torch.arange(width, device=valid.device).view(1, 1, -1)
        distance = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x))
        return distance < frame


class Empty(Mask):
    """Nothing is observed: unconditional generation."""

    may_be_empty = True

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        return torch.zeros(n, *valid.shape, dtype=torch.bool, device=generator.device)


class Full(Mask):
    """All valid cells are observed.

    Arguments:
        time: How the gaps of other times go through a sequence, for which it stands where known fields are hidden.
    """

    ways = ("anew", "fixed", "moving")

    def __init__(self, time: Time = "auto") -> None:
        super().__init__(time)

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        return valid.expand(n, -1, -1, -1)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        return valid.expand(n, -1, -1).clone()
