"""`report.html`: one file that says which method fills best, by how much, and whether its spread can be trusted.

Figures are inside the file as PNG, each in two widths, for a desk and for a telephone; it asks nothing of the network.
The sentences follow from the intervals alone, see `verdicts`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from vecfield_diffusion.evaluation import plots
from vecfield_diffusion.evaluation.comparison import Score, Scored, Setting, ratio, row
from vecfield_diffusion.evaluation.generation import UNSEEN, Generated
from vecfield_diffusion.evaluation.scores import SCORES, columns, heading, superscript
from vecfield_diffusion.evaluation.tables import rounded_pair
from vecfield_diffusion.evaluation.trajectory import DRIFTERS, TimeSection
from vecfield_diffusion.evaluation.verdicts import (
    accuracy_sentence,
    certainty_sentence,
    drifters_sentence,
    generated_sentence,
    numbers_sentence,
    spread_sentence,
    too_few,
)

TEMPLATE = Path(__file__).with_name("report.html.j2")
_SIGNS = {"lower": "↓", "higher": "↑", "": ""}

#: Screens up to this width in pixels show the narrow figures, and tables as cards.
_NARROW = 800
#: A caption, and what draws the figure in a width.
Drawing = tuple[str, Callable[[float], bytes]]


@dataclass(frozen=True)
class Section:
    """What was found under one mask.

    Attributes:
        setting: The cases.
        scored: The methods.
        networks: Which of them are networks.
        generated: Where nothing was observed, how the fields compare with unseen ones.
        dates: When each case was, in words.
        independent: How many independent cases they are worth by their correlation in time; None where not known.
        in_time: Of cases that follow one another, how methods fill them as a series.
    """

    setting: Setting
    scored: Sequence[Scored]
    networks: Sequence[str]
    generated: Generated | None = None
    dates: Sequence[str] = ()
    independent: float | None = None
    in_time: TimeSection | None = None

    def find(self, method: str) -> Scored | None:
        """Returns the method of this name, or None."""
        return next((scored for scored in self.scored if scored.method == method), None)

    @cached_property
    def others(self) -> list[Scored]:
        """The methods that are no networks."""
        return [scored for scored in self.scored if scored.method not in self.networks]

    @property
    def doubt(self) -> str | None:
        """A sentence where the cases are too few for a verdict."""
        return too_few(len(self.setting.truth), self.independent)

    def best(self, metric: str) -> Scored | None:
        """Returns the other method that is best in a score on hidden cells; None without other methods."""
        definition = SCORES[metric]
        return min(self.others, key=lambda m: definition.badness(m.scores["hidden"][metric].value), default=None)

    def rows(self, units: str) -> list[dict[str, object]]:
        """Returns the lines of `scores.csv`."""
        mask = self.setting.mask
        found = [line for scored in self.scored for line in scored.rows(mask, units)]
        for name, scores in self._generated_scores().items():
            found += [row(mask, name, metric, "generated", score, units) for metric, score in scores.items()]
        for name, region, metric, score in self._time_scores():
            found.append(row(mask, name, metric, region, score, units))
        return found

    def generated_lines(self) -> list[dict[str, object]]:
        """Returns the scores of generated fields, a line for each set of fields."""
        return [
            {"fields": name} | {metric: score.value for metric, score in scores.items()}
            for name, scores in self._generated_scores().items()
        ]

    def time_lines(self) -> list[dict[str, object]]:
        """Returns the scores in time, a line for each method and for what it is of: the mean, or the members."""
        lines: dict[tuple[str, str], dict[str, object]] = {}
        for name, region, metric, score in self._time_scores():
            line = lines.setdefault((name, region), {"mask": self.setting.mask, "method": name, "of": region})
            line[metric] = score.value
        return list(lines.values())

    def sentences(self, units: str) -> list[str]:
        """Returns what was found, a sentence for each question."""
        found = [self.doubt]
        for name in self.networks:
            found += self._judged(self.find(name), units) if self.doubt is None else self._told(self.find(name), units)
            if self.generated is not None:
                found.append(generated_sentence(name, self.generated.scores))
            if self.in_time is not None:
                found.append(drifters_sentence(name, self.in_time, self.networks))
        return [sentence for sentence in found if sentence]

    def _judged(self, ours: Scored, units: str) -> list[str | None]:
        found = []
        if (other := self.best("rmse_component")) is not None:
            found.append(accuracy_sentence(ours, other, ratio(ours, other, "rmse_component"), units))
        if (other := self.best("crps")) is not None and ours.law != "point":
            found.append(certainty_sentence(ours, other, ratio(ours, other, "crps")))
        return [*found, spread_sentence(ours)]

    def _told(self, ours: Scored, units: str) -> list[str | None]:
        return [numbers_sentence(ours, self.best("rmse_component"), units)]

    def _time_scores(self) -> Iterator[tuple[str, str, str, Score]]:
        """Method, what of it (`mean` or `members`), name and score of all scores in time."""
        if self.in_time is not None:
            for of in [*self.in_time.found, self.in_time.truth]:
                for region, scores in of.scores.items():
                    yield from ((of.method, region, metric, score) for metric, score in scores.items())

    def _generated_scores(self) -> Mapping[str, Mapping[str, Score]]:
        return {} if self.generated is None else self.generated.scores


def render(
    title: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
    units: str,
    coordinates: plots.Coordinates | None = None,
    *,
    data: str = "",
    network: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Returns the report as the text of an HTML file that needs no other.

    Arguments:
        title: The name of the evaluation.
        sections: What was found, by mask.
        provenance: What it was made of, by label.
        units: Of the velocities.
        coordinates: Where the cells lie, for the axes of maps.
        data: The data in a few words, for the title.
        network: The networks in a few words, for the title.
        notes: What a reader has to know before all numbers, such as that the snapshots are unlike those of training.
    """
    # Not all methods stand in all sections: a forecast has others.
    methods = dict.fromkeys(scored.method for section in sections for scored in section.scored)
    networks = dict.fromkeys(name for section in sections for name in section.networks)
    styles = plots.method_styles(list(networks), list(methods))
    seconds = {name: [found.seconds for section in sections if (found := section.find(name))] for name in styles}
    costs = {name: sum(found) / len(found) for name, found in seconds.items()}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{network} on {data}" if network and data else network or data or title,
        name=title,
        notes=notes,
        parts=[_part(section, units, styles, coordinates) for section in sections],
        pair=lambda score: rounded_pair(*score[:3]),
        columns={name: _heading(name, units) for name in columns("report")},
        generated={name: _heading(name, units) for name in SCORES},
        time_columns={name: _heading(name, units) for name in columns("series")},
        cost={"words": "Time on the machine that made this report"}
        | embedded(partial(plots.figure_cost, costs, styles)),
        provenance=provenance,
        drifters=DRIFTERS,
        narrow=_NARROW,
    )


def _heading(name: str, units: str) -> str:
    """The head of a column: words, unit and which way is better."""
    direction = SCORES[name].direction
    sign = _SIGNS.get(direction, direction.replace("best ", "→ "))
    return f"{heading(name, units)} {sign}".rstrip()


def _part(
    section: Section,
    units: str,
    styles: plots.Styles,
    coordinates: plots.Coordinates | None,
) -> dict[str, Any]:
    """What the template needs to know of one mask."""
    setting = section.setting
    return {
        "mask": setting.mask,
        "observed": float(setting.observed[..., setting.grid.valid].double().mean()),
        "cases": len(setting.truth),
        "dates": list(section.dates),
        "sentences": section.sentences(units),
        "table": _table(section),
        "generated": {} if section.generated is None else section.generated.scores,
        "in_time": section.time_lines(),
        "step": "" if section.in_time is None else f"{section.in_time.step:.3g} {section.in_time.unit}",
        "figures": [{"words": words} | embedded(draw) for words, draw in drawings(section, units, styles, coordinates)],
    }


def embedded(draw: Callable[..., bytes]) -> dict[str, str]:
    """Returns both widths of a figure, as they stand in the file."""
    return {
        name: "data:image/png;base64," + base64.b64encode(draw(width=width)).decode("ascii")
        for name, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    }


def _table(section: Section) -> list[dict[str, Any]]:
    """The methods, networks first, then by their error, with each score and half its interval."""

    def order(scored: Scored) -> tuple[bool, float]:
        return scored.method not in section.networks, scored.scores["hidden"]["rmse_component"].value

    def score(scored: Scored, name: str) -> Score:
        return (scored.scores["field"] | scored.scores["hidden"])[name]

    best = section.best("rmse_component")
    least = {
        name: min(SCORES[name].badness(score(scored, name).value) for scored in section.scored)
        for name in columns("report")
    }
    return [
        {
            "method": scored.method,
            "network": scored.method in section.networks,
            "best": scored is best,
            "seconds": f"{scored.seconds:.2g}",
            "scores": {
                name: (
                    *rounded_pair(*score(scored, name)[:3]),
                    section.doubt is None and SCORES[name].badness(score(scored, name).value) == least[name] < np.inf,
                )
                for name in columns("report")
            },
        }
        for scored in sorted(section.scored, key=order)
    ]


def drawings(
    section: Section, units: str, styles: plots.Styles, coordinates: plots.Coordinates | None
) -> list[Drawing]:
    """Returns the figures of one mask in their order: a caption, and what draws it in a width."""
    found = [_example(section, units, coordinates), _errors(section, units, styles)]
    laws = {scored.method: _calibration(scored) for scored in section.scored if scored.law != "point"}
    if laws:
        event = f"{section.setting.threshold:.3g} {superscript(units)}"
        words = f"Calibration on hidden cells: dotted is a calibrated method; the event is a speed above {event}"
        found.append((words, partial(plots.figure_calibration, laws, units, styles)))
    if sum(name.startswith("hidden ") for name in section.setting.regions) > 1:
        found.append(_by_distance(section, units, styles))
    if section.scored[0].spectrum is not None:
        found.append(_spectra(section, styles))
    if section.generated is not None:
        words = "Generated and unseen fields"
        found.append((words, partial(_draw_generated, section.generated, styles)))
    if section.in_time is not None:
        found.append(_series(section.in_time, units, styles))
    return found


def _example(section: Section, units: str, coordinates: plots.Coordinates | None) -> Drawing:
    """The middle case: truth, observations, the first network and the best other method."""
    setting, case = section.setting, section.setting.example
    first, other = section.find(section.networks[0]), section.best("rmse_component")
    date = section.dates[case] if section.dates else f"snapshot {setting.numbers[case]}"
    draw = partial(
        plots.figure_example,
        setting.truth[case].numpy(),
        setting.observed[case].numpy(),
        first.example.members.numpy(),
        [] if other is None else [(other.method, other.example.members[0].numpy())],
        setting.grid,
        units,
        coordinates,
        date=date,
    )
    return f"{date}, filled by {first.method}", draw


def _errors(section: Section, units: str, styles: plots.Styles) -> Drawing:
    scores = {
        metric: {scored.method: scored.scores["hidden"][metric][:3] for scored in section.scored}
        for metric in ("rmse_component", "crps")
    }
    words = "Errors on hidden cells with 95 % intervals (methods that give one field: CRPS is the absolute error)"
    return words, partial(plots.figure_scores, scores, units, styles)


def _by_distance(section: Section, units: str, styles: plots.Styles) -> Drawing:
    bins = [name for name in section.setting.regions if name.startswith("hidden ")]
    errors = {scored.method: [scored.scores[name]["rmse_component"][:3] for name in bins] for scored in section.scored}
    spreads = {scored.method: [scored.scores[name]["spread"].value for name in bins] for scored in section.scored}
    labels = [_distance_label(name.removeprefix("hidden ")) for name in bins]
    words = "Error (RMSE of a component) and spread (dashed) by the distance to the nearest observation"
    return words, partial(plots.figure_distance, labels, errors, spreads, units=units, styles=styles)


def _distance_label(name: str) -> str:
    """A bin of distances as a short label: `2 < d <= 4` as `2-4`."""
    return name.replace("d <= ", "≤ ").replace(" < ≤ ", "–").replace("d > ", "> ")


def _spectra(section: Section, styles: plots.Styles) -> Drawing:
    first = section.scored[0]
    energy = {scored.method: scored.spectrum.numpy() for scored in section.scored}
    noise = {scored.method: scored.noise.numpy() for scored in section.scored}
    waves = first.wavenumber.numpy(), first.signal.numpy()
    words = "Kinetic energy by scale, of members (not their mean); energy of the error of the mean over the truth's"
    return words, partial(plots.figure_spectra, *waves, energy, noise, styles=styles)


def _series(found: TimeSection, units: str, styles: plots.Styles) -> Drawing:
    """Temporal spectra of members, and how far drifters come apart from the true ones."""
    energy = {of.method: of.spectrum.numpy() for of in found.found if of.spectrum is not None}
    away = {of.method: {name: far.numpy() for name, far in of.separation.items()} for of in found.found}
    words = "The series: energy by frequency, of members (not their mean)"
    if any(away.values()):
        words += "; distance of drifters from the true ones, in members (lines) and in the mean (dashed)"
    waves = found.frequency.numpy(), found.truth.spectrum.numpy()
    return words, partial(plots.figure_series, *waves, energy, away, unit=found.unit, units=units, styles=styles)


def _calibration(scored: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Spread and error of bins with a hundredth of the values or more, the shares of the ranks, and the reliability."""
    count, variance, error = scored.bins.numpy()
    used = count > 0.01 * count.sum()
    ranks = scored.sums["hidden"]["ranks"].sum(dim=0).numpy()
    return (
        np.sqrt(variance[used] / count[used]),
        np.sqrt(error[used] / count[used]),
        ranks / ranks.sum(),
        scored.reliability.numpy(),
    )


def _draw_generated(found: Generated, styles: plots.Styles, width: float) -> bytes:
    energy = {name: spectrum.numpy() for name, spectrum in found.spectra.items()}
    waves, law = (found.wavenumber.numpy(), energy), (found.edges, found.densities)
    return plots.figure_generation(*waves, *law, reference=UNSEEN, styles=styles, width=width)
