"""How far chance moves a score: the moving-block bootstrap over cases in the order of time (Kunsch 1989).

Cases close in time resemble each other; drawing whole blocks of consecutive ones keeps that resemblance, which drawing
single ones would lose and so promise too narrow an interval.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resamples(cases: int, block: int | None = None, repeats: int = 1000, seed: int = 0) -> Tensor:
    """Returns the numbers of the cases of every resample, `(repeats, cases)`.

    Arguments:
        cases: How many there are, in the order of time.
        block: Consecutive cases that are drawn together; 1 for independent ones, at most all; the whole number next to
            the cube root of `cases`, which is the best rate for a mean, if None.
        repeats: How many resamples.
        seed: Of the draw.

    Raises:
        ValueError: No case, or a block or repeats out of range.
    """
    if cases < 1:
        raise ValueError(f"cases must be >= 1, got {cases}")
    block = round(cases ** (1 / 3)) if block is None else block
    if not 1 <= block <= cases:
        raise ValueError(f"block must be between 1 and the {cases} cases, got {block}")
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(cases - block + 1, (repeats, -(-cases // block), 1), generator=generator)
    return (starts + torch.arange(block)).flatten(1)[:, :cases]


def bootstrap(
    values: Tensor,
    block: int | None = None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the central interval of probability `level` of the mean of `values`; NaN if none is finite.

    Arguments:
        values: One for every case in the order of time, `(N,)`; not finite where it has none: left out.
        block: As for `resamples`, and so are `repeats` and `seed`.
        level: Above 0 and below 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got {level}")
    values = values.double().where(values.isfinite(), torch.nan)
    means = values[resamples(len(values), block, repeats, seed).to(values.device)].nanmean(dim=1)
    low, high = torch.nanquantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(means))
    return float(low), float(high)
