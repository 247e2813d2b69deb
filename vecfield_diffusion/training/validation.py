"""What a validation measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.training.batches import Batch


@torch.no_grad()
def loss_by_level(
    loss: Callable[[Batch], Tensor], diffusion: Diffusion, batches: Iterable[Batch], bins: int = 4
) -> dict[str, float]:
    """Returns the mean loss over batches, and in bins of ln s between the smallest and the largest level, by name."""
    losses, levels = [], []
    for batch in batches:
        losses.append(loss(batch).cpu())
        levels.append(diffusion.level(batch.t).cpu())
    values, level = torch.cat(losses), torch.cat(levels)
    ends = math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max)
    edges = torch.logspace(*ends, bins + 1, dtype=torch.float64)
    places = torch.bucketize(level.double(), edges[1:-1])
    found = {"val/loss": values.mean().item()}
    for place in places.unique().tolist():
        low, high = edges[place], edges[place + 1]
        found[f"val/loss_s{low:.2g}_{high:.2g}"] = values[places == place].mean().item()
    return found


def headline(scores: dict[str, float]) -> dict[str, float]:
    """Returns the scores that one compares runs by: all but the losses of bins of noise, which differ between runs."""
    return {name: value for name, value in scores.items() if not name.startswith("val/loss_")}
