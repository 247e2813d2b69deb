"""The `spectrum_error` that exact members would have: `python benchmarks/exact_spectra.py 12 17 256` (snapshots).

For a doubly periodic Gaussian field of 64 x 64 cells without divergence the energy of a shell is a sum of independent
squares, as many as it has wavenumbers, so its mean over snapshots is chi-squared. The members are drawn independently
of the truth, 8 for each snapshot: observations, which truth and members share, bring the two nearer to each other.
"""

from __future__ import annotations

import sys

import torch

from vecfield_diffusion.evaluation.spectra import spectrum_error
from vecfield_diffusion.evaluation.tables import table

CELLS, LAST, MEMBERS, DRAWS = 64, 18, 8, 20000


def errors(snapshots: int) -> torch.Tensor:
    """The distances `(DRAWS,)` of the mean spectrum of exact members from that of as many true snapshots."""
    k = torch.fft.fftfreq(CELLS, 1 / CELLS, dtype=torch.float64)
    freedom = torch.bincount(torch.hypot(k[:, None], k).round().long().flatten())[: LAST + 1].double()
    truth, members = (
        torch.distributions.Chi2(count * freedom).sample((DRAWS,)) / (count * freedom)
        for count in (snapshots, MEMBERS * snapshots)
    )
    return spectrum_error(members, truth, LAST)


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = []
    for snapshots in map(int, sys.argv[1:]):
        found = errors(snapshots)
        low, high = (found.quantile(level).item() for level in (0.1, 0.9))
        rows.append({"snapshots": snapshots, "mean": found.mean().item(), "10 %": low, "90 %": high})
    print(table(rows, ("snapshots", "mean", "10 %", "90 %")))
