"""From configurations to objects: what the programs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vecfield_diffusion.apps.build import build
from vecfield_diffusion.apps.posterior import Posterior
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.hdf5 import open_hdf5
from vecfield_diffusion.data.netcdf import open_netcdf
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.cfg import ClassifierFree, NoGuidance
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.guidance.physics import Physics
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.adaptive import Adaptive
from vecfield_diffusion.training.checkpoint import find_checkpoint, load_checkpoint
from vecfield_diffusion.training.trainer import network_precision


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
    trusted: bool = False,
    trust: Sequence[str] = (),
) -> Denoiser:
    """The denoiser of a training configuration, with fresh weights."""
    shape = network_channels(diffusion) | {"periodic": grid.periodic}
    network = build(config["model"], "model", trusted=trusted, trust=trust, **shape)
    dtype = network_precision(config["trainer"]["precision"], device)
    denoiser = Denoiser(network, diffusion, normalizer, autocast=dtype)
    return denoiser.to(device=device, memory_format=torch.channels_last)


def network_channels(diffusion: Diffusion) -> dict[str, int]:
    """The channels that a network has for a formulation: the field, the observation, the guess; mean and variance."""
    channels = {"in_channels": 2 + Observation.CHANNELS + (2 if diffusion.coupled else 0)}
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
    if isinstance(parts.guidance, ClassifierFree) and (
        parts.sensor is not None or not isinstance(inpainting, Conditional | None)
    ):
        raise UserError(
            "guidance=cfg stresses the condition that the network is told: it goes with inpainting=conditional and "
            "sensor=none alone"
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
    """All that a checkpoint says: the denoiser with averaged weights, the grid, the data that it was trained on."""

    denoiser: Denoiser
    grid: Grid
    statistics: Statistics
    units: str
    split: dict[str, range]
    config: dict[str, Any]
    path: Path
    step: int


def load_trained(ckpt: str, device: torch.device, trust: Sequence[str] = ()) -> Trained:
    """The network of a run folder or a checkpoint file, ready to sample.

    Raises:
        UserError: No checkpoint there, a damaged or foreign one, or one whose configuration names what is not trusted.
    """
    path = find_checkpoint(ckpt)
    state = load_checkpoint(path)
    try:
        config = yaml.safe_load(state["config"])
        grid, statistics = Grid(**state["grid"]), Statistics(**state["statistics"])
        normalizer = Normalizer(state["mean"], statistics.std)
        diffusion = build(config["diffusion"], "diffusion", trust=trust)
        denoiser = make_denoiser(config, diffusion, normalizer, grid, device, trust=trust)
        denoiser.network.load_state_dict(state["ema"])
        diffusion.load_state_dict(state.get("diffusion", {}))
        step, units = int(state["counters"]["step"]), str(state["data"]["units"])
        split = {name: range(*block) for name, block in state["data"]["split"].items()}
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path}: the network does not fit into the GPU's memory; use device=cpu") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the checkpoint does not fit this program ({reason})") from error
    return Trained(denoiser.eval().requires_grad_(False), grid, statistics, units, split, config, path, step)


def open_input(path: str, trained: Trained, trust: Sequence[str] = ()) -> Fields:
    """The fields of a file given as `input=`: netCDF by its ending, else HDF5.

    Arrays are looked for under the names that the training data had, where those were of the same kind of file.
    """
    opener = open_netcdf if Path(path).suffix.lower() in (".nc", ".nc4", ".cdf") else open_hdf5
    node = trained.config["dataset"]
    target = f"{opener.__module__}.{opener.__name__}"
    node = {**node, "path": path} if node["_target_"] == target else {"_target_": target, "path": path}
    try:
        return build(node, "dataset", trust=trust)
    except UserError as error:
        message = str(error).replace("dataset.path=", "input=")
        if "dataset." in message:
            message += " (keys of train.py: a file is read under the names that the training data had)"
        raise UserError(f"input={path}: {message}") from error


def held_out(trained: Trained, split: str, trust: Sequence[str] = ()) -> tuple[Fields, range]:
    """The data that a checkpoint was trained on, and the snapshots of a split that it has not seen."""
    try:
        fields = build(trained.config["dataset"], "dataset", trust=trust)
    except UserError as error:
        raise UserError(
            f"the data that {trained.path} was trained on: {error} (run it from the folder where it was trained; "
            "infer.py also takes input=FILE)"
        ) from error
    if len(fields) < trained.split[split].stop:
        raise UserError(
            f"{fields.source} has {len(fields)} snapshots now, but {trained.path} keeps {trained.split[split].start} "
            f"to {trained.split[split].stop - 1} for {split}. Restore the file, or train anew"
        )
    return fields, trained.split[split]


def check_error(sigma_obs: float, trained: Trained) -> None:
    """Prints a note where observations are worse than any that the network was trained with."""
    most = trained.config["trainer"]["sigma_obs"] * trained.statistics.std
    if sigma_obs > most:
        print(f"note: sigma_obs={sigma_obs:g} is more than the {most:.3g} {trained.units} that training reached")


def check_grid(fields: Fields, trained: Trained) -> None:
    """Raises UserError where fields do not have the size and the order of rows that the network was trained on."""
    if fields.shape != trained.grid.shape:
        raise UserError(
            f"{fields.source} has fields of {fields.shape[0]}x{fields.shape[1]} cells, but {trained.path} was trained "
            f"on {trained.grid.shape[0]}x{trained.grid.shape[1]}. Give data of that size, or train on yours"
        )
    if fields.grid.dy[0] * trained.grid.dy[0] < 0:
        raise UserError(
            f"the rows of {fields.source} run the other way than those that {trained.path} was trained on. Turn the "
            f"file around along {fields.y_name}"
        )
    if fields.units != trained.units:
        raise UserError(f"{fields.source} is in {fields.units}, but {trained.path} was trained on {trained.units}")
    for name in ("dx", "dy"):
        here, there = (getattr(grid, name).abs().median() for grid in (fields.grid, trained.grid))
        if not 0.95 < here / there < 1.05:
            print(f"note: {name} is {here:.4g} in {fields.source}, but {there:.4g} in the training data")
