"""Masks of whole frames: those that are missing, and those after the last that is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecfield_diffusion.data.masks.base import Mask, Time, integers, interval, spawned, uniform
from vecfield_diffusion.errors import UserError


class Missing(Mask):
    """Whole frames are missing, as where an instrument drops out for some time; the others are observed.

    Whether a frame is missing is a Markov chain with two states, so the length of a spell is geometric. Where the
    share asks for more than spells of their length can give, they are longer. A snapshot is missing as often.

    Arguments:
        fraction: The share of the frames that is missing, or a range.
        spell: The mean number of frames that are missing together, or a range.
        mask: What is observed of the other frames; all if None.
        time: `moving` for spells; `anew` where every frame is missing, or not, by itself.

    Raises:
        ValueError: A fraction outside [0, 1], or a spell shorter than a frame.
    """

    may_be_empty = True
    ways = ("anew", "moving")
    natural = "moving"

    def __init__(
        self,
        fraction: float | list[float] | tuple[float, float] = 0.3,
        spell: float | list[float] | tuple[float, float] = 3.0,
        mask: Mask | None = None,
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        self.fraction = interval("fraction", fraction, 0.0, 1.0)
        self.spell = interval("spell", spell, 1.0, math.inf)
        self.mask = mask

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        missing = _share(n, generator) < uniform(n, self.fraction, generator)
        shown = valid.expand(n, -1, -1) if self.mask is None else self.mask(n, valid, generator)[:, 0]
        return shown & ~missing.view(n, 1, 1)

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        observed = _others(self.mask, n, valid, generator)
        fraction = uniform(n, self.fraction, generator)
        spell = torch.maximum(uniform(n, self.spell, generator), fraction / (1.0 - fraction))
        begin = torch.where(fraction < 1.0, fraction / ((1.0 - fraction) * spell), 1.0)
        missing = [_share(n, generator) < fraction]
        for _ in valid[1:]:
            share = _share(n, generator)
            missing.append(torch.where(missing[-1], share >= 1.0 / spell, share < begin))
        return observed & ~torch.stack(missing, dim=1).view(n, -1, 1, 1)


class Ahead(Mask):
    """The last frames are unknown, as in a forecast; those before are observed. A longer sequence is known longer.

    Arguments:
        horizon: The number of frames that are unknown, or a range, of which a short sequence takes what leaves a frame.
        mask: What is observed of the frames before; all if None.

    Raises:
        ValueError: A horizon below 1.
    """

    may_be_empty = True
    ways = ("moving",)
    natural = "moving"

    def __init__(self, horizon: int | list[int] = 1, mask: Mask | None = None) -> None:
        super().__init__()
        self.horizon = interval("horizon", horizon, 1, math.inf)
        self.mask = mask

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """Raises UserError: a snapshot by itself has no frame before it."""
        raise UserError("the frames ahead of a snapshot by itself are not to be filled: give a sequence, or mask=none")

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`.

        Raises:
            UserError: No frame is left.
        """
        count = len(valid)
        if self.horizon[0] >= count:
            raise UserError(f"mask.horizon={self.horizon[0]:g} leaves nothing known of {count} frames: expected less")
        observed = _others(self.mask, n, valid, generator)
        horizon = integers(n, (self.horizon[0], min(self.horizon[1], count - 1)), generator)
        known = torch.arange(count, device=valid.device) < count - horizon.view(n, 1)
        return observed & known.view(n, count, 1, 1)


def _share(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)


def _others(mask: Mask | None, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
    """What is observed of frames that are not missing, `(n, T, H, W)`."""
    if mask is None:
        return valid.expand(n, -1, -1, -1)
    return mask.sequence(n, len(valid), valid, spawned(generator))[:, :, 0]
