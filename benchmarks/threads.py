"""Two programs on the same cores: `python benchmarks/threads.py [--threads 2] [--seconds 5] [--rounds 3]`.

A network is evaluated again and again by one program, and by two at once, each with as many threads as there are cores:
waiting passively, as every command here does (`vecfield_diffusion/threads.py`), and actively, as OpenMP does by itself.
Printed are evaluations a second of one alone, and those of each of two as a share of it; a half is all that there is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
#: What each program runs: it waits for a word, and prints evaluations a second.
PROGRAM = """
import sys, time
import torch
from vecfield_diffusion.models.unet import UNet
torch.set_num_threads(int(sys.argv[1]))
network = UNet(in_channels=7, channels=[32, 64], blocks=2, attention=[], embedding=64).eval()
x, noise = torch.randn(8, 7, 32, 32), torch.zeros(8)
with torch.no_grad():
    network(x, noise)
    print("ready", flush=True)
    sys.stdin.readline()
    begun, done = time.monotonic(), 0
    while time.monotonic() - begun < float(sys.argv[2]):
        network(x, noise)
        done += 1
    print(done / (time.monotonic() - begun))
"""


def rates(count: int, policy: str, threads: int, seconds: float) -> list[float]:
    """Returns the evaluations a second of each of `count` programs at work together."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_WAIT_POLICY": policy, "PYTHONPATH": str(ROOT)}
    command, pipe = [sys.executable, "-c", PROGRAM, str(threads), str(seconds)], subprocess.PIPE
    running = [subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for program in running:
        program.stdout.readline()
    for program in running:
        program.stdin.write("\n")
        program.stdin.flush()
    return [float(program.communicate()[0]) for program in running]


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shares: dict[str, list[float]] = {}
    print(f"load before: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    for _ in range(options.rounds):
        for policy in ("PASSIVE", "ACTIVE"):
            alone, *two = (rate for count in (1, 2) for rate in rates(count, policy, options.threads, options.seconds))
            found = [rate / alone for rate in two]
            shares.setdefault(policy, []).append(min(found))
            print(f"{policy.lower():>7}: {alone:.2f} per s alone, {found[0]:.2f} and {found[1]:.2f} of it", flush=True)
    for policy, found in shares.items():
        print(f"{policy.lower()}: the slower of two at {median(found):.2f} of its speed alone")


if __name__ == "__main__":
    main()
