"""From configurations to objects: what the programs share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import CONF
from vecfield_diffusion.data.context import Context
from vecfield_diffusion.data.fields import Fields, same_units
from vecfield_diffusion.data.points import open_points
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import Regression
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.cfg import ClassifierFree, NoGuidance
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.guidance.physics import Physics
from vecfield_diffusion.inference.export import SHIPPED, load_weights
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.models.gaussian import Waves
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.method import Posterior
from vecfield_diffusion.samplers.adaptive import Adaptive
from vecfield_diffusion.training.checkpoint import find_checkpoint, load_checkpoint
from vecfield_diffusion.training.trainer import network_precision

#: Where shipped networks lie: in a wheel inside the package, in a checkout beside it.
PRETRAINED = [CONF.parent / "pretrained"]


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here. Use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_denoiser(
    config: Mapping[str, Any],
    diffusion: Diffusion,
    normalizer: Normalizer,
    grid: Grid,
    device: torch.device,
    context: Context | None = None,
    trusted: bool = False,
    trust: Sequence[str] = (),
) -> Denoiser:
    """The denoiser of a training configuration, with fresh weights."""
    # A window of an axis has borders even where the axis has none.
    sizes = zip(grid.periodic, config["window"] or grid.shape, grid.shape, strict=True)
    periodic = tuple(closed and size == full for closed, size, full in sizes)
    shape = network_channels(diffusion, context) | {"periodic": periodic}
    network = build(config["model"], "model", trusted=trusted, trust=trust, **shape)
    dtype = network_precision(config["trainer"]["precision"], device)
    denoiser = Denoiser(network, diffusion, normalizer, autocast=dtype)
    return denoiser.to(device=device, memory_format=torch.channels_last)


def network_channels(diffusion: Diffusion, context: Context | None = None) -> dict[str, int]:
    """The channels of a network: the field, the observation, the guess, the context; mean and variance."""
    told = Observation.CHANNELS + (2 if diffusion.coupled else 0) + (0 if context is None else len(context))
    channels = {"in_channels": 2 + told}
    return channels | {"out_channels": 4} if diffusion.learned_variance else channels


def check_path(diffusion: Diffusion) -> None:
    """Raises UserError where a path has no levels, or none that numbers can hold."""
    try:
        low, high = diffusion.sigma_min, diffusion.sigma_max
        if not 0 < low < high < 1e6:
            raise ValueError(
                f"the levels sigma / alpha must rise from above 0 to below 1e6, got {low:.3g} to {high:.3g}"
            )
        diffusion.time(torch.tensor([low, high], dtype=torch.float64))
    except ValueError as error:
        raise UserError(f"diffusion: {error}. Set diffusion.t_min and diffusion.t_max inside the path") from error


def check_combination(diffusion: Diffusion, parts: Posterior) -> None:
    """Raises UserError where a sampler cannot go with a formulation, or with the way to condition."""
    sampler, inpainting = parts.sampler, parts.inpainting
    check_path(diffusion)
    try:
        diffusion.levels(sampler.steps, sampler.grid)
    except ValueError as error:
        raise UserError(f"sampler.{error}. Give fewer sampler.steps, or sampler.grid=karras, where any go") from error
    if sampler.needs_variance:
        if not diffusion.learned_variance:
            raise UserError(
                "sampler.variance=learned needs a network that was trained with diffusion=iddpm "
                f"diffusion.learned_variance=true; {type(diffusion).__name__} knows small and large"
            )
        plain = isinstance(parts.guidance, NoGuidance) and not isinstance(parts.physics, Physics)
        plain = plain and parts.sensor is None
        if not (plain and isinstance(inpainting, Conditional | None)):
            raise UserError(
                "sampler.variance=learned goes with inpainting=conditional, physics=none and guidance=none alone: the "
                "others change the variance"
            )
    if isinstance(sampler, Adaptive) and inpainting is not None and inpainting.changes_state:
        raise UserError(
            "sampler=adaptive has no levels that all members share, which "
            f"inpainting={type(inpainting).__name__.lower()} needs. Use another sampler, or inpainting=conditional"
        )
    told = inpainting is None or inpainting.told
    plain = isinstance(parts.guidance, NoGuidance) and parts.sensor is None and not isinstance(parts.physics, Physics)
    if isinstance(diffusion, Regression) and not (plain and isinstance(inpainting, Conditional | None)):
        raise UserError(
            "diffusion=regression gives the mean alone: it goes with inpainting=conditional, physics=none, "
            "guidance=none and sensor=none"
        )
    if isinstance(parts.guidance, ClassifierFree) and (parts.sensor is not None or not told):
        raise UserError(
            "guidance=cfg stresses the cells that the network is told: use sensor=none and inpainting=conditional, or "
            "inpainting=mmps inpainting.told=true for physics and single components beside them"
        )
    if parts.sensor is not None and isinstance(parts.physics, Physics) and parts.physics.mode == "hard":
        raise UserError("physics.mode=hard holds observed cells, which a sensor does not give: use physics.mode=rows")
    if parts.sensor is not None and not (inpainting is None or inpainting.takes_rows):
        raise UserError(
            f"sensor={type(parts.sensor).__name__.lower()} needs inpainting=mmps or pigdm: the network was trained on "
            "velocities of single cells"
        )


@dataclass(frozen=True)
class Trained:
    """All that a checkpoint says: the denoiser with averaged weights, the grid, the data that it was trained on.

    `coordinates` are `x` and `y` with their names, as `Fields` has them, where the checkpoint knows them; `context` is
    what the network is told beside observations; `window` is the size of its fields, where they were windows;
    `calibration` are the factors of its spread, see `inference/calibration.py`.
    """

    denoiser: Denoiser
    grid: Grid
    statistics: Statistics
    units: str
    split: dict[str, range]
    config: dict[str, Any]
    path: Path
    step: int
    context: Context | None = None
    coordinates: Mapping[str, Any] | None = None
    calibration: Sequence[Mapping[str, Any]] = ()

    @property
    def window(self) -> tuple[int, int]:
        """The size of the fields that the network was trained on."""
        return tuple(self.config["window"] or self.grid.shape)


def find_trained(ckpt: str) -> Path:
    """The file that `ckpt=` means: see `find_checkpoint`; else a shipped one, such as `pretrained/turbulence`."""
    here = Path(ckpt)
    for place in (here, *(folder.parent / here for folder in PRETRAINED)):
        shipped = place if place.suffix == SHIPPED else place.with_name(f"{place.name}{SHIPPED}")
        if not here.exists() and shipped.is_file():
            return shipped
    return find_checkpoint(ckpt)


def load_trained(ckpt: str, device: torch.device, trust: Sequence[str] = ()) -> Trained:
    """The network of a run folder or a checkpoint file, ready to sample.

    Raises:
        UserError: No checkpoint there, a damaged or foreign one, or one whose configuration names what is not trusted.
    """
    path = find_trained(ckpt)
    state = load_weights(path) if path.suffix == SHIPPED else load_checkpoint(path)
    try:
        config = yaml.safe_load(state["config"])
        grid, statistics = Grid(**state["grid"]), Statistics(**state["statistics"])
        normalizer = Normalizer(state["mean"], statistics.std)
        diffusion = build(config["diffusion"], "diffusion", trust=trust)
        config.setdefault("window")
        context = Context.from_state(state["context"]) if state.get("context") else None
        denoiser = make_denoiser(config, diffusion, normalizer, grid, device, context, trust=trust)
        denoiser.network.load_state_dict(state["ema"])
        diffusion.load_state_dict(state.get("diffusion", {}))
        step, units = int(state["counters"]["step"]), str(state["data"]["units"])
        split = {name: range(*block) for name, block in state["data"]["split"].items()}
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path}: the network does not fit into the GPU's memory; use device=cpu") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the checkpoint does not fit this program ({reason})") from error
    denoiser = denoiser.eval().requires_grad_(False)
    rest = context, state.get("coordinates"), state.get("calibration", ())
    return Trained(denoiser, grid, statistics, units, split, config, path, step, *rest)


def open_input(
    path: str,
    trained: Trained,
    names: tuple[str, str] | None = None,
    bin_length: float | None = None,
) -> Fields:
    """The fields of a file given as `input=`: points by the ending csv, tsv or txt, else whatever the file is.

    What the configuration of the training data says of names and masks holds here, too, where the file has them.

    Arguments:
        path: The file.
        trained: What the network was trained on.
        names: The variables of the two components.
        bin_length: See `open_points`.

    Raises:
        UserError: A file that cannot be read or understood.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv", ".txt"):
        return open_table(path, trained, bin_length)
    taken = inspect.signature(open_fields).parameters
    said = {key: value for key, value in trained.config["dataset"].items() if key in taken and value is not None}
    said |= {"path": path} | ({} if names is None else {"velocity": None, "u": names[0], "v": names[1]})
    kept = {key: said[key] for key in ("path", "u", "v", "context", "history", "preload_gb", "land") if key in said}
    if names is None:
        kept = {key: value for key, value in kept.items() if key not in ("u", "v")}
    try:
        try:
            return open_fields(**said)
        except UserError as error:  # a file of another kind: what was said of the training data is not true of it
            if names is None and not set(said) - set(kept):
                raise
            fields = open_fields(**kept)
            left = ", ".join(f"{key}={value}" for key, value in said.items() if key not in kept)
            print(f"note: read without what was said of the training data ({left}): {error}")
            return fields
    except (UserError, ValueError) as error:
        message = str(error).replace("dataset.path=", "input=")
        hint = " (here: names=[U,V])" if "dataset.u=" in message else ""
        raise UserError(f"input={path}: {message}{hint}") from error


def open_table(path: str, trained: Trained, bin_length: float | None) -> Fields:
    """The points of a table on the grid of the training data. Raises UserError."""
    known = trained.coordinates
    if known is None:
        raise UserError(f"{trained.path} does not say where its cells are: train anew to give it points")
    x, y = known["x"].numpy(), known["y"].numpy()
    degrees = known["x_name"] == "lon"
    how = (x, y, degrees, trained.grid.valid.cpu().numpy(), trained.grid.periodic[1], bin_length)
    points = open_points(path, *how)
    if np.isfinite(points.error).any():
        print("note: the table gives errors, which sigma_obs=error takes into account")
    return points.to_fields(trained.grid, x, y, known["x_name"], known["y_name"], trained.units)


def held_out(trained: Trained, split: str, trust: Sequence[str] = (), data: str | None = None) -> tuple[Fields, range]:
    """The data that a checkpoint was trained on, and the snapshots of a split that it has not seen.

    Raises:
        UserError: They are not where they were, nor at `data`, or have lost snapshots.
    """
    node = trained.config["dataset"]
    if data is not None and "path" not in node:
        raise UserError(f"data={data}: {trained.path} was trained on data that are made, not read")
    try:
        fields = build(node if data is None else {**node, "path": data}, "dataset", trust=trust)
    except UserError as error:
        raise UserError(
            f"the data that {trained.path} was trained on: {error} (run it from the folder where it was trained, or "
            "say where they are now: data=FILE; infer.py also takes input=FILE)"
        ) from error
    if len(fields) < trained.split[split].stop:
        raise UserError(
            f"{fields.source} has {len(fields)} snapshots now, but {trained.path} keeps {trained.split[split].start} "
            f"to {trained.split[split].stop - 1} for {split}. Restore the file, or train anew"
        )
    return fields, trained.split[split]


def check_error(worst: float, trained: Trained) -> None:
    """Prints a note where observations are worse than any that the network was trained with."""
    most = trained.config["trainer"]["sigma_obs"] * trained.statistics.std
    if worst > 1.0001 * most:  # float32
        print(f"note: sigma_obs={worst:g} is more than the {most:.3g} {trained.units} that training reached")


def fit_size(trained: Trained, fields: Fields, overlap: float = 0.25, batch: int = 64) -> Trained:
    """The same for fields of another size, or larger than the network's: it then works in windows that overlap.

    Raises:
        UserError: A network that knows its own domain alone.
    """
    denoiser, grid = trained.denoiser, trained.grid
    if isinstance(getattr(denoiser.network, "field", None), Waves) and not fields.grid.valid.all():
        raise UserError(
            f"{fields.source} has cells outside the domain, but {trained.path} was trained with model=gaussian on "
            "waves that fill all of it. Give a file without land, or train with window=[32,32] or so"
        )
    away = elsewhere(trained, fields)
    if fields.shape != grid.shape or away:
        place = " of another place" if away else ""
        size = f"{fields.shape[0]}x{fields.shape[1]}"
        said = f"{fields.source} has fields{place} of {size}, but {trained.path} was trained"
        if denoiser.normalizer.mean.any():
            raise UserError(
                f"{said} on {grid.shape[0]}x{grid.shape[1]} around the mean field of that domain. Give data of that "
                "size, or train with mean_field=false"
            )
        if trained.config["window"] is None and any(grid.periodic) and fields.shape != grid.shape:
            raise UserError(
                f"{said} on a periodic domain of {grid.shape[0]}x{grid.shape[1]}. Give data of that size, or train "
                "with window=[32,32] or so"
            )
        zero = torch.zeros(2, *fields.shape, device=denoiser.normalizer.mean.device)
        normalizer = Normalizer(zero, trained.statistics.std).to(zero.device)
        denoiser = Denoiser(denoiser.network, denoiser.diffusion, normalizer, denoiser.autocast).eval()
        grid = fields.grid
    if fields.shape != trained.window:
        height, width = trained.window
        print(f"in windows of {height}x{width} cells, a share of {overlap:g} of each shared with the next")
        denoiser = Windowed(denoiser, trained.window, overlap, grid.periodic, batch)
    return replace(trained, denoiser=denoiser, grid=grid)


def elsewhere(trained: Trained, fields: Fields) -> bool:
    """Whether fields of the size of the training data lie at other longitudes and latitudes, by a cell or more."""
    known = trained.coordinates
    if known is None or known["x_name"] != "lon" or fields.x_name != "lon" or fields.shape != trained.grid.shape:
        return False
    east = (torch.as_tensor(fields.x.astype(float)) - known["x"] + 180) % 360 - 180
    north = torch.as_tensor(fields.y.astype(float)) - known["y"]
    cells = zip((east, north), (known["x"], known["y"]), strict=True)
    return any(bool((off.abs() > axis.diff().abs().median()).any()) for off, axis in cells)


def check_grid(fields: Fields, trained: Trained) -> None:
    """Raises UserError where fields have other units, or rows in another order, than those of the training data."""
    if fields.grid.dy[0] * trained.grid.dy[0] < 0:
        raise UserError(
            f"the rows of {fields.source} run the other way than those that {trained.path} was trained on. Turn the "
            f"file around along {fields.y_name}"
        )
    if not same_units(fields.units, trained.units):
        raise UserError(f"{fields.source} is in {fields.units}, but {trained.path} was trained on {trained.units}")
    for name in ("dx", "dy"):
        here, there = (getattr(grid, name).abs().median() for grid in (fields.grid, trained.grid))
        if not 0.95 < here / there < 1.05:
            print(f"note: {name} is {here:.4g} in {fields.source}, but {there:.4g} in the training data")
