"""Solving with land, factorised or iterated: `python benchmarks/physics.py [--sides 32 64 128 256] [--batch 1 16]`.

A square of cells in a channel, a fifth of them land in patches. For each size and batch the equations of `leray` are
solved by conjugate gradients with the preconditioners of `physics/factored.py` and of `physics/multigrid.py` in turns,
and those of `project`, with one cell of ten held, the same of all fields, with that of `factored` and without any.
Printed are milliseconds on this machine, the median of 3, with the set-up and with what is kept, and their ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vecfield_diffusion.physics import poisson
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.projection import leray, project

#: The most cells that are factorised, by the name of the way.
WAYS = {"factorised": 10**9, "iterated": 0}
ROUNDS = 3
#: The share of cells that are held.
HELD = 0.1


def grid_of(side: int) -> Grid:
    """Returns the grid: land where a smooth random field is high, walls in the south and north."""
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).numpy()
    smooth = torch.from_numpy(gaussian_filter(noise, side / 24, mode=("reflect", "wrap")))
    valid = smooth < smooth.flatten().quantile(0.8)
    return Grid(valid, dx=1e4, dy=1e4, boundary_x="periodic", boundary_y="wall")


def timed(work: Callable[[], Tensor]) -> float:
    """Returns the milliseconds that some work takes."""
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    print(f"{'side':>5} {'batch':>5} {'':>20} {'factorised':>10} {'iterated':>10} {'ratio':>6}")
    for side in options.sides:
        grid = grid_of(side)
        held = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(2)) < HELD
        for batch in options.batch:
            u = torch.randn(batch, 2, side, side, generator=torch.Generator().manual_seed(1))
            for name, work in (("leray", partial(leray, u, grid)), ("project", partial(project, u, grid, held))):
                compare(f"{side:5} {batch:5} {name:>8}", work)


def compare(title: str, work: Callable[[], Tensor]) -> None:
    """Prints what some work takes in both ways, with the set-up and without."""
    first, again = ({name: [] for name in WAYS} for _ in range(2))
    for _ in range(ROUNDS):
        for name, poisson.MOST in WAYS.items():
            poisson.equations.cache_clear()
            first[name].append(timed(work))
            again[name].append(timed(work))
    for words, found in (("with set-up", first), ("kept", again)):
        a, b = (median(found[name]) for name in WAYS)
        print(f"{title} {words:>11} {a:10.1f} {b:10.1f} {b / a:6.1f}", flush=True)


if __name__ == "__main__":
    main()
