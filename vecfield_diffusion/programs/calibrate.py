"""Fits the spread of a network's ensembles on the validation snapshots, one factor for each way to observe.

vecfield-calibrate ckpt=outputs/train/run 'masks=[track,block]'
vecfield-calibrate ckpt=outputs/train/run 'masks=[track]' sigma_obs=0.05 cases=100 sampler.steps=16

Options are those of evaluate.py. The factors are written into the checkpoint, also into one that is shipped, and
are applied with calibrate=true, for the same masks, errors, sampler, inpainting, physics, guidance and sensor alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vecfield_diffusion.config.build import build
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.calibration import fit_factor, store_factor
from vecfield_diffusion.programs.ahead import View
from vecfield_diffusion.programs.filling import check_ranges
from vecfield_diffusion.programs.method import node_of, process_of
from vecfield_diffusion.programs.study import Study, open_study
from vecfield_diffusion.programs.twin import filler


def calibrate(config: dict[str, Any], folder: Path) -> None:
    """Fits, prints and stores one factor for each mask; `folder` is not needed.

    Raises:
        UserError: A checkpoint, mask or number that does not fit.
    """
    check_ranges(config)
    for key, kind, wanted in (("ckpt", str, "one run"), ("sigma_obs", int | float, "a number")):
        if not isinstance(config[key], kind):
            raise UserError(f"{key}={config[key]}: expected {wanted} to calibrate")
    if config["horizon"] != 0:
        raise UserError(f"horizon={config['horizon']}: the spread of forecasts is not calibrated. Leave it out")
    study = open_study({**config, "calibrate": False}, [], "validation")
    if len(study.models) > 1:
        raise UserError(f"ckpt={config['ckpt']}: expected one run to calibrate, found {len(study.models)}")
    for name in config["masks"]:
        fit_mask(study, name)


def fit_mask(study: Study, name: str) -> None:
    """Fits the factor of one mask. Raises UserError where nothing is hidden, or members do not differ."""
    node = node_of(study.config, "mask", name)
    mask = build(node, "mask", trusted=True)
    if mask is None:
        masks = study.config["masks"]
        raise UserError(f"masks={masks}: {name} hides nothing of its own. Name masks such as [track,block]")
    mask = study.mask(mask)
    cases = study.models[0].conditioned(study.cases(mask), study.fields, study.config, mask)
    model = study.models[0].resolved(View(name, name, mask), cases, study.config)
    trained, method = model.trained, model.method
    with filler(study, model, cases, mask, label=name) as fill:
        members = fill(slice(None))
    hidden = cases.hidden & ~cases.single.any(dim=1, keepdim=True)
    try:
        factor = fit_factor(members, cases.truth, hidden)
    except ValueError as error:
        raise UserError(f"masks={study.config['masks']}: {name} cannot be calibrated: {error}") from error
    store_factor(trained.path, trained.step, process_of(study.config, node, method), factor)
    print(f"{name}: factor {factor:.4g} on {len(study.indices)} validation snapshots, in {trained.path}")
