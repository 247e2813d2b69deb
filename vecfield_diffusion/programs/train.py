"""`python train.py`: trains a network, or goes on where a run of that name stopped."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import yaml

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.augment import Transforms
from vecfield_diffusion.data.draws import window_grid
from vecfield_diffusion.data.splits import independent
from vecfield_diffusion.data.statistics import homogeneous
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.normalizer import Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.locks import owned
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.gaussian_field import gaussian_field
from vecfield_diffusion.programs.objective import make_objective
from vecfield_diffusion.programs.parts import any_diffusion, make_parts, with_levels
from vecfield_diffusion.programs.run_folder import check_folder, coordinates, describe, keep_config, kept_config
from vecfield_diffusion.programs.small import mirrors, regularised
from vecfield_diffusion.programs.start import begin_from
from vecfield_diffusion.programs.trained import choose_device, make_denoiser
from vecfield_diffusion.programs.training_data import TrainingData, open_data
from vecfield_diffusion.programs.tuning import load_teacher, of_teacher, tune_from
from vecfield_diffusion.programs.validation import Validation
from vecfield_diffusion.signals import stoppable
from vecfield_diffusion.training.batches import Batches
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.few_steps import FewStepRun
from vecfield_diffusion.training.launch import joined, launched
from vecfield_diffusion.training.loggers import NoLogger
from vecfield_diffusion.training.reuse import reused
from vecfield_diffusion.training.trainer import TrainingRun, headline


def train(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Trains as a configuration says, in a run folder, and returns the validation scores.

    `trainer.devices` processes take part, or as many as torchrun has started.

    Raises:
        UserError: Anything in the configuration or the data that only the user can mend, or another process that
            trains in this folder.
        SystemExit: A signal stopped the run after its state was saved (130 for Ctrl-C, 143 for SIGTERM).
    """
    return launched(train_together, config, folder, devices=config["trainer"]["devices"])


def train_together(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Trains as one of the processes that were launched for it, or alone; see `train`."""
    states = [folder / "checkpoints" / name for name in ("best.pt", "last.pt")]
    with joined(config["trainer"]["strategy"]) as processes:
        own = owned(folder / "metrics.jsonl", folder / "config.yaml", *states) if processes.first else nullcontext()
        with own:
            return _trained(config, folder, processes)


def _trained(config: dict[str, Any], folder: Path, processes: SingleProcess) -> dict[str, float]:
    """See `train`; the folder is ours."""
    last = folder / "checkpoints" / "last.pt"
    with stoppable(lambda: f"saved {last}" if last.exists() else "nothing to save yet"):
        run = prepare(config, folder, processes)
        if run.resume():
            print(f"{folder}: going on from step {run.counters.step}")
        if processes.told(run.counters.step) != run.counters.step:
            raise UserError(f"{folder} is not the same at all processes: give a folder that all machines share")
        run.logger.open(folder, str(folder).removeprefix("outputs/train/"), config)
        try:
            scores = run.train()
        finally:
            run.logger.close()
    print(f"{folder}: {run.counters.step} steps, {run.counters.minutes:.1f} minutes")
    print(f"next: python infer.py ckpt={folder} mask=block{sampled_by(run.denoiser.diffusion)}")
    return headline(scores)


def sampled_by(diffusion: Diffusion) -> str:
    """Returns what a command that samples must say of the sampler; nothing where the default one does."""
    return "" if diffusion.gives_mean else f" sampler=consistency sampler.steps={diffusion.most_steps or 2}"


def prepare(config: dict[str, Any], folder: Path, processes: SingleProcess | None = None) -> TrainingRun:
    """Returns a run with all that it needs, built and checked: first what needs no data, so that mistakes show early.

    Arguments:
        config: The configuration of `train.py`.
        folder: The run folder.
        processes: Those that train together; this one alone if None.

    Raises:
        UserError: Anything in the configuration or the data that only the user can mend.
    """
    processes = processes or SingleProcess()
    device = processes.device(choose_device(config["device"]))
    formulation = any_diffusion(config)
    teacher = load_teacher(config, formulation, device)
    config = config if teacher is None else of_teacher(config, formulation, teacher)
    check_folder(config, folder)
    parts = make_parts(config) | {"processes": processes}
    processes.check(parts["trainer"].batch_size, parts["trainer"].accumulate)
    data = open_data(config, parts)
    fields = data.fields
    domain = fields.grid if data.window is None else window_grid(fields.grid, data.window)
    config = without_auto(with_levels(config, data.statistics.sigma_max), folder, data, domain, parts["gated"])
    parts["trainer"] = replace(parts["trainer"], patience=config["trainer"]["patience"])
    augment = build(config["augment"], "augment", trusted=True)
    transforms = augment.resolve(domain, mean_is_zero=homogeneous(fields))
    denoiser = make_denoiser(
        config,
        diffusion=build(config["diffusion"], "diffusion", trusted=True),
        normalizer=copy.deepcopy(data.normalizer),
        grid=fields.grid,
        device=device,
        context=data.context,
        trusted=True,
    )
    begins = not check_folder(config, folder)
    if teacher is not None:
        tune_from(denoiser, teacher, begins)
    elif config["start"] is not None and begins:
        begin_from(denoiser, fields.frames, config["start"], device)
    if teacher is None:
        denoiser.parametrization.learn(
            lambda: gaussian_field(fields, data.split["train"], data.normalizer, data.window)
        )
    announce(denoiser, data.statistics, transforms.names)
    processes.distribute(denoiser)
    if processes.first:
        keep_config(config, folder)
    return make_run(config, folder, parts=parts, data=data, denoiser=denoiser, transforms=transforms)


def without_auto(config: dict[str, Any], folder: Path, data: TrainingData, domain: Grid, gated: bool) -> dict[str, Any]:
    """Returns the configuration with what the number of independent training fields asks for, and prints it."""
    training = data.split["train"]
    config, said = regularised(
        config,
        independent(data.fields, training),
        len(training),
        mirrors=mirrors(domain) if gated and not homogeneous(data.fields) else (),
        before=kept_config(folder),
    )
    if said:
        print(said)
    return config


def make_run(
    config: dict[str, Any],
    folder: Path,
    *,
    parts: Mapping[str, Any],
    data: TrainingData,
    denoiser: Denoiser,
    transforms: Transforms,
) -> TrainingRun:
    """Returns the run of a denoiser on data, ready to resume or to begin."""
    trainer, processes, fields, context = parts["trainer"], parts["processes"], data.fields, data.context
    batches = partial(
        Batches,
        fields=fields,
        normalizer=data.normalizer,
        diffusion=build(config["diffusion"], "diffusion", trusted=True),
        mask=parts["mask"],
        size=trainer.batch_size,
        seed=config["seed"],
        sigma_obs=trainer.sigma_obs,
        dropout=trainer.condition_dropout,
        window=data.window,
        context=context,
    )
    train = batches(indices=data.split["train"], augmentation=transforms)
    chosen = dict(context=context, trainer=trainer, sampler=parts["sampler"], mask=parts["mask"], config=config)
    run = TrainingRun if denoiser.diffusion.gives_mean else FewStepRun

    def solve_for(alike: list[Observation]) -> None:
        own = (observation[processes.own(len(observation))] for observation in alike)
        denoiser.prepare(reduce(Observation.concatenate, own))

    return run(
        trainer=trainer,
        denoiser=denoiser,
        optimizer=build(config["optimizer"], "optimizer", trusted=True, params=denoiser.parameters()),
        batches=reused(train, denoiser.parametrization.keeps, solve_for),
        validation=batches(indices=data.split["validation"], augmentation=None),
        folder=folder,
        logger=parts["logger"] if processes.first else NoLogger(),
        identity={
            "config": yaml.safe_dump(config, sort_keys=False),
            "data": describe(fields, data.split),
            "grid": fields.grid.state_dict(),
            "statistics": data.statistics.state_dict(),
            "mean": data.normalizer.mean,
            "context": None if context is None else context.state_dict(),
            "coordinates": coordinates(fields),
        },
        objective=make_objective(parts["loss"], data, denoiser),
        penalty=parts["physics"].penalty(denoiser.normalizer, fields.grid.to(denoiser.normalizer.std.device)),
        score=Validation(denoiser, fields, data.split["validation"], **chosen) if trainer.score_cases else None,
        processes=processes,
    )


def announce(denoiser: Denoiser, statistics: Statistics, augmentation: tuple[str, ...]) -> None:
    """Prints what the data are like, what is about to be trained, and where the noise is too little for the data."""
    print(
        f"std {statistics.std:.3g}, RMS divergence {statistics.divergence_rms:.2g} and vorticity "
        f"{statistics.vorticity_rms:.2g} per s, noise asked for {statistics.sigma_max:.3g} std"
    )
    diffusion, size = denoiser.diffusion, sum(weight.numel() for weight in denoiser.network.parameters())
    precision = "float32" if denoiser.autocast is None else str(denoiser.autocast).removeprefix("torch.")
    print(
        f"{type(diffusion).__name__}, noise levels {diffusion.sigma_min:.3g} to {diffusion.sigma_max:.3g}; "
        f"{size / 1e6:.2f} M parameters in {precision} on {next(denoiser.parameters()).device.type}; "
        f"augmentation: {', '.join(augmentation) or 'none'}"
    )
    if diffusion.sigma_max < 0.999 * statistics.sigma_max:
        print(
            f"note: with noise up to {diffusion.sigma_max:.3g} only, samples without observations lose energy at the "
            "largest scales"
        )
