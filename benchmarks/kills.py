"""kill -9 at random moments: `python benchmarks/kills.py [--kills 20] [--folder DIR] [overrides of train.py]`.

Data are generated and a small network is trained undisturbed, and once more while the process is killed after a random
time again and again; then a file is filled and the network evaluated by one process, and by two of which one after the
other is killed. Data, weights, averages, filled fields and scores must be the same to the last bit. Exits with 1 where
they are not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
import xarray as xr

from vecfield_diffusion.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FLOWS = ["resolution=16", "solver_resolution=32", "snapshots=256", "viscosity=1e-6", "order=2", "duration=20"]
TRAIN = ["debug=fast", *(f"dataset.{key}" for key in FLOWS), "trainer.max_steps=400", "trainer.validate_every=100"]
TRAIN += ["trainer.checkpoint_minutes=0.005", "trainer.log_every=20", "device=cpu"]
LARGER = ["debug=fast", "dataset.snapshots=512", "dataset.resolution=64", "dataset.duration=20", "device=cpu"]
LARGER += ["trainer.max_steps=1", "trainer.score_cases=0"]
SCORE = ["ckpt=outputs/train/whole", "masks=[block,pixels,track,clouds]", "cases=16", "members=4", "device=cpu"]
SCORE += ["baselines=[linear,oi]"]
FILL = ["ckpt=outputs/train/whole", "time=all", "mask=block", "members=4", "batch=4", "device=cpu"]
#: Seconds after which a process is killed: some of them before it has begun.
SECONDS = (3.0, 12.0)


def started(folder: Path, program: str, *words: str) -> subprocess.Popen[bytes]:
    """Returns a program at work in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{program}.py"), *words], cwd=folder, env=environment, stdout=nowhere
    )


def disturbed(folder: Path, program: str, *words: str, kills: int, processes: int) -> int:
    """Runs a program by several processes, one after the other of which is killed and replaced, then to its end.

    Returns how many were alive when they were killed.
    """
    chance, found = random.Random(0), 0
    running = [started(folder, program, *words) for _ in range(processes)]
    for _ in range(kills):
        time.sleep(chance.uniform(*SECONDS) / processes)
        victim = running.pop(0)
        found += victim.poll() is None
        victim.kill()
        victim.wait()
        running.append(started(folder, program, *words))
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"{program} ended with {codes}")
    return found


def alike(folder: Path, program: str, *words: str, kills: int) -> tuple[Path, Path]:
    """Returns the folders of a command that was left alone, and of the same by two processes that were killed."""
    started(folder, program, *words, "name=whole").wait()
    found = disturbed(folder, program, *words, "name=killed", kills=kills, processes=2)
    print(f"{program}: {found} of {kills} killed alive", flush=True)
    return tuple(folder / "outputs" / program / name for name in ("whole", "killed"))


def generated(folder: Path, kills: int) -> bool:
    """Returns whether data that a killed process began are those of one that was left alone."""
    started(folder, "train", *LARGER, "dataset.folder=whole", "name=data").wait()
    words = [*LARGER, "dataset.folder=killed", "name=data_killed"]
    found = disturbed(folder, "train", *words, kills=kills, processes=1)
    print(f"generation: {found} of {kills} killed alive", flush=True)
    files = [next((folder / name).glob("*.h5")) for name in ("whole", "killed")]
    sets = [h5py.File(file)["velocity"][:] for file in files]
    return np.array_equal(*sets)


def weights(folder: Path, words: Sequence[str], kills: int) -> bool:
    """Returns whether weights and averages of a training that was killed are those of one that was left alone."""
    started(folder, "train", *words, "name=whole").wait()
    found = disturbed(folder, "train", *words, "name=killed", kills=kills, processes=1)
    print(f"training: {found} of {kills} killed alive", flush=True)
    states = [load_checkpoint(folder / f"outputs/train/{name}/checkpoints/last.pt") for name in ("whole", "killed")]
    pairs = [(states[0][part], states[1][part]) for part in ("network", "ema")]
    return all(torch.equal(value, other[key]) for one, other in pairs for key, value in one.items())


def fields(folder: Path, kills: int) -> bool:
    """Returns the same of filled fields."""
    sets = [xr.open_dataset(place / "fields.nc") for place in alike(folder, "infer", *FILL, kills=kills)]
    return all(np.array_equal(*(data[name] for data in sets), equal_nan=True) for name in ("u_members", "v_members"))


def scores(folder: Path, kills: int) -> bool:
    """Returns the same of the table of scores, but for the seconds that it took."""
    tables = [pd.read_csv(place / "scores.csv") for place in alike(folder, "evaluate", *SCORE, kills=kills)]
    first, second = (table[table.metric != "seconds_per_field"] for table in tables)
    return first.equals(second)


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["data", "weights", "fields", "scores"])
    options, overrides = parser.parse_known_args()
    folder, kills = options.folder or Path(tempfile.mkdtemp()), options.kills
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"data": generated, "weights": partial(weights, words=[*TRAIN, *overrides])}
    parts |= {"fields": fields, "scores": scores}  # of the network that was trained before
    same = {name: parts[name](folder, kills=kills) for name in options.only}
    for name, alike_all in same.items():
        print(f"{name}: {'the same' if alike_all else 'DIFFERENT'}")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
