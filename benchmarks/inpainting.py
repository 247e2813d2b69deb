"""Every way to make samples agree with observations, on a trained network: `python benchmarks/inpainting.py ckpt=RUN`.

The same unseen snapshots, masks, observation errors and seeds for all methods; scores on hidden cells. Takes the keys
of evaluate.py, such as `cases=16 members=8`, and `methods=a,b` and `masks=a,b` to choose rows.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from vecfield_diffusion.commands import evaluate as main
from vecfield_diffusion.config.build import build
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.physical import divergence_rms
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.programs.fill import fill_cases
from vecfield_diffusion.programs.fitted import check_grid
from vecfield_diffusion.programs.method import build_method, resolve_method
from vecfield_diffusion.programs.trained import choose_device, held_out, load_trained

MASKS = {
    "pixels 1 %": {"_target_": "vecfield_diffusion.data.masks.Pixels", "fraction": 0.01},
    "pixels 10 %": {"_target_": "vecfield_diffusion.data.masks.Pixels", "fraction": 0.1},
    "track 5 %": {"_target_": "vecfield_diffusion.data.masks.Track", "fraction": 0.05},
    "two swaths": {"_target_": "vecfield_diffusion.data.masks.Swath", "width": 6.0, "count": 2},
    "block": {"_target_": "vecfield_diffusion.data.masks.Block", "fraction": 0.25},
}
METHODS = {
    "conditional": ["inpainting=conditional"],
    "conditional + gradient": ["inpainting=conditional", "physics=divergence"],
    "conditional + hard": ["inpainting=conditional", "physics=divergence", "physics.mode=hard"],
    "conditional + cfg 1.5": ["inpainting=conditional", "guidance=cfg"],
    "mmps": ["inpainting=mmps"],
    "mmps k=1": ["inpainting=mmps", "inpainting.k_max=1"],
    "mmps + rows": ["inpainting=mmps", "physics=divergence"],
    "pigdm": ["inpainting=pigdm"],
    "dps 100": ["inpainting=dps", "sampler=euler", "sampler.steps=100"],
    "repaint 32x10": ["inpainting=repaint", "sampler=ddpm", "sampler.steps=32", "sampler.schedule=log_snr"],
    "replacement": ["inpainting=replacement"],
}
COLUMNS = ("mask", "method", "rmse_component", "rmse_vector", "crps", "spread_skill")
COLUMNS += ("divergence / truth", "evaluations", "s per field", "guard")


def compare(overrides: list[str], masks: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """One row for each mask and method."""
    config = main.config(*overrides)
    device = choose_device(config["device"])
    trained = load_trained(config["ckpt"], device, config["trust"])
    fields, offered = held_out(trained, "test", config["trust"], config["data"])
    check_grid(fields, trained)
    count = min(config["cases"], len(offered))
    indices = [offered[i * len(offered) // count] for i in range(count)]
    rows = []
    for name in masks:
        mask = build(MASKS[name], "mask", trusted=True)
        cases = make_cases(fields, indices, mask, seed=config["seed"], sigma_obs=config["sigma_obs"], add_error=True)
        true = divergence_rms(cases.truth[None], trained.grid, trained.grid.valid.expand_as(cases.observed))
        for method in methods:
            chosen = main.config(*overrides, *METHODS[method])
            parts = resolve_method(chosen, build_method(chosen, trained, device), trained, cases)
            begun = time.perf_counter()
            members = fill_cases(chosen, trained=trained, method=parts, cases=cases)
            seconds = (time.perf_counter() - begun) / (len(members) * len(cases.y))
            everywhere = trained.grid.valid.expand_as(cases.observed)
            share = parts.inpainting.guard / parts.inpainting.solves if isinstance(parts.inpainting, MMPS) else None
            rows.append(
                {
                    "mask": name,
                    "method": method,
                    **scores(members, cases.truth, cases.hidden),
                    "divergence / truth": divergence_rms(members, trained.grid, everywhere) / true,
                    "evaluations": parts.evaluations,
                    "s per field": seconds,
                    "guard": "" if share is None else f"{share:.2f}",
                }
            )
            print(table(rows[-1:], COLUMNS), flush=True)
    return rows


def chosen(arguments: list[str], key: str, offered: dict[str, Any]) -> list[str]:
    """What `key=a,b` names, all where it is not given; the argument is taken out of the list."""
    for argument in arguments:
        if argument.startswith(f"{key}="):
            arguments.remove(argument)
            return argument.removeprefix(f"{key}=").split(",")
    return list(offered)


if __name__ == "__main__":
    given = sys.argv[1:]
    which = {key: chosen(given, key, offered) for key, offered in (("masks", MASKS), ("methods", METHODS))}
    if not any(word.startswith("ckpt=") for word in given):
        raise SystemExit(f"{Path(__file__).name}: give ckpt=outputs/train/RUN")
    print(table(compare(given, **which), COLUMNS))
