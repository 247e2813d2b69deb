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
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.trained import Trained

# The table, as `evaluation/baselines.py` is to have it.

#: Correlation of the anomalies with those of the field before, from which that field is worth a baseline.
CORRELATED = 0.2
#: Divergence over vorticity of the training fields, below which a covariance without divergence is suited.
SOLENOIDAL = 0.2


@dataclass(frozen=True)
class BaselineKind:
    """A baseline by what one must know before it is fitted.

    Attributes:
        label: What tables call it.
        make: Makes one that is not fitted.
        blind: Whether it looks at no observation of the present.
        needs_previous: Whether it estimates from the field before, and is left out where that says nothing.
        without_divergence: Whether it is for flows without divergence alone.
    """

    label: str
    make: Callable[[], Baseline]
    blind: bool = False
    needs_previous: bool = False
    without_divergence: bool = False

    def named(self, note: str = "") -> str:
        """Returns the label with a note, such as from when the field is that persistence keeps."""
        return f"{self.label} ({note})" if note else self.label


#: The baselines by the names of `baselines=`.
BASELINES = {
    "climatology": BaselineKind("climatology", Climatology, blind=True),
    "persistence": BaselineKind("persistence", Persistence, blind=True, needs_previous=True),
    "nearest": BaselineKind("nearest", Nearest),
    "linear": BaselineKind("linear", Linear),
    "cubic": BaselineKind("cubic", Cubic),
    "biharmonic": BaselineKind("biharmonic", Biharmonic),
    "oi": BaselineKind("optimal interpolation", OptimalInterpolation),
    "oi_solenoidal": BaselineKind(
        "OI without divergence",
        lambda: OptimalInterpolation("homogeneous", divergence_free=True),
        without_divergence=True,
    ),
    "gappy_pod": BaselineKind("gappy POD", GappyPOD),
    "dineof": BaselineKind("DINEOF", DINEOF),
}


def unsuited(keys: Sequence[str], *, divergence_share: float, persistence: float) -> dict[str, str]:
    """Returns, by key, why some of the baselines do not suit the data.

    Arguments:
        keys: Names in `BASELINES`.
        divergence_share: RMS divergence over RMS vorticity of the training fields.
        persistence: The correlation of the anomalies with those of the field before; NaN where there is none.
    """
    reasons = {}
    for key in keys:
        if BASELINES[key].needs_previous and not persistence >= CORRELATED:
            reasons[key] = f"the correlation with the snapshot before is {persistence:.2g}"
        if BASELINES[key].without_divergence and not divergence_share < SOLENOIDAL:
            reasons[key] = f"the divergence of the data is {divergence_share:.2g} of their vorticity"
    return reasons


def fit_baselines(keys: Sequence[str], training: np.ndarray, grid: Grid) -> dict[str, Baseline]:
    """Returns the baselines `keys` fitted to training fields `(n, 2, H, W)`, by key."""
    return {key: BASELINES[key].make().fit(training, grid) for key in keys}


def _posterior(baseline: Baseline, y: np.ndarray, observed: np.ndarray, error: Any, previous: Any) -> tuple:
    """The mean and the standard deviation, None where there is no law: `Baseline.posterior` is to be this."""
    if isinstance(baseline, OptimalInterpolation):
        return baseline.posterior(y, observed, error)
    return baseline.fill(y, observed, error, previous), None


# What an evaluation does with them.

#: The baseline that checkpoints hold, beside those that are fitted here.
REGRESSION = "regression"
#: The least error of an observation for optimal interpolation, in standard deviations of the data.
NUGGET = 0.01
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


def baseline_fill(
    baseline: Baseline,
    cases: Cases,
    *,
    floor: float,
    before: Tensor | None = None,
    progress: Callable[[int], None] = lambda fields: None,
) -> Callable[[slice], Estimate]:
    """A function that fills the cases of a slice by a baseline; a law comes with its standard deviation.

    Arguments:
        baseline: Fitted.
        cases: The cases.
        floor: The least error of an observation, in the units of the data.
        before: The snapshot before each case, `(N, 2, H, W)`.
        progress: Called with 1 after each field.
    """

    def estimate(case: int) -> tuple[np.ndarray, np.ndarray | None]:
        sigma = cases.sigma_obs[case].double().square().mean(dim=0).sqrt().nan_to_num(0.0, posinf=0.0)
        error = np.maximum(sigma.item() if sigma.numel() == 1 else sigma.numpy(), floor)
        previous = None if before is None else before[case].numpy()
        found = _posterior(baseline, cases.y[case].numpy(), cases.observed[case, 0].numpy(), error, previous)
        progress(1)
        return found

    def fields(chosen: slice) -> Estimate:
        means, stds = zip(*(estimate(case) for case in range(*chosen.indices(len(cases.y)))), strict=True)
        law = all(std is not None for std in stds)
        return Estimate(torch.from_numpy(np.stack(means))[None], torch.from_numpy(np.stack(stds)) if law else None)

    return fields
