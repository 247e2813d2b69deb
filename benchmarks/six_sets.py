"""The six sets of real data, from inspection to a filled file, with nothing edited by hand.

    python benchmarks/six_sets.py DATA [minutes=5] [sets=storm,wake,...]

Each set with several snapshots: `inspect_data.py`, the experiment file that it wrote, `train.py`, `infer.py` with some
of the observed cells hidden, `evaluate.py` beside the baselines on snapshots kept aside. The two sets of one snapshot
cannot be trained on: a network of windows of generated turbulence fills them. Scores are printed at the end.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from vecfield_diffusion.evaluation.tables import table

ROOT = Path(__file__).parents[1]
SETS = {
    "agulhas": "globcurrent_agulhas/globcurrent_agulhas_2002.nc",
    "wake": "pinball_wake_dns/pinball_wake_re130.h5",
    "wind": "arome_wind_norway/AROME_MetCoOp_00_DEF_20160202_subset.nc",
    "storm": "ncep_storm_500hPa/ncep_storm_500hPa_199601.nc",
    "altimetry": "duacs_blacksea_1day/dt_blacksea_allsat_phy_l4_20160707_20200801.nc",
    "radar": "maracoos_hfr_1hour/hfr_rtv_midatl_6km_oi_maracoos_2022_02_21_1200.nc",
}
KEYS = {"wake": ["invalid=obstacle_mask"]}
ONE = ("altimetry", "radar")
MASKS = ("pixels", "block", "track")
SHOWN = ("diffusion", "climatology", "linear", "biharmonic", "optimal interpolation")


def call(program: str, *arguments: str) -> None:
    """Runs a program of this checkout."""
    print("$ python", program, *arguments, flush=True)
    subprocess.run([sys.executable, str(ROOT / program), *arguments], check=True)


def hidden(name: str) -> dict[str, float]:
    """What `infer.py` scored."""
    return json.loads(Path(f"outputs/infer/{name}/metrics.json").read_text())["hidden"]


def series(name: str, file: Path, minutes: str) -> list[dict[str, object]]:
    """A set of several snapshots: inspected, trained on, filled, scored."""
    call("scripts/inspect_data.py", str(file), *KEYS.get(name, []))
    recipe = next(Path(f"outputs/inspect/{file.stem}/experiment").glob("*.yaml"))
    given = [f"experiment={recipe.stem}", f"name={name}", f"trainer.max_minutes={minutes}", "trainer.score_cases=0"]
    schedule = ["trainer.cooldown=0.5", "optimizer.lr=7e-4", "trainer.ema=10000", "trainer.validate_every=500"]
    call("train.py", "--config-dir", str(recipe.parents[1]), *given, *schedule)
    ckpt = f"ckpt=outputs/train/{name}"
    call("infer.py", ckpt, f"input={file}", "time=-1", "hide=0.2", "members=4", "sampler.steps=16", f"name={name}")
    few = ["cases=50", "members=8", "sampler.steps=16", f"name={name}"]
    call("evaluate.py", ckpt, f"masks=[{','.join(MASKS)}]", *few)
    with Path(f"outputs/evaluate/{name}/scores.csv").open() as text:
        scores = list(csv.DictReader(text))
    return [
        {
            "set": name,
            "mask": mask,
            "score": score,
            **{
                row["method"]: float(row["value"])
                for row in scores
                if (row["mask"], row["metric"], row["region"]) == (mask, score, "hidden")
            },
        }
        for mask in MASKS
        for score in ("rmse_component", "crps")
    ]


def single(name: str, file: Path) -> dict[str, object]:
    """A set of one snapshot: inspected, and a fifth of it hidden and filled by the network of generated flows."""
    call("scripts/inspect_data.py", str(file))
    how = ["hide=0.2", "members=8", "sampler.steps=16", f"name={name}"]
    call("infer.py", "ckpt=outputs/train/general", f"input={file}", *how)
    scores = hidden(name)
    return {"set": name, **{key: scores[key] for key in ("rmse_component", "crps", "spread_skill", "relative_l2")}}


if __name__ == "__main__":
    options = dict(word.split("=", 1) for word in sys.argv[2:])
    data, minutes = Path(sys.argv[1]), options.get("minutes", "5")
    chosen = options.get("sets", ",".join(SETS)).split(",")
    rows = [row for name in chosen if name not in ONE for row in series(name, data / SETS[name], minutes)]
    if any(name in ONE for name in chosen):
        general = [
            "dataset.resolution=64",
            "window=[32,32]",
            "model=unet_tiny",
            "name=general",
            "trainer.batch_size=16",
        ]
        call("train.py", *general, f"trainer.max_minutes={minutes}", "trainer.cooldown=0.5", "trainer.score_cases=0")
    ones = [single(name, data / SETS[name]) for name in chosen if name in ONE]
    print(table(rows, ("set", "mask", "score", *SHOWN)))
    print(table(ones))
