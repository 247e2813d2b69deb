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
from vecfield_diffusion.data.masks import Mask

#: Patterns that are kept, at most, and the cells of all of them together.
PATTERNS, CELLS = 256, 2**26


class OtherTimes(Mask):
    """Observed is what another snapshot of the series measured, drawn among those that hide some of the cells offered.

    Where none of them hides a cell and shows another, all cells are observed: there is nothing to score.

    Arguments:
        patterns: The cells that snapshots measured, boolean `(P, H, W)`.
    """

    def __init__(self, patterns: Tensor) -> None:
        self.patterns = patterns

    @classmethod
    def of(cls, fields: Fields, indices: Sequence[int]) -> Self:
        """The patterns of evenly spaced snapshots among `indices`, at most 256 of them."""
        count = max(1, min(PATTERNS, CELLS // math.prod(fields.shape)))
        chosen = indices[:: -(-len(indices) // count)]
        measured = [fields.read([index]).isfinite().all(dim=1) for index in chosen]
        return cls(torch.cat(measured))

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`."""
        shown = (self.patterns & valid).flatten(1).any(dim=1)
        hides = (~self.patterns & valid).flatten(1).any(dim=1)
        places = (shown & hides).nonzero().squeeze(1)
        if not len(places):
            return valid.expand(n, -1, -1).clone()
        return self.patterns[places[torch.randint(len(places), (n,), generator=generator)]]
