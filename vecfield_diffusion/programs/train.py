"""`python train.py`: trains a network, or goes on where a run of that name stopped."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vecfield_diffusion.data.context import Context
    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.diffusion.denoiser import Denoiser
    from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
    from vecfield_diffusion.models.gaussian import Modes
    from vecfield_diffusion.physics.grid import Grid
    from vecfield_diffusion.training.trainer import Run


#: Snapshots that a covariance is learnt from, at most.
SNAPSHOTS = 2000
#: Keys that may change between the command that began a run and the one that goes on with it.
FREE = {"name", "device", "logger", "trainer.max_steps", "trainer.max_minutes", "trainer.log_every"} | {
    "trainer.checkpoint_minutes"
}


def train(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Trains as a configuration says, in a run folder, and returns the validation scores.

    Raises:
        UserError: Anything in the configuration or the data that only the user can mend.
        SystemExit: A signal stopped the run after its state was saved (130 for Ctrl-C, 143 for SIGTERM).
    """
    import torch

    from vecfield_diffusion.training.trainer import Stopped, headline

    run = prepare(config, folder)
    if run.resume():
        print(f"{folder}: going on from step {run.counters.step}")
    run.logger.open(folder, str(folder).removeprefix("outputs/train/"), config)
    try:
        scores = run.train()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({error}). Raise trainer.accumulate, or lower batch_size") from error
    except Stopped as stop:
        state = f"saved {run.last}" if run.last.exists() else "nothing to save yet"
        print(f"{stop}: {state}; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    finally:
        run.logger.close()
    print(f"{folder}: {run.counters.step} steps, {run.counters.minutes:.1f} minutes")
    print(f"next: python infer.py ckpt={folder} mask=block")
    return headline(scores)


def prepare(config: dict[str, Any], folder: Path) -> Run:
    """Everything that a run needs, built and checked: first what needs no data, so that mistakes show early."""
    import yaml

    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.data.context import Context
    from vecfield_diffusion.data.statistics import homogeneous, measure
    from vecfield_diffusion.programs.trained import choose_device, make_denoiser
    from vecfield_diffusion.training.batches import Batches, window_grid
    from vecfield_diffusion.training.trainer import Run

    check_config(config, folder)
    device = choose_device(config["device"])
    parts = make_parts(config)
    trainer = parts["trainer"]
    fields = build(config["dataset"], "dataset", trusted=True)
    split = parts["splits"].split(fields)
    print(fields.summary())
    print("snapshots: " + ", ".join(f"{name} {s.start}-{s.stop - 1}" for name, s in split.items()))
    window = checked_window(config, fields)
    cut = cutter(fields.grid, window, config["seed"])
    normalizer, statistics = measure(fields, split["train"], config["mean_field"], cut)
    context = Context.measure(fields, split["train"])
    seen = fields.grid if window is None else window_grid(fields.grid, window)
    names = parts["augment"].resolve(seen, mean_is_zero=homogeneous(fields))
    config = with_levels(config, statistics.sigma_max)
    diffusion = build(config["diffusion"], "diffusion", trusted=True)
    own = (copy.deepcopy(diffusion), copy.deepcopy(normalizer), fields.grid, device, context)
    denoiser = make_denoiser(config, *own, trusted=True)
    if hasattr(denoiser.network, "learn"):
        denoiser.network.learn(gaussian_field(fields, split["train"], normalizer, window))
    announce(denoiser, statistics, names)
    keep_config(config, folder)

    common = dict(fields=fields, normalizer=normalizer, diffusion=diffusion, mask=parts["mask"], seed=config["seed"])
    common |= dict(size=trainer.batch_size, sigma_obs=trainer.sigma_obs, dropout=trainer.condition_dropout)
    common |= dict(window=window, context=context)
    return Run(
        trainer=trainer,
        denoiser=denoiser,
        optimizer=build(config["optimizer"], "optimizer", trusted=True, params=denoiser.parameters()),
        batches=Batches(indices=split["train"], augmentation=parts["augment"], **common),
        validation=Batches(indices=split["validation"], augmentation=None, **common),
        folder=folder,
        logger=parts["logger"],
        identity={
            "config": yaml.safe_dump(config, sort_keys=False),
            "data": describe(fields, split),
            "grid": fields.grid.state_dict(),
            "statistics": statistics.state_dict(),
            "mean": normalizer.mean,
            "context": None if context is None else context.state_dict(),
            "coordinates": coordinates(fields),
        },
        penalty=parts["physics"].penalty(denoiser.normalizer, fields.grid.to(device)),
        score=scorer(denoiser, fields, split["validation"], parts, config, context) if trainer.score_cases else None,
    )


def make_parts(config: dict[str, Any]) -> dict[str, Any]:
    """What can be built without data; the rest is tried out, so that a number out of range is met before data are made.

    Raises:
        UserError: A number out of range, or parts that do not go together.
    """
    import torch

    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.inference.method import Method
    from vecfield_diffusion.programs.trained import network_channels

    if config["seed"] < 0:
        raise UserError(f"seed must be >= 0, got {config['seed']}")
    names = ("trainer", "sampler", "mask", "augment", "splits", "logger", "physics")
    parts = {name: build(config[name], name, trusted=True) for name in names}
    if parts["mask"] is None:
        raise UserError("mask=auto is for filling a file: train with mask=mixture, or another of conf/mask")
    diffusion = build(with_levels(config, 80.0)["diffusion"], "diffusion", trusted=True)
    Method(parts["sampler"], Conditional()).check(diffusion)
    torch.manual_seed(config["seed"])
    build(config["model"], "model", trusted=True, periodic=(False, False), **network_channels(diffusion))
    build(config["optimizer"], "optimizer", trusted=True, params=[torch.nn.Parameter(torch.zeros(1))])
    torch.manual_seed(config["seed"])
    return parts


def checked_window(config: dict[str, Any], fields: Fields) -> tuple[int, int] | None:
    """The window of `window=`, which must lie within the fields. Raises UserError."""
    window = config["window"]
    if window is None:
        return None
    height, width = fields.shape
    if not (8 <= window[0] <= height and 8 <= window[1] <= width):
        raise UserError(f"window={list(window)}: expected [height, width] from 8 to the {height}x{width} of the fields")
    if config["physics"] is not None and config["physics"]["_target_"].endswith(".Physics"):
        raise UserError("window does not go with physics in training: a window does not know its own spacings")
    return tuple(window)


def cutter(grid: Grid, window: tuple[int, int] | None, seed: int) -> Callable[[Tensor], Tensor]:
    """What a network sees of whole fields: a random window of each, or all of it."""
    from vecfield_diffusion.data.statistics import whole
    from vecfield_diffusion.training.batches import seeded, windows

    if window is None:
        return whole
    generator = seeded(seed, 2)
    return lambda fields: windows(grid, window, len(fields), generator)(fields)


def gaussian_field(fields: Fields, indices: range, normalizer: Normalizer, window: tuple[int, int] | None) -> Modes:
    """The Gaussian field with the homogeneous covariance of the training snapshots, at most 2000 of them.

    It has few enough numbers to be as good on unseen fields. That of principal components fits the fields that it was
    learnt from so much better than others that a network trained beside it goes wrong on these.
    """
    import numpy as np
    import torch

    from vecfield_diffusion.data.statistics import homogeneous
    from vecfield_diffusion.evaluation.covariance import Homogeneous
    from vecfield_diffusion.models.gaussian import Eigenfields, Waves

    read = normalizer.normalize(fields.read(indices[:: -(-len(indices) // SNAPSHOTS)])).numpy()
    print(f"covariance of {len(read)} training snapshots")
    zero, valid = np.zeros(read.shape[1:]), fields.grid.valid.numpy()
    covariance = Homogeneous.of(read, zero, valid, fields.grid.periodic, nugget=0.0)
    if window is None and homogeneous(fields) and np.isfinite(read).all():  # waves have no gaps
        return Waves(torch.from_numpy(covariance.spectrum))
    shape = window or fields.shape
    count = min(Eigenfields.MODES, 2 * shape[0] * shape[1] - 1)
    vectors, variances, nugget = covariance.leading(count, shape)
    return Eigenfields(torch.from_numpy(vectors).float(), torch.from_numpy(variances).float(), nugget)


def coordinates(fields: Fields) -> dict[str, Any]:
    """The coordinates as a checkpoint stores them."""
    import torch

    axes = {name: torch.tensor(getattr(fields, name).astype(float)) for name in ("x", "y")}
    return axes | {"x_name": fields.x_name, "y_name": fields.y_name}


def describe(fields: Fields, split: Mapping[str, range]) -> dict[str, Any]:
    """What a checkpoint remembers of the data, so that unseen snapshots stay those that training did not see."""
    blocks = {name: [block.start, block.stop] for name, block in split.items()}
    return {"length": len(fields), "units": fields.units, "split": blocks}


def with_levels(config: dict[str, Any], sigma_max: float) -> dict[str, Any]:
    """The configuration with `diffusion.sigma_max: auto` replaced by what the data ask for."""
    diffusion = dict(config["diffusion"])
    if diffusion.get("sigma_max") == "auto":
        diffusion["sigma_max"] = sigma_max
    return {**config, "diffusion": diffusion}


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


def keep_config(config: dict[str, Any], folder: Path) -> None:
    """Writes `config.yaml` when a run begins. Raises what `check_config` raises."""
    import yaml

    from vecfield_diffusion.inference.files import write_text_atomic

    if not check_config(config, folder):
        write_text_atomic(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def check_config(config: dict[str, Any], folder: Path) -> bool:
    """Whether the folder holds a run with a checkpoint; it goes on only with the configuration that it began with.

    `auto` stands for whatever the data asked for: it is compared once it is known.

    Raises:
        UserError: The run was configured otherwise.
    """
    import yaml

    path = folder / "config.yaml"
    if not path.exists() or not any((folder / "checkpoints").glob("*.pt")):
        return False
    before, now = leaves(yaml.safe_load(path.read_text())), leaves(yaml.safe_load(yaml.safe_dump(config)))
    for key in sorted(before):  # a key that there was not then had the value that is now its default
        free = any(key == each or key.startswith(f"{each}.") for each in FREE)
        if not free and before.get(key) != now.get(key) and (key, now.get(key)) != ("diffusion.sigma_max", "auto"):
            raise UserError(
                f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}. Give the same to go on "
                "with it, or another name=... for a new run"
            )
    return True


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested configuration by dotted path."""
    if not isinstance(node, Mapping):
        return {path: node}
    return {key: value for name in node for key, value in leaves(node[name], f"{path}.{name}".lstrip(".")).items()}


def scorer(
    denoiser: Denoiser,
    fields: Fields,
    indices: range,
    parts: dict[str, Any],
    config: dict[str, Any],
    context: Context | None,
) -> Callable[[Path], dict[str, float]]:
    """A function that fills the same validation cases at each call, scores their hidden cells and draws them."""
    from vecfield_diffusion.evaluation.metrics import scores
    from vecfield_diffusion.evaluation.plots import sample_grid
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.inference.cases import make_cases, with_context
    from vecfield_diffusion.inference.ensemble import sample_ensemble
    from vecfield_diffusion.inference.method import Method
    from vecfield_diffusion.inference.windows import Windowed

    trainer, seed, mask = parts["trainer"], config["seed"], parts["mask"]
    spaced = [indices[i * len(indices) // trainer.score_cases] for i in range(min(trainer.score_cases, len(indices)))]
    cases = make_cases(fields, sorted(set(spaced)), mask, seed)
    cases = with_context(cases, fields, context, denoiser.normalizer, seed, mask, True)
    device = next(denoiser.parameters()).device
    if config["window"] is not None:
        denoiser = Windowed(denoiser, tuple(config["window"]), 0.25, fields.grid.periodic)

    def score(picture: Path) -> dict[str, float]:
        observation = cases.observation(denoiser.normalizer, device)
        how = (denoiser, Method(parts["sampler"], Conditional()), observation, fields.grid)
        members = sample_ensemble(*how, members=trainer.score_members, seed=seed, numbers=cases.numbers)
        try:
            sample_grid(picture, cases.truth, cases.observed, members, fields.grid, fields.units)
        except OSError as error:  # a picture is not worth a run
            picture.unlink(missing_ok=True)
            print(f"note: {picture} could not be written: {error.strerror}", file=sys.stderr)
        values = scores(members, cases.truth, cases.hidden)
        return {f"val/{name}": values[name] for name in ("crps", "rmse_component", "spread_skill")}

    return score
