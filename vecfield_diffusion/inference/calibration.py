"""The spread of ensembles, put right by one factor: members <- mean + f (members - mean).

For members and truth drawn from one law, the error of the mean of M members has the variance (M + 1) / M of theirs
(Fortin et al., J. Hydrometeorol. 15, 1708, 2014). f is what makes this so on cases that were neither trained on nor
scored. It is linear: the mean stays as it is, and so does whatever all members obey, such as no divergence or values
observed exactly.

A factor holds for the process that it was fitted on (mask, error of the observations, sampler, guidance) and for the
weights of one step. Factors are kept in `<checkpoint>.calibration.json` beside the checkpoint:

    {"step": 20000, "factors": [{"process": {"mask": ..., "sigma_obs": ..., ...}, "factor": 1.21}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError

#: The parts of a configuration, beside mask and error, that the spread of an ensemble depends on.
PARTS = ("history", "sampler", "inpainting", "physics", "guidance", "sensor")

Process = dict[str, Any]


def fit_factor(members: Tensor, truth: Tensor, where: Tensor) -> float:
    """f = sqrt(mean square error of the ensemble mean / ((M + 1) / M mean variance)), 1 / `spread_skill`.

    Arguments:
        members: `(M, N, 2, H, W)`, M >= 2.
        truth: `(N, 2, H, W)`, NaN where unknown; such cells are left out.
        where: The cells that count, boolean `(N, 1, H, W)`.

    Raises:
        ValueError: One member, no cell, or members that do not differ.
    """
    m = len(members)
    if m < 2:
        raise ValueError(f"members must be >= 2, a spread needs two, got {m}")
    cells = where & truth.isfinite().all(dim=1, keepdim=True)
    x, y = members.movedim(-3, -4)[..., cells[:, 0]].double(), truth.movedim(-3, -4)[:, cells[:, 0]].double()
    if not (y.numel() and (x != x[0]).any()):
        raise ValueError("members must differ somewhere among the cells that count, got one field")
    error, variance = (x.mean(dim=0) - y).square().sum(), x.var(dim=0).sum()
    return (m * error / ((m + 1) * variance)).sqrt().item()


def apply_factor(members: Tensor, factor: float, observed: Tensor, sigma_obs: Tensor | float) -> Tensor:
    """The members with their spread changed; values observed without error stay as they are, bit for bit.

    Arguments:
        members: `(M, N, 2, H, W)`, NaN outside the domain.
        factor: f.
        observed: Boolean `(N, 1, H, W)`, or `(N, 2, H, W)` where some components are missing.
        sigma_obs: The standard deviation of their error: a number, or a tensor as `Cases` has it.
    """
    mean = members.mean(dim=0)
    held = observed & (torch.as_tensor(sigma_obs) == 0).to(observed.device)
    return torch.where(held, members, torch.lerp(mean, members, factor))


def describe_process(config: Mapping[str, Any], mask: Mapping[str, Any], inpainting: str) -> Process:
    """What a factor is fitted on, in plain values.

    Arguments:
        config: The configuration of the program that fills.
        mask: The node of the mask.
        inpainting: What `inpainting=auto` has come to.
    """
    process = {"mask": mask, "sigma_obs": config["sigma_obs"]} | {name: config.get(name) or None for name in PARTS}
    process["inpainting"] = process["inpainting"] or inpainting
    return json.loads(json.dumps(process))


def calibration_path(checkpoint: Path) -> Path:
    """Where the factors of a checkpoint lie."""
    return checkpoint.with_suffix(".calibration.json")


def store_factor(checkpoint: Path, step: int, process: Process, factor: float) -> Path:
    """Adds a factor to those of a checkpoint, in the place of one of the same process; those of other steps go.

    Raises:
        UserError: The file that is there already is damaged.
    """
    path = calibration_path(checkpoint)
    known = _read(path) if path.exists() else {"step": step, "factors": []}
    kept = known["factors"] if known["step"] == step else []
    factors = [each for each in kept if each["process"] != process] + [{"process": process, "factor": factor}]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"step": step, "factors": factors}, indent=2) + "\n")
    return path


def load_factor(checkpoint: Path, step: int, process: Process) -> float:
    """The factor of a checkpoint for a process.

    Raises:
        UserError: There is none, or only for other weights or another process.
    """
    path = calibration_path(checkpoint)
    again = f"Run python scripts/calibrate.py ckpt={checkpoint} with the same options, or calibrate=false"
    if not path.exists():
        raise UserError(f"calibrate=true: {path} is not there. {again}")
    known = _read(path)
    if known["step"] != step:
        raise UserError(f"calibrate=true: {path} is of step {known['step']}, the checkpoint of step {step}. {again}")
    for each in known["factors"]:
        if each["process"] == process:
            return each["factor"]
    raise UserError(f"calibrate=true: {path} is for {_nearest(process, known['factors'])}. {again}")


def _nearest(process: Process, factors: list[dict[str, Any]]) -> str:
    """How the known process that differs least differs."""
    differences = []
    for known in (each["process"] for each in factors):
        keys = [key for key in process if known.get(key) != process[key]]
        differences.append(", ".join(f"{key}={known.get(key)}, not {process[key]}" for key in keys))
    return min(differences, key=len)


def _read(path: Path) -> dict[str, Any]:
    """The file. Raises UserError."""
    try:
        known = json.loads(path.read_text())
        # Each once, as what it should be.
        _ = int(known["step"]), [(dict(each["process"]), float(each["factor"])) for each in known["factors"]][0]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{path}: not a file of scripts/calibrate.py ({error}). Remove it and calibrate anew"
        ) from error
    return known
