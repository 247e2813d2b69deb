"""What a mask is, one snapshot at a time and through time, and how its numbers are drawn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from vecfield_diffusion.errors import UserError

#: How a mask goes through time; `auto` is the way that is natural to it.
Time = Literal["auto", "anew", "fixed", "moving"]
#: The same for a mask in which nothing moves.
Still = Literal["auto", "anew", "fixed"]


def interval(name: str, value: float | list[float] | tuple[float, ...], low: float, high: float) -> tuple[float, float]:
    """A number or a range as a pair within `[low, high]`."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} must be a number or [low, high] within [{low:g}, {high:g}], got {value}")
    return pair


def uniform(n: int, bounds: tuple[float, float], generator: torch.Generator, log: bool = False) -> Tensor:
    """n numbers of an interval, `(n,)`, evenly spread or (`log`) evenly spread in their logarithms."""
    low, high = bounds
    share = torch.rand(n, generator=generator, device=generator.device)
    return low * (high / low) ** share if log and low > 0 else low + (high - low) * share


def integers(n: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """n whole numbers of an interval, both ends included, `(n,)`."""
    low, high = (int(bound) for bound in bounds)
    return torch.randint(low, high + 1, (n,), generator=generator, device=generator.device)


def velocities(n: int, speed: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n velocities along columns and rows, `(n,)` each, with speeds of an interval and headings of any direction."""
    size = uniform(n, speed, generator)
    heading = 2.0 * math.pi * torch.rand(n, generator=generator, device=generator.device)
    return size * heading.cos(), size * heading.sin()


def draw_cells(valid: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Flat indices of valid cells, drawn evenly."""
    choices = valid.flatten().nonzero().squeeze(1)
    return choices[torch.randint(len(choices), shape, generator=generator, device=generator.device)]


def spawned(generator: torch.Generator) -> torch.Generator:
    """A generator of its own: how much is drawn from it does not change what the first one draws next."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return torch.Generator(generator.device).manual_seed(int(seed))


def folded(position: Tensor, length: Tensor | float) -> Tensor:
    """A position on a line of some length with mirrors at 0 and at its end, `[0, length]`."""
    period = 2.0 * torch.as_tensor(length, dtype=position.dtype, device=position.device).clamp(min=0.5)
    inside = position % period
    return torch.minimum(inside, period - inside)


class Mask:
    """A random mask; a subclass writes `draw`, and `move` if it moves through a sequence.

    Arguments:
        time: How it goes through the frames of a sequence: drawn `anew` in each, `fixed` where the first frame has it,
            or `moving`; `auto` is the way that is natural to it, `natural`.

    Raises:
        ValueError: A way that it does not know.
    """

    may_be_empty = False
    #: The ways through time that it knows, and the one that `auto` stands for.
    ways: tuple[str, ...] = ("anew", "fixed")
    natural = "anew"
    time: str = "auto"

    def __init__(self, time: Time = "auto") -> None:
        if time not in ("auto", *self.ways):
            raise ValueError(f"time must be one of auto, {', '.join(self.ways)}, got {time}")
        self.time = time

    def through(self, time: str) -> Self:
        """Returns the same mask, which goes through time in a way of `ways`."""
        if time not in self.ways:
            raise ValueError(f"time must be one of {', '.join(self.ways)}, got {time}")
        other = copy.copy(self)
        other.time = time
        return other

    @property
    def way(self) -> str:
        """How it goes through time: `anew`, `fixed` or `moving`."""
        return self.natural if self.time == "auto" else self.time

    def __call__(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Draw n masks.

        Arguments:
            n: The number of masks.
            valid: The domain, boolean `(H, W)`.
            generator: Where all randomness comes from.

        Returns:
            Observed cells, boolean `(n, 1, H, W)`, on the device of the generator.

        Raises:
            UserError: The domain has no valid cell.
        """
        valid = _some(valid.to(generator.device))
        observed = self.draw(n, valid, generator) & valid
        return self._with_a_cell(observed, valid, generator).unsqueeze(1)

    def sequence(self, n: int, frames: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Draw n sequences of masks.

        On one domain, a longer sequence begins with the shorter one of the same generator (but for `Ahead`, which
        counts from the end), so that windows of one run agree where they overlap: draw the run, and cut it. Drawn anew,
        each frame observes a valid cell at least, as a mask does; a mask that moves, too; one that is fixed observes
        what is valid of its cells in every frame.

        Arguments:
            n: The number of sequences.
            frames: T.
            valid: The domain, boolean `(H, W)`; or one in each frame, `(T, H, W)`: where none of its cells is valid,
                none is observed.
            generator: Where all randomness comes from.

        Returns:
            Observed cells, boolean `(n, T, 1, H, W)`, on the device of the generator.

        Raises:
            UserError: No frame has a valid cell.
        """
        valid = valid.to(generator.device).expand(frames, *valid.shape[-2:])
        domain = _some(valid.any(dim=0))
        if self.way == "anew":
            drawn = [self(n, cells, generator)[:, 0] if cells.any() else cells.expand(n, -1, -1) for cells in valid]
            return torch.stack(drawn, dim=1).unsqueeze(2)
        if self.way == "fixed":
            return (self(n, domain, generator) & valid).unsqueeze(2)
        spare = spawned(generator)
        observed = self.move(n, valid, generator) & valid
        drawn = [self._with_a_cell(observed[:, frame], cells, spare) for frame, cells in enumerate(valid)]
        return torch.stack(drawn, dim=1).unsqueeze(2)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Observed cells `(n, H, W)`, as yet regardless of `valid` and of emptiness."""
        raise NotImplementedError

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Observed cells `(n, T, H, W)` of masks that move, on a domain `(T, H, W)`, as yet regardless of the same.

        What a frame needs of the generator is drawn after all that the frames before it needed.
        """
        raise NotImplementedError

    def _with_a_cell(self, observed: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        """The same masks `(n, H, W)`, with a random valid cell where a mask that may not be empty is."""
        empty = (~observed.flatten(1).any(dim=1)).nonzero().squeeze(1)
        if self.may_be_empty or not len(empty) or not valid.any():
            return observed
        cells = observed.flatten(1)
        cells[empty, draw_cells(valid, (len(empty),), generator)] = True
        return cells.view(observed.shape)


class Drawn(Mask):
    """A function as a mask, drawn anew in each frame.

    Arguments:
        function: `(n, valid (H, W), generator) -> observed (n, 1, H, W)`.
    """

    may_be_empty = True

    def __init__(self, function: Callable[[int, Tensor, torch.Generator], Tensor]) -> None:
        super().__init__()
        self.function = function

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        return self.function(n, valid, generator)[:, 0]


def _some(valid: Tensor) -> Tensor:
    """The same domain. Raises UserError where it has no cell."""
    if not valid.any():
        raise UserError("no cell of the field is valid, so there is nothing to observe: dataset.valid=...")
    return valid
