"""Forecasts in an evaluation: nothing is observed of a case and of the frames just before it.

Such a case lies a number of steps ahead of the last frame that is observed, through the mask of the evaluation or, with
`masks=[ahead]`, wholly. All methods see the same frames before it, and none sees what comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Ahead, Full, Mask
from vecfield_diffusion.data.sequences import MISSING, Integers, Runs
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.baselines import BASELINES
from vecfield_diffusion.evaluation.series import SERIES_BASELINES, ObservedSeries
from vecfield_diffusion.programs.method import node_of


@dataclass(frozen=True)
class View:
    """What is observed around the cases.

    Arguments:
        name: What tables call it.
        option: The option of `mask=` that it is made of.
        mask: What is observed of a frame.
        ahead: How many steps the cases lie ahead of the last frame that is observed; 0 where they are observed.
        whole: Whether the mask hides nothing at all, rather than what files lack at other times.
    """

    name: str
    option: str
    mask: Mask
    ahead: int = 0
    whole: bool = False


def views(config: Mapping[str, Any]) -> list[View]:
    """Returns all that `masks=` and `horizon=` ask for.

    Raises:
        UserError: A mask that hides nothing, or a horizon that is none.
    """
    given = config["horizon"]
    horizons = [given] if isinstance(given, int) else list(given)
    if not horizons or min(horizons) < 0:
        raise UserError(f"horizon={given}: expected a number of steps >= 0, or some, such as horizon=[1,3,6]")
    masks = {name: build(node_of(config, "mask", name), "mask", trusted=True) for name in config["masks"]}
    if not masks or None in masks.values():
        raise UserError(f"masks={list(masks)}: name options of conf/mask that hide something, such as masks=[block]")
    return list(dict.fromkeys(view(name, mask, ahead) for name, mask in masks.items() for ahead in horizons))


def view(option: str, mask: Mask, ahead: int) -> View:
    """Returns a mask at a horizon; `ahead` by itself has its own."""
    if not isinstance(mask, Ahead):
        return View(f"{option}_ahead_{ahead}" if ahead else option, option, mask, ahead)
    ahead = ahead or int(mask.horizon[1])
    inner, whole = (Full(), True) if mask.mask is None else (mask.mask, False)
    return View(f"{option}_{ahead}", option, inner, ahead, whole)


def foretellable(fields: Fields, offered: range, ahead: int) -> Sequence[int]:
    """Returns the snapshots of `offered` with one of the same run at least `ahead` steps before them among these."""
    if not ahead:
        return offered
    runs, chosen = Runs.of(fields), np.asarray(offered)
    begin = {run: int(runs.frame[chosen][runs.run[chosen] == run].min()) for run in np.unique(runs.run[chosen])}
    first = np.array([begin[run] for run in runs.run[chosen]])
    return chosen[runs.frame[chosen] - first >= ahead].tolist()


def earlier(fields: Fields, indices: Sequence[int], ahead: int) -> Integers:
    """Returns the snapshot `ahead` steps before each of some, `(N,)`, -1 where there is none."""
    runs, chosen = Runs.of(fields), np.asarray(indices)
    place = {key: number for number, key in enumerate(zip(runs.run.tolist(), runs.frame.tolist(), strict=True))}
    before = zip(runs.run[chosen].tolist(), (runs.frame[chosen] - ahead).tolist(), strict=True)
    return np.array([place.get(key, MISSING) for key in before])


def foretold(given: Iterable[ObservedSeries], ahead: int, reach: int) -> Iterator[ObservedSeries]:
    """Yields, for each frame that is wanted of some series, what is observed until `ahead` steps before it.

    Arguments:
        given: What is observed, run by run.
        ahead: How many steps the frame lies ahead of the last one that counts.
        reach: How many frames until then count.
    """
    for run in given:
        for frame in run.frames:
            first, last = max(frame - ahead - reach, 0), frame + 1
            y: NDArray[np.float64] = run.y[first:last].copy()
            y[max(len(y) - ahead, 0) :] = np.nan
            yield ObservedSeries(y, run.noise[first:last], [frame - first])


def silent(keys: Iterable[str]) -> dict[str, str]:
    """Returns why some baselines have no forecast, by key."""
    reasons = {}
    for key in keys:
        if key in SERIES_BASELINES and SERIES_BASELINES[key].both:
            reasons[key] = f"without later observations {SERIES_BASELINES[key].both}"
        elif key in BASELINES and not BASELINES[key].blind:
            reasons[key] = "nothing of the present is observed"
    return reasons
