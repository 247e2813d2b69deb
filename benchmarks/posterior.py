"""What each way to condition on observations is worth, against exact posteriors: `python benchmarks/posterior.py`.

The fields are Gaussian on a periodic grid, x0 ~ N(0, S), with an energy spectrum of slope -3, so for rows
`y = A x0 + n`, `n ~ N(0, R)`, everything has a closed form:

    D(z, s) = S (S + s^2 I)^-1 z                                     the prior's denoiser
    m = K y,  C = S - K A S,  K = S A^T (A S A^T + R)^-1             the posterior
    D(z, s, y) = m + C (C + s^2 I)^-1 (z - m)                        the conditional denoiser

The methods see D alone, as they would see a trained network; `conditional` and guidance see D(z, s, y), too. What is
left is the error of the method. Printed are

    error    the root mean square difference of the mean of the samples from m, in standard deviations of the field
    spread   the root of the ratio of the traces of the covariance of the samples and C
    W2       an upper bound of the 2-Wasserstein distance of the samples and N(m, C), by dimension, in the same unit
    calls    evaluations and vector-Jacobian products of D for a sample

over `CASES` fields for each mask. The noise of half the samples is that of the others with the other sign, so what is
affine in it has no scatter in its mean. Deterministic methods run beside the exact conditional denoiser from the same
noise, whose own covariance comes from one run on all unit vectors: their spread is nearly free of scatter. That of
RePaint and replacement has a standard error of one to two percent on pixels, three on swaths and block. The bound of W2
is the root mean square difference of these pairs, plus the distance of the samples of the exact denoiser from the
posterior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.guidance.cfg import ClassifierFree
from vecfield_diffusion.guidance.inpainting import Conditional, Inpainting, RePaint
from vecfield_diffusion.guidance.physics import NoPhysics, Physics
from vecfield_diffusion.guidance.posterior import DPS, MMPS, PiGDM
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.operators import divergence
from vecfield_diffusion.samplers.base import NoiseFunction, Sampler
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler
from vecfield_diffusion.samplers.stochastic import Ancestral

SIZE, CASES, MEMBERS = 12, 8, 16
SHAPE, VALUES = (2, SIZE, SIZE), 2 * SIZE**2
SIGMA_OBS = 0.05
#: Share of the energy in gradients, and the tolerance of the divergence in s^-1, a sixth of what the fields have.
DIVERGENT, TAU = 0.1, 2e-5
GRID = Grid(torch.ones(SIZE, SIZE, dtype=torch.bool), 1000.0, 1000.0, "periodic", "periodic")
NORMALIZER = Normalizer(torch.zeros(2, 1, 1), 0.4).double()


@dataclass(frozen=True)
class Method:
    """A row of a table."""

    name: str
    inpainting: Inpainting
    sampler: Sampler = field(default_factory=lambda: DPMpp2M(32))
    scale: float = 1.0
    physics: NoPhysics = field(default_factory=NoPhysics)


METHODS = [
    Method("exact conditional denoiser (cfg w = 1)", Conditional()),
    Method("mmps", MMPS()),
    Method("mmps k_max=3", MMPS(k_max=3)),
    Method("mmps k_max=3, cold", MMPS(k_max=3, warm_start=False)),
    Method("pigdm", PiGDM()),
    Method("dps, 100 steps", DPS(), Euler(100)),
    Method("dps, 300 steps", DPS(), Euler(300)),
    Method("dps, 300 steps, zeta=1000", DPS(1000.0), Euler(300)),
    Method("repaint 64x10", RePaint(10), Ancestral(64)),
    Method("repaint 64x50", RePaint(50), Ancestral(64)),
    Method("replacement, 64 steps", RePaint(1), Ancestral(64)),
    Method("cfg w = 1.5", Conditional(), scale=1.5),
    Method("cfg w = 2", Conditional(), scale=2.0),
    Method("cfg w = 3", Conditional(), scale=3.0),
]
ERRORS = (0.01, 0.05, 0.2)
PHYSICS = [
    Method("mmps, rows", MMPS(), physics=Physics("rows", tau=TAU)),
    Method("pigdm, rows", PiGDM(), physics=Physics("rows", tau=TAU)),
    Method("exact conditional denoiser, gradient", Conditional(), physics=Physics("gradient")),
    Method("exact conditional denoiser, hard", Conditional(), physics=Physics("hard")),
    Method("exact conditional denoiser, none", Conditional()),
]


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Unit normal fields, `(n, 2, SIZE, SIZE)`."""
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=generator)


class Gaussian:
    """N(0, C) of fields, for C `(d, d)`."""

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = covariance
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        kept = values > 1e-12 * values[-1]
        self.eigenvalues, self.vectors = values[kept], vectors[:, kept]

    def denoise(self, z: Tensor, s: Tensor) -> Tensor:
        """E[x0 | z] of `(B, 2, SIZE, SIZE)` at levels `(B,)`."""
        gain = self.eigenvalues / (self.eigenvalues + s[:, None] ** 2)
        return ((z.flatten(1) @ self.vectors * gain) @ self.vectors.T).view_as(z)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n, 2, SIZE, SIZE)`."""
        white = torch.randn(n, len(self.eigenvalues), dtype=torch.float64, generator=generator)
        return (white * self.eigenvalues.sqrt() @ self.vectors.T).view(n, *SHAPE)

    def given(self, rows: Tensor, errors: Tensor) -> tuple[Gaussian, Tensor]:
        """The law given rows A `(K, d)` with errors `(K,)`, and the gain K `(d, K)`."""
        cross = self.covariance @ rows.T
        gain = torch.linalg.solve(rows @ cross + (errors**2).diag(), cross.T).T
        return Gaussian(self.covariance - gain @ cross.T), gain


def prior(share: float = 0.0) -> Gaussian:
    """Stream functions, and potentials with a share of the energy, of amplitude k^-3; of unit variance."""
    k = torch.fft.fftfreq(SIZE, 1 / SIZE, dtype=torch.float64)
    ky, kx = k[:, None], k[None, :]
    amplitude = torch.where(ky**2 + kx**2 > 0, (ky**2 + kx**2).clamp(min=1) ** -1.5, 0.0)
    psi = torch.fft.fft2(torch.eye(SIZE**2, dtype=torch.float64).view(-1, SIZE, SIZE)) * amplitude
    covariance = torch.zeros(VALUES, VALUES, dtype=torch.float64)
    for weight, parts in ((1 - share, (-1j * ky * psi, 1j * kx * psi)), (share, (1j * kx * psi, 1j * ky * psi))):
        maps = torch.fft.ifft2(torch.stack(parts, dim=1)).real.flatten(1)
        covariance += weight * maps.T @ maps / maps.square().sum(dim=0).mean()
    return Gaussian(covariance)


def masks() -> dict[str, Tensor]:
    """The observed cells, `(SIZE, SIZE)`."""
    generator, out = torch.Generator().manual_seed(0), {}
    for share in (11, 33, 50, 75):
        order = torch.randperm(SIZE**2, generator=generator)
        out[f"pixels {share} %"] = (order < round(share / 100 * SIZE**2)).view(SIZE, SIZE)
    swaths = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    swaths[:, SIZE // 8 : SIZE // 4] = swaths[:, 5 * SIZE // 8 : 6 * SIZE // 8] = True
    block = torch.ones(SIZE, SIZE, dtype=torch.bool)
    block[SIZE // 4 : 5 * SIZE // 8, SIZE // 4 : 5 * SIZE // 8] = False
    return out | {"two swaths": swaths, "all but a block": block}


class Case:
    """Fields observed at the same cells, and their posteriors.

    Arguments:
        law: The prior.
        mask: The observed cells.
        sigma: The error of the observations.
        known: Whether the fields are known to have no divergence, within TAU.

    Attributes:
        observation: Of each field.
        cells: The posterior given the observed cells alone, less its mean, and its gain.
        posterior: The posterior, less its mean.
        mean: The means, `(CASES, d)`.
    """

    def __init__(self, law: Gaussian, mask: Tensor, sigma: float, known: bool = False) -> None:
        generator, unit = torch.Generator().manual_seed(1), torch.eye(VALUES, dtype=torch.float64)
        self.law, seen = law, mask.flatten().repeat(2)
        asked = divergence(NORMALIZER.std * unit.view(-1, *SHAPE), GRID).flatten(1).T if known else unit[:0]
        x0 = law.given(asked, torch.full((len(asked),), TAU).double())[0].sample(CASES, generator)
        observed = mask.expand(CASES, 1, SIZE, SIZE)
        error = torch.full((CASES, 1, 1, 1), sigma, dtype=torch.float64)
        y = torch.where(observed, x0 + sigma * normal(CASES, generator), torch.nan)
        self.observation = Observation(y, observed, error, torch.ones_like(observed))
        self.rows, self.sigma = unit[seen], sigma
        errors = torch.tensor([sigma] * int(seen.sum()) + [TAU] * len(asked), dtype=torch.float64)
        self.cells = law.given(self.rows, errors[: len(self.rows)])
        self.posterior, gain = law.given(torch.cat([self.rows, asked]), errors)
        self.mean = y.flatten(1)[:, seen] @ gain[:, : len(self.rows)].T

    def mean_of_cells(self, y: Tensor) -> Tensor:
        """The posterior mean given the observed cells of `(B, 2, SIZE, SIZE)`."""
        return (y.nan_to_num().flatten(1) @ self.rows.T @ self.cells[1].T).view_as(y)


class Model:
    """The exact denoiser of a case: unconditional where it is told nothing. It counts what it is asked for.

    Attributes:
        evaluations: Samples that were evaluated.
        products: Vector-Jacobian products, counted likewise.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.evaluations, self.products = case, 0, 0

    def __call__(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        self.evaluations += len(z)
        told = observation.observed.flatten(1).any(dim=1)
        if told.any():
            mean = self.case.mean_of_cells(observation.y)
            conditional = mean + self.case.cells[0].denoise(z - mean, s)
            return torch.where(told[:, None, None, None], conditional, self.case.law.denoise(z, s))
        x_hat = self.case.law.denoise(z, s)
        if x_hat.requires_grad:
            x_hat.register_hook(self.count)
        return x_hat

    def count(self, gradient: Tensor) -> None:
        """Of the hook of a result."""
        self.products += len(gradient)


def mirrored(seed: int) -> NoiseFunction:
    """Noise for all members of all cases, case by case; the second half of the members of a case mirrors the first."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        half = normal(CASES * MEMBERS // 2, generator).view(CASES, MEMBERS // 2, *SHAPE)
        return torch.cat([half, -half], dim=1).flatten(0, 1)

    return noise


def levels(sampler: Sampler) -> Tensor:
    """The noise levels of a run."""
    return karras(0.002, 80.0, sampler.steps)


@torch.no_grad()
def draw(case: Case, method: Method) -> tuple[Tensor, Model]:
    """Samples `(CASES, MEMBERS, d)`, as `sample_ensemble` draws them, and the model with its counts."""
    model, given = Model(case), case.observation[torch.arange(CASES).repeat_interleave(MEMBERS)]
    noise, inpainting, physics = mirrored(2), method.inpainting, method.physics
    rows = physics.rows(NORMALIZER, GRID) if inpainting.weighs_rows else ()
    bound = inpainting.bind(ClassifierFree(method.scale).wrap(model), given, rows)
    hook = inpainting.hook(given, noise, bound, method.sampler.steps)
    guided = physics.guide(bound, NORMALIZER, GRID)
    repeats = {"repeats": inpainting.repeats, "repeat_above": case.sigma}
    x = method.sampler.sample(guided, levels(method.sampler), noise, hook, **repeats)
    return physics.finish(x, given, NORMALIZER, GRID).view(CASES, MEMBERS, VALUES), model


class Exact:
    """What the exact conditional denoiser gives for a case, from the noise that `draw` begins with."""

    def __init__(self, case: Case) -> None:
        sampler, law = DPMpp2M(32), case.posterior
        self.case, noise = case, mirrored(2)()
        unit = torch.eye(VALUES, dtype=torch.float64).view(-1, *SHAPE)
        maps = sampler.sample(law.denoise, levels(sampler), lambda: unit).flatten(1)
        self.covariance = maps.T @ maps
        # A sample is the mean, what is left of a first state that is centred on 0 and not there, a map of the noise.
        off = -case.mean.view(-1, *SHAPE) / levels(sampler)[0]
        left = case.mean + sampler.sample(law.denoise, levels(sampler), lambda: off).flatten(1)
        self.samples = left[:, None] + (noise.flatten(1) @ maps).view(CASES, MEMBERS, VALUES)
        shift = (left - case.mean).square().sum(dim=1).mean()
        self.distance = wasserstein(shift, self.covariance, law.covariance)

    def score(self, x: Tensor, scattered: bool) -> dict[str, float]:
        """Error, spread and W2 of samples; see the module. `scattered`: they have noise of their own."""
        width, beside = (trace(fields) for fields in (x, self.samples))
        if not scattered:
            width = width / beside * self.covariance.trace()
        return {
            "error": (x.mean(dim=1) - self.case.mean).square().mean().sqrt().item(),
            "spread": (width / self.case.posterior.covariance.trace()).sqrt().item(),
            "W2": (x - self.samples).square().mean().sqrt().item() + self.distance,
        }


def trace(x: Tensor) -> Tensor:
    """The trace of the covariance of mirrored samples `(CASES, MEMBERS, d)`."""
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=2).mean()


def wasserstein(square: Tensor, one: Tensor, other: Tensor) -> float:
    """The 2-Wasserstein distance by dimension of laws with means that are `square` apart (squared)."""
    root = square_root(other)
    total = square + (one + other - 2 * square_root(root @ one @ root)).trace()
    return (total.clamp(min=0) / len(one)).sqrt().item()


def square_root(matrix: Tensor) -> Tensor:
    """That of a covariance."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def ignored(case: Case) -> str:
    """Error and spread of the prior in the place of the posterior."""
    error = case.mean.square().mean().sqrt()
    return f"{error:.2f} / {(case.law.covariance.trace() / case.posterior.covariance.trace()).sqrt():.1f}"


def number(x: float) -> str:
    """Two decimals, three for what is small."""
    return f"{x:.3f}" if x < 0.0995 else f"{x:.2f}"


def row(method: Method, cases: dict[str, Case], exact: dict[str, Exact], columns: Sequence[str]) -> dict[str, str]:
    """The scores of a method, mask by mask, and what it costs."""
    out, calls, products = {"method": method.name}, set(), set()
    for name, case in cases.items():
        x, model = draw(case, method)
        scores = exact[name].score(x, isinstance(method.sampler, Ancestral))
        out[name] = " / ".join(number(scores[column]) for column in columns)
        calls.add(model.evaluations // len(x.flatten(0, 1)))
        products.add(model.products // len(x.flatten(0, 1)))
    return out | {"evaluations": span(calls), "products": span(products)}


def span(values: set[int]) -> str:
    """The smallest and the largest."""
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def show(title: str, rows: list[dict[str, str]]) -> None:
    """Prints a table."""
    print(f"{title}\n\n{table(rows)}\n", flush=True)


def main() -> None:
    """Prints the three tables."""
    law, seen = prior(), masks()
    for sigma in ERRORS:
        cases = {name: Case(law, mask, sigma) for name, mask in seen.items()}
        exact = {name: Exact(case) for name, case in cases.items()}
        chosen = METHODS if sigma == SIGMA_OBS else [method for method in METHODS if method.name == "mmps"]
        rows = [row(method, cases, exact, ("error", "spread")) for method in chosen]
        rows.append({"method": "observations ignored"} | {name: ignored(case) for name, case in cases.items()})
        show(f"error / spread, sigma_obs = {sigma}", rows)
    cases = {name: Case(prior(DIVERGENT), mask, SIGMA_OBS, known=True) for name, mask in seen.items()}
    exact = {name: Exact(case) for name, case in cases.items()}
    rows = [row(method, cases, exact, ("W2", "error", "spread")) for method in PHYSICS]
    show("W2 / error / spread, the divergence known to be 0", rows)


if __name__ == "__main__":
    main()
