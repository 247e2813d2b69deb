"""`python evaluate.py`: scores ensembles beside the baselines on fields that training kept aside, and reports.

Each mask hides some of what is known of the unseen snapshots. Every model and every baseline fills the same cases; what
they give is scored on the hidden cells. With `calibrate=true` the members of each ensemble are scored again with their
spread put right (see `inference/calibration.py`).

With `series=true` the snapshots follow one another, and what a method gives of them is scored as trajectories, too.

With `horizon=` the cases are foretold from the frames that lie so many steps before them; see `ahead.py`.

With `sensor=` the ensembles are conditioned on what an instrument reads of the cells that the mask shows. Cells where
it read anything count as observed, the others are scored; baselines that cannot take such values are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.data.masks import Empty, Full, Mask
from vecfield_diffusion.evaluation.baselines import BASELINES
from vecfield_diffusion.evaluation.comparison import Estimate, Scored, Setting, score
from vecfield_diffusion.evaluation.generation import Generated
from vecfield_diffusion.evaluation.report import Section
from vecfield_diffusion.evaluation.trajectory import TimeSection, score_in_time, time_section
from vecfield_diffusion.inference.calibration import apply_factor
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.inference.locks import shared
from vecfield_diffusion.inference.work_items import shared_out
from vecfield_diffusion.programs.ahead import silent, views
from vecfield_diffusion.programs.baselines import baseline_fill, chosen_baselines
from vecfield_diffusion.programs.compared import Network
from vecfield_diffusion.programs.fill import say_summary
from vecfield_diffusion.programs.filling import at_once, check_ranges
from vecfield_diffusion.programs.in_time import series_fill
from vecfield_diffusion.programs.study import Study
from vecfield_diffusion.programs.twin import TwinExperiment, filler, open_experiments
from vecfield_diffusion.programs.written import Kept, check_writable, print_scores, summary, write_report, write_scores
from vecfield_diffusion.signals import stoppable

#: Generated fields that are compared with unseen ones, at most.
GENERATED = 256

#: What makes a function that fills the cases of a slice, given whom to tell of each field.
Fill = Callable[..., Callable[[slice], Estimate]]


def evaluate(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Scores every method under every mask; prints a table, writes `scores.csv`, then `report.html`.

    Each mask is kept as soon as it is done: the same command goes on where an interrupted one stopped, and processes
    with the same command share the masks.

    Raises:
        UserError: A checkpoint, mask or baseline that does not fit, or a spread that was not calibrated.
        SystemExit: A signal stopped the program (130 for Ctrl-C, 143 for SIGTERM).
    """
    check_ranges(config)
    wanted, asked = chosen_baselines(config["baselines"], sensor=bool(config["sensor"])), views(config)
    sections: list[Section] = []

    def finished() -> str:
        done = ", ".join(section.setting.mask for section in sections) or "no mask"
        return f"{done} finished and kept in {folder}"

    with stoppable(finished):
        study, experiments = open_experiments(config, wanted, asked)
        check_writable(folder)
        with shared(folder / "scores.csv", study.key, folder / "report.html") as share:
            kept = Kept(folder, study.key)
            names = [experiment.name for experiment in experiments]
            sections += kept.all(names)
            for section in sections:
                print(f"{section.setting.mask}: done before")
            for experiment in shared_out(experiments, lambda one: kept.find(one.name) is not None, share):
                kept.add(experiment.name, scored_section(study, experiment))
                sections[:] = kept.all(names)
                write_scores(folder, sections, study.fields.units)
            with share.claim("report", wait=True) as ours:
                if ours:
                    sections[:] = kept.all(names)
                    report(folder, sections, study)
                    share.finish()
                    kept.clear()
    return summary(sections) if sections else {}


def report(folder: Path, sections: Sequence[Section], study: Study) -> None:
    """Prints and writes what was found under all masks."""
    write_scores(folder, sections, study.fields.units)
    print_scores(folder, sections, study.config["members"], study.fields.units)
    write_report(folder, sections, study)


def scored_section(study: Study, experiment: TwinExperiment) -> Section:
    """All methods under one mask, scored."""
    setting, generates = experiment.setting, isinstance(experiment.mask, Empty)
    generated = Collection(-(-GENERATED // len(setting.truth)) if generates else 0)
    series = Collection(study.config["members"] if study.config["series"] and not experiment.ahead else 0)
    scored = []
    for model, cases in experiment.entries:
        keep = [series] if model.regression else [series, generated]
        scored += model_scored(study, model, cases, replace(experiment, entries=[]), keep)
    scored += baselines_scored(study, experiment, series)
    comparison = compare_generated(study, generated) if generates else None
    follows = study.config["series"] and not experiment.ahead  # forecasts are no trajectory
    in_time = scored_in_time(study, setting, series) if follows else None
    return Section(setting, scored, experiment.networks, comparison, study.dates, study.independent, in_time)


@dataclass(frozen=True)
class Collection:
    """The estimates of methods that are looked at once more when they have been scored.

    Arguments:
        most: Members of an estimate that are kept; 0 for none of anything.
        found: The estimates by method.
    """

    most: int
    found: dict[str, list[Estimate]] = field(default_factory=dict)

    def add(self, name: str, estimate: Estimate) -> None:
        """Keeps an estimate of the method `name`."""
        if self.most:
            self.found.setdefault(name, []).append(estimate._replace(members=estimate.members[: self.most]))


def model_scored(
    study: Study, model: Network, cases: Cases, experiment: TwinExperiment, keep: Sequence[Collection] = ()
) -> Iterator[Scored]:
    """The scores of a model, then those of the same members with their spread calibrated.

    Arguments:
        study: What is compared.
        model: The network and its method, with nothing left open.
        cases: The cases with what it is conditioned on.
        experiment: The same cases as they are scored, and their mask.
        keep: What takes in the estimates, too.
    """
    config = study.config | ({"members": 1} if model.regression else {})
    setting, size, kept = experiment.setting, max(1, at_once(config, model.trained) // config["members"]), []

    def collect(name: str, members: Tensor) -> Estimate:
        for collection in keep:
            collection.add(name, Estimate(members))
        return Estimate(members)

    label, ahead = f"{setting.mask}, {model.name}", experiment.ahead
    with filler(study, model, cases, experiment.mask, label=label, ahead=ahead) as fill:

        def ensemble(chosen: slice) -> Estimate:
            members = fill(chosen)
            kept.extend([] if model.factor is None else [members])
            return collect(model.name, members)

        plain = score(model.name, ensemble, setting, size)
    plain = replace(plain, recorded=say_summary(model.method))
    yield plain
    for name in model.rows[1:]:

        def calibrated(chosen: slice, name: str = name) -> Estimate:
            some = cases[chosen]
            return collect(name, apply_factor(kept.pop(0), model.factor, some.observed | some.single, some.sigma_obs))

        yield replace(score(name, calibrated, setting, size), seconds=plain.seconds)


def baselines_scored(study: Study, experiment: TwinExperiment, series: Collection) -> Iterator[Scored]:
    """The scores of every baseline that is fitted here; `series` takes in what they say."""
    cases, mask, ahead = experiment.cases, experiment.mask, experiment.ahead
    mute = silent(study.wanted) if ahead else {}
    fills: dict[str, Fill] = {}
    for key, baseline in study.baselines.items():
        if key not in mute:
            before = previous(study, cases, mask, ahead) if BASELINES[key].needs_previous else None
            fills[study.label(key, ahead)] = partial(baseline_fill, baseline, cases, floor=study.floor, before=before)
    if study.series_baselines.keys() - mute:
        given = list(study.observations(mask, ahead))
        draws = dict(members=series.most, seed=study.config["seed"])
        for key, baseline in study.series_baselines.items():
            if key not in mute:
                fills[study.label(key)] = partial(series_fill, baseline, given, **draws)
    for label, fill in fills.items():
        with progress.bar(len(cases.y), "fields", f"{experiment.setting.mask}, {label}") as bar:
            fields = fill(progress=bar.update)

            def kept(chosen: slice, label: str = label, fields: Callable[[slice], Estimate] = fields) -> Estimate:
                estimate = fields(chosen)
                series.add(label, estimate)
                return estimate

            yield score(label, kept, experiment.setting)


def scored_in_time(study: Study, setting: Setting, series: Collection) -> TimeSection | None:
    """How the methods fill the snapshots as a series; None, with a note, where too little of it is known."""
    try:
        truth = study.true_series(setting)
    except ValueError as error:
        print(f"note: {setting.mask}: {error}")
        return None
    found = []
    for name, parts in series.found.items():
        whole = Estimate.joined(parts)
        found.append(score_in_time(name, truth, whole.members.mean(dim=0), whole.realisations))
    return time_section(truth, found)


def previous(study: Study, cases: Cases, mask: Mask, ahead: int = 0) -> Tensor:
    """The snapshot before each case as a network with history sees it, `(N, 2, H, W)`, with errors like the present.

    It is NaN where there is none, and where `history=masked` hides it, as the mask hides the present.
    Of a forecast it is the last one that is observed, `ahead` steps before the case.
    """
    if ahead:
        return study.forerunners(mask, ahead)
    shown = mask if study.config["history"] == "masked" else Full()
    earlier = [max(number - 1, 0) for number in cases.numbers]
    options = dict(seed=study.config["seed"], sigma_obs=cases.sigma_obs, add_error=True)
    known = make_cases(study.fields, earlier, shown, **options)
    return torch.where(study.before.isfinite(), known.y, torch.nan)


def compare_generated(study: Study, generated: Collection) -> Generated | None:
    """How generated fields compare with unseen ones, and halves of the unseen with each other.

    None, with a note, where too few fields are known everywhere.
    """
    grid = study.reference.grid
    offered = study.offered[:: -(-len(study.offered) // GENERATED)]
    reference, train = (
        fields[fields.isfinite().all(dim=1)[:, grid.valid].all(dim=1)]
        for fields in (study.fields.read(offered), study.training)
    )
    fields = {
        name: torch.cat([part.members.flatten(0, 1) for part in parts]) for name, parts in generated.found.items()
    }
    if not fields or min(len(reference) // 2, len(train), *map(len, fields.values())) < 2:
        print("note: generated fields are not scored: too few fields, generated or unseen, are known everywhere")
        return None
    return Generated.of(fields, reference, train, grid)
