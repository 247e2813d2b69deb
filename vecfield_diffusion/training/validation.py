"""What a validation measures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from vecfield_diffusion.data.splits import independent
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.training.batches import Batch, Batches
from vecfield_diffusion.training.checkpoint import load_checkpoint
from vecfield_diffusion.training.gating import Evidence, at_even_levels, cross_validated, evidence, fit, knots_of


@torch.no_grad()
def loss_by_level(
    loss: Callable[[Batch], Tensor], diffusion: Diffusion, batches: Iterable[Batch], bins: int = 4
) -> dict[str, float]:
    """Returns the mean loss over batches, and in bins of ln s between the smallest and the largest level, by name."""
    losses, levels = [], []
    for batch in batches:
        losses.append(loss(batch).cpu())
        levels.append(diffusion.level(batch.t).cpu())
    return in_bins(torch.cat(losses), torch.cat(levels), diffusion, bins)


def in_bins(values: Tensor, level: Tensor, diffusion: Diffusion, bins: int = 4) -> dict[str, float]:
    """Returns the mean of the losses `(N,)` at levels `(N,)`, and that in each bin of ln s, by name."""
    ends = math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max)
    edges = torch.logspace(*ends, bins + 1, dtype=torch.float64)
    places = torch.bucketize(level.double(), edges[1:-1])
    found = {"val/loss": values.mean().item()}
    for place in places.unique().tolist():
        low, high = edges[place], edges[place + 1]
        found[f"val/loss_s{low:.2g}_{high:.2g}"] = values[places == place].mean().item()
    return found


class GatedLoss:
    """The validation loss of a network with a gate, which it sets; see `training/gating.py`.

    Arguments:
        batches: The validation batches.
        count: How many of them are used, the same each time.

    Attributes:
        independence: How many independent snapshots one of the validation snapshots is worth.
    """

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count
        chosen = torch.cat([self.snapshots(k) for k in range(count)]).unique()
        self.independence = min(1.0, independent(batches.fields, chosen.tolist()) / len(chosen))

    def snapshots(self, k: int) -> Tensor:
        """Returns the snapshot of each sample of batch k, `(size,)`; of a sequence the first."""
        chosen = self.batches.chosen(k)
        return chosen.reshape(len(chosen), -1)[:, 0]

    def __call__(self, denoiser: Denoiser, device: torch.device) -> dict[str, float]:
        """Sets the gate and returns the loss with it by name; `val/loss_gaussian` is the one without the network."""
        drawn, even = [], []
        for k in range(self.count):
            batch, snapshots = self.batches(k).to(device), self.snapshots(k)
            drawn.append(evidence(denoiser, batch, snapshots))
            even.append(evidence(denoiser, at_even_levels(denoiser.diffusion, batch, k * len(batch.t)), snapshots))
        own, knots = Evidence.joined(drawn), knots_of(denoiser.diffusion)
        found = Evidence.joined([own, *even])
        loss = cross_validated(found, knots, self.independence)[: len(own.level)]
        factors = fit(found, knots, self.independence)
        if not loss.mean() < own.target.mean():
            loss, factors = own.target, torch.zeros_like(factors)
        denoiser.parametrization.gate.set(knots, factors)
        without = own.target.mean().item()
        return in_bins(loss, own.level.exp(), denoiser.diffusion) | {"val/loss_gaussian": without}


def where_it_helps(path: Path, denoiser: Denoiser) -> str:
    """Returns in words at which noise levels the network of a checkpoint helps the estimate that it builds on.

    Arguments:
        path: The checkpoint.
        denoiser: One of the same network, which has a gate; it stays as it is.
    """
    state, gate = load_checkpoint(path), copy.deepcopy(denoiser.parametrization.gate)
    own = (name for name, module in denoiser.network.named_modules() if module is denoiser.parametrization.gate)
    prefix = f"{next(own)}."
    kept = {name.removeprefix(prefix): value for name, value in state["ema"].items() if name.startswith(prefix)}
    gate.load_state_dict(kept)
    said = gate.sentence()
    return f"the best step is {state['counters']['step']}" + f": {said}" * bool(said)


def headline(scores: dict[str, float]) -> dict[str, float]:
    """Returns the scores that one compares runs by: all but the losses of bins of noise, which differ between runs."""
    return {name: value for name, value in scores.items() if not name.startswith("val/loss_")}
