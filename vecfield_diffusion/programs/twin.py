"""Twin experiments: known snapshots through a mask, as each method sees them and as it is scored on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vecfield_diffusion.data.masks import Mask
from vecfield_diffusion.evaluation.comparison import Setting
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.programs.compared import Network
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
