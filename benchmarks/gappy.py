"""What training on gappy data costs: the same turbulence, whole and with half of every snapshot missing.

    python benchmarks/gappy.py [trainer.max_steps=4000 ...]

makes a file of the demo's turbulence in which clouds hide about half of each snapshot for good, trains on it and on the
whole fields with the same number of steps, and scores both on the whole unseen fields: the network fills what it never
saw whole. Overrides go to both trainings.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from vecfield_diffusion.commands import infer as infer
from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.data.masks import Clouds
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.data.turbulence import open_turbulence
from vecfield_diffusion.evaluation.baselines import fit_baselines
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.inference.cases import make_cases
from vecfield_diffusion.programs.baselines import training_fields
from vecfield_diffusion.programs.fill import fill_cases
from vecfield_diffusion.programs.method import build_method, resolve_method
from vecfield_diffusion.programs.trained import held_out, load_trained

MASKS = ("pixels", "block", "track")
CASES, MEMBERS = 50, 8
#: A recipe for the data of experiment=demo, with a plain UNet.
RECIPE = ["model=unet_tiny", "diffusion.noise=log_normal", "diffusion.P_mean=0.3", "diffusion.P_std=1.6"]
RECIPE += ["optimizer.lr=1e-3", "trainer.batch_size=16", "trainer.cooldown=0.6", "trainer.warmup=1600"]
RECIPE += ["trainer.max_steps=4000", "trainer.score_cases=0", "splits.guard=0"]
RECIPE += ["mask.masks.pixels.fraction=[0.01,0.25]", "mask.weights={pixels: 0.4, track: 0.3, block: 0.3}"]
GAPPY = Path("outputs/data/gappy_turbulence.h5")


def make_gappy() -> None:
    """Writes the turbulence of the demo with gaps that no snapshot shares."""
    whole = open_turbulence(resolution=32)
    velocity = whole.read(range(len(whole)))
    observed = Clouds([0.3, 0.7])(len(whole), whole.grid.valid, torch.Generator().manual_seed(5))
    velocity = torch.where(observed, velocity, torch.nan)
    spacing = {"dx": whole.grid.dx[0].item(), "dy": whole.grid.dy[0].item()}
    write_hdf5(GAPPY, velocity, **spacing, boundary_x="periodic", boundary_y="periodic", x=whole.x, y=whole.y)
    print(f"{GAPPY}: {1 - observed.double().mean():.0%} of the cells missing")


def train(name: str, overrides: list[str]) -> None:
    """One training of the demo's network."""
    command = [sys.executable, "train.py", f"name={name}", *RECIPE, *overrides]
    subprocess.run(command, check=True)


def score(name: str) -> list[dict[str, object]]:
    """The scores of a run on whole unseen fields."""
    trained = load_trained(f"outputs/train/{name}", torch.device("cpu"))
    fields = open_turbulence(resolution=32)
    offered = held_out(trained, "test")[1]
    indices = list(offered)[:: max(1, len(offered) // CASES)][:CASES]
    rows = []
    for mask in MASKS:
        drawn = build(option("mask", mask), "mask", trusted=True)
        cases = make_cases(fields, indices, drawn, seed=0)
        config = infer.config(f"ckpt=outputs/train/{name}", f"members={MEMBERS}", "inpainting=conditional")
        parts = resolve_method(config, build_method(config, trained, torch.device("cpu")), trained, cases)
        members = fill_cases(config, trained=trained, method=parts, cases=cases)
        rows.append({"trained on": name, "mask": mask, **scores(members, cases.truth, cases.hidden)})
        if name == "whole":
            oi = fit_baselines(["oi"], training_fields(trained, fields).numpy(), fields.grid)["oi"]
            pairs = zip(cases.y.numpy(), cases.observed[:, 0].numpy(), strict=True)
            filled = torch.from_numpy(np.stack([oi.fill(y, seen, 0.0) for y, seen in pairs]))
            rows.append(
                {"trained on": "OI of whole fields", "mask": mask, **scores(filled[None], cases.truth, cases.hidden)}
            )
    return rows


if __name__ == "__main__":
    given = sys.argv[1:]
    make_gappy()
    train("whole", ["dataset.resolution=32", *given])
    train("gappy", ["dataset=hdf5", f"dataset.path={GAPPY}", *given])
    columns = ("mask", "trained on", "rmse_component", "crps", "spread_skill")
    print(table(sorted(score("whole") + score("gappy"), key=lambda row: str(row["mask"])), columns))
