"""Training, validation and test snapshots as blocks of time.

Snapshots a short time apart are nearly the same field, so a random split would test on what was trained on. The
blocks here are consecutive, and `guard` snapshots between them are left out:

    | train | guard | validation | guard | test |

The guard is the smallest lag at which the autocorrelation of the anomalies a (the time mean of every cell removed)

    rho(L) = mean_{t, cells} a(t) a(t + L) / mean_{t, cells} a(t)^2

falls below 0.2. Snapshots that are independent already at lag 1 need none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields, blocks
from vecfield_diffusion.errors import UserError

THRESHOLD = 0.2
SPLITS = ("train", "validation", "test")


class TimeBlocks:
    """Consecutive blocks with a guard between them.

    Arguments:
        train: The share of the snapshots (those not left out as guard) in the first block.
        validation: The share in the second.
        test: The share in the third.
        guard: The number of snapshots left out between two blocks; `auto` measures it.

    Raises:
        ValueError: A share outside [0, 1], shares of more than 1 together, or a negative guard.
    """

    def __init__(
        self,
        train: float = 0.8,
        validation: float = 0.1,
        test: float = 0.1,
        guard: int | Literal["auto"] = "auto",
    ) -> None:
        self.fractions = {"train": train, "validation": validation, "test": test}
        for name, fraction in self.fractions.items():
            if not 0.0 <= fraction <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {fraction}")
        if sum(self.fractions.values()) > 1.0 + 1e-9:
            raise ValueError(f"train must be at most 1 together with validation and test, got {self.fractions}")
        if guard != "auto" and not (isinstance(guard, int) and guard >= 0):
            raise ValueError(f"guard must be 'auto' or an integer of at least 0, got {guard!r}")
        self.guard = guard

    def split(self, fields: Fields) -> dict[str, range]:
        """The snapshots of `train`, `validation` and `test`.

        Raises:
            UserError: A block would be empty.
        """
        guard = self.guard_of(fields)
        usable = len(fields) - 2 * guard
        shares = np.cumsum([0.0, *self.fractions.values()])
        edges = [math.floor(share * usable + 1e-6) for share in shares]
        split = {
            name: range(start + k * guard, max(start, stop) + k * guard)
            for k, (name, (start, stop)) in enumerate(zip(SPLITS, pairwise(edges), strict=True))
        }
        empty = [name for name, snapshots in split.items() if usable < 1 or len(snapshots) == 0]
        if empty:
            raise UserError(
                f"{fields.source}: {len(fields)} snapshots with a guard of {guard} leave none for "
                f"{' and '.join(empty)} (shares {self.fractions}). Give more snapshots, larger shares, or a smaller "
                "guard, e.g. splits.guard=0."
            )
        return split

    def guard_of(self, fields: Fields) -> int:
        """The guard in snapshots: as given, or measured, at most a tenth of the snapshots."""
        if self.guard != "auto":
            return self.guard
        anomalies, measured = sampled_anomalies(fields)
        variance = anomalies.square().sum() / measured.sum()
        longest = len(fields) // 10
        for lag in range(1, min(longest, len(anomalies) // 2) + 1):
            pairs = (measured[lag:] & measured[:-lag]).sum().clamp(min=1)
            covariance = (anomalies[lag:] * anomalies[:-lag]).sum() / pairs
            if covariance < THRESHOLD * variance:
                return 0 if lag == 1 else lag
        return longest


def sampled_anomalies(fields: Fields, snapshots: int = 4096, cells: int = 256) -> tuple[Tensor, Tensor]:
    """Values less their time mean, 0 where not measured, and where they are measured, both `(T, components)`.

    At most `cells` valid cells, evenly picked, and `snapshots` consecutive ones from the middle.
    """
    valid = fields.grid.valid.flatten().nonzero().squeeze(1)
    chosen = valid[:: math.ceil(len(valid) / cells)]
    length = min(snapshots, len(fields))
    first = (len(fields) - length) // 2
    values = torch.cat(
        [
            fields.read(first + indices).flatten(2)[..., chosen].flatten(1)
            for indices in blocks(length, fields.grid.valid.numel())
        ]
    ).double()
    measured = values.isfinite()
    return torch.where(measured, values - values.nanmean(0), 0.0), measured
