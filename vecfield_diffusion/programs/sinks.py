"""Where filled fields go: a file, an `xr.Dataset` in memory, or members alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.inference.member_blocks import MemberBlocks
from vecfield_diffusion.inference.work_items import Work


class Sink(Protocol):
    """Takes filled fields.

    Arguments:
        work: Says what of them this process makes.
        members_of: Keeps blocks of large ensembles; None where nothing is kept of a process that is killed.
    """

    work: Work
    members_of: MemberBlocks | None

    def done(self) -> set[int]:
        """Returns the positions that are there."""

    def members(self, position: int) -> NDArray:
        """Returns the members `(M, 2, H, W)` of a position that is there."""

    def write(self, positions: Sequence[int], members: Any, observed: Any, truth: Any = None) -> None:
        """Takes a block; see `inference/template.FilledTimes`."""


class Gathered:
    """A sink in memory, for members alone."""

    def __init__(self) -> None:
        self.fields: dict[int, NDArray] = {}
        self.work, self.members_of = Work(), None

    def done(self) -> set[int]:
        """See `Sink`."""
        return set(self.fields)

    def members(self, position: int) -> NDArray:
        """See `Sink`."""
        return self.fields[position]

    def write(self, positions: Sequence[int], members: Any, observed: Any, truth: Any = None) -> None:
        """See `Sink`."""
        self.fields |= zip(positions, members.swapaxes(0, 1), strict=True)

    def whole(self) -> Tensor:
        """Returns the members of all positions, `(M, N, 2, H, W)`."""
        return torch.from_numpy(np.stack([self.fields[position] for position in sorted(self.fields)], axis=1))
