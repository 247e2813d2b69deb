"""kill -9 at random moments: `python benchmarks/kills.py [--kills 20] [--folder DIR] [overrides of train.py]`.

A small network is trained undisturbed, and once more while its process is killed after a random time again and again;
then a file is filled by one process, and by two of which one after the other is killed. Weights, averages and filled
fields must be the same to the last bit. Exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from vecfield_diffusion.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FLOWS = ["resolution=16", "solver_resolution=32", "snapshots=256", "viscosity=1e-6", "order=2", "duration=20"]
TRAIN = ["debug=fast", *(f"dataset.{key}" for key in FLOWS), "trainer.max_steps=400", "trainer.validate_every=100"]
TRAIN += ["trainer.checkpoint_minutes=0.005", "trainer.log_every=20", "device=cpu"]
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


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    options, overrides = parser.parse_known_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    words = [*TRAIN, *overrides]
    started(folder, "train", *words, "name=whole").wait()
    killed = disturbed(folder, "train", *words, "name=killed", kills=options.kills, processes=1)
    states = [load_checkpoint(folder / f"outputs/train/{name}/checkpoints/last.pt") for name in ("whole", "killed")]
    pairs = [(states[0][part], states[1][part]) for part in ("network", "ema")]
    same = all(torch.equal(value, other[key]) for one, other in pairs for key, value in one.items())
    print(
        f"training: {killed} of {options.kills} killed alive, weights and averages {'the same' if same else 'DIFFER'}"
    )
    started(folder, "infer", *FILL, "name=whole").wait()
    killed = disturbed(folder, "infer", *FILL, "name=killed", kills=options.kills, processes=2)
    first, second = (xr.open_dataset(folder / f"outputs/infer/{name}/fields.nc") for name in ("whole", "killed"))
    fields = all(np.array_equal(first[name], second[name], equal_nan=True) for name in ("u_members", "v_members"))
    print(f"filling: {killed} of {options.kills} killed alive, members {'the same' if fields else 'DIFFER'}")
    sys.exit(not (same and fields))


if __name__ == "__main__":
    main()
