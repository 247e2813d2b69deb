"""`python evaluate.py`: scores ensembles beside the baselines on fields that training kept aside, and reports.

A regression, be it a checkpoint of `diffusion=regression` or what a network with `model=residual` holds, is a baseline,
too: it says one field, which is evaluated once, whatever the sampler and the number of members. With `calibrate=true`
the members of each ensemble are scored again with their spread put right (see `inference/calibration.py`).

With `sensor=` the ensembles are told what an instrument reads of the cells that the mask shows. Cells where it read
anything count as observed, the others are scored; baselines that cannot take such values are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.config.program import option
from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.programs.fill import fill_cases, say_summary
from vecfield_diffusion.programs.filling import at_once, check_ranges, errors
from vecfield_diffusion.programs.infer import axes
from vecfield_diffusion.programs.method import fit_method, process_of, resolve_method

if TYPE_CHECKING:
    import torch

    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.evaluation.baselines import Baseline
    from vecfield_diffusion.evaluation.comparison import Estimate, Scored, Setting
    from vecfield_diffusion.evaluation.report import Section
    from vecfield_diffusion.guidance.sensors import Sensor
    from vecfield_diffusion.inference.cases import Cases
    from vecfield_diffusion.inference.method import Method
    from vecfield_diffusion.programs.trained import Trained


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
#: The baseline that checkpoints hold, beside those that are fitted here.
REGRESSION = "regression"
#: Baselines that look at no observation of the present.
BLIND = ("climatology", "persistence")
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
        UserError: A checkpoint, mask or baseline that does not fit, or a spread that was not calibrated.
    """
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.evaluation.metrics import table
    from vecfield_diffusion.inference.files import write_text_atomic

    check_ranges(config)
    wanted = chosen_baselines(config["baselines"])
    if config["sensor"] and (lost := [name for name in wanted if name not in BLIND]):
        print(f"note: {', '.join(lost)} take velocities of single cells alone, and are left out beside a sensor")
        wanted = [name for name in wanted if name in BLIND]
    masks = {name: build(option("mask", name), "mask", trusted=True) for name in config["masks"]}
    if not masks or None in masks.values():
        raise UserError(f"masks={list(masks)}: name options of conf/mask that hide something, such as masks=[block]")
    task = open_task(config, wanted)
    trials = [prepare(task, name, mask) for name, mask in masks.items()]
    sections, rows = [], []
    for trial in trials:
        sections.append(section(task, trial))
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
    return summary(sections)


# What is compared.


@dataclass(frozen=True)
class Contestant:
    """A network and the way its fields are made; `factor` is that of the spread, where it is to be calibrated."""

    name: str
    trained: Trained
    parts: Method
    factor: float | None = None

    @property
    def regression(self) -> bool:
        """Whether it says one field, the mean."""
        return is_regression(self.trained)

    @property
    def methods(self) -> list[str]:
        """What tables call its ensembles: plain and, where there is a factor, calibrated."""
        return [self.name] if self.factor is None else [self.name, f"{self.name} calibrated"]


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

    @property
    def sensor(self) -> Sensor | None:
        """What the fields are seen through; None for velocities of single cells."""
        return self.contestants[0].parts.sensor

    def cases(self, mask: Any) -> Cases:
        """The snapshots through a mask, and through the instrument where there is one."""
        from vecfield_diffusion.inference.cases import make_cases

        error = errors(self.config["sigma_obs"], self.fields, self.indices)
        how = {"add_error": True, "sensor": self.sensor}
        return make_cases(self.fields, self.indices, mask, self.config["seed"], error, **how)

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


@dataclass(frozen=True)
class Trial:
    """What is done under one mask.

    Attributes:
        setting: The cases as methods are scored on them.
        mask: What is observed.
        cases: As the baselines are told them.
        entries: The networks with nothing left open, and the cases as each is told them.
    """

    setting: Setting
    mask: Any
    cases: Cases
    entries: list[tuple[Contestant, Cases]]

    @property
    def networks(self) -> list[str]:
        """The methods that are judged: ensembles; regressions, baselines otherwise, where there is nothing else."""
        ensembles = [each for each, _ in self.entries if not each.regression]
        return [name for each in ensembles or [each for each, _ in self.entries] for name in each.methods]


def chosen_baselines(given: str | Sequence[str]) -> list[str]:
    """The baselines that `baselines=` names, in the order of `BASELINES`, then the regression. Raises UserError."""
    known = [*BASELINES, REGRESSION]
    if given == "all":
        return known
    named = [given] if isinstance(given, str) else given
    for name in named:
        if name not in known:
            hint = nearest(name, [*known, "all"])
            raise UserError(f"baselines={name}: there is none of this name.{hint} Known: all, {', '.join(known)}")
    return [name for name in known if name in named]


def open_task(config: dict[str, Any], wanted: list[str], split: str = "test") -> Task:
    """The networks, and the snapshots of a split of the data that they were trained on. Raises UserError."""
    from vecfield_diffusion.programs.trained import choose_device, held_out

    device = choose_device(config["device"])
    trained = load_runs(config, wanted, device)
    built = {name: build_parts(config, each, device) for name, each in trained.items()}
    fields, offered = held_out(next(iter(trained.values())), split, config["trust"], config["data"])
    contestants = [enter(config, fields, name, each, built[name]) for name, each in trained.items()]
    count = min(config["cases"], len(offered))
    spaced = [offered[i * len(offered) // count] for i in range(count)]
    indices = [i for i in spaced if fields.read([i]).isfinite().any()]
    if not indices:
        raise UserError(f"{fields.source}: none of the snapshots that training kept aside measures anything")
    for each in contestants:
        said = "" if len(contestants) == 1 else f"{each.name}: "
        print(f"{said}{each.trained.path}: step {each.trained.step}")
    print(f"{len(indices)} unseen snapshots of {fields.source}")
    return Task(config, contestants, fields, offered, indices, [name for name in wanted if name != REGRESSION])


def load_runs(config: dict[str, Any], wanted: Sequence[str], device: torch.device) -> dict[str, Trained]:
    """The networks by the names of their methods, then the regressions within them, where these are wanted.

    Raises:
        UserError: Checkpoints that do not fit, or that leave nothing to do what the configuration asks for.
    """
    from vecfield_diffusion.programs.trained import load_trained

    runs = named_runs(config["ckpt"])
    trained = {name: load_trained(path, device, config["trust"]) for name, path in runs.items()}
    check_alike(trained)
    alone = [name for name, each in trained.items() if is_regression(each)]
    if alone == ["diffusion"]:
        trained = {REGRESSION: trained.pop("diffusion")}
    if alone and config["sensor"]:
        raise UserError(f"ckpt={runs[alone[0]]}: a regression takes velocities of single cells alone: use sensor=none")
    if config["calibrate"] and len(alone) == len(trained):
        raise UserError("calibrate=true: a regression has no spread. Use calibrate=false")
    if REGRESSION not in wanted:
        return trained
    within = regressions(trained)
    if not (within or alone or config["baselines"] == "all"):
        raise UserError(
            f"baselines={REGRESSION}: no checkpoint holds one. Train one by train.py diffusion=regression and add its "
            "run, ckpt=[...,RUN], or train with model=residual"
        )
    return trained | within


def is_regression(trained: Trained) -> bool:
    """Whether a network gives the mean alone."""
    from vecfield_diffusion.diffusion.formulations import Regression

    return isinstance(trained.denoiser.diffusion, Regression)


def regressions(trained: dict[str, Trained]) -> dict[str, Trained]:
    """The regressions within networks that have one (`model=residual`), by name."""
    from vecfield_diffusion.diffusion.denoiser import mean_only

    holders = {name: each for name, each in trained.items() if hasattr(each.denoiser.network, "mean")}
    one = len(holders) == 1 and REGRESSION not in trained
    return {
        REGRESSION if one else f"{REGRESSION} of {name}": replace(each, denoiser=mean_only(each.denoiser))
        for name, each in holders.items()
    }


def build_parts(config: dict[str, Any], trained: Trained, device: torch.device) -> Method:
    """How fields are made: as the configuration says; of a regression by one evaluation. Raises UserError."""
    from vecfield_diffusion.guidance.cfg import NoGuidance
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.guidance.physics import NoPhysics
    from vecfield_diffusion.inference.method import Method
    from vecfield_diffusion.programs.method import build_method
    from vecfield_diffusion.samplers.deterministic import DPMpp2M

    if is_regression(trained):  # the last step of this sampler returns what the denoiser gives
        return Method(DPMpp2M(steps=1), Conditional(), NoPhysics(), NoGuidance())
    return build_method(config, trained, device)


def enter(config: dict[str, Any], fields: Fields, name: str, trained: Trained, parts: Method) -> Contestant:
    """A network fitted to the data, its instrument placed among them. Raises UserError."""
    from vecfield_diffusion.programs.trained import check_grid, fit_size

    check_grid(fields, trained)
    if config["sensor"] and config["sensor"].get("velocity"):
        raise UserError(
            "sensor.velocity: what a radar recorded has no truth to be scored against; it is for infer.py. Give "
            "sensor.sites=[[X,Y]], through which the known fields are seen"
        )
    parts = fit_method(parts, fields, overlap=config["overlap"], batch=config["batch"])
    return Contestant(name, fit_size(trained, fields, config["overlap"], config["batch"]), parts)


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
    from vecfield_diffusion.config.sweep import read
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


def prepare(task: Task, name: str, mask: Any) -> Trial:
    """The cases of a mask, and all that was left open chosen, before anything is computed.

    Raises:
        UserError: A mask that hides nothing, parts that do not go with it, or a spread that was not calibrated for it.
    """
    from vecfield_diffusion.evaluation.comparison import Setting

    config, first, cases = task.config, task.first, task.cases(mask)
    seen = cases.observed | cases.single.any(dim=1, keepdim=True)
    if not (cases.hidden & ~seen).any():
        raise UserError(f"masks={config['masks']}: {name} hides no cell, so that there is nothing to score")
    told = (cases.numbers, cases.truth, seen, first.grid, task.climatology, first.statistics.std)
    entries = [settled(task, each, name, mask, cases) for each in task.contestants]
    # What an instrument reads is no velocity of a cell, and y not what a baseline may see.
    blind = cases if task.sensor is None else replace(cases, observed=cases.observed & False)
    return Trial(Setting(name, *told, config["members"]), mask, blind, entries)


def settled(task: Task, contestant: Contestant, name: str, mask: Any, cases: Cases) -> tuple[Contestant, Cases]:
    """A network with all parts chosen and, where it is asked for, its factor; the cases as it is told them."""
    from vecfield_diffusion.inference.cases import with_context

    config, trained = task.config, contestant.trained
    past = mask if config["history"] == "masked" else None
    cases = with_context(cases, task.fields, trained.context, trained.denoiser.normalizer, config["seed"], past, True)
    parts = resolve_method(config, contestant.parts, trained, cases, label=name)
    factor = factor_of(config, contestant, name, parts) if config["calibrate"] and not contestant.regression else None
    return replace(contestant, parts=parts, factor=factor), cases


def factor_of(config: dict[str, Any], contestant: Contestant, name: str, parts: Method) -> float:
    """The factor of the spread that was fitted under a mask. Raises UserError where there is none."""
    from vecfield_diffusion.inference.calibration import find_factor

    trained = contestant.trained
    try:
        factor = find_factor(trained.calibration, process_of(config, option("mask", name), parts), trained.path)
    except UserError as error:
        raise UserError(f"masks=[{name}]: {error}") from error
    print(f"{name}: {contestant.name} calibrated has its spread times {factor:.3f}, as fitted on validation snapshots")
    return factor


def section(task: Task, trial: Trial) -> Section:
    """All methods under one mask."""
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.evaluation.report import Section

    collected: dict[str, list[torch.Tensor]] = {}
    scored = [each for entry in trial.entries for each in contestant_scored(task, *entry, trial.setting, collected)]
    scored += baselines_scored(task, trial)
    found = Section(trial.setting, scored, trial.networks)
    return replace(found, generated=generation(task, collected)) if isinstance(trial.mask, Empty) else found


def contestant_scored(
    task: Task, contestant: Contestant, cases: Cases, setting: Setting, collected: dict[str, Any]
) -> Iterator[Scored]:
    """What a network says, scored, then the same members with their spread calibrated.

    Some of the fields of ensembles are added to `collected`. All members are kept where they serve twice.
    """
    from tqdm import tqdm

    from vecfield_diffusion.evaluation.comparison import Estimate, score
    from vecfield_diffusion.inference.calibration import apply_factor

    trained, parts, factor = contestant.trained, contestant.parts, contestant.factor
    config = task.config | ({"members": 1} if contestant.regression else {})
    size, kept = max(1, at_once(config, trained) // config["members"]), []
    total = None if parts.evaluations is None else len(cases.y) * config["members"] * parts.evaluations

    def told(name: str, members: torch.Tensor) -> Estimate:
        if not contestant.regression:
            collected.setdefault(name, []).append(members[: -(-GENERATED // len(cases.y))].flatten(0, 1))
        return Estimate(members)

    with tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None, desc=contestant.name) as bar:

        def ensemble(chosen: slice) -> Estimate:
            now = part_of(cases, chosen)
            members = fill_cases(config, trained=trained, method=parts, cases=now, progress=bar.update)
            kept.extend([] if factor is None else [members])
            return told(contestant.name, members)

        found = score(contestant.name, ensemble, setting, size)
    say_summary(parts)
    yield found
    for name in contestant.methods[1:]:

        def scaled(chosen: slice, name: str = name) -> Estimate:
            known = (cases.observed | cases.single)[chosen]
            return told(name, apply_factor(kept.pop(0), factor, known, cases.sigma_obs[chosen]))

        yield replace(score(name, scaled, setting, size), seconds=found.seconds)


def part_of(cases: Cases, chosen: slice) -> Cases:
    """Some of the cases."""
    values = {each.name: getattr(cases, each.name) for each in fields_of(cases) if each.name != "grid"}
    return replace(cases, **{name: value[chosen] for name, value in values.items() if value is not None})


def baselines_scored(task: Task, trial: Trial) -> Iterator[Scored]:
    """Every baseline that is fitted here, scored."""
    from vecfield_diffusion.evaluation.comparison import score

    floor = NUGGET * task.first.statistics.std
    for name, baseline in task.baselines.items():
        before = previous(task, trial.cases, trial.mask) if name == BASELINES["persistence"] else None
        yield score(name, baseline_fill(baseline, trial.cases, floor, before), trial.setting)


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
    if not fields or min(len(reference) // 2, len(train), *map(len, fields.values())) < 2:
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


def summary(sections: list[Section]) -> dict[str, float]:
    """The CRPS of every mask and network, and as `crps` the mean over the masks of the best network."""
    found, means, names = {}, [], sections[0].networks
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
