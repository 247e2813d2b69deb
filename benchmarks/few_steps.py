"""Networks of few steps beside their teacher: `python benchmarks/few_steps.py ckpt=TEACHER quick=a,b evaluations=1,2`.

All fill the same unseen snapshots, and so does the teacher in as few steps. On hidden cells: the CRPS over that of the
teacher in the steps of its own, with its interval, and spread over skill. Of spectra of members the largest deviation
over the wavenumbers, `spectrum_error`, from the truth and from the teacher's members: few snapshots have few long
waves, which sets all of them apart from the truth. Takes the keys of evaluate.py, such as `cases=16 data=FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vecfield_diffusion.commands import evaluate as main
from vecfield_diffusion.evaluation.comparison import Scored, ratio
from vecfield_diffusion.evaluation.spectra import SHARE, cut_off, spectrum_error
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.programs.ahead import views
from vecfield_diffusion.programs.evaluate import model_scored
from vecfield_diffusion.programs.twin import open_experiments

COLUMNS = ("network", "evaluations", "mask", "crps", "crps / teacher", "interval", "spread_skill")
COLUMNS += ("spectrum / truth", "spectrum / teacher", "s per field")


def scored(overrides: list[str]) -> dict[str, Scored]:
    """What the network of `ckpt=` gives under each mask."""
    config = main.config(*overrides, "baselines=[]")
    study, experiments = open_experiments(config, [], views(config))
    return {one.name: next(model_scored(study, *one.entries[0], one)) for one in experiments}


def compare(overrides: list[str], quick: list[str], evaluations: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each network, number of evaluations and mask; the first are those of the teacher."""
    common = [word for word in overrides if not word.startswith(("ckpt=", "sampler"))]
    contestants = [("teacher", "own", overrides)]
    contestants += [("teacher", steps, [*overrides, f"sampler.steps={steps}"]) for steps in evaluations]
    few = ["sampler=consistency", *common]
    contestants += [
        (Path(run).name, n, [f"ckpt={run}", *few, f"sampler.steps={n}"]) for run in quick for n in evaluations
    ]
    teacher: dict[str, Scored] = {}
    for name, steps, own in contestants:
        for mask, found in scored(own).items():
            best = teacher.setdefault(mask, found)
            over, hidden = ratio(found, best, "crps"), found.scores["hidden"]
            row = {"network": name, "evaluations": steps, "mask": mask, "s per field": found.seconds}
            row |= {"crps": hidden["crps"].value, "spread_skill": hidden["spread_skill"].value}
            row |= {"crps / teacher": over.value, "interval": f"{over.low:.3f}-{over.high:.3f}"}
            if found.spectrum is not None:
                last = max(1, int(SHARE * cut_off(found.signal)))
                against = {"spectrum / truth": found.signal, "spectrum / teacher": best.spectrum}
                row |= {key: float(spectrum_error(found.spectrum, other, last)) for key, other in against.items()}
            yield row


def taken(arguments: list[str], key: str, default: str) -> list[str]:
    """What `key=a,b` names; the argument is taken out of the list."""
    for argument in arguments:
        if argument.startswith(f"{key}="):
            arguments.remove(argument)
            default = argument.removeprefix(f"{key}=")
    return [word for word in default.split(",") if word]


if __name__ == "__main__":
    given = sys.argv[1:]
    which = {key: taken(given, key, default) for key, default in (("quick", ""), ("evaluations", "1,2,4"))}
    if not any(word.startswith("ckpt=") for word in given):
        raise SystemExit(f"{Path(__file__).name}: give ckpt=TEACHER")
    for row in compare(given, **which):
        print(table([row], COLUMNS), flush=True)
