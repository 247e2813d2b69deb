"""`python evaluate.py`: scores ensembles beside the baselines on fields that training kept aside, and reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.apps.config import Program, option
from vecfield_diffusion.apps.infer import SAMPLING, at_once, axes, check_ranges, errors, fill, say_guard
from vecfield_diffusion.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from vecfield_diffusion.apps.assemble import Trained
    from vecfield_diffusion.apps.posterior import Posterior
    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.evaluation.baselines import Baseline
    from vecfield_diffusion.evaluation.comparison import Estimate, Scored, Setting
    from vecfield_diffusion.evaluation.report import Section
    from vecfield_diffusion.inference.cases import Cases

main = Program(
    "evaluate",
    "vecfield_diffusion.apps.evaluate:evaluate",
    keys={
        **SAMPLING,
        "ckpt": "str | list[str]",
        "sigma_obs": "float | str | list[str]",
        "masks": "list[str]",
        "cases": "int",
        "baselines": "str | list[str]",
    },
    examples={"ckpt": "python evaluate.py ckpt=outputs/train/run 'masks=[track,block,pixels]'"},
    lists={"masks": "mask"},
    metric="crps",
)

#: The columns of the printed table; `scores.csv` has all.
COLUMNS = ("mask", "method", "rmse_component", "rmse_vector", "crps", "spread_skill", "rmse / OI", "s per field")
#: Floor of the error that optimal interpolation is told, in standard deviations of the data.
NUGGET = 0.01
#: The baselines by the names that `baselines=` knows them by, as tables name them.
BASELINES = {
    "climatology": "climatology",
    "persistence": "persistence",
    "nearest": "nearest",
    "linear": "linear",
    "cubic": "cubic",
    "biharmonic": "biharmonic",
    "oi": "optimal interpolation",
    "oi_solenoidal": "OI without divergence",
    "gappy_pod": "gappy POD",
    "dineof": "DINEOF",
}
FAST = ("climatology", "nearest", "linear", "biharmonic", "oi")
#: Correlation from one snapshot to the next, from which the last one is worth a baseline.
THRESHOLD = 0.2
#: Divergence over vorticity of the training fields, below which a covariance without divergence is suited.
SOLENOIDAL = 0.2
#: Training snapshots that baselines are fitted on, and generated fields that are compared with unseen ones, at most.
TRAINING, GENERATED = 2000, 256


def evaluate(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Scores every mask and method; prints a table, writes `scores.csv`, then `report.html`.

    Raises:
        UserError: A checkpoint, mask or baseline that does not fit.
    """
    from vecfield_diffusion.apps.build import build
    from vecfield_diffusion.evaluation.metrics import table
    from vecfield_diffusion.inference.files import write_text_atomic

    check_ranges(config)
    wanted = chosen_baselines(config["baselines"])
    masks = {name: build(option("mask", name), "mask", trusted=True) for name in config["masks"]}
    if not masks or None in masks.values():
        raise UserError(f"masks={list(masks)}: name options of conf/mask that hide something, such as masks=[block]")
    task = open_task(config, wanted)
    sections, rows = [], []
    for name, mask in masks.items():
        sections.append(section(task, name, mask))
        rows += sections[-1].rows(task.fields.units)
        write_text_atomic(folder / "scores.csv", as_csv(rows))
    print(table([line for each in sections for line in printed(each)], COLUMNS))
    if any(each.generated for each in sections):
        print(table([line for each in sections for line in each.generated_lines()]))
    print(
        f"{folder / 'scores.csv'}: hidden cells, {len(task.indices)} cases of {config['members']} members, "
        f"{task.fields.units}; crps: of members, of the Gaussian law of optimal interpolation, else the absolute error"
    )
    write_report(task, sections, folder)
    return summary(sections, [each.name for each in task.contestants])


# What is compared.


@dataclass(frozen=True)
class Contestant:
    """A network and the way its ensembles are made."""

    name: str
    trained: Trained
    parts: Posterior


@dataclass(frozen=True)
class Task:
    """What is scored: the networks, the unseen snapshots `indices` of the data, and the baselines that are wanted."""

    config: dict[str, Any]
    contestants: list[Contestant]
    fields: Fields
    offered: range
    indices: list[int]
    wanted: list[str]

    @property
    def first(self) -> Trained:
        """The network whose data, grid and scale are those of all."""
        return self.contestants[0].trained

    @cached_property
    def training(self) -> torch.Tensor:
        """Training snapshots `(n, 2, H, W)`."""
        train = self.first.split["train"]
        return self.fields.read(train[:: -(-len(train) // TRAINING)])

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """The methods that one would use otherwise, fitted, by the names that tables give them."""
        wanted = self.wanted
        if "persistence" in wanted and not (rho := self.persistence) >= THRESHOLD:
            print(f"note: persistence is left out: the correlation with the snapshot before is {rho:.2g}")
            wanted = [name for name in wanted if name != "persistence"]
        return fit_baselines(self.first, self.fields, wanted, self.training)

    @cached_property
    def before(self) -> torch.Tensor:
        """The snapshot before each of those that are scored, `(N, 2, H, W)`, NaN where there is none."""
        from vecfield_diffusion.data.context import Context

        return Context((1,), (), {}, {}).parts(self.fields, self.indices)[0]

    @property
    def persistence(self) -> float:
        """The correlation of the anomalies with those of the snapshot before; NaN where there is none."""
        now, before = (each - self.climatology for each in (self.fields.read(self.indices), self.before))
        both = now.isfinite() & before.isfinite()
        now, before = now[both], before[both]
        return float((now * before).sum() / (now.square().sum() * before.square().sum()).sqrt())

    @cached_property
    def climatology(self) -> torch.Tensor:
        """The mean field of training `(2, H, W)`."""
        import torch

        from vecfield_diffusion.evaluation.baselines import Climatology

        return torch.from_numpy(Climatology().fit(self.training.numpy(), self.fields.grid).mean)


def chosen_baselines(given: str | Sequence[str]) -> list[str]:
    """The baselines that `baselines=` names, in the order of `BASELINES`. Raises UserError."""
    if given == "all":
        return list(BASELINES)
    named = [given] if isinstance(given, str) else given
    for name in named:
        if name not in BASELINES:
            hint = nearest(name, [*BASELINES, "all"])
            raise UserError(f"baselines={name}: there is none of this name.{hint} Known: all, {', '.join(BASELINES)}")
    return [name for name in BASELINES if name in named]


def open_task(config: dict[str, Any], wanted: list[str]) -> Task:
    """The networks, and the data that they were trained on. Raises UserError."""
    from vecfield_diffusion.apps.assemble import check_grid, choose_device, fit_size, held_out, load_trained
    from vecfield_diffusion.apps.posterior import build_posterior

    device = choose_device(config["device"])
    trained = {name: load_trained(path, device, config["trust"]) for name, path in named_runs(config["ckpt"]).items()}
    check_alike(trained)
    built = {name: build_posterior(config, each, device) for name, each in trained.items()}
    fields, offered = held_out(next(iter(trained.values())), "test", config["trust"], config["data"])
    contestants = []
    for name, each in trained.items():
        check_grid(fields, each)
        if built[name].weak is not None:
            weak = fit_size(built[name].weak, fields, config["overlap"], config["batch"])
            built[name].guidance.weak = weak.denoiser
        fitted = fit_size(each, fields, config["overlap"], config["batch"])
        contestants.append(Contestant(name, fitted, built[name]))
    count = min(config["cases"], len(offered))
    spaced = [offered[i * len(offered) // count] for i in range(count)]
    indices = [i for i in spaced if fields.read([i]).isfinite().any()]
    if not indices:
        raise UserError(f"{fields.source}: none of the snapshots that training kept aside measures anything")
    for each in contestants:
        said = "" if len(contestants) == 1 else f"{each.name}: "
        print(f"{said}{each.trained.path}: step {each.trained.step}")
    print(f"{len(indices)} unseen snapshots of {fields.source}")
    return Task(config, contestants, fields, offered, indices, wanted)


def named_runs(ckpt: str | Sequence[str]) -> dict[str, str]:
    """The checkpoints that `ckpt=` means by the names of their methods; a folder of numbered runs is all of them.

    One alone is `diffusion`; several are called as their folders are, by the whole path where that is not enough.

    Raises:
        UserError: None, or the same twice.
    """
    given = [ckpt] if isinstance(ckpt, str) else list(ckpt)
    runs = [run for each in given for run in numbered(each) or [(Path(each).name, each)]]
    if not runs:
        raise UserError("ckpt=[]: name at least one checkpoint")
    if len(runs) == 1:
        return {"diffusion": runs[0][1]}
    taken = [*(name for name, _ in runs), *BASELINES.values()]
    found = {path if taken.count(name) > 1 else name: path for name, path in runs}
    if len(found) < len(runs):
        raise UserError(f"ckpt={given}: each checkpoint is compared once, but one is named twice")
    return found


def numbered(place: str) -> list[tuple[str, str]]:
    """Name and folder of each run of a sweep that has a checkpoint; the name tells what sets it apart."""
    from vecfield_diffusion.apps.sweep import read
    from vecfield_diffusion.training.checkpoint import find_checkpoint

    folder = Path(place)
    if not folder.is_dir() or find_checkpoint(folder).exists():
        return []
    runs = sorted((each for each in folder.iterdir() if each.name.isdigit()), key=lambda each: int(each.name))
    chosen = {each: (read(each) or {"overrides": []})["overrides"] for each in runs if find_checkpoint(each).exists()}
    if lacking := len(runs) - len(chosen):
        print(f"note: {lacking} of the {len(runs)} runs in {place} have no checkpoint, and are left out")
    common = set.intersection(*map(set, chosen.values())) if chosen else set()
    return [
        (" ".join([run.name, *(each for each in told if each not in common)]), str(run)) for run, told in chosen.items()
    ]


def check_alike(trained: dict[str, Trained]) -> None:
    """Raises UserError where networks were not trained on the same snapshots of the same data."""

    def data(each: Trained) -> dict[str, Any]:
        told = ("history", "context")  # what a network is told beside the observation may differ
        return {key: value for key, value in each.config["dataset"].items() if key not in told}

    (name, first), *others = trained.items()
    for other, each in others:
        for said, ours, theirs in (
            ("data", data(first), data(each)),
            ("units", first.units, each.units),
            ("grid", first.grid.shape, each.grid.shape),
            ("split", first.split, each.split),
        ):
            if ours != theirs:
                raise UserError(
                    f"ckpt=[{name},{other}]: networks are compared on the same unseen snapshots, but these were "
                    f"trained with another {said}, {briefly(ours, theirs)}. Evaluate each by itself"
                )


def briefly(ours: Any, theirs: Any) -> str:
    """What differs of two values."""
    if isinstance(ours, dict):
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        ours, theirs = ({key: each.get(key) for key in keys} for each in (ours, theirs))
    return f"{ours} and {theirs}"


def fit_baselines(
    trained: Trained, fields: Fields, wanted: Sequence[str] = FAST, training: torch.Tensor | None = None
) -> dict[str, Baseline]:
    """The methods that one would use otherwise, fitted on the training snapshots, at most 2000 of them.

    Arguments:
        trained: Of what split and statistics.
        fields: The data.
        wanted: Names in `BASELINES`; `oi_solenoidal` is left out, with a note, where the flow has divergence.
        training: The snapshots, where they are read already.
    """
    from vecfield_diffusion.evaluation import baselines, modes

    makers = {
        "climatology": baselines.Climatology,
        "persistence": baselines.Persistence,
        "nearest": baselines.Nearest,
        "linear": baselines.Linear,
        "cubic": baselines.Cubic,
        "biharmonic": baselines.Biharmonic,
        "oi": baselines.OptimalInterpolation,
        "oi_solenoidal": lambda: baselines.OptimalInterpolation("homogeneous", divergence_free=True),
        "gappy_pod": modes.GappyPOD,
        "dineof": modes.DINEOF,
    }
    if training is None:
        train = trained.split["train"]
        training = fields.read(train[:: -(-len(train) // TRAINING)])
    share = trained.statistics.divergence_rms / trained.statistics.vorticity_rms
    if "oi_solenoidal" in wanted and not share < SOLENOIDAL:
        print(f"note: oi_solenoidal is left out: the divergence of the data is {share:.2g} of their vorticity")
        wanted = [name for name in wanted if name != "oi_solenoidal"]
    return {BASELINES[name]: makers[name]().fit(training.numpy(), fields.grid) for name in wanted}


# One mask.


def section(task: Task, name: str, mask: Any) -> Section:
    """All methods under one mask. Raises UserError where it hides nothing."""
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.evaluation.comparison import Setting
    from vecfield_diffusion.evaluation.report import Section
    from vecfield_diffusion.inference.cases import make_cases

    config, first = task.config, task.first
    error = errors(config["sigma_obs"], task.fields, task.indices)
    cases = make_cases(task.fields, task.indices, mask, config["seed"], error, add_error=True)
    if not cases.hidden.any():
        raise UserError(f"masks={config['masks']}: {name} hides no cell, so that there is nothing to score")
    told = (cases.numbers, cases.truth, cases.observed, first.grid, task.climatology, first.statistics.std)
    setting = Setting(name, *told, config["members"])
    collected: dict[str, list[torch.Tensor]] = {}
    scored = [contestant_scored(task, each, setting, cases, mask, collected) for each in task.contestants]
    scored += baselines_scored(task, setting, cases, mask)
    found = Section(setting, scored, [each.name for each in task.contestants])
    return replace(found, generated=generation(task, collected)) if isinstance(mask, Empty) else found


def contestant_scored(
    task: Task, contestant: Contestant, setting: Setting, cases: Cases, mask: Any, collected: dict[str, Any]
) -> Scored:
    """A network's ensembles, scored; some of its fields are added to `collected`."""
    from tqdm import tqdm

    from vecfield_diffusion.apps.posterior import Seen, settle
    from vecfield_diffusion.evaluation.comparison import Estimate, score
    from vecfield_diffusion.inference.cases import with_context

    config, trained = task.config, contestant.trained
    past = mask if config["history"] == "masked" else None
    cases = with_context(cases, task.fields, trained.context, trained.denoiser.normalizer, config["seed"], past, True)
    parts = settle(contestant.parts, trained, Seen().add(cases), config["sigma_obs"])
    kept = collected.setdefault(contestant.name, [])
    total = None if parts.evaluations is None else len(cases.y) * config["members"] * parts.evaluations
    with tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None, desc=contestant.name) as bar:

        def ensemble(chosen: slice) -> Estimate:
            members = fill(config, trained, parts, part_of(cases, chosen), bar)
            kept.append(members[: -(-GENERATED // len(cases.y))].flatten(0, 1))
            return Estimate(members)

        found = score(contestant.name, ensemble, setting, max(1, at_once(config, trained) // config["members"]))
    say_guard(parts)
    return found


def part_of(cases: Cases, chosen: slice) -> Cases:
    """Some of the cases."""
    values = {each.name: getattr(cases, each.name) for each in fields_of(cases) if each.name != "grid"}
    return replace(cases, **{name: value[chosen] for name, value in values.items() if value is not None})


def baselines_scored(task: Task, setting: Setting, cases: Cases, mask: Any) -> Iterator[Scored]:
    """Every baseline, scored."""
    from vecfield_diffusion.evaluation.comparison import score

    floor = NUGGET * task.first.statistics.std
    for name, baseline in task.baselines.items():
        before = previous(task, cases, mask) if name == BASELINES["persistence"] else None
        yield score(name, baseline_fill(baseline, cases, floor, before), setting)


def previous(task: Task, cases: Cases, mask: Any) -> torch.Tensor:
    """The snapshot before each case as a network with history sees it, `(N, 2, H, W)`, with errors like the present.

    It is NaN where there is none, and where `history=masked` hides it, as the mask hides the present.
    """
    import torch

    from vecfield_diffusion.data.masks import Full
    from vecfield_diffusion.inference.cases import make_cases

    shown = mask if task.config["history"] == "masked" else Full()
    earlier = [max(number - 1, 0) for number in cases.numbers]
    seen = make_cases(task.fields, earlier, shown, task.config["seed"], cases.sigma_obs, add_error=True)
    return torch.where(task.before.isfinite(), seen.y, torch.nan)


def baseline_fill(
    baseline: Baseline, cases: Cases, floor: float, before: torch.Tensor | None = None
) -> Callable[[slice], Estimate]:
    """How a baseline fills the cases of a slice; optimal interpolation says how sure it is.

    Arguments:
        baseline: Fitted.
        cases: The cases.
        floor: The least error that it is told, in the units of the data.
        before: The snapshot before each case, `(N, 2, H, W)`.
    """
    import numpy as np
    import torch

    from vecfield_diffusion.evaluation.baselines import OptimalInterpolation
    from vecfield_diffusion.evaluation.comparison import Estimate

    def cell_error(case: int) -> Any:
        sigma = cases.sigma_obs[case].double().square().mean(dim=0).sqrt().nan_to_num(0.0, posinf=0.0)
        return np.maximum(sigma.item() if sigma.numel() == 1 else sigma.numpy(), floor)

    def told(case: int) -> tuple[Any, ...]:
        return cases.y[case].numpy(), cases.observed[case, 0].numpy(), cell_error(case)

    def fields(chosen: slice) -> Estimate:
        numbers = range(*chosen.indices(len(cases.y)))
        if isinstance(baseline, OptimalInterpolation):
            mean, std = zip(*(baseline.posterior(*told(case)) for case in numbers), strict=True)
            return Estimate(torch.from_numpy(np.stack(mean))[None], torch.from_numpy(np.stack(std)))
        past = (None if before is None else before[case].numpy() for case in numbers)
        filled = [baseline.fill(*told(case), previous=each) for case, each in zip(numbers, past, strict=True)]
        return Estimate(torch.from_numpy(np.stack(filled))[None])

    return fields


def generation(task: Task, collected: dict[str, list[torch.Tensor]]) -> Any:
    """How generated fields compare with unseen ones, and halves of the unseen with each other.

    None, with a note, where too few fields are known everywhere.
    """
    import torch

    from vecfield_diffusion.evaluation.report import Generated

    offered = task.offered[:: -(-len(task.offered) // GENERATED)]
    reference, train = task.fields.read(offered), task.training
    reference, train = (
        each[each.isfinite().all(dim=1)[:, task.first.grid.valid].all(dim=1)] for each in (reference, train)
    )
    fields = {name: torch.cat(parts) for name, parts in collected.items()}
    if min(len(reference) // 2, len(train), *map(len, fields.values())) < 2:
        print("note: generated fields are not scored: too few fields, generated or unseen, are known everywhere")
        return None
    return Generated.of(fields, reference, train, task.first.grid)


# What is said.


def printed(section: Section) -> list[dict[str, object]]:
    """The lines of the printed table."""
    reference = section.find(BASELINES["oi"])
    lines = []
    for each in section.scored:
        values = each.scores["hidden"]
        line = {"mask": section.setting.mask, "method": each.method}
        line |= {name: values[name].value for name in ("rmse_component", "rmse_vector", "spread_skill")}
        crps = values["crps"]
        line["crps"] = f"{crps.value:.4g} +- {(crps.high - crps.low) / 2:.1g}"
        if reference is not None:
            line["rmse / OI"] = line["rmse_component"] / reference.scores["hidden"]["rmse_component"].value
        lines.append(line | {"s per field": each.seconds})
    return lines


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as text, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary(sections: list[Section], names: list[str]) -> dict[str, float]:
    """The CRPS of every mask and network, and as `crps` the mean over the masks of the best network."""
    found, means = {}, []
    for name in names:
        values = {each.setting.mask: each.find(name).scores["hidden"]["crps"].value for each in sections}
        found |= {f"{mask}/crps" if len(names) == 1 else f"{mask}/{name}/crps": crps for mask, crps in values.items()}
        means.append(sum(values.values()) / len(values))
    return {"crps": min(means), **found}


def write_report(task: Task, sections: list[Section], folder: Path) -> None:
    """Draws and writes `report.html`."""
    import torch
    import yaml

    from vecfield_diffusion import __version__
    from vecfield_diffusion.evaluation.report import render
    from vecfield_diffusion.inference.files import write_text_atomic

    fields, config = task.fields, task.config
    provenance = {
        "data": fields.source,
        **{key: str(value) for key, value in fields.attrs.items() if key in ("source", "licence")},
        "layout": fields.summary(),
        "unseen snapshots": ", ".join(map(str, task.indices)),
        "training snapshots": f"{task.first.split['train'].start} to {task.first.split['train'].stop - 1}",
        **{
            f"network {each.name}": f"{each.trained.path}, step {each.trained.step}, "
            f"{type(each.trained.denoiser.diffusion).__name__}"
            for each in task.contestants
        },
        "seed": config["seed"],
        "program": f"vecfield_diffusion {__version__}, torch {torch.__version__}",
        "configuration": yaml.safe_dump(config, sort_keys=False),
    }
    text = render(config["name"], sections, provenance, fields.units, axes(fields))
    write_text_atomic(folder / "report.html", text)
    print(f"{folder / 'report.html'}: figures and tables")
