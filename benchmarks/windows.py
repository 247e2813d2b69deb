"""Fields larger than the network's: `python benchmarks/windows.py [--steps 2] [--batch 64]`.

**Cost.** A map of 720x1440 cells, 44 % of them land, periodic in longitude, is drawn by `unet_tiny` (as it is before
training, which costs the same) in windows of 64x64 cells that overlap by 16. Printed are the windows that are not all
land, seconds for an evaluation, how much of them is the network's, and the most memory that the process ever held.

**Seams.** Lines of Gaussian values with correlation exp(-r / l), windows of 48 cells. The denoiser of a window is the
exact posterior mean given its cells alone: what the best network of this size knows. DPM-Solver++(2M) with 32 steps is
a linear map of its noise, so the law of the samples comes from one run on all unit vectors, no Monte Carlo, and is
compared with that of the exact denoiser of the whole line in the same sampler:

    error    the root mean square difference from the posterior mean given the whole line, in standard deviations of the
             field, at the worst of 5 noise levels
    seam     the root mean square jump from a cell to the next over what it should be, the largest
    spread   the standard deviation of a cell over what it should be, the smallest
    law      the difference of the covariance from what it should be over that, in the Frobenius norm

blended at every evaluation, and, for comparison, finished windows of noise of their own, blended by the same weights.
"""

from __future__ import annotations

import argparse
import resource
import time
from itertools import product

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.windows import Cover, Windowed, starts
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.base import BoundDenoiser
from vecfield_diffusion.samplers.deterministic import DPMpp2M

SHAPE, WINDOW, OVERLAP, LAND = (720, 1440), (64, 64), 16, 0.44
LINE, LEVELS = 48, (0.1, 0.3, 1.0, 3.0, 10.0)


class Clocked(Denoiser):
    """A denoiser that counts its fields and seconds."""

    fields, seconds = 0, 0.0

    def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        begun = time.perf_counter()
        x_hat = super().forward(z, s, observation)
        self.fields, self.seconds = self.fields + len(z), self.seconds + time.perf_counter() - begun
        return x_hat


def continents() -> Tensor:
    """Valid cells of a map `SHAPE`: smooth noise below a threshold is sea."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    smooth = gaussian_filter(noise, 40, mode=("nearest", "wrap"))
    return torch.from_numpy(smooth < np.quantile(smooth, 1 - LAND))


def megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(steps: int, batch: int) -> None:
    """Draws the map, and prints what that took."""
    valid, before = continents(), megabytes()
    network = UNet(Observation.CHANNELS + 2, channels=[32, 64, 96], blocks=1, attention=[-1], embedding=128)
    denoiser = Clocked(network, EDM(), Normalizer(torch.zeros(2, 1, 1), 1.0)).eval()
    windowed = Windowed(denoiser, WINDOW, OVERLAP, (False, True), batch)
    grid, begun = Grid(valid, boundary_x="periodic"), time.perf_counter()
    method = Method(DPMpp2M(steps), Conditional())
    members = sample_ensemble(windowed, method, Observation.none(1, valid), grid, members=1, seed=0)
    seconds = (time.perf_counter() - begun) / steps
    whole = (len(starts(n, size, OVERLAP, x)) for n, size, x in zip(SHAPE, WINDOW, (False, True), strict=True))
    print(f"map {SHAPE[0]}x{SHAPE[1]}, {1 - valid.double().mean():.0%} land, windows of {WINDOW[0]}x{WINDOW[1]}")
    print(f"finite in the domain alone: {bool((members.isfinite() == valid).all())}")
    print(f"windows computed: {denoiser.fields // steps} of {np.prod(list(whole))}")
    print(f"seconds for an evaluation: {seconds:.2f}, network {denoiser.seconds / steps:.2f}")
    print(f"memory: {megabytes():.0f} MiB at most, {before:.0f} before")


def covariance(n: int, length: float) -> Tensor:
    """That of a line of n cells."""
    place = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(place[:, None] - place).abs() / length)


class Exact:
    """The posterior mean of lines `(B, 2, 1, n)`, given these n cells alone."""

    def __init__(self, n: int, length: float) -> None:
        self.eigenvalues, self.vectors = torch.linalg.eigh(covariance(n, length))

    def __call__(self, z: Tensor, s: Tensor, observation: Observation | None = None) -> Tensor:
        gain = self.eigenvalues / (self.eigenvalues + s[:, None, None, None] ** 2)
        return (z @ self.vectors * gain) @ self.vectors.T

    def samples(self) -> Tensor:
        """What DPM-Solver++(2M) makes of each unit vector as its noise, `(n, n)`."""
        return samples(self, len(self.vectors))


def samples(denoise: BoundDenoiser, n: int) -> Tensor:
    """What the sampler makes of each unit vector of a line of n cells as its noise, `(n, n)`."""
    return DPMpp2M(32).sample(denoise, karras(0.002, 80.0, 32), lambda: lines(n))[:, 0, 0]


def lines(n: int) -> Tensor:
    """All unit vectors as fields `(n, 2, 1, n)`."""
    return torch.eye(n, dtype=torch.float64)[:, None, None].expand(n, 2, 1, n)


def finished(window: Exact, axis: Cover) -> Tensor:
    """Blended samples of windows as a function of the noise of each, `(k 48, n)`."""
    n, made = axis.window.shape[1], window.samples()
    maps = made.new_zeros(len(axis.cells), LINE, n)
    for number, place, weight in zip(axis.window, axis.place, axis.weight, strict=True):
        maps[number, :, torch.arange(n)] += weight[:, None] * made[:, place].T
    return maps.flatten(0, 1)


def seams(overlap: int, length: float) -> list[float]:
    """Error, seam, spread and law blended at every evaluation, seam, spread and law of finished windows."""
    n = LINE + 3 * (LINE - overlap)
    window, whole = Exact(LINE, length), Exact(n, length)
    told = Observation.none(n, torch.ones(1, n, dtype=torch.bool), torch.float64)
    windowed = Windowed(window, (1, LINE), (overlap + 0.5) / LINE, batch=10_000)
    axis = Cover.of(n, LINE, overlap, False, torch.device("cpu"))
    errors = []
    for s in LEVELS:
        level = torch.full((n,), s, dtype=torch.float64)
        maps = (windowed(lines(n), level, told) - whole(lines(n), level))[:, 0, 0]
        given = covariance(n, length) + s**2 * torch.eye(n, dtype=torch.float64)
        errors.append((maps.T @ given @ maps).diagonal().mean().sqrt().item())
    target, every = whole.samples(), samples(lambda z, s: windowed(z, s, told), n)
    return [max(errors), *differences(every, target), *differences(finished(window, axis), target)]


def differences(maps: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Seam, spread and law of samples, `(noise, n)`, beside those they should be; see the module."""
    jump = (maps.diff(dim=1).square().sum(0) / target.diff(dim=1).square().sum(0)).sqrt()
    spread = (maps.square().sum(0) / target.square().sum(0)).sqrt()
    law, wanted = maps.T @ maps, target.T @ target
    return jump.max().item(), spread.min().item(), ((law - wanted).norm() / wanted.norm()).item()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="evaluations of the map")
    parser.add_argument("--batch", type=int, default=64, help="windows computed at once")
    arguments = parser.parse_args()
    cost(arguments.steps, arguments.batch)
    names = (
        "l",
        "overlap",
        "error",
        "seam",
        "spread",
        "law",
        *(f"{name}, finished" for name in ("seam", "spread", "law")),
    )
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for length, overlap in product((2.0, 6.0, 24.0), (0, 4, 8, 16, 24)):
        error, *rest = seams(overlap, length)
        print(f"| {length:g} | {overlap} | {error:.5f} | " + " | ".join(f"{value:.3f}" for value in rest) + " |")


if __name__ == "__main__":
    main()
