"""Symmetries that the law has and the network has not: the mean of what it says of a sample and of its images.

    D(z, s, y) <- 1 / |G| sum_g g^-1 D(g z, s, g y)

with the observations, their errors, the domain and its land moved along. Where the law is symmetric, E[x0 | z, y] is:
the mean over the group is then never further from it than the network, by the mean square over the images of a sample
(the squared error of the mean is the mean one less the variance). A network that was trained with `model.equivariant`
commutes by itself, at |G| times less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser, DenoiserFunction
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.ellipses import blocks, root
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.cfg import Guidance
from vecfield_diffusion.models.symmetry import Generator, Symmetry, group
from vecfield_diffusion.physics.grid import Grid


class Averaged(Guidance):
    """The mean over flips, transposes, quarter turns and translations: as many evaluations a step as there are images.

    Arguments:
        transforms: Some of `flip_x`, `flip_y`, `transpose`, `turn`; what follows from them is there, too.
        shifts: The mean is over shifts by 0 .. n - 1 cells along each axis, for data that are periodic along both; 1
            for none. A network of strides commutes with shifts by its largest stride, 8 cells with four resolutions.

    Attributes:
        differences: The mean square of the images' deviations from their mean and of that mean, over all evaluations.

    Raises:
        ValueError: A transform of another name, or fewer shifts than one.
    """

    def __init__(self, transforms: Sequence[Generator] = ("flip_x", "flip_y"), shifts: int = 1) -> None:
        if shifts < 1:
            raise ValueError(f"shifts must be >= 1, got {shifts}")
        self.elements, self.shifts = group(transforms), shifts
        self.differences: list[Tensor | float] = [0.0, 0.0]

    def images(self) -> Iterator[tuple[Symmetry, tuple[int, int]]]:
        """Yields the elements: a symmetry, then a shift along y and x."""
        yield from product(self.elements, product(range(self.shifts), repeat=2))

    def obstacle(self, grid: Grid) -> str | None:
        """Returns why a grid is not symmetric; land need not be, for it is moved along."""
        even = all(bool((spacing == spacing[0]).all()) for spacing in (grid.dx, grid.dy))
        alike = even and bool(grid.dx[0].abs() == grid.dy[0].abs()) and grid.boundary_x == grid.boundary_y
        for needed, given, what in (
            (self.shifts > 1, all(grid.periodic), "shifts needs data that are periodic along both axes"),
            (any(g.flip_y for g in self.elements), even, "transforms with flip_y needs the same spacing in every row"),
            (any(g.transpose for g in self.elements), alike, "turns and transposes need square cells and equal ends"),
        ):
            if needed and not given:
                return f"guidance.{what}: leave them out"
        return None

    def wrap(self, denoiser: Denoiser) -> DenoiserFunction:
        """Returns the mean over the group.

        Raises:
            UserError: A mean field in the units of the network: the anomalies from it have no such symmetry.
        """
        if denoiser.normalizer.mean.any():
            raise UserError(
                "guidance=symmetry: the network was trained on anomalies from a mean field, which flips and shifts do "
                "not leave as it is. It takes a network that was trained with mean_field=false"
            )

        def mean(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
            total, squares, count = torch.zeros_like(z), 0.0, 0
            for g, shift in self.images():
                moved = denoiser(shifted(g.act(z), shift), s, image(observation, g, shift))
                back = g.inverse.act(shifted(moved, (-shift[0], -shift[1])))
                total, squares, count = total + back, squares + back.detach().square().sum(), count + 1
            found = total / count
            size = found.detach().square().sum()
            # Tensors: a number would have each evaluation wait for the device.
            self.differences = [self.differences[0] + squares / count - size, self.differences[1] + size]
            return found

        return mean

    def summary(self) -> str | None:
        """Returns how far the images were apart."""
        apart, size = map(float, self.differences)
        count = len(self.elements) * self.shifts**2
        return f"guidance=symmetry: {count} images, {(max(apart, 0.0) / size) ** 0.5:.2%} apart" if size else None


def shifted(fields: Tensor, shift: tuple[int, int]) -> Tensor:
    """Returns fields with their cells moved along y and x, those at the ends to the other side."""
    return fields.roll(shift, (-2, -1)) if any(shift) else fields


def image(observation: Observation, g: Symmetry, shift: tuple[int, int] = (0, 0)) -> Observation:
    """Returns an observation with its cells moved and its vectors turned.

    Raises:
        UserError: One with a context, of which it is not known what turns.
    """
    if observation.context is not None:
        raise UserError(
            "guidance=symmetry does not know how a context turns: it takes a network without dataset.context"
        )

    def scalars(values: Tensor) -> Tensor:
        moved = shifted(g.move(values), shift)
        return moved.flip(-3) if g.transpose and values.shape[-3] == 2 else moved

    def errors(values: Tensor) -> Tensor:
        if values.shape[-3] < 3:
            return scalars(values)
        *variances, covariance = blocks(shifted(g.move(values), shift)).split(1, dim=-3)
        variances = variances[::-1] if g.transpose else variances
        return root(*variances, -covariance if g.flip_x != g.flip_y else covariance)

    def vectors(values: Tensor) -> Tensor:
        return shifted(g.act(values), shift)

    return replace(
        observation,
        y=vectors(observation.y),
        observed=scalars(observation.observed),
        sigma_y=errors(observation.sigma_y),
        valid=scalars(observation.valid),
        background=None if observation.background is None else vectors(observation.background),
        single=None if observation.single is None else scalars(observation.single),
    )
