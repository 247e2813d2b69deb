"""How near every formulation comes to the exact denoiser: `python benchmarks/formulations.py [names] [overrides]`.

The fields are divergence-free and Gaussian, x0 ~ N(0, S) with an energy spectrum of slope -3 on a periodic grid, so the
posterior mean has a closed form, with and without observations `y = x0 + sigma_y eps` of some cells:

    D*(z, s, y) = m + C (C + s^2 I)^-1 (z - m),    m = K y,  C = S - K S_y,  K = S_y^T (S_yy + sigma_y^2 I)^-1,

with S_y the rows of S at the observed values and S_yy their columns among those. Every formulation is trained by the
training program for the same number of samples, with the same network, optimizer and data, and its averaged weights are
scored at fixed noise levels by

    excess(s) = E |D - D*|^2 / E |D* - x0|^2,

the share by which its denoising loss exceeds the least that is possible. All of them see the same fields and noise.
The squared error of D is that of the network times c_out^2, so where c_out grows with the noise, as it does for every
prediction of the noise, more is asked of the network; the margin is

    excess(s) <= MARGIN max(1, c_out(s)^2).

Names choose formulations, overrides are those of train.py. The exit status is 1 where the margin does not hold.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.commands import train as main
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.diffusion.base import Diffusion, Prediction, reverse_variances
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.programs.train import prepare
from vecfield_diffusion.training.trainer import TrainingRun

SIZE = 16
SNAPSHOTS = 20000
LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
MASKS, SHARE, SIGMA_Y = 8, 0.1, 0.3
#: Where nothing is observed, and where some cells are.
MARGINS = (0.25, 0.6)

#: What all have in common.
COMMON = [
    "dataset=hdf5",
    "splits.guard=0",
    "mean_field=false",
    "mask=pixels",
    "model=unet_tiny",
    "model.channels=[24,48]",
    "model.attention=[]",
    "model.embedding=64",
    "optimizer.lr=5e-3",
    "trainer.max_steps=2500",
    "trainer.batch_size=16",
    "trainer.cooldown=0.7",
    "trainer.sigma_obs=0.5",
    "trainer.condition_dropout=0.5",
    "trainer.score_cases=0",
    "trainer.validate_every=1000000",
]

#: The formulations, each with its overrides.
FORMULATIONS = {
    "edm": "diffusion=edm",
    "edm_log_normal": "diffusion=edm diffusion.noise=log_normal diffusion.P_mean=0.3 diffusion.P_std=1.6",
    "edm_uncertainty": "diffusion=edm diffusion.uncertainty=true",
    "ve": "diffusion=ve",
    "ve_unit_input": "diffusion=ve diffusion.inputs=unit",
    "vp": "diffusion=vp",
    "vp_edm_head": "diffusion=vp diffusion.inputs=unit diffusion.prediction=edm",
    "ou": "diffusion=ou",
    "ddpm": "diffusion=ddpm",
    "ddpm_cosine": "diffusion=ddpm diffusion.schedule=cosine",
    "iddpm": "diffusion=iddpm",
    "iddpm_variance": "diffusion=iddpm diffusion.learned_variance=true",
    "flow": "diffusion=flow",
    "flow_logit_normal": "diffusion=flow diffusion.times=logit_normal",
    "interpolant": "diffusion=interpolant",
    "trigonometric": "diffusion=interpolant diffusion._target_=formulations.Trigonometric ~diffusion.gamma",
}


class Trigonometric(Diffusion):
    """A path as a user would write one: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Arguments:
        sigma_min: The smallest noise level, s = tan(pi t / 2).
        sigma_max: The largest.
        prediction: What the network predicts.
        sigma_data: The standard deviation of the normalised data.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float | Literal["auto"] = 80.0,
        prediction: Prediction = "velocity",
        sigma_data: float = 1.0,
    ) -> None:
        low, high = (2 / math.pi * math.atan(level) for level in (sigma_min, sigma_max))
        super().__init__(low, high, prediction, sigma_data)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)


class Law:
    """N(0, S) on the grid, of unit variance; invariant under the augmentations of a square periodic domain."""

    def __init__(self) -> None:
        k = torch.fft.fftfreq(SIZE, 1 / SIZE, dtype=torch.float64)
        ky, kx = k[:, None], k[None, :]
        square = ky**2 + kx**2
        # A stream function of amplitude k^-3 has velocities of k^-2, and k^-3 of energy in a shell of wavenumbers.
        amplitude = torch.where(square > 0, square.clamp(min=1) ** -1.5, 0.0)
        unit = torch.eye(SIZE**2, dtype=torch.float64).view(-1, SIZE, SIZE)
        psi = torch.fft.fft2(unit) * amplitude
        maps = torch.fft.ifft2(torch.stack([-1j * ky * psi, 1j * kx * psi], dim=1)).real.flatten(1)
        self.maps = maps / maps.square().sum(0).mean().sqrt()
        self.covariance = self.maps.T @ self.maps

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n, 2, SIZE, SIZE)` fields in float64."""
        white = torch.randn(n, SIZE**2, generator=generator, dtype=torch.float64)
        return (white @ self.maps).view(n, 2, SIZE, SIZE)


@dataclass(frozen=True)
class Case:
    """Fields that are observed at the same cells, and the law of a field given each observation, all normalised.

    Arguments:
        x0: `(n, 2, SIZE, SIZE)` in float64.
        observation: Of each.
        mean: The posterior means, `(n, d)`.
        eigenvalues: Of the posterior covariance, `(d,)`.
        vectors: Its eigenvectors, in columns.
    """

    x0: Tensor
    observation: Observation
    mean: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    def exact(self, z: Tensor, s: float) -> Tensor:
        """D*, of the shape of `z`."""
        gain = self.eigenvalues / (self.eigenvalues + s**2)
        return (self.mean + ((z.flatten(1) - self.mean) @ self.vectors * gain) @ self.vectors.T).view_as(z)

    def least(self, s: float) -> float:
        """The variance of a value given z and the observation: the loss of D*."""
        return (self.eigenvalues * s**2 / (self.eigenvalues + s**2)).mean().item()


def make_case(law: Law, std: float, observed: Tensor, n: int, generator: torch.Generator) -> Case:
    """`n` fields in units of `std`, of which the cells `observed` `(SIZE, SIZE)` are measured."""
    x0, covariance = law.sample(n, generator) / std, law.covariance / std**2
    y = x0 + SIGMA_Y * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    seen = observed.flatten().repeat(2)
    rows = covariance[seen]
    gain = torch.linalg.solve(rows[:, seen] + SIGMA_Y**2 * torch.eye(len(rows), dtype=torch.float64), rows).T
    eigenvalues, vectors = torch.linalg.eigh(covariance - gain @ rows)
    cells = observed.expand(n, 1, SIZE, SIZE)
    told = Observation(y.float(), cells, torch.full((n, 1, 1, 1), SIGMA_Y), torch.ones_like(cells))
    return Case(x0, told, y.flatten(1)[:, seen] @ gain.T, eigenvalues.clamp(min=0), vectors)


def make_cases(law: Law, std: float) -> tuple[list[Case], list[Case]]:
    """One case of 256 fields of which nothing is observed, and `MASKS` of 32 fields each."""
    generator = torch.Generator().manual_seed(2)
    nothing = make_case(law, std, torch.zeros(SIZE, SIZE, dtype=torch.bool), 256, generator)
    masks = [torch.rand(SIZE, SIZE, generator=generator).flatten() for _ in range(MASKS)]
    some = [(mask < mask.quantile(SHARE)).view(SIZE, SIZE) for mask in masks]
    return [nothing], [make_case(law, std, mask, 32, generator) for mask in some]


@torch.no_grad()
def excess(run: TrainingRun, cases: list[Case]) -> list[float]:
    """The excess at each of `LEVELS`, over all cases together."""
    denoiser, grid = run.denoiser, run.batches.fields.grid
    result = []
    for number, s in enumerate(LEVELS):
        generator = torch.Generator().manual_seed(100 + number)
        above = least = 0.0
        for case in cases:
            z = case.x0 + s * torch.randn(case.x0.shape, generator=generator, dtype=torch.float64)
            told = denoiser.diffusion.with_background(case.observation, grid)
            exact = case.exact(z, s)
            above += (denoiser(z.float(), torch.full((len(z),), s), told) - exact).square().sum().item()
            least += (exact - case.x0).square().sum().item()
        result.append(above / least)
    return result


@torch.no_grad()
def variance_shares(run: TrainingRun, case: Case) -> tuple[list[float], list[float]]:
    """The learned share of the reverse variance of a step of the chain, nothing being observed, and the best one.

    The bound is least where the variance is `small + (1 - (r/s)^2)^2 C`, with C the posterior variance of a value.
    """
    diffusion = run.denoiser.diffusion
    generator = torch.Generator().manual_seed(7)
    learned, best = [], []
    for level in LEVELS:
        s = diffusion.rising[diffusion.nearest(torch.tensor([level]))]
        small, large = (variance.item() for variance in reverse_variances(s, diffusion.below(s)))
        step = (1 - (diffusion.below(s) / s) ** 2).item()
        best.append(math.log1p(step**2 * case.least(s.item()) / small) / math.log(large / small))
        z = (case.x0 + s * torch.randn(case.x0.shape, generator=generator, dtype=torch.float64)).float()
        learned.append(run.denoiser.moments(z, s.float().expand(len(z)), case.observation)[1].mean().item())
    return learned, best


def print_line(name: str, values: list[float], note: str = "", places: int = 3) -> None:
    """One line of a table."""
    print(f"{name:32}" + "".join(f"{value:8.{places}f}" for value in values) + note, flush=True)


def print_least(law: Law) -> None:
    """The least loss in both kinds of cases, and the excess of the exact denoiser that ignores the observation."""
    nothing, some = make_cases(law, 1.0)
    blind = [nothing[0].least(s) for s in LEVELS]
    told = [sum(case.least(s) for case in some) / MASKS for s in LEVELS]
    print_line("least loss", blind)
    print_line("least loss, observed", told)
    print_line("exact but blind to y, observed", [b / t - 1 for b, t in zip(blind, told, strict=True)])


def train(law: Law, folder: Path, overrides: list[str]) -> TrainingRun:
    """A run of the training program on fields of the law, done."""
    path = folder / "fields.h5"
    if not path.exists():
        velocity = law.sample(SNAPSHOTS, torch.Generator().manual_seed(1)).float()
        write_hdf5(path, velocity, boundary_x="periodic", boundary_y="periodic")
    config = main.config(*COMMON, f"dataset.path={path}", *overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(config, Path(tempfile.mkdtemp(dir=folder)))
        run.train()
    return run


def score(run: TrainingRun, name: str, law: Law) -> bool:
    """Prints the lines of a formulation; whether the margins hold."""
    holds, diffusion = True, run.denoiser.diffusion
    c_out = diffusion.preconditioning(diffusion.time(torch.tensor(LEVELS, dtype=torch.float64)))[2]
    kinds = make_cases(law, run.denoiser.normalizer.std.item())
    with run.averaged():
        for kind, cases, margin in zip(("", ", observed"), kinds, MARGINS, strict=True):
            values = excess(run, cases)
            inside = bool((torch.tensor(values) <= margin * c_out.square().clamp(min=1)).all())
            print_line(name + kind, values, f"   largest {max(values):.3f}" + ("" if inside else ", beyond the margin"))
            holds &= inside
        if diffusion.learned_variance:
            learned, best = variance_shares(run, kinds[0][0])
            print_line("    learned share of ln variance", learned)
            print_line("    best share of ln variance", best)
    return holds


def measure(chosen: list[str], overrides: list[str]) -> bool:
    """Trains and scores formulations and prints the table; whether all margins hold."""
    law, holds = Law(), True
    print_line("excess at s =", list(LEVELS), places=2)
    print_least(law)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            run = train(law, Path(folder), [*FORMULATIONS[name].split(), *overrides])
            holds &= score(run, name, law)
    return holds


if __name__ == "__main__":
    names = [text for text in sys.argv[1:] if text in FORMULATIONS]
    sys.exit(not measure(names or list(FORMULATIONS), [text for text in sys.argv[1:] if text not in FORMULATIONS]))
