"""The Gaussian field that a network with `model=gaussian` starts from, learnt from the training snapshots."""

from __future__ import annotations

import numpy as np
import torch

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Timeline
from vecfield_diffusion.data.statistics import homogeneous
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.evaluation.covariance import Homogeneous
from vecfield_diffusion.evaluation.estimation import Estimator, choose, lagged_products, non_negative
from vecfield_diffusion.evaluation.spacetime import Bools, Floats, PrincipalComponents, SpaceTime, Stationary, Sum
from vecfield_diffusion.models.gaussian import Eigenfields, Modes, Waves
from vecfield_diffusion.models.product_modes import ProductModes
from vecfield_diffusion.programs.in_time import training_frames

#: Snapshots that a covariance is learnt from, at most.
SNAPSHOTS = 2000
#: How much larger than in training windows may be along each axis where fields are filled.
LARGER = 2


def gaussian_field(fields: Fields, indices: range, normalizer: Normalizer, window: tuple[int, int] | None) -> Modes:
    """Returns the Gaussian field with the homogeneous covariance of the training snapshots, at most 2000 of them.

    That of sequences is stationary in time; see `sequence_field`.

    It has few enough numbers to be as good on unseen fields. That of principal components fits the fields that it was
    learnt from so much better than others that a network trained beside it goes wrong on these.
    """
    if fields.frames > 1:
        series = training_frames(fields, Timeline.of(fields).frames, indices)
        scaled = normalizer.cpu().normalize(torch.from_numpy(series)).numpy()
        kind = dict(frames=fields.frames, stride=fields.stride, window=window)
        return sequence_field(scaled, fields.grid.valid.numpy(), fields.grid.periodic, **kind)
    read = normalizer.normalize(fields.read(indices[:: -(-len(indices) // SNAPSHOTS)])).numpy()
    print(f"covariance of {len(read)} training snapshots")
    zero, valid = np.zeros(read.shape[1:]), fields.grid.valid.numpy()
    covariance = Homogeneous.of(read, zero, valid, fields.grid.periodic, nugget=0.0)
    if window is None and homogeneous(fields) and np.isfinite(read).all():  # waves have no gaps
        return Waves(torch.from_numpy(covariance.spectrum))
    shape = window or fields.shape
    count = min(Eigenfields.MODES, 2 * shape[0] * shape[1] - 1)
    vectors, variances, nugget = covariance.leading(count, shape)
    return Eigenfields(torch.from_numpy(vectors).float(), torch.from_numpy(variances).float(), nugget)


def sequence_field(
    series: Floats,
    valid: Bools,
    periodic: tuple[bool, bool],
    *,
    frames: int,
    stride: int = 1,
    window: tuple[int, int] | None = None,
) -> ProductModes:
    """Returns the Gaussian field of sequences, its kind chosen by what is hidden of the training series, and prints it.

    A network of windows does not know where in the domain they lie: its field is homogeneous, with a variance that is
    the same everywhere and no mean; what the mean varies by in space counts as a part of the field that stays.

    Arguments:
        series: The training fields at equal steps, normalised, `(N, 2, H, W)`, NaN where not measured: whole frames
            where a snapshot is missing, and between runs.
        valid: The cells of the domain, `(H, W)`.
        periodic: Whether y and x close on themselves.
        frames: T, those of a sequence.
        stride: Steps of the series from one of them to the next.
        window: The size of the windows that the network sees; None for whole fields.
    """
    estimator, whole = Estimator(periodic), window is None
    choice = choose(series, valid, estimator, **({} if whole else {"local": (False,), "ranks": ()}))
    print(f"field in space and time of {len(series)} frames: {choice.words}")
    if whole:
        return product_modes(choice.field, frames, stride)
    lags = spaced(choice.field.lags, frames, stride)
    mean = np.where(valid, choice.field.mean, np.nan)[None]
    # The mean field where windows lie anywhere: random in space, the same at all times.
    lags = lags + non_negative(lagged_products(mean, valid, periodic, 1))
    # As far as fields may be filled in windows larger than those of training.
    axes = zip(window, valid.shape, periodic, strict=True)
    known = tuple(own if closed else min(full, LARGER * own) for own, full, closed in axes)
    return ProductModes(torch.from_numpy(cut(lags, known)), window)


def product_modes(field: SpaceTime, frames: int, stride: int = 1) -> ProductModes:
    """Returns a field for sequences of `frames`, `stride` of its steps apart, with its mean and variances."""
    parts = field.parts if isinstance(field, Sum) else (field,)
    (stationary,) = (part for part in parts if isinstance(part, Stationary))
    components = [part for part in parts if isinstance(part, PrincipalComponents)]
    given = {"mean": field.mean, "scale": np.sqrt(np.square(stationary.scale).mean(axis=0))}
    for part in components:
        given |= {"components": part.fields, "component_lags": spaced(part.lags, frames, stride)}
    lags = spaced(stationary.lags, frames, stride)
    return ProductModes(
        torch.from_numpy(lags), field.valid.shape, **{name: torch.from_numpy(value) for name, value in given.items()}
    )


def spaced(lags: Floats, frames: int, stride: int) -> Floats:
    """Returns covariances at every `stride`-th lag, `frames` of them, 0 beyond the last."""
    out = np.zeros((frames, *lags.shape[1:]))
    kept = lags[: frames * stride : stride]
    out[: len(kept)] = kept
    return out


def cut(lags: Floats, window: tuple[int, int]) -> Floats:
    """Returns C(tau, r) on the torus of windows, which do not close on themselves."""
    height, width = window
    rows, columns = (np.arange(1 - n, n) for n in window)
    out = np.zeros((*lags.shape[:3], 2 * height, 2 * width))
    there = (rows % lags.shape[-2])[:, None], columns % lags.shape[-1]
    out[..., (rows % (2 * height))[:, None], columns % (2 * width)] = lags[..., there[0], there[1]]
    return out
