"""Whether the speed is above a threshold: how good the probabilities are that methods give of it.

With p the probability and o = 1 where it is above, else 0, the Brier score is the mean of (p - o)^2. Where k of M
members are above, p = k / M, and the score is the fair one (Ferro 2014, eq. 7),

    (k / M - o)^2 - k (M - k) / (M^2 (M - 1)),

whose expectation is that of the law that the members are drawn from; one field has a p of 0 or 1. A method is reliable
if the event happens in a share p of the cells where p is its probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The bins of the reliability diagram are about 0, 0.1, .., 1.
BINS = 11
#: Points of equal weight at which a normal law is integrated.
POINTS = 128


def chances(members: Tensor, std: Tensor | None, threshold: float) -> Tensor:
    """Returns the probability `(n, H, W)` that the speed is above a threshold.

    Arguments:
        members: `(M, n, 2, H, W)`.
        std: Of a Gaussian law of independent components whose mean is the one member, `(n, 2, H, W)`; None of members.
        threshold: In the units of the members.
    """
    if std is None:
        return (members.norm(dim=2) > threshold).double().mean(dim=0)
    (u, v), (su, sv) = members[0].double().unbind(dim=1), std.double().clamp(min=1e-12).unbind(dim=1)
    below = torch.zeros_like(u)
    for share in (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS:
        other = (threshold**2 - (u + su * torch.special.ndtri(share)).square()).clamp(min=0).sqrt()
        below += (torch.special.ndtr((other - v) / sv) - torch.special.ndtr((-other - v) / sv)) / POINTS
    return 1 - below


def event_sums(
    members: Tensor, std: Tensor | None, truth: Tensor, where: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Returns the Brier score summed over the cells of each case, `(n,)`, and count, probability and event by bins.

    Arguments:
        members: See `chances`.
        std: See `chances`.
        truth: `(n, 2, H, W)`, NaN where unknown; such cells are left out.
        where: The region, boolean `(n, 1, H, W)`.
        threshold: In the units of the truth.

    Returns:
        The sums, and the bins `(3, BINS)` of the probability, summed over all cases.
    """
    known = (where & truth.isfinite().all(dim=1, keepdim=True))[:, 0]
    chance = chances(members, std, threshold)[known]
    happened = (truth.norm(dim=1) > threshold)[known].double()
    score, count = (chance - happened).square(), len(members)
    if std is None and count > 1:
        score = score - chance * (1 - chance) / (count - 1)
    total = score.new_zeros(len(truth)).index_add_(0, known.nonzero()[:, 0], score)
    bins, place = score.new_zeros(3, BINS), (chance * (BINS - 1)).round().long()
    for row, values in zip(bins, (torch.ones_like(chance), chance, happened), strict=True):
        row.index_add_(0, place, values)
    return total, bins
