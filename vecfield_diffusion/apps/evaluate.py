"""`python evaluate.py`: scores an ensemble beside the baselines on fields that training kept aside."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.apps.config import Program, option
from vecfield_diffusion.apps.infer import SAMPLING, check_ranges, fill
from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch

    from vecfield_diffusion.apps.assemble import Trained
    from vecfield_diffusion.apps.posterior import Posterior
    from vecfield_diffusion.data.fields import Fields
    from vecfield_diffusion.inference.cases import Cases

main = Program(
    "evaluate",
    "vecfield_diffusion.apps.evaluate:evaluate",
    keys={**SAMPLING, "masks": "list[str]", "cases": "int"},
    examples={"ckpt": "python evaluate.py ckpt=outputs/train/run 'masks=[track,block,pixels]'"},
    lists={"masks": "mask"},
    metric="crps",
)

#: The columns of the printed table; `scores.csv` has all.
COLUMNS = ("mask", "method", "rmse_component", "rmse_vector", "crps", "spread_skill", "rmse / OI", "s per field")
#: Floor of the error that optimal interpolation is told, in standard deviations of the data.
NUGGET = 0.01


def evaluate(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Scores on hidden cells for every mask and method; prints a table and writes `scores.csv`."""
    from vecfield_diffusion.apps.assemble import check_grid, choose_device, fit_size, held_out, load_trained
    from vecfield_diffusion.apps.build import build
    from vecfield_diffusion.apps.posterior import build_posterior, settle
    from vecfield_diffusion.evaluation.metrics import table
    from vecfield_diffusion.inference.cases import make_cases, with_context
    from vecfield_diffusion.inference.files import write_text_atomic

    check_ranges(config)
    device = choose_device(config["device"])
    masks = {name: build(option("mask", name), "mask", trusted=True) for name in config["masks"]}
    if not masks or None in masks.values():
        raise UserError(f"masks={list(masks)}: name options of conf/mask that hide something, such as masks=[block]")
    trained = load_trained(config["ckpt"], device, config["trust"])
    parts = build_posterior(config, trained, device)
    fields, offered = held_out(trained, "test", config["trust"], config["data"])
    check_grid(fields, trained)
    trained = fit_size(trained, fields, config["overlap"], config["batch"])
    if parts.weak is not None:
        parts.guidance.weak = fit_size(parts.weak, fields, config["overlap"], config["batch"]).denoiser
    count = min(config["cases"], len(offered))
    spaced = [offered[i * len(offered) // count] for i in range(count)]
    indices = [i for i in spaced if fields.read([i]).isfinite().any()]
    if not indices:
        raise UserError(f"{fields.source}: none of the snapshots that training kept aside measures anything")
    print(f"{trained.path}: step {trained.step}; {len(indices)} unseen snapshots of {fields.source}")
    baselines = fit_baselines(trained, fields)
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        how = (mask, config["seed"], config["sigma_obs"])
        cases = make_cases(fields, indices, *how, add_error=True)
        past = mask if config["history"] == "masked" else None
        cases = with_context(cases, fields, trained.context, trained.denoiser.normalizer, past, config["seed"])
        if not cases.hidden.any():
            raise UserError(f"masks={list(masks)}: {name} hides no cell, so that there is nothing to score")
        settled = settle(parts, trained, cases)
        found = [{"mask": name, **row} for row in scored(config, trained, settled, cases, baselines)]
        reference = next(row["rmse_component"] for row in found if row["method"] == "optimal interpolation")
        rows += [{**row, "rmse / OI": row["rmse_component"] / reference} for row in found]
        write_text_atomic(folder / "scores.csv", as_csv(rows))
    print(table(rows, COLUMNS))
    print(f"{folder / 'scores.csv'}: hidden cells, {len(indices)} cases of {config['members']} members, {fields.units}")
    scores = {f"{row['mask']}/crps": row["crps"] for row in rows if row["method"] == "diffusion"}
    return {"crps": sum(scores.values()) / len(scores), **scores}


def fit_baselines(trained: Trained, fields: Fields) -> dict[str, Any]:
    """The methods that one would use otherwise, fitted on the training snapshots, at most 2000 of them."""
    from vecfield_diffusion.evaluation.baselines import Biharmonic, Climatology, Linear, Nearest, OptimalInterpolation

    train = trained.split["train"]
    velocity = fields.read(train[:: -(-len(train) // 2000)]).numpy()
    methods = {
        "climatology": Climatology(),
        "nearest": Nearest(),
        "linear": Linear(),
        "biharmonic": Biharmonic(),
        "optimal interpolation": OptimalInterpolation(),
    }
    return {name: method.fit(velocity, fields.grid) for name, method in methods.items()}


def scored(
    config: dict[str, Any], trained: Trained, parts: Posterior, cases: Cases, baselines: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row for the ensemble and one for each baseline."""
    from vecfield_diffusion.evaluation.metrics import scores

    begun = time.perf_counter()
    members = fill(config, trained, parts, cases)
    seconds = (time.perf_counter() - begun) / (len(members) * len(cases.y))
    values = scores(members, cases.truth, cases.hidden, trained.grid)
    yield {"method": "diffusion", **values, "s per field": seconds}
    for name, baseline in baselines.items():
        begun = time.perf_counter()
        filled = baseline_fill(baseline, cases, NUGGET * trained.statistics.std)
        seconds = (time.perf_counter() - begun) / len(cases.y)
        yield {
            "method": name,
            **scores(filled[None], cases.truth, cases.hidden, trained.grid),
            "s per field": seconds,
        }


def baseline_fill(baseline: Any, cases: Cases, floor: float) -> torch.Tensor:
    """The fields `(N, 2, H, W)` of a baseline."""
    import numpy as np
    import torch
    from tqdm import tqdm

    sigma = max(cases.sigma_obs.max().item(), floor)
    pairs = zip(cases.y.numpy(), cases.observed[:, 0].numpy(), strict=True)
    bar = tqdm(pairs, total=len(cases.y), desc=type(baseline).__name__, unit="field", disable=None, leave=False)
    return torch.from_numpy(np.stack([baseline.fill(y, observed, sigma) for y, observed in bar]))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as text, numbers in full."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
