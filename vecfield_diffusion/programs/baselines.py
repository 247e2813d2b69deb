"""The baselines that stand beside a network: one table, and how each fills the cases of a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.evaluation.baselines import (
    Baseline,
    Biharmonic,
    Climatology,
    Cubic,
    Linear,
    Nearest,
    OptimalInterpolation,
    Persistence,
)
from vecfield_diffusion.evaluation.comparison import Estimate
from vecfield_diffusion.evaluation.modes import DINEOF, GappyPOD
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.programs.trained import Trained


@dataclass(frozen=True)
class BaselineKind:
    """A baseline as `baselines=` knows it.

    Attributes:
        label: What tables call it.
        make: Makes it, not yet fitted.
        blind: Whether it looks at no observation of the present.
        law: Whether it gives a Gaussian law, mean and standard deviation.
    """

    label: str
    make: Callable[[], Baseline]
    blind: bool = False
    law: bool = False


def _solenoidal() -> Baseline:
    return OptimalInterpolation("homogeneous", divergence_free=True)


#: The baselines by the names of `baselines=`.
BASELINES = {
    "climatology": BaselineKind("climatology", Climatology, blind=True),
    "persistence": BaselineKind("persistence", Persistence, blind=True),
    "nearest": BaselineKind("nearest", Nearest),
    "linear": BaselineKind("linear", Linear),
    "cubic": BaselineKind("cubic", Cubic),
    "biharmonic": BaselineKind("biharmonic", Biharmonic),
    "oi": BaselineKind("optimal interpolation", OptimalInterpolation, law=True),
    "oi_solenoidal": BaselineKind("OI without divergence", _solenoidal, law=True),
    "gappy_pod": BaselineKind("gappy POD", GappyPOD),
    "dineof": BaselineKind("DINEOF", DINEOF),
}
#: The baseline that checkpoints hold, beside those that are fitted here.
REGRESSION = "regression"
FAST = ("climatology", "nearest", "linear", "biharmonic", "oi")
#: The least error of an observation for optimal interpolation, in standard deviations of the data.
NUGGET = 0.01
#: Divergence over vorticity of the training fields, below which a covariance without divergence is suited.
SOLENOIDAL = 0.2
#: Training snapshots that baselines are fitted on, at most.
TRAINING = 2000


def chosen_baselines(names: str | Sequence[str], sensor: bool = False) -> list[str]:
    """The baselines that `baselines=` names, in the order of `BASELINES`, then the regression.

    Arguments:
        names: `all`, or some names.
        sensor: Whether the fields are seen through an instrument: then only those stay that look at no observation,
            and a note says so.

    Raises:
        UserError: A name that there is not.
    """
    known = [*BASELINES, REGRESSION]
    named = known if names == "all" else [names] if isinstance(names, str) else names
    for name in named:
        if name not in known:
            hint = nearest(name, [*known, "all"])
            raise UserError(f"baselines={name}: there is none of this name.{hint} Known: all, {', '.join(known)}")
    wanted = [name for name in known if name in named]
    blind = [name for name in wanted if name in BASELINES and BASELINES[name].blind]
    if sensor and (lost := [name for name in wanted if name not in blind]):
        print(f"note: {', '.join(lost)} take velocities of single cells alone, and are left out beside a sensor")
        return blind
    return wanted


def training_fields(trained: Trained, fields: Fields) -> Tensor:
    """Evenly spaced training snapshots `(n, 2, H, W)`, at most 2000."""
    train = trained.split["train"]
    return fields.read(train[:: -(-len(train) // TRAINING)])


def fit_baselines(
    trained: Trained, fields: Fields, wanted: Sequence[str] = FAST, training: Tensor | None = None
) -> dict[str, Baseline]:
    """The baselines, fitted on training snapshots, by the names that tables give them.

    Arguments:
        trained: Of what split and statistics.
        fields: The data.
        wanted: Names in `BASELINES`; `oi_solenoidal` is left out, with a note, where the flow has divergence.
        training: The snapshots, where they are read already.
    """
    training = training_fields(trained, fields) if training is None else training
    share = trained.statistics.divergence_rms / trained.statistics.vorticity_rms
    if "oi_solenoidal" in wanted and not share < SOLENOIDAL:
        print(f"note: oi_solenoidal is left out: the divergence of the data is {share:.2g} of their vorticity")
        wanted = [name for name in wanted if name != "oi_solenoidal"]
    return {BASELINES[name].label: BASELINES[name].make().fit(training.numpy(), fields.grid) for name in wanted}


def baseline_fill(
    kind: BaselineKind,
    baseline: Baseline,
    cases: Cases,
    *,
    floor: float,
    before: Tensor | None = None,
    progress: Callable[[int], None] = lambda fields: None,
) -> Callable[[slice], Estimate]:
    """A function that fills the cases of a slice by a baseline; a law comes with its standard deviation.

    Arguments:
        kind: Which it is.
        baseline: The same, fitted.
        cases: The cases.
        floor: The least error of an observation, in the units of the data.
        before: The snapshot before each case, `(N, 2, H, W)`.
        progress: Called with 1 after each field.
    """

    def observation(case: int) -> tuple[Any, ...]:
        sigma = cases.sigma_obs[case].double().square().mean(dim=0).sqrt().nan_to_num(0.0, posinf=0.0)
        error = np.maximum(sigma.item() if sigma.numel() == 1 else sigma.numpy(), floor)
        return cases.y[case].numpy(), cases.observed[case, 0].numpy(), error

    def estimate(case: int) -> tuple[np.ndarray, ...]:
        if kind.law:
            return baseline.posterior(*observation(case))
        return (baseline.fill(*observation(case), previous=None if before is None else before[case].numpy()),)

    def fields(chosen: slice) -> Estimate:
        found = []
        for case in range(*chosen.indices(len(cases.y))):
            found.append(estimate(case))
            progress(1)
        mean, *std = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
        return Estimate(mean[None], *std)

    return fields
