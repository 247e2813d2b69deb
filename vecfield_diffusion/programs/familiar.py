"""The masks that a network was trained on, and whether another is like them.

Masks are compared by five features; far is beyond the 99th percentile of the nearest-neighbour distance among training
masks. Where the network works in windows, so does the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.draws import draw, draw_sequence, says_so, windows
from vecfield_diffusion.data.given_masks import shares_of
from vecfield_diffusion.programs.trained import Trained

#: Masks of training that others are compared with.
DRAWS = 256
#: Windows of a field that are compared with them.
WINDOWS = 32


class TrainingMasks:
    """A sample of the masks of training on the domain of a network, drawn when it is first asked for.

    Arguments:
        trained: The network, fitted to the fields.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained, self.generator = trained, torch.Generator().manual_seed(0)

    @cached_property
    def cut(self) -> Callable[[Tensor], Tensor] | None:
        """Cuts windows out of fields, where the network works in windows."""
        grid = self.trained.grid.to("cpu")
        size = tuple(map(min, self.trained.window, grid.shape))
        return None if size == grid.shape else windows(grid, size, DRAWS, self.generator)

    @cached_property
    def domain(self) -> Tensor:
        """The cells of the domain, `(H, W)`, or of each window, `(DRAWS, h, w)`."""
        valid = self.trained.grid.valid.cpu()
        return valid if self.cut is None else self.cut(valid.expand(DRAWS, 1, *valid.shape))[:, 0]

    @cached_property
    def observed(self) -> Tensor:
        """The masks `(DRAWS, 1, h, w)`. Raises UserError where the configuration of the training names none."""
        domain = self.domain  # its random numbers come first
        mask, frames = build(self.trained.config["mask"], "mask", trust=self.trained.trust), self.trained.frames
        if frames == 1 or not says_so(mask):
            return draw(mask, DRAWS, domain, self.generator)
        # One frame of each sequence; the first, which is known if any is, for one that shows nothing.
        drawn = draw_sequence(mask, DRAWS, frames, valid=domain, generator=self.generator)
        one = drawn[torch.arange(DRAWS), torch.arange(DRAWS) % frames]
        return torch.where(one.flatten(1).any(dim=1).view(-1, 1, 1, 1), one, drawn[:, 0])

    @property
    def shares(self) -> tuple[float, float]:
        """The smallest and the largest observed share of the cells of the domain."""
        shares = shares_of(self.observed, self.domain)
        return shares.min().item(), shares.max().item()

    @cached_property
    def nearness(self) -> tuple[Tensor, Tensor, Tensor]:
        """The features of the masks over their scale, that scale, and the distance from which another is far."""
        drawn = features(self.observed, self.domain)
        scale = drawn.std(dim=0).clamp(min=1e-3)
        among = torch.cdist(drawn / scale, drawn / scale).fill_diagonal_(torch.inf).min(dim=1).values
        return drawn / scale, scale, among.quantile(0.99)

    def unlike(self, observed: Tensor) -> bool:
        """Returns whether a mask `(1, H, W)` is unlike those of training; of its windows, more than one in ten."""
        asked, domain, (drawn, scale, far) = observed[None], self.domain, self.nearness
        if self.cut is not None:
            asked, domain = self.cut(asked.expand(DRAWS, *observed.shape))[:WINDOWS], domain[:WINDOWS]
        distance = torch.cdist(features(asked, domain) / scale, drawn).min(dim=1).values
        return bool((distance > far).double().mean() > 0.1)


def features(observed: Tensor, valid: Tensor) -> Tensor:
    """Returns what masks `(N, 1, H, W)` are like, `(N, 5)`, on one domain `(H, W)` or one for each `(N, H, W)`.

    The logarithms of the observed share and of the mean and largest distances of hidden cells from the observed ones;
    how many neighbours of an observed cell are observed, too; how far the centre of the observed cells is from that of
    the domain, over its length. A mask without an observed cell is far from all others.
    """
    rows, domains = [], valid.expand(len(observed), *observed.shape[-2:])
    for mask, wet in zip(observed[:, 0].cpu().numpy(), domains.cpu().numpy(), strict=True):
        if not mask.any():
            rows.append([-20.0, 10.0, 10.0, 0.0, 0.0])
            continue
        distance = distance_transform_edt(~mask)[wet]
        together = ((mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()) / (2 * mask.sum())
        centre = np.argwhere(mask).mean(axis=0) - np.argwhere(wet).mean(axis=0)
        offset = np.linalg.norm(centre / wet.shape)
        share = np.log(mask.sum() / wet.sum())
        rows.append([share, np.log1p(distance.mean()), np.log1p(distance.max()), together, offset])
    return torch.tensor(rows, dtype=torch.float64)
