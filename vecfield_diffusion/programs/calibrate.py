"""Fits the spread of a network's ensembles on the validation snapshots, one factor for each way to observe.

The factors are written into the checkpoint, also into one that is shipped, and are applied with `calibrate=true`, for
the same masks, errors, sampler, inpainting, physics, guidance and sensor alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    from vecfield_diffusion.programs.study import Study


def calibrate(config: dict[str, Any], folder: Path) -> None:
    """Fits, prints and stores one factor for each mask; `folder` is not needed.

    Raises:
        UserError: A checkpoint, mask or number that does not fit.
    """
    from vecfield_diffusion.programs.infer import check_ranges
    from vecfield_diffusion.programs.study import open_study

    check_ranges(config)
    for key, kind, wanted in (("ckpt", str, "one run"), ("sigma_obs", int | float, "a number")):
        if not isinstance(config[key], kind):
            raise UserError(f"{key}={config[key]}: expected {wanted} to calibrate")
    study = open_study({**config, "calibrate": False}, [], "validation")
    if len(study.models) > 1:
        raise UserError(f"ckpt={config['ckpt']}: expected one run to calibrate, found {len(study.models)}")
    for name in config["masks"]:
        fit_mask(study, name)


def fit_mask(study: Study, name: str) -> None:
    """The factor of one mask. Raises UserError where nothing is hidden, or members do not differ."""
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.inference.calibration import fit_factor, store_factor
    from vecfield_diffusion.programs.infer import fill, process_of

    node = study.config["options"]["mask"][name]
    mask = build(node, "mask", trusted=True)
    if mask is None:
        given = study.config["masks"]
        raise UserError(f"masks={given}: {name} hides nothing of its own. Name masks such as [track,block]")
    mask = study.mask(mask)
    cases = study.models[0].conditioned(study.cases(mask), study.fields, study.config, mask)
    network = study.models[0].resolved(name, cases, study.config)
    members = fill(study.config, network.trained, network.method, cases)
    hidden = cases.hidden & ~cases.single.any(dim=1, keepdim=True)
    try:
        factor = fit_factor(members, cases.truth, hidden)
    except ValueError as error:
        raise UserError(f"masks={study.config['masks']}: {name} cannot be calibrated: {error}") from error
    store_factor(network.trained.path, network.trained.step, process_of(study.config, node, network.method), factor)
    print(f"{name}: factor {factor:.4g} on {len(study.indices)} validation snapshots, in {network.trained.path}")
