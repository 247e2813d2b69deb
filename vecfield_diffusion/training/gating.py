"""The factor by which the output of a network counts at each noise level, fitted on validation.

With the estimate g, its deviation c and the target t = (x0 - g) / c of the output F, the loss of a sample whose output
is multiplied by a is

    <t, t> - 2 a <F, t> + a^2 <F, F>,

the means taken over what is measured. At each knot k of ln s the factor is that of least squares, with the weights w_k
of linear interpolation, shrunk by what chance may have done to it (the positive part of James & Stein, 1961):

    b_k = sum_i w_k <F, t>_i / sum_i w_k <F, F>_i,    a_k = b_k max(0, 1 - (2 e_k / b_k)^2) in [0, 1].

e_k is the standard error of b_k. Samples of one snapshot count as one, and snapshots that resemble their neighbours as
fewer than they are. A factor that is not two standard errors above zero is zero: the few cases that there are do not
say that the network helps. Where it plainly helps, as at ten standard errors, 4 % is all that it loses.

The loss is reported as it is on what a factor was not fitted on: the validation snapshots are divided into blocks of
time, and the factors for each are those of the others. Where even so the network does not come out better than g
over all levels, the factors are 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.losses import mean_measured
from vecfield_diffusion.models.base import column
from vecfield_diffusion.models.gate import hats
from vecfield_diffusion.training.batches import Batch

#: Knots between the smallest and the largest noise level.
KNOTS = 9
#: Standard errors above zero below which a factor is zero.
ERRORS = 2.0
#: Blocks of validation snapshots that are left out in turn, at most.
FOLDS = 5
#: Turns of the golden angle are as evenly spread as any sequence whose length is not known beforehand.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Evidence:
    """What validation samples say of the output of a network, in float64, `(N,)` each.

    Arguments:
        level: ln s.
        snapshot: The number of the snapshot.
        target: <t, t>, the loss without the network.
        product: <F, t>.
        power: <F, F>.
    """

    level: Tensor
    snapshot: Tensor
    target: Tensor
    product: Tensor
    power: Tensor

    def loss(self, factor: Tensor) -> Tensor:
        """Returns the loss of every sample with factors `(N,)` on its output."""
        return self.target - 2 * factor * self.product + factor.square() * self.power

    def __getitem__(self, index: Tensor | slice) -> Evidence:
        """The samples that `index` selects."""
        return Evidence(*(value[index] for value in vars(self).values()))

    @staticmethod
    def joined(parts: Iterable[Evidence]) -> Evidence:
        """Returns all samples of several."""
        return Evidence(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


@torch.no_grad()
def evidence(denoiser: Denoiser, batch: Batch, snapshots: Tensor) -> Evidence:
    """Returns what a batch from snapshots `(B,)` says of the output of the network, whatever its gate lets through."""
    level = denoiser.diffusion.level(batch.t)
    s = level.to(batch.x0.dtype)
    with denoiser.parametrization.gate.opened():
        x_hat, _, out, skip, _ = denoiser.estimate(batch.x0 + column(s, batch.x0) * batch.noise, s, batch.observation)
    skip = torch.where(batch.observation.valid, skip, 0.0)
    weight = denoiser.weight(level, out)

    def mean(values: Tensor) -> Tensor:
        return (weight * mean_measured(values, batch.measured)).double().cpu()

    target, output = batch.x0 - skip, x_hat - skip
    means = [mean(values) for values in (target.square(), output * target, output.square())]
    return Evidence(level.double().log().cpu(), snapshots.cpu(), *means)


def at_even_levels(diffusion: Diffusion, batch: Batch, first: int) -> Batch:
    """Returns a batch at levels spread evenly in ln s, where training draws more of some than of others.

    `first` counts the samples of the batches before.
    """
    ends, turns = knots_of(diffusion)[[0, -1]], torch.arange(first, first + len(batch.t), dtype=torch.float64)
    level = (ends[0] + (turns * GOLDEN + 0.5) % 1 * (ends[1] - ends[0])).exp().to(batch.t.device)
    return Batch(batch.x0, batch.measured, batch.observation, diffusion.time(level).to(batch.t.dtype), batch.noise)


def knots_of(diffusion: Diffusion) -> Tensor:
    """Returns ln s of the knots, `(K,)` in float64: evenly spaced from the smallest to the largest level."""
    ends = torch.tensor([diffusion.sigma_min, diffusion.sigma_max], dtype=torch.float64).log()
    return torch.linspace(ends[0], ends[1], KNOTS, dtype=torch.float64)


def fit(found: Evidence, knots: Tensor, independence: float = 1.0) -> Tensor:
    """Returns the factors at `knots`, `(K,)`; see the top of this module.

    Arguments:
        found: The validation samples.
        knots: ln s, `(K,)`, ascending.
        independence: How many independent snapshots one snapshot is worth, at most 1.
    """
    weights = hats(found.level, knots)
    power = (weights * found.power[:, None]).sum(0).clamp(min=1e-300)
    best = (weights * found.product[:, None]).sum(0) / power
    _, group = found.snapshot.unique(return_inverse=True)
    residual = weights * (found.product[:, None] - best * found.power[:, None])
    shares = _by_group(weights * found.power[:, None], group)
    counted = power.square() / shares.square().sum(0).clamp(min=1e-300)  # snapshots that bear on a knot
    # Residuals of n snapshots about a mean of their own are too small by (n - 1) / n, and how large they are is itself
    # known but roughly: (n + 1) / (n - 1) makes of two standard errors nearly the 98 % of Student's distribution.
    correction = counted * (counted + 1) / (counted - 1).clamp(min=1e-12).square()
    variance = correction * _by_group(residual, group).square().sum(0) / power.square() / independence
    shrunk = best * (1 - ERRORS**2 * variance / best.square().clamp(min=1e-300)).clamp(min=0)
    return torch.where(counted > 1.5, shrunk, 0.0).clamp(0, 1) + 0.0  # not -0.0


def cross_validated(found: Evidence, knots: Tensor, independence: float = 1.0) -> Tensor:
    """Returns the loss of every sample, `(N,)`, with factors fitted on other blocks of snapshots."""
    snapshots, group = found.snapshot.unique(return_inverse=True)
    folds = min(FOLDS, len(snapshots))
    fold = group * folds // len(snapshots)
    loss = found.target.clone()
    for number in range(folds if folds > 1 else 0):
        held = fold == number
        factors = fit(found[~held], knots, independence)
        loss[held] = found[held].loss(hats(found.level[held], knots) @ factors)
    return loss


def _by_group(values: Tensor, group: Tensor) -> Tensor:
    """Returns the sums of `(N, K)` over the members of groups, `(G, K)`."""
    return values.new_zeros(int(group.max()) + 1, values.shape[1]).index_add(0, group, values)
