"""Filling by N processes against one: `python benchmarks/processes.py [--processes 2] [overrides of infer.py]`.

The same command is run by one process and by N at once, in turns, each on one thread. Printed are, of each round, the
seconds from the first start to the end of the last, those of a command that finds all done (the start of Python and
torch, which no process is spared), and the ratio of one to N, as they are and without the start; at the end medians and
quartiles. The members must be the same to the last bit. Where the cores are not free for it the figures mean little:
the load is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

ROOT = Path(__file__).resolve().parents[1]
FLOWS = ["resolution=64", "snapshots=160", "duration=5"]
TRAIN = ["debug=fast", "trainer.max_steps=1", "trainer.score_cases=0", *(f"dataset.{key}" for key in FLOWS)]
FILL = ["ckpt=outputs/train/run", f"time={list(range(16))}", "mask=block", "members=8", "batch=8", "sampler.steps=16"]


#: A process of a launch does not do again what the others have done; a command given by hand does.
LAUNCHED = {"SLURM_ARRAY_TASK_ID": "0"}


def started(folder: Path, program: str, *words: str, **variables: str) -> subprocess.Popen[bytes]:
    """Returns a program at work in a folder, on one thread, with variables of the environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, str(ROOT / f"{program}.py"), *words, "device=cpu"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def seconds(folder: Path, count: int, *words: str, **variables: str) -> float:
    """Returns the seconds that `count` processes of one filling take together."""
    begun = time.perf_counter()
    running = [started(folder, "infer", *words, **variables) for _ in range(count)]
    if any([process.wait() for process in running]):
        sys.exit("infer.py failed")
    return time.perf_counter() - begun


def main() -> None:
    """Prints what was found; exits with 1 where members differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options, overrides = parser.parse_known_args()
    folder, many = options.folder or Path(tempfile.mkdtemp()), options.processes
    folder.mkdir(parents=True, exist_ok=True)
    words = [*FILL, *overrides]
    if words[0] == FILL[0] and started(folder, "train", *TRAIN, "name=run").wait():
        sys.exit("train.py failed")
    print(f"load before: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    ratios, without = [], []
    for number in range(options.rounds):
        one = seconds(folder, 1, *words, f"name=one{number}")
        all_of_them = seconds(folder, many, *words, f"name=many{number}")
        start = seconds(folder, 1, *words, f"name=one{number}", **LAUNCHED)  # all is there
        ratios.append(one / all_of_them)
        without.append((one - start) / (all_of_them - start))
        print(
            f"round {number}: {one:.1f} s by one, {all_of_them:.1f} s by {many}, {start:.1f} s to start: "
            f"{ratios[-1]:.2f}, without the start {without[-1]:.2f}",
            flush=True,
        )
    for title, found in (("as it is", ratios), ("without the start", without)):
        low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
        print(f"{title}: {middle:.2f} times as fast, quartiles {low:.2f} and {high:.2f}")
    sets = [xr.open_dataset(folder / f"outputs/infer/{name}0/fields.nc") for name in ("one", "many")]
    same = all(np.array_equal(*(data[name] for data in sets), equal_nan=True) for name in ("u_members", "v_members"))
    print(f"members {'the same' if same else 'DIFFER'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
