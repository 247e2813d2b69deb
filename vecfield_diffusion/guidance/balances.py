"""Balances of the sea as observations: no flow through coasts, no divergence of the transport, geostrophy.

Each is a list of rows `L u = l + tau eps` beside the measured values, for mmps and pigdm:

    coast        u . n = 0 in the cells beside land and walls, n across them;
    transport    div(h u) / h = 0 with the depth h of the file;
    geostrophy   u = (g / f) (-d eta / dy, d eta / dx) with the surface height eta of the file, f = 2 Omega sin(lat).

None of them holds exactly. How far a balance is off is its tolerance tau, which `auto` finds where the file measures
enough: as the root mean square of L u - l over the measured velocities. The error of a height widens that of the
velocities that follow from it, here as if the errors of the rows were independent,

    tau^2 + (g / f)^2 sum_j w_j^2 sigma_j^2,

w the weights of the difference that is taken. Variational analyses of radar currents use the same three (Barth et al.,
Ocean Dynam. 71, 293, 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.losses import Penalty
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.linear import FLOOR, LinearObservation
from vecfield_diffusion.guidance.physics import Physics, Term, beside_walls, through_walls
from vecfield_diffusion.physics import operators
from vecfield_diffusion.physics.grid import Grid

GRAVITY, ROTATION = 9.81, 7.2921e-5  # m s-2, s-1
#: The latitude in degrees from which on a flow may be geostrophic.
TROPICS = 5.0
#: The least depth in metres: a mask and a depth of the same place need not agree.
SHALLOW = 1.0
#: Values from which a tolerance is found, at least.
ENOUGH = 10

Tolerance = float | Literal["auto"] | None


@dataclass(frozen=True)
class Surroundings:
    """What a file says beside the velocities that are filled.

    Arguments:
        grid: The grid.
        latitude: Of the rows in degrees, `(H, 1)`; None where it is not known.
        unit: The m s-1 of one unit of velocity; None where it is not known.
        velocity: Returns some measured velocities `(n, 2, H, W)`, NaN in gaps.
        variable: Returns a variable by name in metres at the same times, `(n, 1, H, W)`.
        land: The cells that are land, where that is told from sea that was never measured, `(H, W)`; None elsewhere.
    """

    grid: Grid
    latitude: Tensor | None
    unit: float | None
    velocity: Callable[[], Tensor]
    variable: Callable[[str], Tensor]
    land: Tensor | None = None


class Balances(Physics):
    """Balances as rows; see the module.

    Arguments:
        coast: The tolerance of the velocity across coasts and walls, in the units of the data; `auto` is what the file
            measures there, null leaves the balance out.
        transport: The tolerance of div(h u) / h in s^-1, likewise.
        depth: The variable with h in metres; heights of the bottom, below 0, are taken for depths.
        geostrophy: The tolerance of u less the geostrophic velocity, in the units of the data, likewise.
        height: The variable with the surface height in metres.
        height_error: Its standard deviation in metres, a number or a variable.
        latitude: That of all cells, for f, where the file has none.

    Raises:
        ValueError: No balance, one without its variable, or a number out of range.
    """

    def __init__(
        self,
        coast: Tolerance = None,
        transport: Tolerance = None,
        depth: str | None = None,
        geostrophy: Tolerance = None,
        height: str | None = None,
        height_error: float | str = 0.0,
        latitude: float | None = None,
    ) -> None:
        super().__init__("rows", divergence=0.0)
        wanted = {"coast": coast, "transport": transport, "geostrophy": geostrophy}
        if all(tau is None for tau in wanted.values()):
            raise ValueError("no balance is given: physics.coast, transport or geostrophy needs a tolerance, or auto")
        for name, tau in wanted.items():
            if tau not in (None, "auto") and tau <= 0:
                raise ValueError(f"{name} must be > 0, auto or null, got {tau}")
        for name, needed, variable in (("transport", "depth", depth), ("geostrophy", "height", height)):
            if wanted[name] is not None and variable is None:
                raise ValueError(f"{needed} must name the variable of the file that {name} needs")
        if not isinstance(height_error, str) and height_error < 0:
            raise ValueError(f"height_error must be >= 0, got {height_error}")
        self.depth, self.height, self.height_error, self.latitude = depth, height, height_error, latitude
        self.terms = [
            Term(name, 1.0, through_walls, 0.0, tau, beside_walls if name == "coast" else None)
            for name, tau in wanted.items()
            if tau is not None
        ]
        self.unit, self.f = 1.0, torch.ones(1, 1, dtype=torch.float64)
        self.grid: Grid | None = None

    @property
    def varies(self) -> bool:
        """Whether its rows differ from snapshot to snapshot."""
        return any(term.name == "geostrophy" for term in self.terms)

    def obstacle(self, grid: Grid) -> str | None:
        """Returns why it does not go with a grid: no coast."""
        if any(term.name == "coast" for term in self.terms) and not beside_walls(grid).any():
            return "physics.coast: no cell lies beside land or a wall. Leave it out"
        return None

    def placed(self, around: Surroundings) -> Self:
        """Returns the balances of a file: its depth, its latitudes, and tolerances where they are `auto`.

        Raises:
            UserError: No depth or latitude, latitudes near the equator, or too few values for a tolerance.
        """
        placed = copy.copy(self)
        placed.grid = around.grid
        if self.varies:
            placed.unit, placed.f = _unit(around), self._coriolis(around)
        terms = [self._beside_land(self._with_depth(term, around), around) for term in self.terms]
        placed.terms = [placed._tolerated(term, around) if term.tau == "auto" else term for term in terms]
        return placed

    def recorded(self, variable: Callable[[str], Tensor], grid: Grid) -> Self:
        """Returns those of some snapshots on a grid; `variable` reads their heights in metres, `(N, 1, H, W)`."""
        known = copy.copy(self)
        known.terms = [self._given_height(term, variable, self._cells(grid)) for term in self.terms]
        return known

    def rows(self, normalizer: Normalizer, grid: Grid, frames: int = 1) -> Sequence[LinearObservation]:
        """See `Physics`: with the spacing of the file, which need not be that of the training data."""
        return super().rows(normalizer, self._cells(grid), frames)

    def _cells(self, grid: Grid) -> Grid:
        """The domain that is filled, with the cells of the file."""
        return grid if self.grid is None else replace(self.grid.to(grid.valid.device), valid=grid.valid)

    def select(self, cases: Tensor) -> Self:
        """Returns those of `cases` alone among the ones that were recorded."""
        known, cases = copy.copy(self), cases.cpu()

        def of(value: Tensor | float) -> Tensor | float:
            return value[cases] if isinstance(value, Tensor) and value.ndim > 3 else value

        known.terms = [replace(term, target=of(term.target), tau=of(term.tau)) for term in self.terms]
        return known

    def penalty(self, normalizer: Normalizer, grid: Grid) -> Penalty | None:
        """Refuses training: what is asked for is in the file that is filled."""
        raise UserError("physics=balances are observations, for infer.py and evaluate.py: train with physics=none")

    def _coriolis(self, around: Surroundings) -> Tensor:
        """f of the rows, `(H, 1)`, in s^-1."""
        lat = around.latitude if self.latitude is None else torch.tensor([[self.latitude]], dtype=torch.float64)
        if lat is None:
            raise UserError("physics.geostrophy: the file has no latitudes. Give physics.latitude=, that of all cells")
        rows = around.grid.valid.any(dim=1, keepdim=True).cpu()
        near = lat.abs().masked_fill(~rows, torch.inf) if len(lat) > 1 else lat.abs()
        if near.min() < TROPICS:
            raise UserError(
                f"physics.geostrophy: no balance at latitude {near.min():.3g}, where f is small: expected {TROPICS:g} "
                "degrees and more from the equator. Leave cells out by domain=, or leave out geostrophy"
            )
        return 2 * ROTATION * torch.deg2rad(lat.double()).sin()

    def _with_depth(self, term: Term, around: Surroundings) -> Term:
        """The term with the depth of the file, where it takes one."""
        if term.name != "transport":
            return term
        wet, depth = around.grid.valid.cpu(), around.variable(self.depth)[:1].double()
        inside = depth[..., wet]
        if not inside.isfinite().all():
            raise UserError(
                f"physics.depth={self.depth}: {int((~inside.isfinite()).sum())} of {int(wet.sum())} wet cells have no "
                "depth. Leave them out by domain=, or give a variable that has it everywhere"
            )
        depth = -depth if inside.mean() < 0 else depth
        return replace(term, operator=transport(torch.where(depth.isfinite(), depth, SHALLOW).clamp(min=SHALLOW)))

    def _beside_land(self, term: Term, around: Surroundings) -> Term:
        """The term of the coast without the edges of what was measured, where these are known to be none."""
        if term.name != "coast" or around.land is None:
            return term
        sea = ~around.land.cpu()
        where = beside_walls(replace(around.grid.to("cpu"), valid=sea | around.grid.valid.cpu()))
        return replace(term, where=lambda grid: where.to(grid.valid.device) & grid.valid)

    def _given_height(self, term: Term, variable: Callable[[str], Tensor], grid: Grid) -> Term:
        """The term with the geostrophic velocity of some snapshots as its target, where it has one."""
        if term.name != "geostrophy":
            return term
        height, cpu = variable(self.height).double(), grid.to("cpu")
        target = geostrophic(height, cpu, self.f) / self.unit
        error = variable(self.height_error).double() if isinstance(self.height_error, str) else self.height_error
        if isinstance(error, Tensor) or error > 0:
            wide = geostrophic_error(torch.as_tensor(error).double().expand_as(height), height, cpu, self.f)
            tau = (term.tau**2 + (wide / self.unit).square()).sqrt()
        else:
            tau = term.tau
        return replace(term, operator=velocity_itself, target=target, tau=tau)

    def _tolerated(self, term: Term, around: Surroundings) -> Term:
        """The term with the tolerance that the measured velocities ask for.

        It is at least `FLOOR` of what unrelated velocities of their size give: data that obey to rounding, as those of
        a model may, would make systems too stiff.
        """
        velocity, grid = around.velocity().double(), around.grid.to("cpu")
        known = replace(term, tau=1.0) if term.name == "geostrophy" else term
        known = self._given_height(known, around.variable, grid)
        where = grid.valid if term.where is None else term.where(grid)
        draw = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(0)).double()
        gaps = ~velocity.isfinite()
        # Rows that take a missing value are those that see anything that stands in its place.
        whole = known.operator(torch.where(gaps, draw, 0.0), grid) == 0
        values = known.operator(torch.where(gaps, 0.0, velocity), grid) - known.aim(velocity)
        values = values[where & whole & values.isfinite()]
        if len(values) < ENOUGH:
            raise UserError(
                f"physics.{term.name}=auto: {len(values)} measured values have what it needs around them, expected "
                f"{ENOUGH}. Give a number, the tolerance"
            )
        size = velocity[~gaps].square().mean().sqrt()
        unrelated = known.operator(size * draw, grid)
        unrelated = unrelated[where.expand_as(unrelated)]
        least, found = (part.square().mean().sqrt().item() for part in (FLOOR * unrelated, values))
        return replace(term, tau=max(found, least))


def velocity_itself(velocity: Tensor, grid: Grid) -> Tensor:
    """Returns the velocity: the operator of a balance that gives it."""
    return velocity


def transport(depth: Tensor) -> Callable[[Tensor, Grid], Tensor]:
    """Returns the operator div(h u) / h for depths `(1, 1, H, W)`: the faces of a cell carry the mean of h u."""

    def divergence(velocity: Tensor, grid: Grid) -> Tensor:
        h = depth.to(velocity)
        h = h if velocity.ndim == 4 else h[None]
        return operators.divergence(h * velocity, grid) / h

    return divergence


def geostrophic(height: Tensor, grid: Grid, f: Tensor) -> Tensor:
    """Returns the velocity (g / f) (-d eta / dy, d eta / dx), `(N, 2, H, W)` in m s-1; NaN where it is not known.

    Arguments:
        height: The surface height in metres, `(N, 1, H, W)` or of sequences `(N, T, 1, H, W)`, NaN where unknown.
        grid: The grid; beside land and unknown heights the differences are one-sided.
        f: 2 Omega sin(latitude), `(H, 1)` or `(1, 1)`.
    """
    slopes = []
    for frame in height.flatten(0, -4):
        known = replace(grid, valid=grid.valid & frame[0].isfinite())
        slopes.append(torch.where(has_neighbour(known), operators.slope(frame[None], known)[0], torch.nan))
    along_x, along_y = torch.stack(slopes).unflatten(0, height.shape[:-3]).split(1, dim=-3)
    return GRAVITY / f * torch.cat([-along_y, along_x], dim=-3)


def has_neighbour(grid: Grid) -> Tensor:
    """Returns the valid cells with a valid one beside them along x, and along y, boolean `(2, H, W)`."""

    def beside(valid: Tensor, periodic: bool) -> Tensor:
        before, after = valid.roll(1, -1), valid.roll(-1, -1)
        if not periodic:
            before[:, 0] = after[:, -1] = False
        return valid & (before | after)

    y, x = grid.periodic
    return torch.stack([beside(grid.valid, x), beside(grid.valid.mT, y).mT])


def geostrophic_error(error: Tensor, height: Tensor, grid: Grid, f: Tensor) -> Tensor:
    """Returns the standard deviation of both components of `geostrophic` for independent errors of the heights.

    Arguments:
        error: That of the heights in metres, as `height`.
        height: See `geostrophic`; where it is known matters alone.
        grid: See there.
        f: See there.
    """
    total = torch.zeros_like(height).expand(*height.shape[:-3], 2, *height.shape[-2:]).clone()
    for axis, component in ((-2, 0), (-1, 1)):
        for comb in combs(grid, axis):
            parts = geostrophic(torch.where(comb & height.isfinite(), error, 0.0 * height), grid, f)
            total[..., component, :, :] += parts[..., component, :, :].square()
    return total.sqrt()


def combs(grid: Grid, axis: int) -> Sequence[Tensor]:
    """Returns masks `(H, W)` that hold every cell once, and of no difference along an axis more than one."""
    length, periodic = grid.shape[axis], grid.periodic[axis]
    step = 2 * operators.REACH + 1
    step = length if length < step or (periodic and length % step) else step
    line = torch.arange(length) % step
    line = line[:, None] if axis == -2 else line[None, :]
    return [(line == number).expand(grid.shape) for number in range(step)]


def _unit(around: Surroundings) -> float:
    if around.unit is None:
        raise UserError("physics.geostrophy: velocities in units of speed are needed, such as m s-1")
    return around.unit
