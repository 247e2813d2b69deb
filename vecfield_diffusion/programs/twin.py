"""Twin experiments: known snapshots through a mask, as each method sees them and as it is scored on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.data.masks import Mask
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.comparison import Setting
from vecfield_diffusion.evaluation.verdicts import too_few
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.programs.ahead import View, silent
from vecfield_diffusion.programs.compared import Network
from vecfield_diffusion.programs.fill import fill_cases, run
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.sinks import Gathered
from vecfield_diffusion.programs.source import as_seen_by
from vecfield_diffusion.programs.study import Study, left_out, open_study


@dataclass(frozen=True)
class TwinExperiment:
    """All that is scored under one mask.

    Attributes:
        setting: The cases as methods are scored on them.
        mask: What is observed.
        cases: The same as the baselines see them.
        ahead: How many steps they lie ahead of the last frame that is observed; 0 where they are observed.
        entries: The models with nothing left open, and the cases with what each is conditioned on.
    """

    setting: Setting
    mask: Mask
    cases: Cases
    entries: list[tuple[Network, Cases]]
    ahead: int = 0

    @property
    def name(self) -> str:
        """The name of the mask."""
        return self.setting.mask

    @property
    def networks(self) -> list[str]:
        """The methods that are judged: ensembles; regressions, baselines otherwise, where there is nothing else."""
        ensembles = [model for model, _ in self.entries if not model.regression]
        return [name for model in ensembles or [model for model, _ in self.entries] for name in model.rows]


@contextmanager
def filler(
    study: Study, model: Network, cases: Cases, mask: Mask, *, label: str, ahead: int = 0
) -> Iterator[Callable[[slice], Tensor]]:
    """Gives what returns the members `(M, n, 2, H, W)` of the cases of a slice, under a progress bar of that label.

    A network of sequences fills the whole series when it is first asked: one trajectory for each member, or, from the
    past alone and in forecasts, the end of a sequence for each case.

    Arguments:
        study: What is compared.
        model: The network and its method, with nothing left open; a regression gives one member.
        cases: The cases with what it is conditioned on.
        mask: What is observed of the snapshots around them.
        label: Of the bar.
        ahead: Of forecasts, how many steps before each case the last observation lies.
    """
    config, method = study.config | ({"members": 1} if model.regression else {}), model.method
    if model.trained.frames > 1:

        @cache
        def series() -> Tensor:
            own = dict(names=[label], methods={label: method}, offered=study.offered, ahead=ahead)
            fields, indices = as_seen_by(model.trained, study.fields), study.indices
            filling = Filling(config | {"hide": 0.0}, model.trained, fields, indices, mask, method, twin=True, **own)
            sink = Gathered()
            run(filling, sink, label)
            return sink.whole()

        yield lambda chosen: series()[:, chosen]
        return
    total = None if method.evaluations is None else len(cases.y) * config["members"] * method.evaluations
    with progress.bar(total, "evaluations", label) as bar:
        known = dict(trained=model.trained, method=method, progress=bar.update)
        yield lambda chosen: fill_cases(config, cases=cases[chosen], **known)


def open_experiment(study: Study, view: View) -> TwinExperiment | None:
    """The cases of a mask, with nothing left open; None, with a note, where there is nothing to score.

    Arguments:
        study: What is compared.
        view: What is observed.

    Raises:
        UserError: A method that does not go with the mask, or a spread that was not calibrated for it.
    """
    config, reference, name = study.config, study.reference, view.name
    mask = view.mask if view.whole else study.mask(view.mask)
    cases = seen = study.cases(mask)
    if view.ahead:
        cases = seen.blind(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    observed = cases.observed | cases.single.any(dim=1, keepdim=True)
    if not (cases.hidden & ~observed).any():
        print(f"note: the mask {name} hides no cell that is known, and is left out")
        return None
    models = [model for model in study.models if not view.ahead or model.trained.frames > 1]
    if not models:
        return None
    setting = Setting(
        mask=name,
        numbers=cases.numbers,
        truth=cases.truth,
        observed=observed,
        grid=reference.grid,
        climatology=study.climatology,
        scale=reference.statistics.std,
        ensemble=config["members"],
        exceed=config["exceed"],
    )
    entries = []
    for model in models:
        # The method is chosen by what is observed, of a forecast in the frames before the case.
        own = model.conditioned(seen, study.fields, config, mask)
        entries.append((model.resolved(view, own, config), own if not view.ahead else cases))
    # What an instrument reads is no velocity of a cell, and y not what a baseline may see.
    blind = cases if study.sensor is None else replace(cases, observed=cases.observed & False)
    return TwinExperiment(setting, mask, blind, entries, view.ahead)


def open_experiments(
    config: dict[str, Any], wanted: Sequence[str], asked: Sequence[View]
) -> tuple[Study, list[TwinExperiment]]:  # fmt: skip
    """What is compared, and on which cases; prints what there is to say of both. Raises UserError."""
    study = open_study(config, wanted, farthest=max(view.ahead for view in asked))
    experiments = [found for view in asked if (found := open_experiment(study, view)) is not None]
    if not experiments:
        names = [view.name for view in asked]
        if all(view.ahead for view in asked):
            raise UserError(
                f"masks={config['masks']} horizon={config['horizon']}: a forecast takes a network of sequences, "
                "trained with dataset.frames=5 or so"
            )
        raise UserError(f"masks={names}: {' and '.join(names)} hides no cell, so that there is nothing to score")
    if any(experiment.ahead for experiment in experiments):
        alone = [model.name for model in study.models if model.trained.frames == 1]
        why = "trained on snapshots, where a forecast takes dataset.frames=5 or so"
        left_out(dict.fromkeys(alone, why) | silent(wanted), of="forecasts")
    for note in [*study.untrained, *study.helps, too_few(len(study.indices), study.independent)]:
        if note:
            print(f"note: {note}")
    return study, experiments
