"""Fits the spread of a network's ensembles on the validation snapshots, one factor for each way to observe.

python scripts/calibrate.py ckpt=outputs/train/run 'masks=[track,block]'
python scripts/calibrate.py ckpt=outputs/train/run 'masks=[track]' sigma_obs=0.05 cases=100 sampler.steps=16

Options are those of evaluate.py. The factors are kept beside the checkpoint and applied with calibrate=true, for the
same masks, errors, sampler, inpainting, physics and guidance alone.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from vecfield_diffusion.apps.config import guarded, option
from vecfield_diffusion.apps.evaluate import main as evaluate
from vecfield_diffusion.errors import UserError


def main() -> int:
    """Reads the command line and does what it says. Raises UserError."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    calibrate(evaluate.config(*sys.argv[1:]))
    return 0


def calibrate(config: dict[str, Any]) -> None:
    """Fits, prints and stores one factor for each mask.

    Raises:
        UserError: A checkpoint, mask or number that does not fit.
    """
    from vecfield_diffusion.apps.assemble import check_grid, choose_device, fit_size, held_out, load_trained
    from vecfield_diffusion.apps.infer import check_ranges
    from vecfield_diffusion.apps.posterior import build_posterior

    check_ranges(config)
    for key, kind, wanted in (("ckpt", str, "one run"), ("sigma_obs", int | float, "a number")):
        if not isinstance(config[key], kind):
            raise UserError(f"{key}={config[key]}: expected {wanted} to calibrate")
    device = choose_device(config["device"])
    trained = load_trained(config["ckpt"], device, config["trust"])
    parts = build_posterior(config, trained, device)
    fields, offered = held_out(trained, "validation", config["trust"], config["data"])
    check_grid(fields, trained)
    trained = fit_size(trained, fields, config["overlap"], config["batch"])
    if parts.weak is not None:
        weak = fit_size(parts.weak, fields, config["overlap"], config["batch"])
        parts.guidance.weak = weak.denoiser
        parts = replace(parts, weak=weak)
    count = min(config["cases"], len(offered))
    indices = [offered[i * len(offered) // count] for i in range(count)]
    for name in config["masks"]:
        fit_mask(config, trained, parts, fields, indices, name)


def fit_mask(config: dict[str, Any], trained: Any, parts: Any, fields: Any, indices: list[int], name: str) -> None:
    """The factor of one mask. Raises UserError where nothing is hidden, or members do not differ."""
    from vecfield_diffusion.apps.build import build
    from vecfield_diffusion.apps.infer import fill
    from vecfield_diffusion.apps.posterior import settle
    from vecfield_diffusion.inference.calibration import describe_process, fit_factor, store_factor
    from vecfield_diffusion.inference.cases import make_cases, with_context

    node = option("mask", name)
    mask = build(node, "mask", trusted=True)
    if mask is None:
        raise UserError(f"masks={config['masks']}: {name} hides nothing of its own. Name masks such as [track,block]")
    cases = make_cases(fields, indices, mask, config["seed"], config["sigma_obs"], add_error=True)
    past = mask if config["history"] == "masked" else None
    cases = with_context(cases, fields, trained.context, trained.denoiser.normalizer, past, config["seed"])
    settled = settle(parts, trained, cases)
    members = fill(config, trained, settled, cases)
    try:
        factor = fit_factor(members, cases.truth, cases.hidden)
    except ValueError as error:
        raise UserError(f"masks={config['masks']}: {name} cannot be calibrated: {error}") from error
    process = describe_process(config, node, type(settled.inpainting).__name__)
    path = store_factor(trained.path, trained.step, process, factor)
    print(f"{name}: factor {factor:.4g} on {len(indices)} validation snapshots, in {path}")


if __name__ == "__main__":
    sys.exit(guarded(main))
