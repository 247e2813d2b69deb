"""The gaps of a series as masks: what was measured at one time hides some of what was measured at another.

For a radar or a satellite this is the natural test: values that are known are hidden where the instrument is known to
fail, in patterns that it really leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks.base import Mask, Time

#: Patterns that are kept, at most, and the cells of all of them together.
PATTERNS, CELLS = 256, 2**26


class OtherTimes(Mask):
    """Observed is what another snapshot of the series measured, drawn among those that hide some of the cells offered.

    Where none of them hides a cell and shows another, all cells are observed: there is nothing to score. A sequence
    moves through consecutive other times, the first of which is drawn so for the first frame that offers cells; after
    the last pattern the first one follows. No frame is so observed by itself, where the patterns are those of its
    series.

    Arguments:
        patterns: The cells that snapshots measured, boolean `(P, H, W)`.
        time: How it goes through a sequence; `auto` is `moving`.
    """

    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(self, patterns: Tensor, time: Time = "auto") -> None:
        super().__init__(time)
        self.patterns = patterns

    @classmethod
    def of(cls, fields: Fields, indices: Sequence[int], frames: int = 1, time: Time = "auto") -> Self:
        """The patterns of evenly spaced snapshots among `indices`, or of stretches of them, at most 256 or one stretch.

        Arguments:
            fields: The series.
            indices: The snapshots whose gaps are taken.
            frames: How many consecutive ones are taken together, for sequences as long.
            time: See the class.
        """
        count = max(1, min(PATTERNS, CELLS // math.prod(fields.shape)))
        step = max(frames, -(-len(indices) * frames // count))
        chosen = [index for first in range(0, len(indices), step) for index in indices[first : first + frames]]
        measured = [fields.read([index]).isfinite().all(dim=1) for index in chosen]
        return cls(torch.cat(measured), time)

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        places = self._places(valid)
        if not len(places):
            return valid.expand(n, -1, -1).clone()
        return self.patterns[places[torch.randint(len(places), (n,), generator=generator)]]

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`."""
        offering = valid.flatten(1).any(dim=1).nonzero().squeeze(1)[0]
        places = self._places(valid[offering])
        if not len(places):
            return valid.expand(n, -1, -1, -1)
        first = places[torch.randint(len(places), (n, 1), generator=generator)] - offering
        return self.patterns[(first + torch.arange(len(valid))) % len(self.patterns)]

    def _places(self, valid: Tensor) -> Tensor:
        """The patterns that hide some of the valid cells `(H, W)` and show others."""
        shown = (self.patterns & valid).flatten(1).any(dim=1)
        hides = (~self.patterns & valid).flatten(1).any(dim=1)
        return (shown & hides).nonzero().squeeze(1)
