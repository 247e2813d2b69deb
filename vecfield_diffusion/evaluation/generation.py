"""Whether generated fields are such as the data: distances between samples and unseen fields of the reference.

Each number is to be read beside the same one for two halves of the reference: chance alone is not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.evaluation.physical import kinetic_energy, measured
from vecfield_diffusion.evaluation.spectra import spectra
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity

_PROJECTIONS = 256
#: A divergence of a hundredth of the vorticity is none, and so is a millionth of the energy.
NEGLIGIBLE = 1e-2
_TINY = 1e-30


def generation_scores(samples: Tensor, reference: Tensor, train: Tensor, grid: Grid, seed: int = 0) -> dict[str, float]:
    """All scores of generated fields.

    Arguments:
        samples: Generated fields `(N, 2, H, W)` in physical units, NaN on land.
        reference: Fields of the data that training has not seen, `(R, 2, H, W)`.
        train: Fields that it has seen, `(T, 2, H, W)`.
        grid: Their grid.
        seed: Of the directions of the sliced distance.

    Returns:
        `energy_ratio` and `enstrophy_ratio` (1: as the reference), `spectrum_distance` (mean |ln| of the ratio of the
        energy spectra, over whole shells, a millionth of the peak added to both), `vorticity_distance` (1-D
        Wasserstein, in standard deviations of the reference), `frechet_distance`, `sliced_wasserstein` (in the units
        of the field) and `memorisation` (the median; 1: as far from the training fields as unseen ones are, 0:
        copies).
    """
    ours, theirs = spectra(samples, grid), spectra(reference, grid)
    shells = slice(1, ours.whole)
    energies = [each.energy.mean(dim=0)[shells] for each in (ours, theirs)]
    floor = NEGLIGIBLE**3 * energies[1].max()
    ratio = (energies[0] + floor) / (energies[1] + floor)
    curls = [_vorticity(fields, grid) for fields in (samples, reference)]
    return {
        "energy_ratio": float(kinetic_energy(samples, grid).mean() / kinetic_energy(reference, grid).mean()),
        "enstrophy_ratio": float(curls[0].square().mean() / curls[1].square().mean()),
        "spectrum_distance": float(ratio.clamp(min=_TINY).log().abs().mean()),
        "vorticity_distance": float(wasserstein(curls[0].flatten(), curls[1].flatten()) / curls[1].std()),
        "frechet_distance": frechet_distance(samples, reference, grid),
        "sliced_wasserstein": sliced_wasserstein(samples, reference, grid, seed=seed),
        "memorisation": float(memorisation(samples, train, reference, grid).median()),
    }


def features(fields: Tensor, grid: Grid) -> Tensor:
    """What a physicist would look at, of `fields` `(N, 2, H, W)`, as `(N, F)`.

    The logarithms of the energy in octaves of the wavenumber (shells 1, 2-3, 4-7, ..), of the enstrophy and of the mean
    squared divergence, floored where negligible; the means of u and v over the RMS component; the skewness and the
    logarithm of the kurtosis of the vorticity.
    """
    flat, inside = measured(fields, grid)
    spectrum = spectra(fields, grid)
    bands, low = [], 1
    while low < spectrum.whole:
        bands.append(spectrum.energy[:, low : min(2 * low, spectrum.whole)].sum(dim=1) * spectrum.width)
        low *= 2
    curl, div = vorticity(flat, inside)[:, 0, inside.valid], divergence(flat, inside)[:, 0, inside.valid]
    enstrophy = curl.square().mean(dim=1)
    # What is next to nothing is as good as nothing: its logarithm would say more of rounding than of the flow.
    floor = NEGLIGIBLE**3 * torch.stack(bands).sum(dim=0)
    bands = [band + floor for band in bands]
    sizes = torch.stack((*bands, enstrophy, div.square().mean(dim=1) + NEGLIGIBLE**2 * enstrophy), dim=1)
    anomaly = curl - curl.mean(dim=1, keepdim=True)
    moments = [anomaly.pow(n).mean(dim=1) for n in (2, 3, 4)]
    variance = moments[0].clamp(min=_TINY)
    shape = torch.stack((moments[1] / variance**1.5, (moments[2] / variance**2).clamp(min=_TINY).log()), dim=1)
    values = flat[:, :, inside.valid]
    drift = values.mean(dim=2) / values.square().mean(dim=(1, 2)).sqrt().clamp(min=_TINY)[:, None]
    return torch.cat((sizes.clamp(min=_TINY).log(), drift, shape), dim=1)


def frechet_distance(samples: Tensor, reference: Tensor, grid: Grid) -> float:
    """The `frechet` distance of the `features` of two sets of fields, in standard deviations of the reference.

    The formula is that of Heusel et al. (2017) with features of the flow in place of those of a network.
    A feature that varies by less than a hundredth over the reference counts in hundredths.
    """
    ours, theirs = features(samples, grid), features(reference, grid)
    scale = theirs.std(dim=0).clamp(min=NEGLIGIBLE)
    return frechet(ours / scale, theirs / scale)


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared 2-Wasserstein distance of the Gaussians fitted to `(N, F)` and `(M, F)` (Dowson & Landau 1982).

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with the means m and covariances A, B.
    """
    gap = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    first, second = a.mT.cov().view(a.shape[1], -1), b.mT.cov().view(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(gap + first.trace() + second.trace() - 2 * cross)


def wasserstein(a: Tensor, b: Tensor, p: int = 1) -> Tensor:
    """The p-th power of the p-Wasserstein distance of samples on a line, `(..., N)` and `(..., M)`, as `(...)`.

    The integral of |F_a^-1 - F_b^-1|^p, whose integrand is constant between the levels i / N and j / M: exact.
    """
    n, m = a.shape[-1], b.shape[-1]
    levels = torch.cat((torch.arange(n + 1) * m, torch.arange(m + 1) * n)).unique()  # in units of 1 / (N M)
    at = levels[:-1].to(a.device)
    gap = a.sort(dim=-1).values[..., at // m] - b.sort(dim=-1).values[..., at // n]
    return (gap.abs().pow(p) * (levels.diff().to(a.device) / (n * m))).sum(dim=-1)


def sliced_wasserstein(samples: Tensor, reference: Tensor, grid: Grid, modes: int = 32, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance of the scores on the leading principal components of the reference.

    The root of the mean over random directions of the squared distance of the projections (Rabin et al. 2011), times
    the root of the number of components: a shift of all samples by one vector in their span counts as its length, here
    per root of the number of values of a field. In the units of the field.

    Arguments:
        samples: `(N, 2, H, W)`.
        reference: `(R, 2, H, W)`.
        grid: Their grid.
        modes: How many components, at most.
        seed: Of the directions.
    """
    ours, theirs = _common(grid, samples, reference)
    mean = theirs.mean(dim=0)
    vectors = torch.linalg.svd(theirs - mean, full_matrices=False).Vh[:modes]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(_PROJECTIONS, len(vectors), dtype=torch.float64, generator=generator).to(ours.device)
    directions = directions / directions.norm(dim=1, keepdim=True)
    lines = [directions @ (vectors @ (fields - mean).mT) for fields in (ours, theirs)]
    return float((len(vectors) * wasserstein(*lines, p=2).mean() / ours.shape[1]).sqrt())


def memorisation(samples: Tensor, train: Tensor, reference: Tensor, grid: Grid) -> Tensor:
    """The distance of every sample to the nearest training field over that of unseen fields (their median), `(N,)`.

    About 1 for new fields, 0 for copies. The unseen fields should stand off in time further than they are correlated.

    Arguments:
        samples: `(N, 2, H, W)`.
        train: `(T, 2, H, W)`.
        reference: Unseen fields of the data, `(R, 2, H, W)`.
        grid: Their grid.
    """
    new, seen, unseen = _common(grid, samples, train, reference)
    exact = "donot_use_mm_for_euclid_dist"  # the difference of squares cannot tell a copy
    typical = torch.cdist(unseen, seen, compute_mode=exact).amin(dim=1).median()
    return torch.cdist(new, seen, compute_mode=exact).amin(dim=1) / typical


def _common(grid: Grid, *sets: Tensor) -> list[Tensor]:
    """The values `(N, 2 K)` of each set in the cells that are finite in all of them."""
    flat, inside = measured(torch.cat(sets), grid)
    return list(flat[:, :, inside.valid].flatten(1).split([len(fields) for fields in sets]))


def _vorticity(fields: Tensor, grid: Grid) -> Tensor:
    flat, inside = measured(fields, grid)
    return vorticity(flat, inside)[:, 0, inside.valid]
