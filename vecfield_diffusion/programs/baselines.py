"""The baselines that stand beside a network: which are wanted, and how one fills the cases of a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.ellipses import at_least
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.evaluation.baseline import Baseline
from vecfield_diffusion.evaluation.baselines import BASELINES
from vecfield_diffusion.evaluation.comparison import Estimate
from vecfield_diffusion.evaluation.series import SERIES_BASELINES
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.programs.trained import Trained

#: The baseline that checkpoints hold, beside those that are fitted here.
REGRESSION = "regression"
#: The least error of an observation for optimal interpolation, in standard deviations of the data.
NUGGET = 0.01
#: Training snapshots that baselines are fitted on, at most.
TRAINING = 2000


def chosen_baselines(names: str | Sequence[str], sensor: bool = False) -> list[str]:
    """The baselines that `baselines=` names, in the order of `BASELINES`, then those of series and the regression.

    Arguments:
        names: `all`, or some names.
        sensor: Whether the fields are seen through an instrument: then only those stay that look at no observation,
            and a note says so.

    Raises:
        UserError: A name that there is not.
    """
    known = [*BASELINES, *SERIES_BASELINES, REGRESSION]
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
        sigma = cases.sigma_obs[case].double().nan_to_num(0.0, posinf=0.0)
        if baseline.takes_ellipses and len(sigma) > 1:
            error = at_least(sigma, floor).numpy()
        else:
            sigma = (sigma.square().sum(dim=0) / min(len(sigma), 2)).sqrt()
            error = np.maximum(sigma.item() if sigma.numel() == 1 else sigma.numpy(), floor)
        previous = None if before is None else before[case].numpy()
        found = baseline.posterior(cases.y[case].numpy(), cases.observed[case, 0].numpy(), error, previous)
        progress(1)
        return found

    def fields(chosen: slice) -> Estimate:
        means, stds = zip(*(estimate(case) for case in range(*chosen.indices(len(cases.y)))), strict=True)
        law = all(std is not None for std in stds)
        return Estimate(torch.from_numpy(np.stack(means))[None], torch.from_numpy(np.stack(stds)) if law else None)

    return fields
