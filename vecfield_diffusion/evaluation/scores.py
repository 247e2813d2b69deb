"""The one table of scores: what each is called, its unit, which way is better and, where it has one, its formula.

Scores are functions of sums over cells (see `metrics.sums`), so that a case, all cases and a resample of them are
scored by one formula. To add a score, add an entry to `SCORES`: what is printed, written to `scores.csv` and set into
the report reads this table. Scores that are no functions of those sums, such as distances of spectra, have no formula
here; the module that computes them is named beside them.

With the ensemble mean m, the truth y and the unbiased variance s^2 of a cell,

    rmse_component = sqrt(mean (m - y)^2)         rmse_vector = sqrt(mean |m - y|^2) = sqrt(2) rmse_component
    relative_l2    = |m - y| / |y|                skill       = 1 - mean |m - y|^2 / mean |r - y|^2, r a climatology
    spread         = sqrt(mean s^2)               spread_skill = sqrt((M+1)/M) spread / rmse_component

A calibrated ensemble has spread_skill 1: there y is one more draw, so E (m - y)^2 = (1 + 1/M) Var. Of the directions,
with w = u + i v and the angle of two vectors counted from y to m, counterclockwise, in degrees (Kundu 1976, eq. 3.1),

    correlation exp(i veering) = sum w_y* w_m / sqrt(sum |w_y|^2 sum |w_m|^2)      angular_error = mean |angle|

Coverage is read off the rank r of y among the members. If y is one more draw, the interval from x_(k) to x_(M+1-k)
holds it with probability (M + 1 - 2k) / (M + 1), whatever the distribution; the levels between those are interpolated
linearly (k = 0 is the whole line), which keeps the expectation exact for every M, where sample quantiles do not. The
reliability index is the sum of |share - 1/(M + 1)| over the ranks (Delle Monache et al. 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Sums over cells by name, `(...)` each, those of the ranks `(..., M + 1)`.
Sums = Mapping[str, Tensor]
Better = Literal["lower", "higher"] | float
Place = Literal["fill", "table", "report", "series"]

_DEGREES, _METRES, _SECONDS, _NONE = "degrees", "m", "s", "1"
_VELOCITY, _RATE = "velocity", "velocity per length"


@dataclass(frozen=True)
class Definition:
    """What is known of a score without computing it.

    Arguments:
        words: What a table calls it.
        unit: A unit, or `velocity` and `velocity per length` for those of the fields.
        better: `lower`, `higher`, or the value that it has at best; None where neither is better.
        formula: The score `(...)` of sums `(...)`; None where it is not a function of them.
        needs: The sums that not all callers gather; without them the score is left out.
        shown: The tables that have a column for it: `fill` (infer.py), `table` (evaluate.py), `report` and, of
            trajectories, `series`.
    """

    words: str
    unit: str = _NONE
    better: Better | None = None
    formula: Callable[[Sums], Tensor] | None = None
    needs: Sequence[str] = ()
    shown: Sequence[Place] = ()

    @property
    def direction(self) -> str:
        """Which way is better, for the head of a column: `lower`, `higher`, `best 1`."""
        return "" if self.better is None else self.better if isinstance(self.better, str) else f"best {self.better:g}"

    def badness(self, value: float) -> float:
        """A number that is the less, the better the score is; infinite where there is no value."""
        if self.better is None or math.isnan(value):
            return math.inf
        signed = {"lower": value, "higher": -value}
        return signed[self.better] if self.better in signed else abs(value - float(self.better))


def _rmse(s: Sums) -> Tensor:
    return (s["error"] / (2 * s["cells"])).sqrt()


def _spread(s: Sums) -> Tensor:
    return (s["variance"] / (2 * s["cells"])).sqrt()


def _size(s: Sums) -> Tensor:
    return s["mean"].sqrt() * s["truth"].sqrt()


def _veering(s: Sums) -> Tensor:
    return torch.rad2deg(torch.atan2(s["across"], s["along"])).where(_size(s) > 0, math.nan)


def _spread_skill(s: Sums) -> Tensor:
    members = s["ranks"].shape[-1] - 1
    return _where_spread(s, math.sqrt((members + 1) / members) * _spread(s) / _rmse(s))


def _where_spread(s: Sums, value: Tensor) -> Tensor:
    """`value`, NaN where members do not differ: there is no spread to judge."""
    return value.where(_spread(s) > 0, math.nan)


def _shares(s: Sums) -> Tensor:
    return s["ranks"] / s["ranks"].sum(dim=-1, keepdim=True)


def reliability_index(shares: Tensor) -> Tensor:
    """Returns the distance of rank shares `(..., M + 1)` from flat ones: 0 if calibrated, at most 2 M / (M + 1)."""
    return (shares - 1 / shares.shape[-1]).abs().sum(dim=-1)


def covered(shares: Tensor, level: float) -> Tensor:
    """Returns the coverage `(...)` of the central interval of probability `level` of rank shares `(..., M + 1)`."""
    m = shares.shape[-1] - 1
    outside = (shares + shares.flip(-1)).cumsum(dim=-1)[..., : (m + 1) // 2]
    inside = torch.cat((torch.ones_like(shares[..., :1]), 1 - outside), dim=-1)
    nominal = [1 - 2 * k / (m + 1) for k in range(inside.shape[-1])]
    if m % 2 == 0:
        inside, nominal = torch.cat((inside, torch.zeros_like(shares[..., :1])), dim=-1), [*nominal, 0.0]
    k = next(k for k in range(1, len(nominal)) if nominal[k] <= level + 1e-12)
    part = (level - nominal[k]) / (nominal[k - 1] - nominal[k])
    return inside[..., k] + part * (inside[..., k - 1] - inside[..., k])


def _in_time(words: str, unit: str = _NONE, better: Better | None = None, shown: bool = True) -> Definition:
    """A score of trajectories."""
    return Definition(words, unit, better, shown=("series",) if shown else ())


_ALL: tuple[Place, ...] = ("fill", "table", "report")

#: Every score by the name that `scores.csv` and `metrics.json` know it by, in the order of columns.
SCORES: dict[str, Definition] = {
    "rmse_component": Definition("RMSE, component", _VELOCITY, "lower", _rmse, shown=_ALL),
    "rmse_vector": Definition(
        "RMSE, vector", _VELOCITY, "lower", lambda s: math.sqrt(2) * _rmse(s), shown=("fill", "table", "report")
    ),
    "mae": Definition(
        "absolute error",
        _VELOCITY,
        "lower",
        lambda s: s["absolute"] / (2 * s["cells"]),
        needs=("absolute",),
        shown=("report",),
    ),
    "relative_l2": Definition("relative error", better="lower", formula=lambda s: (s["error"] / s["truth"]).sqrt()),
    "correlation": Definition(
        "correlation",
        better="higher",
        formula=lambda s: torch.hypot(s["along"], s["across"]) / _size(s),
        shown=("fill", "report"),
    ),
    "veering": Definition("veering", _DEGREES, 0.0, _veering),
    "angular_error": Definition("angular error", _DEGREES, "lower", lambda s: s["angle"] / s["angles"]),
    "crps": Definition("CRPS", _VELOCITY, "lower", lambda s: s["crps"] / (2 * s["cells"]), shown=_ALL),
    "energy_score": Definition("energy score", _VELOCITY, "lower", lambda s: s["energy"] / s["cells"]),
    "spread": Definition("spread", _VELOCITY, None, _spread),
    "spread_skill": Definition("spread / error", better=1.0, formula=_spread_skill, shown=_ALL),
    "coverage_50": Definition(
        "in 50 % interval", better=0.5, formula=lambda s: _where_spread(s, covered(_shares(s), 0.5))
    ),
    "coverage_90": Definition(
        "in 90 % interval",
        better=0.9,
        formula=lambda s: _where_spread(s, covered(_shares(s), 0.9)),
        shown=("fill", "report"),
    ),
    "reliability_index": Definition(
        "reliability index", better="lower", formula=lambda s: _where_spread(s, reliability_index(_shares(s)))
    ),
    "skill": Definition(
        "skill over climatology",
        better="higher",
        formula=lambda s: 1 - s["error"] / s["climatology"],
        needs=("climatology",),
    ),
    "brier": Definition(  # of the speed above a threshold, see `events`
        "Brier score", better="lower", formula=lambda s: s["brier"] / s["cells"], needs=("brier",), shown=("report",)
    ),
    "divergence_rms": Definition(
        "divergence, RMS",
        _RATE,
        None,
        lambda s: (s["divergence"] / s["divergence_cells"]).sqrt(),
        needs=("divergence", "divergence_cells"),
    ),
    # Of whole fields: `regions.seam_index`, `comparison.scales`, and the time that a method takes.
    "seam_index": Definition("seam index", better=1.0),
    "spectrum_error": Definition("spectrum error", better="lower", shown=("report",)),
    "effective_resolution": Definition("effective resolution", _METRES, "lower", shown=("report",)),
    "seconds_per_field": Definition("time per field", _SECONDS, "lower"),
    # Of sets of generated fields: `generation.generation_scores`.
    "energy_ratio": Definition("energy ratio", better=1.0),
    "enstrophy_ratio": Definition("enstrophy ratio", better=1.0),
    "spectrum_distance": Definition("spectrum distance", better="lower"),
    "vorticity_distance": Definition("vorticity distance", better="lower"),
    "frechet_distance": Definition("Fréchet distance", better="lower"),
    "sliced_wasserstein": Definition("sliced Wasserstein distance", _VELOCITY, "lower"),
    "memorisation": Definition("distance to training fields", better=1.0),
    # Of trajectories: `trajectory.score_in_time`.
    "rotary_error": _in_time("rotary spectrum error", better="lower"),
    **{f"increments_{k}": _in_time(f"increments over {k}", better=1.0, shown=k == 1) for k in (1, 3, 5)},
    **{f"lag_correlation_{k}": _in_time(f"correlation after {k}", shown=k == 1) for k in (1, 3, 5)},
    **{f"separation_{k}": _in_time(f"drifters after {k}", "km", "lower") for k in (1, 3, 5)},
    # Of the fields that `programs/infer` evaluates the density of.
    "log_likelihood": Definition("log-likelihood", "nats", "higher"),
}


def derive(sums: Sums) -> dict[str, Tensor]:
    """Returns the scores of sums `(...)` by name, `(...)` each; NaN where there is nothing to divide by.

    Arguments:
        sums: As `metrics.sums` gathers them, of any shape `(...)`, ranks `(..., M + 1)`.
    """
    return {
        name: score.formula(sums)
        for name, score in SCORES.items()
        if score.formula is not None and all(key in sums for key in score.needs)
    }


def columns(place: Place) -> list[str]:
    """Returns the names of the scores that a table of this place has a column for, in their order."""
    return [name for name, score in SCORES.items() if place in score.shown]


def unit(name: str, units: str) -> str:
    """Returns the unit of a score of velocities in `units` on a grid in metres; `1` where it has none."""
    found = SCORES[name].unit if name in SCORES else "1"
    return {_VELOCITY: units, _RATE: rate(units)}.get(found, found)


def rate(units: str) -> str:
    """Returns the unit of derivatives in space of velocities in `units` on a grid in metres."""
    return "s-1" if units == "m s-1" else f"{units} m-1"


def heading(name: str, units: str) -> str:
    """Returns the head of a column of the report: the words, the unit in brackets where there is one."""
    of = unit(name, units)
    return SCORES[name].words + ("" if of == _NONE else f" [{superscript(of)}]")


def superscript(units: str) -> str:
    """Returns `m s-1` as `m s⁻¹`."""
    words = [
        word[:-2] + "⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(word[-1])] if word[-2:-1] == "-" and word[-1].isdigit() else word
        for word in units.split()
    ]
    return " ".join(words)
