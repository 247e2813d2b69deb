"""The spread of ensembles, put right by one factor: members <- mean + f (members - mean).

For members and truth drawn from one law, the error of the mean of M members has the variance (M + 1) / M of theirs
(Fortin et al., J. Hydrometeorol. 15, 1708, 2014). f is what makes this so on cases that were neither trained on nor
scored. It is linear: the mean stays as it is, and so does whatever all members obey, such as no divergence or values
observed exactly.

A factor holds for the process that it was fitted on (mask, error of the observations, sampler, guidance) and for the
weights that it was fitted with: it is kept in their checkpoint, as `calibration: [{process, factor}, ...]`, and goes
with them when a run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.ellipses import deviations
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import SHIPPED, amend_weights, load_weights
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

#: The parts of a configuration, beside mask and error, that the spread of an ensemble depends on.
PARTS = ("history", "sampler", "inpainting", "physics", "guidance", "sensor")

#: The keys of the shape of errors, which few have.
ELLIPSE = ("sigma_scale", "radars")

#: The keys that say how a mask goes through time. A factor from before there were any is one of snapshots, which have
#: nothing of them.
IN_TIME = frozenset({"time", "speed", "shift", "change"})

#: The key of a sampler without which a factor was fitted before it had one, and what the sampler then did.
COLD = {"temperature": 1.0}

Process = dict[str, Any]


def fit_factor(members: Tensor, truth: Tensor, where: Tensor) -> float:
    """Returns f = sqrt(mean square error of the ensemble mean / ((M + 1) / M mean variance)), 1 / `spread_skill`.

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
    cells = (where & truth.isfinite().all(dim=-3, keepdim=True)).squeeze(-3)
    x, y = members.movedim(-3, 1)[..., cells].double(), truth.movedim(-3, 0)[..., cells].double()
    if not (y.numel() and (x != x[0]).any()):
        raise ValueError("members must differ somewhere among the cells that count, got one field")
    error, variance = (x.mean(dim=0) - y).square().sum(), x.var(dim=0).sum()
    return (m * error / ((m + 1) * variance)).sqrt().item()


def apply_factor(members: Tensor, factor: float, observed: Tensor, sigma_obs: Tensor | float) -> Tensor:
    """Returns the members with their spread changed; values observed without error stay as they are, bit for bit.

    Arguments:
        members: `(M, N, 2, H, W)`, NaN outside the domain.
        factor: f.
        observed: Boolean `(N, 1, H, W)`, or `(N, 2, H, W)` where some components are missing.
        sigma_obs: The standard deviation of their error: a number, or a tensor as `Cases` has it.
    """
    mean = members.mean(dim=0)
    sigma = torch.as_tensor(sigma_obs)
    held = observed & ((deviations(sigma) if sigma.ndim else sigma) == 0).to(observed.device)
    return torch.where(held, members, torch.lerp(mean, members, factor))


def describe_process(config: Mapping[str, Any], mask: Mapping[str, Any], inpainting: Mapping[str, Any]) -> Process:
    """Returns what a factor is fitted on, in plain values.

    Arguments:
        config: The configuration of the program that fills.
        mask: The node of the mask.
        inpainting: The node of the way to condition, or of what `inpainting=auto` has come to.
    """
    process = {"mask": mask, "sigma_obs": config["sigma_obs"]}
    process |= {name: config[name] for name in ELLIPSE if config.get(name)}
    process |= {name: config.get(name) or None for name in PARTS}
    return json.loads(json.dumps(process | {"inpainting": inpainting}))


def store_factor(checkpoint: Path, step: int, process: Process, factor: float) -> None:
    """Adds a factor to those of a checkpoint, in the place of one of the same process.

    Raises:
        UserError: A checkpoint that cannot be read, is no longer that of `step`, or cannot be written.
    """
    shipped = checkpoint.suffix == SHIPPED
    state = load_weights(checkpoint) if shipped else load_checkpoint(checkpoint)
    if (now := state["counters"]["step"]) != step:
        raise UserError(
            f"{checkpoint} is of step {now} now, but the factor was fitted at step {step}. Calibrate when its training "
            "has ended"
        )
    kept = [known for known in state.get("calibration", []) if known["process"] != process]
    factors = [{"process": process, "factor": factor}, *kept]  # before one under the names of an older version
    if shipped:
        amend_weights(checkpoint, "calibration", factors)
    else:
        save_checkpoint(checkpoint, state | {"calibration": factors})


def find_factor(factors: Sequence[Mapping[str, Any]], process: Process, checkpoint: Path) -> float:
    """Returns the factor for a process among those of a checkpoint.

    Raises:
        UserError: There is none, or only for another process.
    """
    again = f"Run vecfield-calibrate ckpt={checkpoint} with the same options, or calibrate=false"
    if not factors:
        raise UserError(f"calibrate=true: {checkpoint} was not calibrated. {again}")
    for known in factors:
        if _completed(known["process"], process) == process:
            return known["factor"]
    raise UserError(f"calibrate=true: {checkpoint} was calibrated for {_nearest(process, factors)}. {again}")


def _completed(known: Mapping[str, Any], process: Process) -> Process:
    """Returns a known process with what the mask of `process` says of time, where its own says nothing of it.

    A sampler without a temperature had that of 1.
    """
    mask, sampler, wanted = known.get("mask"), known.get("sampler"), process.get("sampler")
    if isinstance(sampler, Mapping) and isinstance(wanted, Mapping) and COLD.keys() <= wanted.keys():
        known = {**known, "sampler": {**COLD, **sampler}}
    if not isinstance(mask, Mapping) or not isinstance(process["mask"], Mapping):
        return dict(known)
    lacking = {key: value for key, value in process["mask"].items() if key in IN_TIME - mask.keys()}
    return {**known, "mask": {**mask, **lacking}}


def _nearest(process: Process, factors: Sequence[Mapping[str, Any]]) -> str:
    """Returns how the known process that differs least differs."""
    differences = []
    for known in (factor["process"] for factor in factors):
        keys = [key for key in process if known.get(key) != process[key]]
        differences.append(", ".join(f"{key}={known.get(key)}, not {process[key]}" for key in keys))
    return min(differences, key=len)
