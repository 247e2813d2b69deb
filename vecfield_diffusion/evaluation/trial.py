"""What a filled series is worth: a part of what was measured is hidden, filled, and compared with simpler methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vecfield_diffusion import progress
from vecfield_diffusion.evaluation.baselines import Linear
from vecfield_diffusion.evaluation.comparison import gaussian_crps
from vecfield_diffusion.evaluation.estimation import hide
from vecfield_diffusion.evaluation.interpolation import Interpolation
from vecfield_diffusion.evaluation.series import along_time
from vecfield_diffusion.evaluation.spacetime import Bools, Floats
from vecfield_diffusion.models.measured import SPARSE
from vecfield_diffusion.physics.grid import Grid

SHARE = 0.1  # of the measured values that is hidden
FRAMES, DRAWS = 16, 16  # that are judged, half as many where each is a large system; and that tell their variance
#: Makes super-observations and the variance of their errors of a series and that of its own.
Thinned = Callable[[Floats, NDArray | float], tuple[Floats, NDArray | float]]
NORMAL_90 = 1.6448536269514722  # half the central interval of 90 % of a normal law, in standard deviations


def pieces(measured: Bools, valid: Bools, seed: int, share: float = SHARE) -> tuple[Bools, str]:
    """Returns what is hidden `(T, H, W)`, about a share of the measured cells, and its shape in words.

    In frames at random it is what another frame of the series lacks, a stretch of consecutive frames at a time. Where
    no frame lacks anything, or most lack most, so that little would be left, it is blocks of half the sides.

    Arguments:
        measured: The measured cells, `(T, H, W)`.
        valid: The cells of the domain, `(H, W)`.
        seed: One seed hides the same.
        share: How much.
    """
    generator = np.random.default_rng([seed, 10])
    frames = np.flatnonzero(measured.any(axis=(1, 2)))
    whole = measured[frames][:, valid].mean() if len(frames) else 0.0
    gaps = 0.3 <= whole < 0.995
    out, total = np.zeros_like(measured), share * measured.sum()
    stretch = max(1, min(4, len(frames) // 10))
    for start in generator.permutation(np.arange(0, len(frames), stretch)):
        if out.sum() >= total:
            break
        here = frames[start : start + stretch]
        other = frames[(start + np.arange(len(here)) + generator.integers(len(frames))) % len(frames)]
        pattern = ~measured[other] if gaps else hide(measured[here, None], valid, 0, "block", generator)
        out[here] = pattern & measured[here] & valid
    return out, "the gaps of other times" if gaps else "blocks"


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes:
        rows: The scores of every method on the hidden values, by its name: `rmse_component`, `crps`, `coverage_90` and
            `spread_skill`, after the correction of the spread where there is one.
        factor: What the spread in space and time is to be multiplied by: the error over the spread.
    """

    rows: Mapping[str, Mapping[str, float]]
    factor: float


def judge(
    how: Interpolation,
    series: Floats,
    noise: NDArray | float,
    hidden: Bools,
    grid: Grid,
    thinned: Thinned = lambda series, noise: (series, noise),
) -> Trial:
    """Returns how well hidden values are found again.

    The factor of the spread is that of all judged frames; it enters the scores of one half of them as fitted on the
    other half.

    Arguments:
        how: The interpolation in space and time, learnt without what is hidden.
        series: What was measured, `(T, 2, H, W)`, NaN elsewhere.
        noise: The variance of its errors.
        hidden: The cells that are hidden, `(T, H, W)`.
        grid: The grid.
        thinned: Makes of what is left, and of its noise, what the interpolation is given.
    """
    judged = np.isfinite(series) & hidden[:, None]
    frames = np.flatnonzero(judged.any(axis=(1, 2, 3)))
    shown = np.where(hidden[:, None], np.nan, series)
    dense = (how.before + 1 + how.after) * np.isfinite(shown).sum() > SPARSE * len(shown)
    frames = frames[np.linspace(0, len(frames) - 1, min(FRAMES // 2 if dense else FRAMES, len(frames))).astype(int)]
    given = thinned(shown, noise)
    truth = np.concatenate([series[frame][judged[frame]] for frame in frames])
    half = np.concatenate([np.full(judged[frame].sum(), number % 2) for number, frame in enumerate(frames)])
    found, how = {}, replace(how, draws=DRAWS)
    for name, way in (("space and time", how), ("snapshot alone", replace(how, before=0, after=0))):
        parts = way.parts(*given, [range(f, f + 1) for f in frames], with_variance=judged)
        judging = progress.over(frames, "frames", f"judging: {name}")
        laws = [(part.mean[0][judged[f]], part.variance[0][judged[f]]) for f, part in zip(judging, parts, strict=True)]
        mean, variance = (np.concatenate(values) for values in zip(*laws, strict=True))
        found[name] = _scored(mean, variance + _at(noise, judged, frames), truth, half)
    linear, known = Linear().fit(shown, grid), np.isfinite(shown).all(axis=1)
    across = [linear.fill(shown[frame], known[frame])[judged[frame]] for frame in frames]
    along = [along_time(shown, frame)[judged[frame]] for frame in frames]
    rows = {name: scores for name, (scores, _) in found.items()}
    for name, values in (("linear in space", across), ("linear in time", along)):
        error = np.where(np.isfinite(values := np.concatenate(values)), values, truth.mean()) - truth
        rows[name] = {"rmse_component": float(np.sqrt(np.square(error).mean())), "crps": float(np.abs(error).mean())}
    return Trial(rows, found["space and time"][1])


def _at(noise: NDArray | float, judged: Bools, frames: NDArray) -> Floats | float:
    """The variance of the errors of the judged values: what is compared with has them, too."""
    if np.ndim(noise) == 0:
        return noise
    return np.concatenate([noise[frame, :2][judged[frame]] for frame in frames])


def _scored(mean: Floats, variance: Floats, truth: Floats, half: NDArray) -> tuple[dict[str, float], float]:
    """The scores of Gaussian laws, their spread corrected by the factor of the other half, and that of both."""
    square, variance = np.square(mean - truth), variance.clip(min=1e-300)
    factor = np.sqrt(square.mean() / variance.mean())
    parts = [
        np.sqrt(square[half == k].mean() / variance[half == k].mean()) if (half == k).any() else factor for k in (1, 0)
    ]
    std = np.sqrt(variance) * np.asarray(parts)[half]
    crps = gaussian_crps(*map(torch.from_numpy, (mean, std, truth))).mean()
    scores = {
        "rmse_component": np.sqrt(square.mean()),
        "crps": crps,
        "coverage_90": (np.abs(mean - truth) <= NORMAL_90 * std).mean(),
        "spread_skill": np.sqrt(np.square(std).mean() / square.mean()),
    }
    return {name: float(value) for name, value in scores.items()}, float(factor)
