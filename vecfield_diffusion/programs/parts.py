"""What a training is made of before its data are known."""

from __future__ import annotations

from typing import Any

import torch

from vecfield_diffusion.config.build import build
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.models.base import Parametrization
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.trained import make_network


def make_parts(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what can be built without data; the rest is tried out, so that a number out of range is met before them.

    Raises:
        UserError: A number out of range, or parts that do not go together.
    """
    if config["seed"] < 0:
        raise UserError(f"seed must be >= 0, got {config['seed']}")
    names = ("trainer", "sampler", "mask", "augment", "splits", "logger", "physics", "loss")
    parts = {name: build(config[name], name, trusted=True) for name in names}
    if parts["mask"] is None:
        raise UserError("mask=auto is for filling a file: train with mask=mixture, or another of conf/mask")
    diffusion = any_diffusion(config)
    Method(parts["sampler"], Conditional()).check(diffusion)
    torch.manual_seed(config["seed"])
    any_grid = Grid(torch.ones(config["window"] or (64, 64), dtype=torch.bool))
    network = make_network(config, diffusion, any_grid, trusted=True)
    parts["gated"] = isinstance(network, Parametrization) and network.gate is not None
    build(config["optimizer"], "optimizer", trusted=True, params=[torch.nn.Parameter(torch.zeros(1))])
    torch.manual_seed(config["seed"])
    return parts


def any_diffusion(config: dict[str, Any]) -> Diffusion:
    """Returns the formulation before the data are known, whose levels `auto` may stand for any."""
    return build(with_levels(config, 80.0)["diffusion"], "diffusion", trusted=True)


def with_levels(config: dict[str, Any], sigma_max: float) -> dict[str, Any]:
    """Returns the configuration with `diffusion.sigma_max: auto` replaced by what the data ask for."""
    diffusion = dict(config["diffusion"])
    if diffusion.get("sigma_max") == "auto":
        diffusion["sigma_max"] = sigma_max
    return {**config, "diffusion": diffusion}
