"""The path of vehicles that measure where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecfield_diffusion.data.masks.base import Mask, Time, draw_cells, integers, interval, uniform


class Track(Mask):
    """The path of a vehicle that measures where it is.

    The heading is a random walk, so the path is smooth over about 2 / turn^2 cells; at the edge of the domain the
    vehicle is reflected. Each leg starts on a valid cell. Cells of land are crossed without being observed, and legs
    are added until the fraction is reached.

    Moving, the legs are as many vehicles, each of which goes on from frame to frame: where it ends in one it begins in
    the next.

    Arguments:
        fraction: The share of the valid cells that is observed.
        legs: The number of legs, or a range of it; more follow where a path crosses itself or land.
        turn: The standard deviation of the change of heading from cell to cell, in radians.
        speed: Where it moves, in cells per frame, or a range; by default so far that each frame observes the fraction.
        time: How it goes through a sequence; `auto` is `moving`.

    Raises:
        ValueError: A fraction outside [0, 1], fewer legs than 1, a negative turn, or a speed below 0.
    """

    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(
        self,
        fraction: float | list[float] = 0.05,
        legs: int | list[int] = 1,
        turn: float = 0.15,
        speed: float | list[float] | None = None,
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        self.fraction = interval("fraction", fraction, 0.0, 1.0)
        self.legs = interval("legs", legs, 1, 1000)
        if not turn >= 0.0:
            raise ValueError(f"turn must be at least 0, got {turn}")
        self.turn = turn
        self.speed = None if speed is None else interval("speed", speed, 0.0, math.inf)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        cells = valid.sum().item()
        wanted = (uniform(n, self.fraction, generator) * cells).round().clamp(min=1.0)
        legs = integers(n, self.legs, generator)
        length = (1.1 * wanted / legs).ceil().clamp(min=2.0)
        # Steps enough for paths that cross themselves, and for the share of the steps that land takes away.
        steps = math.ceil(3.0 * wanted.max().item() * valid.numel() / cells) + 16
        path = self._walk(valid, steps, length.long(), generator)
        return _first_cells(path, valid, wanted)

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        domain = valid.any(dim=0)
        wanted = (uniform(n, self.fraction, generator) * domain.sum()).round().clamp(min=2.0)
        legs = integers(n, self.legs, generator)
        speed = None if self.speed is None else uniform(n, self.speed, generator).double()
        vehicles = Vehicles.starting(domain, legs, generator)
        farthest = 3.0 * (wanted / legs).max().item() * domain.numel() / domain.sum().item() + 15.0
        steps = math.ceil(farthest if speed is None else speed.max().item()) + 1
        frames = []
        for frame in range(len(valid)):
            path = vehicles.ahead(steps, self.turn, generator)
            visited = _visited(path, domain)
            last = _steps_for(wanted, visited, domain, steps) if speed is None else _whole_steps(speed, frame)
            frames.append((visited <= last.view(n, 1)).view(n, *domain.shape))
            vehicles = vehicles.at(path, last)
        return torch.stack(frames, dim=1)

    def _walk(self, valid: Tensor, steps: int, length: Tensor, generator: torch.Generator) -> Tensor:
        """Flat indices of the cells along the path of every sample, `(n, steps)`; a new leg every `length` steps."""
        n, device = len(length), generator.device
        height, width = valid.shape
        step = torch.arange(steps, device=device).expand(n, -1)
        leg = step // length.view(n, 1)
        first = leg * length.view(n, 1)
        count = math.ceil(steps / length.min().item())
        start = draw_cells(valid, (n, count), generator).gather(1, leg)
        turns = self.turn * torch.randn(n, steps, generator=generator, device=device)
        heading = 2.0 * math.pi * torch.rand(n, count, generator=generator, device=device).gather(1, leg)
        heading = heading + turns.cumsum(1)
        x = heading.cos().cumsum(1)
        y = heading.sin().cumsum(1)
        x = _reflect(start % width + x - x.gather(1, first), width)
        y = _reflect(start // width + y - y.gather(1, first), height)
        return y * width + x


@dataclass(frozen=True)
class Vehicles:
    """Vehicles under way at steps of one cell, beyond the edges of the domain as if it were mirrored there.

    Arguments:
        place: Column, row and heading of each, `(3, n, L)`.
        leader: The vehicle that each follows in all, `(n, L)`: itself, or another where a sample has fewer than L.
    """

    place: Tensor
    leader: Tensor

    @classmethod
    def starting(cls, domain: Tensor, legs: Tensor, generator: torch.Generator) -> Vehicles:
        """Vehicles on valid cells of a domain, as many as `legs (n,)` says."""
        leader = torch.arange(int(legs.max()), device=legs.device) % legs.view(-1, 1)
        cells = draw_cells(domain, tuple(leader.shape), generator)
        heading = 2.0 * math.pi * torch.rand(leader.shape, generator=generator, device=generator.device)
        place = torch.stack((cells % domain.shape[1], cells // domain.shape[1], heading)).double()
        return cls(place.gather(2, leader.expand(3, -1, -1)), leader)

    def ahead(self, steps: int, turn: float, generator: torch.Generator) -> Tensor:
        """The places of the next steps, the present one first, `(3, n, steps + 1, L)`."""
        n, count = self.leader.shape
        turns = turn * torch.randn(n, steps, count, generator=generator, device=generator.device).double()
        turns = turns.gather(2, self.leader.unsqueeze(1).expand_as(turns)).cumsum(dim=1)
        x, y, heading = self.place.unsqueeze(2)
        heading = heading + turns
        moved = torch.stack((x + heading.cos().cumsum(dim=1), y + heading.sin().cumsum(dim=1), heading))
        return torch.cat((self.place.unsqueeze(2), moved), dim=2)

    def at(self, path: Tensor, step: Tensor) -> Vehicles:
        """The same vehicles at a step `(n,)` of a path."""
        index = step.view(1, -1, 1, 1).expand(3, -1, 1, path.shape[-1])
        return replace(self, place=path.gather(2, index).squeeze(2))


def _visited(path: Tensor, domain: Tensor) -> Tensor:
    """The step of a path `(3, n, steps + 1, L)` at which each cell is visited first, `(n, H * W)`; else the next."""
    _, n, steps, count = path.shape
    cells = _reflect(path[1], domain.shape[0]) * domain.shape[1] + _reflect(path[0], domain.shape[1])
    step = torch.arange(steps, device=path.device).repeat_interleave(count).expand(n, -1)
    never = torch.full((n, domain.numel()), steps, device=path.device)
    return never.scatter_reduce(1, cells.flatten(1), step, "amin")


def _steps_for(wanted: Tensor, visited: Tensor, domain: Tensor, steps: int) -> Tensor:
    """The steps after which `wanted` different valid cells are visited, `(n,)`, one at least and `steps` at most."""
    at = visited[:, domain.flatten()]
    new = torch.zeros(len(at), steps + 2, device=at.device).scatter_add(1, at, torch.ones_like(at, dtype=torch.float))
    return (new[:, :-1].cumsum(dim=1) < wanted.view(-1, 1)).sum(dim=1).clamp(1, steps)


def _whole_steps(speed: Tensor, frame: int) -> Tensor:
    """The whole steps that end in a frame, `(n,)`: frame t ends at the distance `speed` (t + 1)."""
    return ((frame + 1) * speed).floor().long() - (frame * speed).floor().long()


def _reflect(position: Tensor, size: int) -> Tensor:
    """The cell of a position on a line of `size` cells with mirrors at both ends."""
    period = 2.0 * max(size - 1, 1)
    folded = position % period
    return torch.minimum(folded, period - folded).round().long().clamp(max=size - 1)


def _first_cells(path: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
    """The first `wanted` different valid cells of a path, `(n, H, W)`."""
    n, steps = path.shape
    step = torch.arange(steps, device=path.device).expand(n, -1)
    visited = torch.full((n, valid.numel()), steps, device=path.device).scatter_reduce(1, path, step, "amin")
    new = (visited.gather(1, path) == step) & valid.flatten()[path]
    last = (new.cumsum(1) <= wanted.view(n, 1)).sum(1, keepdim=True)
    return (visited < last).view(n, *valid.shape)
