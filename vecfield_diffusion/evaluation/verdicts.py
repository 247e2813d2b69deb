"""What scores say, in words: a verdict where the evidence carries one, and otherwise that there is too little of it.

A method is better or worse where the interval of the ratio to the other one leaves out 1. It is calibrated where the
interval of spread over error lies within a tenth of 1. Intervals themselves are no evidence below `ENOUGH` independent
cases: the bootstrap draws from the few that there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vecfield_diffusion.evaluation.comparison import Score, Scored
from vecfield_diffusion.evaluation.generation import HALVES
from vecfield_diffusion.evaluation.scores import superscript
from vecfield_diffusion.evaluation.tables import rounded
from vecfield_diffusion.evaluation.trajectory import TimeSection

#: Independent cases that a verdict needs.
ENOUGH = 10
#: How far the spread may be from the error of a method that is called calibrated.
TOLERANCE = 0.1


def too_few(cases: int, independent: float | None) -> str | None:
    """Returns a sentence where the cases are too few for any verdict, else None.

    Arguments:
        cases: How many there are.
        independent: How many independent ones they are worth by their correlation in time; None where that is not
            known: then all of them.
    """
    worth = cases if independent is None else min(independent, cases)
    if worth >= ENOUGH:
        return None
    said = "" if independent is None else f", which resemble each other and count as {worth:.2g} independent ones"
    return (
        f"Too few to tell which method is better, or whether a spread can be trusted: {cases} unseen snapshots{said}. "
        f"A verdict needs {ENOUGH} independent ones."
    )


def compared(quotient: Score) -> str:
    """Returns in words how one error relates to another: `is 12 % (95 % interval 7 to 16 %) smaller than`."""
    value, low, high = quotient[:3]
    if not (low > 1 or high < 1):
        return f"does not clearly differ (ratio {value:.2f}, 95 % interval {low:.2f} to {high:.2f}) from"
    if value > 2:
        return f"is {value:.1f} (95 % interval {low:.1f} to {high:.1f}) times"
    least, most = sorted(100 * abs(1 - end) for end in (low, high))
    word = "smaller" if high < 1 else "larger"
    return f"is {100 * abs(1 - value):.0f} % (95 % interval {least:.0f} to {most:.0f} %) {word} than"


def accuracy_sentence(ours: Scored, other: Scored, quotient: Score, units: str) -> str:
    """Returns in words how the error of a method relates to that of another one, the ratio of both being known."""
    values = [f"{method.scores['hidden']['rmse_component'].value:.3g}" for method in (ours, other)]
    return (
        f"The error of {ours.method} {compared(quotient)} that of {other.method}, the best other method "
        f"(RMSE of hidden components {values[0]} against {values[1]} {superscript(units)})."
    )


def certainty_sentence(ours: Scored, other: Scored, quotient: Score) -> str:
    """Returns in words how the CRPS of a method relates to that of another one."""
    return f"The CRPS of {ours.method}, the error of all that it gives, {compared(quotient)} that of {other.method}."


def spread_sentence(ours: Scored) -> str | None:
    """Returns in words whether a method knows how wrong it is; None for one that has no spread."""
    value, low, high = ours.scores["hidden"]["spread_skill"][:3]
    if math.isnan(value):
        return None
    numbers = f"{value:.2f} of the error (95 % interval {low:.2f} to {high:.2f})"
    cover = f"; {100 * ours.scores['hidden']['coverage_90'].value:.0f} % of the truth lies in its 90 % intervals"
    if low >= 1 - TOLERANCE and high <= 1 + TOLERANCE:
        verdict = "is calibrated: its spread is"
    elif abs(value - 1) > TOLERANCE and not low <= 1 <= high:
        verdict = f"is {'overconfident' if value < 1 else 'underconfident'}: its spread is"
    else:
        verdict = "may be calibrated, more cases would tell: its spread is"
    return f"Spread: {ours.method} {verdict} {numbers}{cover}."


def numbers_sentence(ours: Scored, other: Scored | None, units: str) -> str:
    """Returns the errors of a method and of another one, without a verdict."""
    errors = [
        f"{rounded(*method.scores['hidden']['rmse_component'][:3])} {superscript(units)} for {method.method}"
        for method in (ours, other)
        if method is not None
    ]
    return f"RMSE of hidden components: {', '.join(errors)}."


def generated_sentence(name: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """Returns in words how generated fields compare with unseen ones."""
    ours, chance = scores[name], scores[HALVES]["vorticity_distance"].value
    energy, enstrophy, copies = (
        f"{value:.2f} ({low:.2f} to {high:.2f})"
        for value, low, high, *_ in (ours[key] for key in ("energy_ratio", "enstrophy_ratio", "memorisation"))
    )
    return (
        f"Generated: fields of {name} have {energy} of the energy and {enstrophy} of the enstrophy of unseen ones; "
        f"their vorticity is {ours['vorticity_distance'].value:.2g} standard deviations away (chance: {chance:.2g}); "
        f"they are {copies} times as far from the training fields as unseen ones are (0: copies). In brackets: 95 % "
        "intervals."
    )


def drifters_sentence(name: str, found: TimeSection, networks: Sequence[str]) -> str | None:
    """Returns where drifters end in a network and in the other method that carries them best; None where none do."""
    away = {kind: f"{float(far[-1]):.3g} km in its {kind}" for kind, far in found.find(name).separation.items()}
    if not away:
        return None
    steps, other = len(found.find(name).separation["mean"]), found.nearest(networks)
    text = f"After {steps} steps drifters in {name} are {' and '.join(away.values())} from the true ones"
    return text + (f"; in {other.method}, {float(other.separation['mean'][-1]):.3g} km." if other else ".")
