"""The mask of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.data.given_masks import load_masks
from vecfield_diffusion.data.masks.base import Mask, Time
from vecfield_diffusion.errors import UserError


class MaskFile(Mask):
    """The mask of a file, the same for every sample and every frame; one with a time axis has a mask for each frame.

    See `load_masks`.

    Arguments:
        path: The file.
        variable: The array in it; by default the first of two dimensions, else of three.
        time: Of a file with a time axis: `moving`, as it has the frames, from its first on; `anew`, any of them in
            each; `fixed`, its first in all. `auto` is `moving`.
    """

    may_be_empty = True
    ways = ("anew", "fixed", "moving")
    natural = "moving"

    def __init__(self, path: str, variable: str | None = None, time: Time = "auto") -> None:
        super().__init__(time)
        self.path = path
        self.variable = variable
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def draw(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.draw`.

        Raises:
            UserError: What `load_masks` raises, a mask that observes no valid cell, or masks of several times and no
                word on which of them.
        """
        masks = self._read(valid, generator.device)
        if len(masks) == 1 or self.way == "fixed":
            return masks[:1].expand(n, -1, -1)
        if self.way == "anew":
            return masks[torch.randint(len(masks), (n,), generator=generator, device=generator.device)]
        raise UserError(
            f"the mask '{self.path}' has {len(masks)} times, and a snapshot by itself takes one. Give the mask of one "
            "time, mask.time=fixed for the first, or mask.time=anew for any"
        )

    def move(self, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
        """See `Mask.move`.

        Raises:
            UserError: What `draw` raises, or fewer times than frames.
        """
        masks = self._read(valid.any(dim=0), generator.device)
        if 1 < len(masks) < len(valid):
            raise UserError(
                f"the mask '{self.path}' has {len(masks)} times, fewer than the {len(valid)} frames of the sequence. "
                "Give a mask for each frame, one for all, or mask.time=anew"
            )
        return masks[: len(valid)].expand(n, len(valid), -1, -1)

    def _read(self, valid: Tensor, device: torch.device) -> Tensor:
        """The masks of the file, `(T, H, W)`, one where it has no times."""
        shape = tuple(valid.shape)
        if shape not in self._masks:
            self._masks[shape] = load_masks(self.path, shape, self.variable)
        masks = self._masks[shape].to(device)
        if not (masks & valid).any():
            raise UserError(
                f"the mask '{self.path}' observes no valid cell. Expected 1 = observed; to generate without any "
                "observation use mask=none"
            )
        return masks
