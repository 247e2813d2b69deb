"""`report.html`: one file that says which method fills best, by how much, and whether its spread can be trusted.

Figures are inside the file as PNG; it asks nothing of the network. The sentences follow from the intervals alone: a
method is better or worse where the interval of the ratio to the best other method leaves out 1, calibrated where its
spread is within a tenth of its error.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

from vecfield_diffusion.evaluation import plots
from vecfield_diffusion.evaluation.comparison import Score, Scored, Setting, ratio, row, unit
from vecfield_diffusion.evaluation.generation import generation_scores
from vecfield_diffusion.evaluation.physical import measured
from vecfield_diffusion.evaluation.spectra import spectra
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import vorticity

#: How far the spread may be from the error of a method that is called calibrated.
TOLERANCE = 0.1
#: Scores in the tables of the report, and the words for them; of hidden cells unless they are those of the field.
COLUMNS = {
    "rmse_component": "RMSE, component",
    "rmse_vector": "RMSE, vector",
    "mae": "absolute error",
    "crps": "CRPS",
    "spread_skill": "spread / error",
    "coverage_90": "in 90 % interval",
    "correlation": "correlation",
    "spectrum_error": "spectrum error, whole field",
    "effective_resolution": "effective resolution, whole field",
}
UNSEEN, HALVES = "unseen fields", "halves of the unseen fields"
TEMPLATE = Path(__file__).with_name("report.html.j2")


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
        scores = {name: generation_scores(each, reference, train, grid) for name, each in fields.items()}
        scores[HALVES] = generation_scores(reference[:half], reference[half:], train, grid, block=None)
        sets = {UNSEEN: reference, **fields}
        waves = {name: spectra(each, grid) for name, each in sets.items()}
        whole, first = waves[UNSEEN].whole, waves[UNSEEN]
        curls = {name: _curl(each, grid) for name, each in sets.items()}
        top = float(np.quantile(np.abs(curls[UNSEEN]), 0.9999)) * 1.3 or 1.0
        edges = np.linspace(-top, top, 61)
        densities = {name: np.histogram(each, edges)[0] / each.size / np.diff(edges) for name, each in curls.items()}
        means = {name: each.energy.mean(dim=0)[:whole] for name, each in waves.items()}
        return cls(scores, first.wavenumber[:whole], means, edges, densities)


def _curl(fields: Tensor, grid: Grid) -> np.ndarray:
    flat, inside = measured(fields, grid)
    return vorticity(flat, inside)[:, 0, inside.valid].flatten().numpy()


@dataclass(frozen=True)
class Section:
    """What was found under one mask.

    Attributes:
        setting: The cases.
        scored: The methods.
        networks: Which of them are networks.
        generated: Where nothing was observed, how the fields compare with unseen ones.
    """

    setting: Setting
    scored: Sequence[Scored]
    networks: Sequence[str]
    generated: Generated | None = None

    def find(self, method: str) -> Scored | None:
        """The method of this name."""
        return next((each for each in self.scored if each.method == method), None)

    @cached_property
    def others(self) -> list[Scored]:
        """The methods that are no networks."""
        return [each for each in self.scored if each.method not in self.networks]

    def best(self, metric: str) -> Scored | None:
        """The other method with the least of a score on hidden cells."""
        return min(self.others, key=lambda each: each.scores["hidden"][metric].value, default=None)

    def rows(self, units: str) -> list[dict[str, object]]:
        """The lines of `scores.csv`."""
        found = [line for each in self.scored for line in each.rows(self.setting.mask, units)]
        for name, values in ({} if self.generated is None else self.generated.scores).items():
            told = (self.setting.mask, name)
            found += [row(*told, metric, "generated", score, units) for metric, score in values.items()]
        return found

    def generated_lines(self) -> list[dict[str, object]]:
        """The scores of generated fields, a line for each set of fields."""
        found = {} if self.generated is None else self.generated.scores
        return [{"fields": name} | {key: score.value for key, score in each.items()} for name, each in found.items()]

    def sentences(self, units: str) -> list[str]:
        """What was found, a sentence for each question."""
        found = []
        for name in self.networks:
            ours = self.find(name)
            found += filter(None, (self._accuracy(ours, units), self._certainty(ours), spread_sentence(ours)))
            if self.generated is not None:
                found.append(generated_sentence(name, self.generated.scores))
        return found

    def _accuracy(self, ours: Scored, units: str) -> str | None:
        other = self.best("rmse_component")
        if other is None:
            return None
        values = [f"{each.scores['hidden']['rmse_component'].value:.3g}" for each in (ours, other)]
        return (
            f"The error of {ours.method} {compared(ratio(ours, other, 'rmse_component'))} that of {other.method}, the "
            f"best other method (RMSE of hidden components {values[0]} against {values[1]} {units})."
        )

    def _certainty(self, ours: Scored) -> str | None:
        other = self.best("crps")
        if other is None or ours.law == "point":
            return None
        quotient = compared(ratio(ours, other, "crps"))
        return f"The CRPS of {ours.method}, the error of all that it says, {quotient} that of {other.method}."


def compared(quotient: Score) -> str:
    """In words, how one error relates to another: `is 12 % (95 % interval 7 to 16 %) smaller than`."""
    value, low, high = quotient[:3]
    if not (low > 1 or high < 1):
        return f"does not clearly differ (ratio {value:.2f}, 95 % interval {low:.2f} to {high:.2f}) from"
    if value > 2:
        return f"is {value:.1f} (95 % interval {low:.1f} to {high:.1f}) times"
    least, most = sorted(100 * abs(1 - each) for each in (low, high))
    word = "smaller" if high < 1 else "larger"
    return f"is {100 * abs(1 - value):.0f} % (95 % interval {least:.0f} to {most:.0f} %) {word} than"


def spread_sentence(ours: Scored) -> str | None:
    """In words, whether a method knows how wrong it is."""
    value, low, high = ours.scores["hidden"]["spread_skill"][:3]
    if math.isnan(value):
        return None
    numbers = f"{value:.2f} of the error (95 % interval {low:.2f} to {high:.2f})"
    cover = f"; {100 * ours.scores['hidden']['coverage_90'].value:.0f} % of the truth lies in its 90 % intervals"
    if abs(value - 1) <= TOLERANCE:
        said = "is calibrated: its spread is"
    elif low <= 1 <= high:
        said = "may be calibrated, more cases would tell: its spread is"
    else:
        said = f"is {'overconfident' if value < 1 else 'underconfident'}: its spread is"
    return f"Spread: {ours.method} {said} {numbers}{cover}."


def generated_sentence(name: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """In words, how generated fields compare with unseen ones."""
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


def render(
    title: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
    units: str,
    coordinates: plots.Coordinates | None = None,
) -> str:
    """The report as the text of an HTML file that needs no other.

    Arguments:
        title: Its name.
        sections: What was found, by mask.
        provenance: What it was made of, by label.
        units: Of the velocities.
        coordinates: Where the cells lie, for the axes of maps.
    """
    styles = plots.method_styles(sections[0].networks, [each.method for each in sections[0].scored])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    seconds = {name: [each.find(name).seconds for each in sections] for name in styles}
    costs = {name: sum(found) / len(found) for name, found in seconds.items()}
    parts = [
        {
            "mask": each.setting.mask,
            "observed": float(each.setting.observed[..., each.setting.grid.valid].double().mean()),
            "cases": len(each.setting.truth),
            "sentences": each.sentences(units),
            "table": _table(each),
            "generated": {} if each.generated is None else each.generated.scores,
            "figures": [(name, _embedded(picture)) for name, picture in figures(each, units, styles, coordinates)],
        }
        for each in sections
    ]
    return template.render(
        title=title,
        parts=parts,
        cell=_cell,
        columns={name: f"{words} [{_brief(unit(name, units))}]".replace(" [1]", "") for name, words in COLUMNS.items()},
        cost=_embedded(plots.figure_cost(costs, styles)),
        provenance=provenance,
    )


def _brief(units: str) -> str:
    return units.replace("-1", "⁻¹")


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _table(section: Section) -> list[dict[str, Any]]:
    """The methods, networks first, then by their error, with value and half the interval of each score."""

    def order(each: Scored) -> tuple[bool, float]:
        return each.method not in section.networks, each.scores["hidden"]["rmse_component"].value

    best = section.best("rmse_component")
    return [
        {
            "method": each.method,
            "network": each.method in section.networks,
            "best": each is best,
            "seconds": f"{each.seconds:.2g}",
            "scores": {name: _cell((each.scores["field"] | each.scores["hidden"])[name]) for name in COLUMNS},
        }
        for each in sorted(section.scored, key=order)
    ]


def _cell(score: Score) -> str:
    if not math.isfinite(score.value):
        return "–" if math.isnan(score.value) else "∞"
    half = (score.high - score.low) / 2
    least = half if 0 < half < math.inf else abs(score.value) / 100
    digits = max(0, min(6, 1 - math.floor(math.log10(least)))) if least > 0 else 4
    return f"{score.value:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def figures(
    section: Section, units: str, styles: Mapping[str, Mapping[str, Any]], coordinates: plots.Coordinates | None
) -> list[tuple[str, bytes]]:
    """The pictures of one mask as PNG, each with what it shows."""
    setting, first, other = section.setting, section.find(section.networks[0]), section.best("rmse_component")
    case = setting.example
    fills = [] if other is None else [(other.method, other.example.members[0].numpy())]
    example = plots.figure_example(
        setting.truth[case].numpy(),
        setting.observed[case].numpy(),
        first.example.members.numpy(),
        fills,
        setting.grid,
        units,
        coordinates,
    )
    found = [(f"Snapshot {setting.numbers[case]}, {first.method}: members, spread and error", example)]
    found.append(("Scores on hidden cells with 95 % intervals", plots.figure_scores(_scores(section), units, styles)))
    laws = {each.method: _calibration(each) for each in section.scored if each.law != "point"}
    if laws:
        words = "Calibration on hidden cells: the dotted lines are those of a calibrated method"
        found.append((words, plots.figure_calibration(laws, units, styles)))
    bins = [name for name in setting.regions if name.startswith("hidden ")]
    if len(bins) > 1:
        labels = [name.removeprefix("hidden ") for name in bins]
        curves = {each.method: [each.scores[name]["rmse_component"][:3] for name in bins] for each in section.scored}
        spreads = {each.method: [each.scores[name]["spread"].value for name in bins] for each in section.scored}
        words = "Error (RMSE of a component) and spread (dashed) by the distance to the nearest observation"
        found.append((words, plots.figure_distance(labels, curves, spreads, units, styles)))
    if first.spectrum is not None:
        energy = {each.method: each.spectrum.numpy() for each in section.scored}
        noise = {each.method: each.noise.numpy() for each in section.scored}
        waves = (first.wavenumber.numpy(), first.signal.numpy())
        words = "Kinetic energy by scale, of members (not their mean); energy of the error of the mean over the truth's"
        found.append((words, plots.figure_spectra(*waves, energy, noise, styles)))
    if section.generated is not None:
        found.append(("Generated and unseen fields", _generated(section.generated, styles)))
    return found


def _scores(section: Section) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    return {
        each.method: tuple(each.scores["hidden"][name][:3] for name in ("rmse_component", "crps"))
        for each in section.scored
    }


def _calibration(each: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spread and error of bins with a hundredth of the values or more, and the shares of the ranks."""
    count, variance, error = each.bins.numpy()
    used = count > 0.01 * count.sum()
    ranks = each.sums["hidden"]["ranks"].sum(dim=0).numpy()
    return np.sqrt(variance[used] / count[used]), np.sqrt(error[used] / count[used]), ranks / ranks.sum()


def _generated(found: Generated, styles: Mapping[str, Mapping[str, Any]]) -> bytes:
    energy = {name: each.numpy() for name, each in found.spectra.items()}
    return plots.figure_generation(found.wavenumber.numpy(), energy, found.edges, found.densities, UNSEEN, styles)
