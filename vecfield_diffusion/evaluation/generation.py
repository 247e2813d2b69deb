"""Whether generated fields are such as the data: distances between samples and unseen fields of the reference.

Each number is to be read beside the same one for two halves of the reference: chance alone is not zero.

Intervals are those of a bootstrap over both sets (see `bootstrap`): generated fields are drawn one by one, those of
the reference in blocks of consecutive ones. Each field is analysed once, and resamples are made of the results. The
training fields stay, and so do the units, that is the standard deviations and principal components of the reference.
The intervals of distances are those of `comparison.distance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.evaluation.bootstrap import resamples
from vecfield_diffusion.evaluation.comparison import Score, counts, distance, interval
from vecfield_diffusion.evaluation.physical import kinetic_energy, measured
from vecfield_diffusion.evaluation.spectra import spectra
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence, vorticity

_PROJECTIONS, _MODES = 256, 32  # of the sliced distance: directions, and components of the reference at most
#: A divergence of a hundredth of the vorticity is none, and so is a millionth of the energy.
NEGLIGIBLE = 1e-2
_TINY = 1e-30
_LEVELS = 1000  # of the vorticity, at which its distributions in resamples are compared
_RATIOS = ("energy_ratio", "enstrophy_ratio", "memorisation")  # the others are distances

#: The numbers `(R, N)` and `(R, M)` of the samples and the reference fields in R resamples.
Drawn = tuple[Tensor, Tensor]


def generation_scores(
    samples: Tensor, reference: Tensor, train: Tensor, grid: Grid, seed: int = 0, block: int | None = 1
) -> dict[str, Score]:
    """Returns all scores of generated fields, with their intervals.

    Arguments:
        samples: Generated fields `(N, 2, H, W)` in physical units, NaN on land.
        reference: Fields of the data that training has not seen, in the order of time, `(R, 2, H, W)`.
        train: Fields that it has seen, `(T, 2, H, W)`.
        grid: Their grid.
        seed: Of the directions of the sliced distance.
        block: Consecutive samples that are drawn together; those that are in the order of time as for `resamples`.

    Returns:
        `energy_ratio` and `enstrophy_ratio` (1: as the reference), `spectrum_distance` (mean |ln| of the ratio of the
        energy spectra, over whole shells, a millionth of the peak added to both), `vorticity_distance` (1-D
        Wasserstein, in standard deviations of the reference), `frechet_distance`, `sliced_wasserstein` (in the units
        of the field) and `memorisation` (the median; 1: as far from the training fields as unseen ones are, 0:
        copies).
    """
    sets = ((len(samples), block), (len(reference), None))
    drawn = tuple(  # all of them first
        torch.cat((torch.arange(size)[None], resamples(size, length, seed=number)))
        for number, (size, length) in enumerate(sets)
    )
    values = resampled(samples, reference, train, grid, drawn, seed)
    count = len(samples)
    return {
        name: Score(float(drawings[0]), *interval(drawings[1:]), count)
        if name in _RATIOS
        else distance(drawings, count)
        for name, drawings in values.items()
    }


def resampled(
    samples: Tensor, reference: Tensor, train: Tensor, grid: Grid, drawn: Drawn, seed: int = 0
) -> dict[str, Tensor]:
    """Returns the scores `(R,)` of the resamples `drawn`, the first of which are all fields."""
    sets = samples, reference
    weights = [counts(chosen) / chosen.shape[1] for chosen in drawn]
    energy, waves = ([of(fields, grid) for fields in sets] for of in (kinetic_energy, spectra))
    curls = [_vorticity(fields, grid) for fields in sets]
    means = [w @ wave.energy[:, 1 : wave.whole] for w, wave in zip(weights, waves, strict=True)]
    floor = NEGLIGIBLE**3 * means[1].amax(dim=1, keepdim=True)
    ratio = (means[0] + floor) / (means[1] + floor)
    return {
        "energy_ratio": _ratio(weights, energy),
        "enstrophy_ratio": _ratio(weights, [curl.square().mean(dim=1) for curl in curls]),
        "spectrum_distance": ratio.clamp(min=_TINY).log().abs().mean(dim=1),
        "vorticity_distance": _vorticity_distances(weights, curls),
        "frechet_distance": _frechet_distances(samples, reference, grid, drawn),
        "sliced_wasserstein": _sliced_distances(samples, reference, grid, drawn, seed),
        "memorisation": _memorisations(samples, train, reference, grid, drawn),
    }


def _ratio(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    ours, theirs = (w @ value for w, value in zip(weights, values, strict=True))
    return ours / theirs


def _vorticity_distances(weights: list[Tensor], curls: list[Tensor]) -> Tensor:
    """Of all fields exactly; of resamples, the integral of |F_a - F_b|, F being the mean of those of the fields."""
    top = max(float(curl.abs().max()) for curl in curls)
    levels = torch.linspace(-top, top, _LEVELS, dtype=torch.float64, device=curls[0].device)
    ours, theirs = (w @ _below(curl, levels) for w, curl in zip(weights, curls, strict=True))
    distances = torch.trapezoid((ours - theirs).abs(), levels)
    distances[0] = wasserstein(curls[0].flatten(), curls[1].flatten())
    return distances / curls[1].std()


def _below(values: Tensor, levels: Tensor) -> Tensor:
    """The share of each row of `values` `(N, K)` that is at most each of the levels `(L,)`, `(N, L)`."""
    at = levels.expand(len(values), -1).contiguous()
    return torch.searchsorted(values.sort(dim=1).values, at, right=True).double() / values.shape[1]


def features(fields: Tensor, grid: Grid) -> Tensor:
    """Returns what a physicist would look at in `fields` `(N, 2, H, W)`, as `(N, F)`.

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


def _frechet_distances(samples: Tensor, reference: Tensor, grid: Grid, drawn: Drawn) -> Tensor:
    """The `frechet` distances of the `features`, in standard deviations of those of the reference.

    The formula is that of Heusel et al. (2017) with features of the flow in place of those of a network.
    A feature that varies by less than a hundredth over the reference counts in hundredths.
    """
    ours, theirs = features(samples, grid), features(reference, grid)
    scale = theirs.std(dim=0).clamp(min=NEGLIGIBLE)
    return frechet(*((values / scale)[chosen] for values, chosen in zip((ours, theirs), drawn, strict=True)))


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared 2-Wasserstein distance of the Gaussians fitted to `(..., N, F)` and `(..., M, F)`, `(...)`.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with the means m and covariances A, B (Dowson & Landau 1982).
    """
    gap = (a.mean(dim=-2) - b.mean(dim=-2)).square().sum(dim=-1)
    first, second = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum(dim=-1)
    return gap + (first + second).diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 2 * cross


def _covariance(x: Tensor) -> Tensor:
    """Of `(..., N, F)`, as `(..., F, F)`."""
    anomaly = x - x.mean(dim=-2, keepdim=True)
    return anomaly.mT @ anomaly / (x.shape[-2] - 1)


def wasserstein(a: Tensor, b: Tensor, p: int = 1) -> Tensor:
    """Returns the p-th power of the p-Wasserstein distance of samples on a line, `(..., N)` and `(..., M)`, as `(...)`.

    The integral of |F_a^-1 - F_b^-1|^p, whose integrand is constant between the levels i / N and j / M: exact.
    """
    return _transport(a.sort(dim=-1).values, b.sort(dim=-1).values, p)


def _transport(a: Tensor, b: Tensor, p: int) -> Tensor:
    """`wasserstein` of sorted samples."""
    n, m = a.shape[-1], b.shape[-1]
    levels = torch.cat((torch.arange(n + 1) * m, torch.arange(m + 1) * n)).unique()  # in units of 1 / (N M)
    at = levels[:-1].to(a.device)
    gap = a[..., at // m] - b[..., at // n]
    return (gap.abs().pow(p) * (levels.diff().to(a.device) / (n * m))).sum(dim=-1)


def _sliced_distances(samples: Tensor, reference: Tensor, grid: Grid, drawn: Drawn, seed: int) -> Tensor:
    """The sliced 2-Wasserstein distances of the scores on the leading principal components of the reference.

    The root of the mean over random directions of the squared distance of the projections (Rabin et al. 2011), times
    the root of the number of components: a shift of all samples by one vector in their span counts as its length, here
    per root of the number of values of a field. In the units of the field.
    """
    ours, theirs = _common(grid, samples, reference)
    mean = theirs.mean(dim=0)
    vectors = torch.linalg.svd(theirs - mean, full_matrices=False).Vh[:_MODES]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(_PROJECTIONS, len(vectors), dtype=torch.float64, generator=generator).to(ours.device)
    directions = directions / directions.norm(dim=1, keepdim=True)
    lines = [(directions @ (vectors @ (fields - mean).mT)).sort(dim=1) for fields in (ours, theirs)]
    often = [counts(chosen).long() for chosen in drawn]
    squares = [
        _transport(*(_repeated(*line, times[k]) for line, times in zip(lines, often, strict=True)), p=2).mean()
        for k in range(len(often[0]))
    ]
    return (len(vectors) * torch.stack(squares) / ours.shape[1]).sqrt()


def _repeated(values: Tensor, order: Tensor, often: Tensor) -> Tensor:
    """Sorted `values` `(D, N)` of the samples `order` `(D, N)`, each sample as `often` `(N,)` as a resample has it."""
    return values.flatten().repeat_interleave(often[order].flatten()).view(values.shape)


def _memorisations(samples: Tensor, train: Tensor, reference: Tensor, grid: Grid, drawn: Drawn) -> Tensor:
    """The median distance of samples to the nearest training field, over that of unseen fields.

    About 1 for new fields, 0 for copies. The unseen fields should stand off in time further than they are correlated.
    """
    near = _nearest(samples, train, reference, grid)
    ours, theirs = (distances[chosen].median(dim=1).values for distances, chosen in zip(near, drawn, strict=True))
    return ours / theirs


def _nearest(samples: Tensor, train: Tensor, reference: Tensor, grid: Grid) -> list[Tensor]:
    """The distances of samples `(N,)` and of reference fields `(R,)` to the nearest training field."""
    new, known, unseen = _common(grid, samples, train, reference)
    exact = "donot_use_mm_for_euclid_dist"  # the difference of squares cannot tell a copy
    return [torch.cdist(fields, known, compute_mode=exact).amin(dim=1) for fields in (new, unseen)]


def _common(grid: Grid, *sets: Tensor) -> list[Tensor]:
    """The values `(N, 2 K)` of each set in the cells that are finite in all of them."""
    flat, inside = measured(torch.cat(sets), grid)
    return list(flat[:, :, inside.valid].flatten(1).split([len(fields) for fields in sets]))


def _vorticity(fields: Tensor, grid: Grid) -> Tensor:
    flat, inside = measured(fields, grid)
    return vorticity(flat, inside)[:, 0, inside.valid]


#: The names of the sets of fields that generated ones are compared with.
UNSEEN, HALVES = "unseen fields", "halves of the unseen fields"


@dataclass(frozen=True)
class Generated:
    """Generated fields beside unseen ones.

    Attributes:
        scores: By set of fields, see `generation_scores`; those of one half of the unseen fields against the other
            tell what chance makes.
        wavenumber: `(K,)`.
        spectra: Mean energy spectra `(K,)` by set of fields.
        edges: Of the bins of vorticity.
        densities: Of vorticity by set of fields.
    """

    scores: Mapping[str, Mapping[str, Score]]
    wavenumber: Tensor
    spectra: Mapping[str, Tensor]
    edges: np.ndarray
    densities: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, fields: Mapping[str, Tensor], reference: Tensor, train: Tensor, grid: Grid) -> Generated:
        """Compares sets of fields `(n, 2, H, W)` with unseen ones, both without gaps.

        Arguments:
            fields: By name.
            reference: Unseen fields.
            train: Training fields.
            grid: The grid.
        """
        half = len(reference) // 2
        scores = {name: generation_scores(generated, reference, train, grid) for name, generated in fields.items()}
        scores[HALVES] = generation_scores(reference[:half], reference[half:], train, grid, block=None)
        sets = {UNSEEN: reference, **fields}
        waves = {name: spectra(velocity, grid) for name, velocity in sets.items()}
        whole, first = waves[UNSEEN].whole, waves[UNSEEN]
        curls = {name: _vorticity(velocity, grid).flatten().numpy() for name, velocity in sets.items()}
        top = float(np.quantile(np.abs(curls[UNSEEN]), 0.9999)) * 1.3 or 1.0
        edges = np.linspace(-top, top, 61)
        densities = {name: np.histogram(curl, edges)[0] / curl.size / np.diff(edges) for name, curl in curls.items()}
        means = {name: found.energy.mean(dim=0)[:whole] for name, found in waves.items()}
        return cls(scores, first.wavenumber[:whole], means, edges, densities)
