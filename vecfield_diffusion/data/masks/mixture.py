"""Several masks, of which each sample draws one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.data.masks.base import Drawn, Mask, Time, interval, spawned
from vecfield_diffusion.errors import nearest


class Mixture(Mask):
    """Each sample draws one of several masks.

    Of a sequence, each draws a way through time, too, and some of them lack whole frames beside what the mask hides.

    Arguments:
        masks: The masks by name.
        weights: How often each is drawn, by the same names, relative to each other; 0 switches one off.
        ways: How often a mask is drawn `anew` in each frame of a sequence, `fixed` or `moving`, relative to each other;
            one that does not know the way goes its own. By default each goes its own way.
        frames: Masks of whole frames, by name.
        shares: The share of the sequences that each of these goes over, by the same names.
        time: One of the ways for all of them; `auto` is as `ways` has it.

    Raises:
        ValueError: Names that differ, weights that are negative or all 0, or a share outside [0, 1].
    """

    # Emptiness is up to the masks drawn, which have seen to it already.
    may_be_empty = True
    ways = ("anew", "fixed", "moving")

    def __init__(
        self,
        masks: dict[str, Any],
        weights: dict[str, float],
        ways: dict[str, float] | None = None,
        frames: dict[str, Any] | None = None,
        shares: dict[str, float] | None = None,
        time: Time = "auto",
    ) -> None:
        super().__init__(time)
        _check_names("masks", masks, "weights", weights)
        _check_weights("weights", weights)
        _check_names("frames", frames or {}, "shares", shares or {})
        if ways is not None:
            _check_names("ways", self.ways, "ways", {*self.ways, *ways})
            _check_weights("ways", ways)
        self.masks = masks
        self.weights = weights
        self.how_often = ways
        self.frames = frames or {}
        self.shares = {name: interval(f"shares.{name}", share, 0.0, 1.0)[0] for name, share in (shares or {}).items()}

    @property
    def way(self) -> str:
        """See `Mask.way`: the masks drawn see to how they go through time."""
        return "moving"

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        chosen = self._chosen(n, generator)
        observed = torch.zeros(n, 1, *valid.shape, dtype=torch.bool, device=generator.device)
        for number, mask in enumerate(self.masks.values()):
            samples = (chosen == number).nonzero().squeeze(1)
            if len(samples):
                observed[samples] = mask(len(samples), valid, generator)
        return observed.squeeze(1)

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        observed = torch.zeros(n, *valid.shape, dtype=torch.bool, device=generator.device)
        chosen = list(zip(self._chosen(n, generator).tolist(), self._ways(n, generator), strict=True))
        for number, way in sorted(set(chosen)):
            samples = [sample for sample, both in enumerate(chosen) if both == (number, way)]
            mask = as_mask(list(self.masks.values())[number])
            observed[samples] = _sequence(mask, len(samples), valid, spawned(generator), way)
        for name, mask in self.frames.items():
            over = torch.rand(n, generator=generator, device=generator.device) < self.shares[name]
            samples = over.nonzero().squeeze(1)
            if len(samples):
                observed[samples] &= _sequence(mask, len(samples), valid, spawned(generator))
        return observed

    def _chosen(self, n: int, generator: torch.Generator) -> Tensor:
        """The number of the mask of each sample, `(n,)`."""
        return _drawn([float(self.weights[name]) for name in self.masks], n, generator)

    def _ways(self, n: int, generator: torch.Generator) -> list[str]:
        """The way through time of each sample; empty for that of its mask."""
        if self.how_often is None or self.time != "auto":
            return ["" if self.time == "auto" else self.time] * n
        names, weights = zip(*self.how_often.items(), strict=True)
        return [names[number] for number in _drawn(weights, n, generator).tolist()]


def as_mask(mask: Any) -> Mask:
    """A mask; a function as one that is drawn anew in each frame."""
    return mask if isinstance(mask, Mask) else Drawn(mask)


def _sequence(mask: Mask, n: int, valid: Tensor, generator: torch.Generator, way: str = "") -> Tensor:
    """Sequences `(n, T, H, W)` of a mask, which goes its own way through time where it does not know the one given."""
    going = mask.through(way) if way in mask.ways else mask
    return going.sequence(n, len(valid), valid, generator)[:, :, 0]


def _drawn(weights: Sequence[float], n: int, generator: torch.Generator) -> Tensor:
    """n numbers, `(n,)`, drawn by their weights."""
    return torch.multinomial(torch.tensor(weights, device=generator.device), n, replacement=True, generator=generator)


def _check_names(one: str, first: Collection[str], other: str, second: Collection[str]) -> None:
    for name in set(first) ^ set(second):
        group, names = (other, first) if name in second else (one, second)
        raise ValueError(f"{group}: '{name}' is not among {', '.join(names)}.{nearest(name, names)}")


def _check_weights(name: str, weights: Mapping[str, float]) -> None:
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"{name} must be at least 0, and one of them above 0, got {weights}")
