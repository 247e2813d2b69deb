"""What is drawn for training and for cases: generators, masks on many domains, windows of fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.masks import Mask
from vecfield_diffusion.physics.grid import Grid

#: `(n, valid (H, W), generator) -> observed (n, 1, H, W)`
MaskFunction = Callable[[int, Tensor, torch.Generator], Tensor]


def draw(mask: MaskFunction, n: int, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Masks `(n, 1, H, W)` on one domain `(H, W)`, or on one domain a sample, `(n, H, W)`."""
    if valid.ndim == 2:
        return mask(n, valid, generator)
    empty = torch.zeros_like(valid[:1, None])
    return torch.cat([mask(1, domain, generator) if domain.any() else empty for domain in valid])


def draw_sequence(mask: MaskFunction, n: int, frames: int, *, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Masks of sequences `(n, T, 1, H, W)`, on one domain `(H, W)` or on one a sample, `(n, H, W)`.

    A mask goes through time as it says itself; a plain function is drawn anew for every frame.
    """
    if valid.ndim == 3:
        empty = torch.zeros_like(valid[:1, None]).expand(1, frames, -1, -1, -1)
        drawn = (draw_sequence(mask, 1, frames, valid=v, generator=generator) if v.any() else empty for v in valid)
        return torch.cat(list(drawn))
    if isinstance(mask, Mask):
        return mask.sequence(n, frames, valid, generator)
    return mask(n * frames, valid, generator).unflatten(0, (n, frames))


def anew(mask: MaskFunction) -> MaskFunction:
    """The same mask, drawn anew for every frame unless it says by itself how it goes through time."""
    says = not isinstance(mask, Mask) or mask.time != "auto" or "anew" not in mask.ways
    return mask if says else mask.through("anew")


def goes_on(mask: MaskFunction) -> bool:
    """Whether the masks of the frames of a sequence have to do with each other, rather than being drawn anew."""
    return isinstance(mask, Mask) and mask.way != "anew"


def says_so(mask: MaskFunction) -> bool:
    """Whether a mask goes through time because it is told to, or knows no other way: snapshots see it so, too."""
    return isinstance(mask, Mask) and goes_on(mask) and (mask.time != "auto" or "anew" not in mask.ways)


def window_grid(grid: Grid, size: tuple[int, int]) -> Grid:
    """A grid of `size` with the mean spacings of `grid`, which goes on beyond its borders."""
    return Grid(torch.ones(size, dtype=torch.bool), grid.dx.mean(), grid.dy.mean())


def windows(grid: Grid, size: tuple[int, int], n: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Cuts a random window of `size` out of each of n samples `(n, C, H, W)`; each holds a valid cell.

    Of sequences `(n, T, C, H, W)` it is the same window in all frames of one.
    """
    cells = grid.valid.flatten().nonzero().squeeze(1)
    centre = cells[torch.randint(len(cells), (n,), generator=generator)]
    axes = []
    for cell, length, extent, periodic in zip(
        (centre // grid.shape[1], centre % grid.shape[1]), grid.shape, size, grid.periodic, strict=True
    ):
        first = cell - torch.randint(extent, (n,), generator=generator)
        first = first if periodic else first.clamp(0, length - extent)
        axes.append((first[:, None] + torch.arange(extent)) % length)
    rows, columns = axes[0][:, :, None], axes[1][:, None, :]
    sample = torch.arange(n)[:, None, None]
    return lambda field: field[sample, ..., rows, columns].movedim((1, 2), (-2, -1))


def seeded(seed: int, *numbers: int) -> torch.Generator:
    """A generator of its own for a seed and the numbers of what it is for, well mixed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]))
