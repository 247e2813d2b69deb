"""Twin experiments: known snapshots through a mask, as each method sees them and as it is scored on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.data.masks import Mask
from vecfield_diffusion.evaluation.comparison import Setting
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.programs.compared import Network
from vecfield_diffusion.programs.fill import Gathered, fill_cases, run
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.source import as_seen_by
from vecfield_diffusion.programs.study import Study


@dataclass(frozen=True)
class TwinExperiment:
    """All that is scored under one mask.

    Attributes:
        setting: The cases as methods are scored on them.
        mask: What is observed.
        cases: The same as the baselines see them.
        entries: The models with nothing left open, and the cases with what each is conditioned on.
    """

    setting: Setting
    mask: Mask
    cases: Cases
    entries: list[tuple[Network, Cases]]

    @property
    def networks(self) -> list[str]:
        """The methods that are judged: ensembles; regressions, baselines otherwise, where there is nothing else."""
        ensembles = [model for model, _ in self.entries if not model.regression]
        return [name for model in ensembles or [model for model, _ in self.entries] for name in model.rows]


@contextmanager
def filler(
    study: Study, model: Network, cases: Cases, mask: Mask, *, label: str
) -> Iterator[Callable[[slice], Tensor]]:
    """Gives what returns the members `(M, n, 2, H, W)` of the cases of a slice, under a progress bar of that label.

    A network of sequences fills the whole series when it is first asked: one trajectory for each member, or, from the
    past alone, the end of a sequence for each case.

    Arguments:
        study: What is compared.
        model: The network and its method, with nothing left open; a regression gives one member.
        cases: The cases with what it is conditioned on.
        mask: What is observed of the snapshots around them.
        label: Of the bar.
    """
    config, method = study.config | ({"members": 1} if model.regression else {}), model.method
    if model.trained.frames > 1:

        @cache
        def series() -> Tensor:
            own = dict(names=[label], methods={label: method}, offered=study.offered)
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


def open_experiment(study: Study, name: str, mask: Mask) -> TwinExperiment | None:
    """The cases of a mask, with nothing left open; None, with a note, where it hides nothing that is known.

    Arguments:
        study: What is compared.
        name: Of the mask.
        mask: What is observed.

    Raises:
        UserError: A method that does not go with the mask, or a spread that was not calibrated for it.
    """
    config, reference, mask = study.config, study.reference, study.mask(mask)
    cases = study.cases(mask)
    observed = cases.observed | cases.single.any(dim=1, keepdim=True)
    if not (cases.hidden & ~observed).any():
        print(f"note: the mask {name} hides no cell that is known, and is left out")
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
    )
    entries = []
    for model in study.models:
        own = model.conditioned(cases, study.fields, config, mask)
        entries.append((model.resolved(name, own, config), own))
    # What an instrument reads is no velocity of a cell, and y not what a baseline may see.
    blind = cases if study.sensor is None else replace(cases, observed=cases.observed & False)
    return TwinExperiment(setting, mask, blind, entries)
