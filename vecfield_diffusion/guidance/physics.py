"""What is known of the flow beside the observations: divergence, curl, conserved totals, walls.

Each term is a linear map L of the velocity in physical units, a target and a tolerance tau. They act in one of three
ways.

**rows** (with `inpainting=mmps` and `pigdm`): further observations, `target = L u + tau eps`. The posterior with them
is exact in the limit, whatever is observed beside.

**gradient** (with any other): a step on the estimate of the clean field,

    D <- D - w s^2 / (sd^2 + s^2) grad E(D),    E = sum w_L |L u - target|^2 / |L|^2 / (2 std^2),

below a threshold of the noise level, clipped to the length of `z - D`, each frame by itself (the gradient on the
Tweedie estimate of Chung et al., ICLR 2023, with the Jacobian s^2 / (sd^2 + s^2) of a white prior in its place; for
partial differential equations Huang et al., DiffusionPDE, NeurIPS 2024). |L|^2, the largest eigenvalue of L^T L on the
grid, makes the energy independent of grid and units: a weight of 1 is one full Richardson step for the shortest waves,
and weights of up to 2 together are stable.

**hard**: the finished field is moved to the nearest one without divergence, or of given totals, the observed cells
held. Real flows seen at a finite resolution are not free of divergence: this is for those that are by construction.

Totals - momentum, what flows out, kinetic energy - are kept in three ways that are not the same: as rows the law is
conditioned on them and stays that of the data; moved afterwards, every field has them and the law is another one; the
gradient does neither wholly. Kinetic energy is no row, for it is quadratic.

What is known holds in every frame of a sequence `(B, T, 2, H, W)`.

In training (`train.py physics=divergence`) E of the estimate, over `1 + s^2`, joins the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.axes import column, total
from vecfield_diffusion.diffusion.losses import Penalty
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.linear import LinearObservation, Operator, operator_rows
from vecfield_diffusion.physics import operators
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.physics.projection import project
from vecfield_diffusion.physics.totals import Totals, mean_velocity
from vecfield_diffusion.samplers.base import BoundDenoiser


@dataclass(frozen=True)
class Term:
    """One thing that is known.

    Arguments:
        name: What messages call it.
        weight: Of its energy; 0 leaves it out.
        operator: L.
        target: What `L u` should be.
        tau: How far it may be off, in the units of the target; a number, or as `L u`.
        where: The cells of a grid in which it is asked for, `(H, W)`; all valid ones if None.
    """

    name: str
    weight: float
    operator: Operator
    target: float | tuple[float, float] | Tensor
    tau: float | Literal["auto"] | Tensor
    where: Callable[[Grid], Tensor] | None = None

    def aim(self, like: Tensor) -> Tensor:
        """Returns the target as a tensor that broadcasts against `L u`."""
        if isinstance(self.target, Tensor):
            return self.target.to(like)
        return torch.as_tensor(self.target, dtype=like.dtype, device=like.device).view(-1, 1, 1)


class NoPhysics:
    """Nothing but the observations.

    Attributes:
        plain: Whether it adds nothing.
        mode: How its terms act, see the module.
        varies: Whether what it knows differs from snapshot to snapshot, and is read by `recorded`.
    """

    plain: bool = True
    mode: str = "none"
    varies: bool = False

    def obstacle(self, grid: Grid) -> str | None:
        """Returns why it does not go with a grid, in the words of the command line; None where it does."""
        return None

    def resolve(self, weighs_rows: bool, statistics: Statistics) -> NoPhysics:
        """Returns the same: nothing is left open."""
        return self

    def summary(self) -> str | None:
        """Returns what is to be said of the terms and their tolerances; None for nothing."""
        return None

    def rows(self, normalizer: Normalizer, grid: Grid, frames: int = 1) -> Sequence[LinearObservation]:
        """No further observations."""
        return ()

    def guide(self, denoise: BoundDenoiser, normalizer: Normalizer, grid: Grid) -> BoundDenoiser:
        """Returns the denoiser itself."""
        return denoise

    def penalty(self, normalizer: Normalizer, grid: Grid) -> Penalty | None:
        """Nothing is added to the training loss."""
        return None

    def finish(self, x: Tensor, observation: Observation, normalizer: Normalizer, grid: Grid) -> Tensor:
        """Returns the field itself."""
        return x


class Physics(NoPhysics):
    """Terms and the way in which they act; see the module.

    Arguments:
        mode: `rows`, `gradient` or `hard`; `auto` is rows where the inpainting takes them, else gradient.
        divergence: The weight of the divergence; it is a term in every mode where it is not 0.
        curl: The weight of the vertical component of the curl.
        no_flow: The weight of the velocity through walls and coasts, of the cells beside them.
        divergence_target: The prescribed divergence in s^-1.
        curl_target: The prescribed curl in s^-1. The target 0 is for flows without rotation: it damps eddies.
        momentum: The prescribed mean velocity `[u, v]` in the units of the data; null leaves it free.
        outflow: The prescribed mean velocity out of the domain through its open edges; 0 lets out what comes in, null
            leaves it free.
        kinetic_energy: The prescribed mean of `|u|^2 / 2`, in the units of the data squared, in gradient and hard mode;
            null leaves it free.
        tau: How far the divergence may be off as a row, in s^-1; `auto` is the RMS divergence of the training data.
        curl_tau: Likewise of the curl; `auto` is the RMS vorticity of the training data.
        velocity_tau: Likewise of momentum, outflow and flow through walls, in the units of the data.
        below: The gradient acts at noise levels below this one, in standard deviations of the data.

    Raises:
        ValueError: A negative weight or more than 2 together, where the step overshoots and grows; tolerances that are
            not positive; a mode that a term does not go with.
    """

    plain = False

    def __init__(
        self,
        mode: Literal["auto", "rows", "gradient", "hard"] = "auto",
        divergence: float = 1.0,
        curl: float = 0.0,
        no_flow: float = 0.0,
        divergence_target: float = 0.0,
        curl_target: float = 0.0,
        momentum: tuple[float, float] | None = None,
        kinetic_energy: float | None = None,
        tau: float | Literal["auto"] = "auto",
        curl_tau: float | Literal["auto"] = "auto",
        velocity_tau: float = 0.01,
        below: float = 10.0,
        outflow: float | None = None,
    ) -> None:
        weights = {"divergence": divergence, "curl": curl, "no_flow": no_flow}
        for name, value in weights.items():
            if not 0 <= value <= 2:
                raise ValueError(f"{name} must be in [0, 2], a larger step overshoots, got {value}")
        if sum(weights.values()) > 2:
            raise ValueError(
                f"curl and no_flow must be at most 2 together with divergence={divergence}, got {curl + no_flow}"
            )
        for name, value in (("tau", tau), ("curl_tau", curl_tau), ("velocity_tau", velocity_tau)):
            if value != "auto" and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if kinetic_energy is not None and kinetic_energy <= 0:
            raise ValueError(f"kinetic_energy must be > 0 or null, got {kinetic_energy}")
        if kinetic_energy is not None and mode == "rows":
            raise ValueError("kinetic_energy is not linear: it goes with mode=gradient or hard, not rows")
        totals = (momentum is not None) + (outflow is not None)
        if sum(weights.values()) > 2 - totals:
            raise ValueError(
                f"momentum and outflow have weight 1 each: the others must be at most {2 - totals} together, "
                f"got {weights}"
            )
        if mode == "hard" and (curl or no_flow or outflow is not None or divergence_target):
            raise ValueError("mode=hard takes the divergence to zero, or momentum and kinetic_energy to theirs")
        self.totals = Totals(momentum, kinetic_energy)
        if mode == "hard" and divergence and self.totals.given:
            raise ValueError("mode=hard takes the divergence to zero or totals to theirs: give divergence=0 for these")
        self.mode, self.kinetic_energy, self.below = mode, kinetic_energy, below
        terms = [
            Term("divergence", divergence, operators.divergence, divergence_target, tau),
            Term("curl", curl, operators.vorticity, curl_target, curl_tau),
            Term("no_flow", no_flow, through_walls, 0.0, velocity_tau, beside_walls),
        ]
        if momentum is not None:
            terms.append(Term("momentum", 1.0, mean_velocity, tuple(momentum), velocity_tau))
        if outflow is not None:
            terms.append(Term("outflow", 1.0, through_edges, outflow, velocity_tau))
        self.terms = [term for term in terms if term.weight]

    def obstacle(self, grid: Grid) -> str | None:
        """Returns why it does not go with a grid: an outflow where nothing can flow out."""
        if any(term.operator is through_edges for term in self.terms) and not outer_edge(grid):
            return "physics.outflow: the domain has no open edge through which anything could flow. Leave it out"
        return None

    def resolve(self, weighs_rows: bool, statistics: Statistics) -> Physics:
        """Returns the same with `auto` replaced by what the inpainting takes and the training data say.

        Raises:
            ValueError: Rows for an inpainting that takes none.
        """
        if self.mode == "rows" and not weighs_rows:
            raise ValueError("mode=rows needs inpainting=mmps or pigdm: another has no place for them")
        found = {"divergence": statistics.divergence_rms, "curl": statistics.vorticity_rms}
        known = copy.copy(self)
        if self.mode == "auto":
            known.mode = "rows" if weighs_rows and self.kinetic_energy is None else "gradient"
        known.terms = [
            replace(term, tau=max(found[term.name], 1e-12)) if term.tau == "auto" else term for term in self.terms
        ]
        return known

    def summary(self) -> str:
        """Returns the mode and the tolerance of each term."""
        return f"physics.mode={self.mode}: " + ", ".join(f"{term.name} (tau {term.tau:.3g})" for term in self.terms)

    def rows(self, normalizer: Normalizer, grid: Grid, frames: int = 1) -> Sequence[LinearObservation]:
        """Returns the terms as linear observations of normalised fields of `frames`, over tau: their error is 1."""
        if self.mode != "rows":
            return ()
        like = normalizer.std
        given = grid, normalizer, frames
        return [
            operator_rows(
                term.operator, term.aim(like), term.tau, *given, None if term.where is None else term.where(grid)
            )
            for term in self.terms
        ]

    def energy(self, velocity: Tensor, std: Tensor, grid: Grid, norms: list[Tensor]) -> Tensor:
        """Returns E of every sample `(B,)`, dimensionless, of velocities `(B, 2, H, W)` in physical units.

        See `norms`.
        """
        energy = torch.zeros(len(velocity), dtype=velocity.dtype, device=velocity.device)
        for term, norm in zip(self.terms, norms, strict=True):
            values = term.operator(velocity, grid)
            excess = (values - term.aim(values)) / std
            if values.shape[-2:] == grid.shape:
                excess = torch.where(grid.valid, excess, 0.0)
            energy = energy + term.weight / 2 / norm * total(excess.square())
        if self.kinetic_energy is not None:
            cells = grid.valid.sum()
            mean = torch.where(grid.valid, velocity, 0.0).square().sum(dim=(-3, -2, -1)) / (2 * cells)
            # Of its root, whose gradient has the length 1 / sqrt(2 cells) everywhere; that of each frame by itself.
            excess = (mean.sqrt() - self.kinetic_energy**0.5) ** 2 * cells / std**2
            energy = energy + excess.view(len(velocity), -1).sum(1)
        return energy

    def norms(self, grid: Grid, like: Tensor) -> list[Tensor]:
        """Returns |L|^2 of each term on the grid."""
        return [squared_norm(term.operator, grid, like) for term in self.terms]

    def guide(self, denoise: BoundDenoiser, normalizer: Normalizer, grid: Grid) -> BoundDenoiser:
        """Returns the guided denoiser of normalised fields on `grid`, in gradient mode."""
        if self.mode not in ("gradient", "auto"):
            return denoise
        norms = self.norms(grid, normalizer.std)

        def guided(z: Tensor, s: Tensor) -> Tensor:
            x_hat = denoise(z, s)
            if not (s < self.below).any():
                return x_hat
            with torch.enable_grad():
                x = x_hat.detach().requires_grad_()
                energy = self.energy(normalizer.denormalize(x), normalizer.std, grid, norms)
                (gradient,) = torch.autograd.grad(energy.sum(), x)
            step = column(torch.where(s < self.below, s**2 / (1 + s**2), 0.0), z) * gradient
            length = step.flatten(-3).norm(dim=-1).clamp(min=torch.finfo(step.dtype).tiny)
            limit = torch.where(grid.valid, z - x_hat, 0.0).flatten(-3).norm(dim=-1)
            return x_hat - (limit / length).clamp(max=1)[..., None, None, None] * step

        return guided

    def penalty(self, normalizer: Normalizer, grid: Grid) -> Penalty:
        """Returns E of the estimate for each of its values, over `1 + s^2`, as a term of training."""
        if reason := self.obstacle(grid):
            raise UserError(reason)
        norms, values = self.norms(grid, normalizer.std), 2 * grid.valid.sum()

        def mean_energy(x_hat: Tensor, s: Tensor) -> Tensor:
            energy = self.energy(normalizer.denormalize(x_hat), normalizer.std, grid, norms)
            return energy / (math.prod(x_hat.shape[1:-3]) * values) / (1 + s**2)

        return mean_energy

    def finish(self, x: Tensor, observation: Observation, normalizer: Normalizer, grid: Grid) -> Tensor:
        """Returns the nearest field without divergence, or of the totals, with observed cells kept, in hard mode."""
        if self.mode != "hard":
            return x
        if self.totals.given:
            return normalizer.normalize(self.totals.reach(normalizer.denormalize(x), grid, observation.observed))
        return normalizer.normalize(project(normalizer.denormalize(x), grid, observation.observed))


class Conserve(Physics):
    """Totals of given value and nothing else; see the module.

    Arguments:
        mode: See `Physics`.
        momentum: See `Physics`.
        outflow: See `Physics`.
        kinetic_energy: See `Physics`.
        velocity_tau: See `Physics`.
        below: See `Physics`.

    Raises:
        ValueError: No total, a tolerance that is not positive, or a mode that a total does not go with.
    """

    def __init__(
        self,
        mode: Literal["auto", "rows", "gradient", "hard"] = "auto",
        momentum: tuple[float, float] | None = None,
        outflow: float | None = None,
        kinetic_energy: float | None = None,
        velocity_tau: float = 0.01,
        below: float = 10.0,
    ) -> None:
        if momentum is None and outflow is None and kinetic_energy is None:
            raise ValueError("give momentum, outflow or kinetic_energy, the total that is to be kept")
        super().__init__(
            mode,
            divergence=0.0,
            momentum=momentum,
            kinetic_energy=kinetic_energy,
            velocity_tau=velocity_tau,
            below=below,
            outflow=outflow,
        )


def through_edges(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the mean velocity of `(B, 2, H, W)` out through the open edges of the domain, `(B, 1, 1, 1)`."""
    area = (grid.dx * grid.dy).abs()[:, None].to(velocity)
    out = (area * operators.divergence(velocity, grid)).sum(dim=(-2, -1), keepdim=True)
    return out / outer_edge(grid)


def outer_edge(grid: Grid) -> float:
    """Returns the length of the open edges of the domain, in metres; 0 without any."""
    sides = ((grid.valid[:, 0].int() + grid.valid[:, -1].int()) * grid.dy.abs()).sum().item()
    ends = (grid.valid[[0, -1]].sum(dim=1) * grid.dx[[0, -1]].abs()).sum().item()
    sides, ends = sides * (grid.boundary_x == "open"), ends * (grid.boundary_y == "open")
    return sides + ends


def through_walls(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the velocity across walls and coasts of the cells beside them, `(B, 2, H, W)`, 0 in all others."""
    return torch.where(beside_walls(grid).to(velocity.device), velocity, 0.0)


def beside_walls(grid: Grid) -> Tensor:
    """Returns the components that lead into walls and coasts, of the cells beside them, boolean `(2, H, W)`."""
    return torch.stack([_beside(grid.valid, grid.boundary_x), _beside(grid.valid.mT, grid.boundary_y).mT])


def _beside(valid: Tensor, boundary: str) -> Tensor:
    """Returns valid cells with land or a wall on one side along the last axis, `(H, W)`."""
    before, after = valid.roll(1, -1), valid.roll(-1, -1)
    if boundary != "periodic":
        before[:, 0] = after[:, -1] = boundary == "open"
    return valid & ~(before & after)


def squared_norm(operator: Operator, grid: Grid, like: Tensor, iterations: int = 50) -> Tensor:
    """Returns the largest eigenvalue of L^T L of a linear operator on fields `(1, 2, H, W)`, by power iteration.

    The iteration comes from below, so five percent are added.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, *grid.shape, generator=generator, dtype=like.dtype).to(like.device)
    length = x.norm()
    for _ in range(iterations):
        with torch.enable_grad():
            x = (x / length).requires_grad_()
            energy = operator(x, grid).square().sum() / 2
            (x,) = torch.autograd.grad(energy, x)
        length = x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    return 1.05 * length
