"""Training, validation and test snapshots as blocks of time, and how much evidence a block of snapshots is.

Snapshots a short time apart are nearly the same field, so a random split would test on what was trained on. The
blocks here are consecutive, and `guard` snapshots between them are left out:

    | train | guard | validation | guard | test |

The autocorrelation of the anomalies a (the time mean of every cell removed) is

    rho(L) = mean_{t, cells} a(t) a(t + L) / mean_{t, cells} a(t)^2.

The guard is the smallest lag from which rho stays below 0.2, of lags up to a tenth of the snapshots. Snapshots that are
independent already at lag 1 need none. Scores are means of squares, so n snapshots are worth

    n^2 / sum_{i, j} rho(t_i - t_j)^2

independent ones (Bayley & Hammersley, J. R. Stat. Soc. Suppl. 8, 1946), in which the whole of rho counts: a tide, whose
correlation comes back with every period, is worth two however long it is watched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.data.fields import Fields, blocks
from vecfield_diffusion.errors import UserError

THRESHOLD = 0.2
SPLITS = ("train", "validation", "test")
#: Blocks whose RMS anomalies differ by more than this factor are called unlike.
UNLIKE = 1.5
#: Snapshots of a block that are read to compare it.
COMPARED = 256
Floats = NDArray[np.float64]


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
            shares = ", ".join(f"{name} {fraction:g}" for name, fraction in self.fractions.items())
            guarded = "more snapshots, larger shares, or a smaller guard, e.g. splits.guard=0"
            wanted = guarded if guard else "more snapshots or larger shares"
            raise UserError(
                f"{fields.source}: {len(fields)} snapshot{'s' * (len(fields) > 1)} with a guard of {guard} leave none "
                f"for {' and '.join(empty)} (shares: {shares}). Give {wanted}"
            )
        return split

    def guard_of(self, fields: Fields) -> int:
        """The guard in snapshots: as given, or measured, at most a tenth of the snapshots."""
        if self.guard != "auto":
            return self.guard
        return guard_after(autocorrelation(fields), len(fields))


def guard_after(rho: Floats, length: int) -> int:
    """The smallest lag from which the correlation stays below 0.2, as far as a tenth of the `length` snapshots."""
    longest = length // 10
    correlated = np.flatnonzero(rho[1 : longest + 1] >= THRESHOLD) + 1
    return min(int(correlated[-1]) + 1, longest) if correlated.size else 0


def autocorrelation(fields: Fields) -> Floats:
    """rho at lags 0, 1, ... as long as the set, or 4096 snapshots of it; all 1 where nothing varies.

    Gaps count as what they are: a lag has the pairs of values that are both measured, within one trajectory.
    """
    anomalies, measured, runs = sampled_anomalies(fields)
    products, pairs = np.zeros(len(anomalies)), np.zeros(len(anomalies))
    for run in np.unique(runs):
        inside = torch.from_numpy(runs == run)
        for total, values in ((products, anomalies[inside]), (pairs, measured[inside].double())):
            total[: len(values)] += lagged(values)
    if products[0] <= 0:
        return np.ones(len(anomalies))
    rho = products / np.maximum(pairs, 1) / (products[0] / pairs[0])
    return np.where(pairs > 0.5, np.clip(rho, -1, 1), 0.0)


def lagged(values: Tensor) -> Floats:
    """The sums over t and columns of x(t) x(t + L) of `(T, columns)`, at lags L from 0 to T - 1; by Fourier."""
    spectrum = torch.fft.rfft(values, 2 * len(values), dim=0).abs().square().sum(dim=1)
    return torch.fft.irfft(spectrum, 2 * len(values))[: len(values)].numpy()


def independent(fields: Fields, indices: Sequence[int] | None = None, rho: Floats | None = None) -> float:
    """How many independent fields the snapshots `indices` are worth; see the top of this file.

    Arguments:
        fields: The data; the correlation is that of all of them.
        indices: Any snapshots in any order; all if None.
        rho: Their `autocorrelation`, where it is known already.
    """
    rho, chosen = autocorrelation(fields) if rho is None else rho, np.zeros(len(fields))
    chosen[slice(None) if indices is None else np.asarray(indices, dtype=np.int64)] = 1.0
    total = 0.0
    runs = np.zeros(len(fields)) if fields.runs is None else fields.runs
    for run in np.unique(runs):
        pairs = lagged(torch.from_numpy(chosen[runs == run])[:, None])[: len(rho)]
        squares = pairs * rho[: len(pairs)] ** 2
        total += 2 * squares.sum() - squares[0]
    return float(chosen.sum() ** 2 / total) if total > 0 else 0.0


def compare_blocks(fields: Fields, split: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence on every block whose fields vary more, or less, than those of training do about their mean.

    Scores on such a block say how a network does on other data than it was trained on.
    """
    training = _some(fields, split["train"])
    mean = training.nanmean(0)
    usual = _rms(training - mean)
    notes = []
    for name in SPLITS[1:]:
        size = _rms(_some(fields, split[name]) - mean) if len(split[name]) else usual
        if usual > 0 and not 1 / UNLIKE <= size / usual <= UNLIKE:
            notes.append(
                f"the {name} snapshots are unlike those of training: their RMS about its mean is {size:.3g} "
                f"{fields.units}, {size / usual:.2g} times that of training, {usual:.3g}; scores on them say little of "
                "other times"
            )
    return notes


def sampled_anomalies(
    fields: Fields, snapshots: int = 4096, cells: int = 256
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Values less their time mean, 0 where not measured, and where they are measured, both `(T, components)`.

    At most `cells` valid cells, evenly picked, and `snapshots` consecutive ones from the middle. Last come the numbers
    of their trajectories `(T,)`.
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
    runs = np.zeros(length, dtype=np.int64) if fields.runs is None else fields.runs[first : first + length]
    return torch.where(measured, values - values.nanmean(0), 0.0), measured, runs


def _some(fields: Fields, indices: Sequence[int]) -> Tensor:
    """At most `COMPARED` of the snapshots, evenly picked, `(n, 2, H, W)`."""
    return fields.read(indices[:: -(-len(indices) // COMPARED)]).double()


def _rms(anomalies: Tensor) -> float:
    return float(anomalies.square().nanmean().sqrt())
