"""`python infer.py`: fills gaps with an ensemble, or draws fields from nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.apps.config import Program
from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch

    from vecfield_diffusion.apps.assemble import Trained
    from vecfield_diffusion.apps.posterior import Posterior
    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.evaluation.plots import Coordinates
    from vecfield_diffusion.inference.cases import Cases

#: The keys of every program that samples.
SAMPLING = {
    "ckpt": "str",
    "name": "str",
    "members": "int",
    "seed": "int",
    "batch": "int",
    "sigma_obs": "float",
    "device": "Literal['auto', 'cpu', 'cuda']",
    "trust": "list[str]",
}

main = Program(
    "infer",
    "vecfield_diffusion.apps.infer:infer",
    keys={
        **SAMPLING,
        "input": "str | None",
        "time": "int | list[int]",
        "colour": "Literal['speed', 'vorticity']",
        "likelihood": "Literal['none', 'hutchinson', 'exact']",
        "likelihood_steps": "int",
    },
    examples={"ckpt": "python infer.py ckpt=outputs/train/run mask=block"},
    files={"mask": "file"},
    metric="crps",
)


def infer(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Fills the gaps of chosen snapshots, writes `fields.nc`, `metrics.json` and `figure.png`, returns the scores.

    Raises:
        UserError: A checkpoint, file or option that does not fit.
    """
    from vecfield_diffusion.apps.assemble import choose_device, load_trained
    from vecfield_diffusion.apps.build import build
    from vecfield_diffusion.apps.posterior import build_posterior, settle
    from vecfield_diffusion.guidance.inpainting import Conditional

    check_ranges(config)
    device = choose_device(config["device"])
    mask = build(config["mask"], "mask", trusted=True)
    trained = load_trained(config["ckpt"], device, config["trust"])
    parts = build_posterior(config, trained, device)
    check_likelihood(config, parts, mask)
    print(f"{trained.path}: step {trained.step}, {type(trained.denoiser.diffusion).__name__}")
    fields, indices = chosen_snapshots(config, trained)
    place(parts.sensor, fields)
    cases = hide(config, trained, fields, indices, mask, parts.sensor)
    if config["likelihood"] != "none":
        parts = replace(parts, inpainting=Conditional())
    parts = settle(parts, trained, cases.observed, config["sigma_obs"])
    members = fill(config, trained, parts, cases)
    nats = None if config["likelihood"] == "none" else likelihood(config, trained, cases)
    return write(config, folder, trained, fields, indices, cases, members, nats)


def check_ranges(config: dict[str, Any]) -> None:
    """Raises UserError for a number out of range."""
    for key, least in (("members", 1), ("batch", 1), ("cases", 1), ("seed", 0), ("sigma_obs", 0.0)):
        if key in config and config[key] < least:
            raise UserError(f"{key} must be >= {least}, got {config[key]}")


def check_likelihood(config: dict[str, Any], parts: Posterior, mask: Any) -> None:
    """Raises UserError where a density is asked for that there is not."""
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.guidance.cfg import NoGuidance
    from vecfield_diffusion.guidance.inpainting import Conditional
    from vecfield_diffusion.guidance.physics import Physics

    if config["likelihood"] == "none":
        return
    plain = isinstance(parts.guidance, NoGuidance) and not isinstance(parts.physics, Physics) and parts.sensor is None
    if not (plain and isinstance(parts.inpainting, Conditional | None)):
        raise UserError(
            "likelihood is that of the network: it goes with inpainting=conditional physics=none guidance=none alone"
        )
    if config["sigma_obs"] == 0 and not isinstance(mask, Empty):
        raise UserError(
            "likelihood: cells observed without error have no density. Add sigma_obs=... (the error of the "
            "observations), or mask=none for the likelihood under the prior"
        )
    if config["likelihood_steps"] < 2:
        raise UserError(f"likelihood_steps must be >= 2, got {config['likelihood_steps']}")


def chosen_snapshots(config: dict[str, Any], trained: Trained) -> tuple[Fields, list[int]]:
    """The fields of `input=`, or of the test split of the training data, and the indices that `time=` chooses."""
    from vecfield_diffusion.apps.assemble import check_grid, held_out, open_input

    if config["input"] is not None:
        fields = open_input(config["input"], trained, config["trust"])
        offered = range(len(fields))
    else:
        fields, offered = held_out(trained, "test", config["trust"])
    print(fields.summary())
    check_grid(fields, trained)
    wanted = [config["time"]] if isinstance(config["time"], int) else list(config["time"])
    outside = [index for index in wanted if not -len(offered) <= index < len(offered)]
    if outside or not wanted:
        raise UserError(f"time={config['time']}: there are {len(offered)} snapshots, 0 to {len(offered) - 1}")
    return fields, [offered[index] for index in wanted]


def place(sensor: Any, fields: Fields) -> None:
    """Tells an instrument where the cells are."""
    import torch

    if sensor is None:
        return
    x, y = (torch.tensor(each.astype(float)) for each in (fields.x, fields.y))
    sensor.place(x, y, fields.x_name == "lon")
    try:
        sensor.measure(torch.zeros(1, 2, *fields.shape), fields.grid)
    except ValueError as error:
        raise UserError(f"sensor.{error}") from error


def hide(config: dict[str, Any], trained: Trained, fields: Fields, indices: list[int], mask: Any, sensor: Any) -> Cases:
    """The cases to fill. `mask=auto` takes the gaps of `input=` as they are, and hides a block where there is none."""
    from vecfield_diffusion.apps.build import build
    from vecfield_diffusion.apps.config import option
    from vecfield_diffusion.data.masks import Empty
    from vecfield_diffusion.inference.cases import make_cases

    twin = config["input"] is None
    mask = mask or build(option("mask", "block" if twin else "gaps"), "mask", trusted=True)
    how = (mask, config["seed"], config["sigma_obs"])
    cases = make_cases(fields, indices, *how, add_error=twin, grid=trained.grid, sensor=sensor)
    if not isinstance(mask, Empty):
        for index, snapshot in zip(indices, cases.observed, strict=True):
            if not snapshot.any():
                raise UserError(f"snapshot {index} has no observed cell: choose another time=, or draw with mask=none")
    if bool((cases.observed | ~trained.grid.valid).all()):
        raise UserError("nothing to fill: every cell is observed. Hide some with mask=block, or another of conf/mask")
    return cases


def fill(config: dict[str, Any], trained: Trained, parts: Posterior, cases: Cases) -> torch.Tensor:
    """The ensemble `(M, N, 2, H, W)` in physical units, with a progress bar."""
    import torch
    from tqdm import tqdm

    from vecfield_diffusion.apps.assemble import check_error
    from vecfield_diffusion.inference.ensemble import sample_ensemble

    check_error(cases.sigma_obs, trained)
    denoiser = trained.denoiser
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    total = None if parts.evaluations is None else config["members"] * len(observation) * parts.evaluations
    how = (denoiser, parts.sampler, parts.inpainting, parts.physics, observation, trained.grid)
    options = {key: config[key] for key in ("members", "seed", "batch")}
    options |= {"guidance": parts.guidance, "sensor": parts.sensor}
    try:
        with tqdm(total=total, unit=" evaluations", unit_scale=True, disable=None) as bar:
            members = sample_ensemble(*how, **options, numbers=cases.numbers, progress=bar.update)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full at batch={config['batch']}: give a smaller one") from error
    solves, guard = (getattr(parts.inpainting, name, 0) for name in ("solves", "guard"))
    if guard:
        print(
            f"mmps: in {guard / solves:.0%} of the systems the network's Jacobian was no covariance (not symmetric, "
            "or not positive); GMRES solved them in place of conjugate gradients"
        )
    return members


def likelihood(config: dict[str, Any], trained: Trained, cases: Cases) -> torch.Tensor:
    """The log-likelihood `(N,)` of the true fields in nats per value, with a progress bar."""
    from tqdm import tqdm

    from vecfield_diffusion.inference.likelihood import nats_per_value

    if not cases.hidden.any():
        raise UserError("likelihood is that of values which were not observed, and there are none: add mask=none")
    denoiser, steps = trained.denoiser, config["likelihood_steps"]
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    levels = denoiser.diffusion.levels(steps, "log_snr")
    how = (denoiser, cases.truth, observation, trained.grid, levels, config["likelihood"], config["seed"])
    with tqdm(total=len(observation) * (2 * steps - 1), unit=" evaluations", disable=None) as bar:
        return nats_per_value(*how, cases.numbers, config["batch"], bar.update)


def write(
    config: dict[str, Any],
    folder: Path,
    trained: Trained,
    fields: Fields,
    indices: list[int],
    cases: Cases,
    members: torch.Tensor,
    nats: torch.Tensor | None = None,
) -> dict[str, float]:
    """Writes the fields, the scores and, last, the picture; prints what they say."""
    import yaml

    from vecfield_diffusion.evaluation.metrics import table
    from vecfield_diffusion.evaluation.plots import figure_inpainting
    from vecfield_diffusion.inference.ensemble import member_seed
    from vecfield_diffusion.inference.files import write_fields, write_text_atomic

    write_fields(
        folder / "fields.nc",
        members.numpy(),
        cases.observed.numpy(),
        trained.grid.valid.numpy(),
        fields.coordinates(indices),
        truth=cases.truth.numpy(),
        units=fields.units,
        config=yaml.safe_dump(config, sort_keys=False),
        seeds=[member_seed(config["seed"], i, m) for i in indices for m in range(config["members"])],
        ckpt=str(trained.path),
        attributes={"source": fields.source, **fields.attrs},
    )
    results = judge(cases, members, trained)
    if nats is not None:
        results["all"]["log_likelihood"] = nats.mean().item()
        results["log_likelihood"] = {str(index): value for index, value in zip(indices, nats.tolist(), strict=True)}
        print(
            f"log-likelihood: {nats.mean():.4f} nats per value, in standard deviations of the data blurred by "
            f"{trained.denoiser.diffusion.sigma_min:.3g}"
        )
    write_text_atomic(folder / "metrics.json", json.dumps(without_nan(results), indent=2) + "\n")
    regions = [{"cells": name, **results[name]} for name in ("hidden", "observed") if name in results]
    if regions:
        print(table(regions))
    print(f"divergence of the members: {results['all']['divergence_rms']:.3g} per s (RMS)")
    figure_inpainting(
        folder / "figure.png",
        cases.truth[0] if cases.hidden[0].any() else None,
        cases.observed[0],
        members[:, 0],
        trained.grid,
        fields.units,
        colour=config["colour"],
        coordinates=axes(fields),
        measured=cases.y[0],
    )
    print(f"{folder}: fields.nc, metrics.json, figure.png")
    return results.get("hidden", {})


def judge(cases: Cases, members: torch.Tensor, trained: Trained) -> dict[str, dict[str, float]]:
    """Scores on hidden and on observed cells, where the truth is known, and the divergence everywhere."""
    from vecfield_diffusion.evaluation.metrics import divergence_rms, scores

    regions = {"hidden": cases.hidden, "observed": cases.observed}
    results = {name: scores(members, cases.truth, where) for name, where in regions.items() if where.any()}
    everywhere = trained.grid.valid.expand_as(cases.observed)
    return {**results, "all": {"divergence_rms": divergence_rms(members, trained.grid, everywhere)}}


def axes(fields: Fields) -> Coordinates:
    """The axes of a picture: degrees, or the units of the source, kilometres where metres would be long numbers."""
    from vecfield_diffusion.evaluation.plots import Coordinates

    if fields.x_name == "lon":
        return Coordinates(fields.x, fields.y, "longitude", "latitude")
    units = fields.x_attrs.get("units", "m")
    if units == "m" and abs(fields.x).max() >= 1e4:
        return Coordinates(fields.x / 1e3, fields.y / 1e3, "x [km]", "y [km]")
    return Coordinates(fields.x, fields.y, f"x [{units}]", f"y [{units}]")


def without_nan(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """The same with None for what has no value, such as the spread of one member: JSON knows no NaN."""
    return {
        region: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for region, values in results.items()
    }
