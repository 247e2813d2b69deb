"""Symmetries of the plane that turn one velocity field into another as likely one.

A transform moves the cells and turns the components with the axes:

    flip_x      (u, v)(x, y) -> (-u,  v)(-x,  y)
    flip_y      (u, v)(x, y) -> ( u, -v)( x, -y)
    transpose   (u, v)(x, y) -> ( v,  u)( y,  x)
    roll        (u, v)(x, y) -> ( u,  v)(x - a, y - b)      along periodic axes

Each commutes with the divergence; the curl changes its sign under a flip and a transpose. They are symmetries of the
data only where nothing singles out a place or a direction: both axes periodic, all cells valid, no mean flow. That is
what `auto` asks for.

The random choice (`draw`) and what follows from it (`apply`) are apart. `apply` gathers all cells once: the value of
cell (i, j) comes from row r(i) and column c(j), or from (c(j), r(i)) in a transposed sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vecfield_diffusion.errors import UserError, nearest
from vecfield_diffusion.physics.grid import Grid

TRANSFORMS = ("flip_x", "flip_y", "transpose", "roll")


@dataclass(frozen=True)
class Parameters:
    """What is done to n samples: transpose first, then flip, then roll.

    Arguments:
        transpose: Boolean `(n,)`.
        flip_x: Boolean `(n,)`.
        flip_y: Boolean `(n,)`.
        roll_x: Cells to the right, integer `(n,)`.
        roll_y: Cells up, integer `(n,)`.
    """

    transpose: Tensor
    flip_x: Tensor
    flip_y: Tensor
    roll_x: Tensor
    roll_y: Tensor


class Augmentation:
    """Random flips, transposes and rolls, those that the domain allows.

    Arguments:
        transforms: `auto`, `none`, or some of `flip_x`, `flip_y`, `transpose`, `roll`.

    Raises:
        ValueError: A transform of another name.
    """

    def __init__(
        self,
        transforms: Literal["auto", "none"] | list[Literal["flip_x", "flip_y", "transpose", "roll"]] = "auto",
    ) -> None:
        if isinstance(transforms, str) and transforms not in ("auto", "none"):
            transforms = [transforms]
        for name in [] if isinstance(transforms, str) else transforms:
            if name not in TRANSFORMS:
                options = ", ".join(("auto", "none", *TRANSFORMS))
                raise ValueError(f"transforms must be of {options}, got {name!r}.{nearest(name, TRANSFORMS)}")
        self.transforms = transforms

    def resolve(self, grid: Grid, mean_is_zero: bool) -> Transforms:
        """The transforms for a domain.

        Arguments:
            grid: The domain.
            mean_is_zero: Whether the mean field of the data is zero, so that no direction is singled out.

        Raises:
            UserError: A transform that was asked for is impossible on this domain.
        """
        if self.transforms == "none":
            names: tuple[str, ...] = ()
        elif self.transforms == "auto":
            symmetric = all(grid.periodic) and bool(grid.valid.all()) and mean_is_zero
            names = tuple(name for name in TRANSFORMS if symmetric and obstacle(name, grid) is None)
        else:
            names = tuple(self.transforms)
            for name in names:
                reason = obstacle(name, grid)
                if reason is not None:
                    raise UserError(f"the augmentation '{name}' needs {reason}. Leave it out, or use 'auto' or 'none'.")
        return Transforms(names, grid.shape, grid.periodic)


@dataclass(frozen=True)
class Transforms:
    """Random transforms of fields on one domain.

    Arguments:
        names: Those that are drawn, of `TRANSFORMS`.
        shape: The `(H, W)` of the domain.
        periodic: Whether y and x close on themselves.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    periodic: tuple[bool, bool]

    def draw(self, n: int, generator: torch.Generator) -> Parameters:
        """Random parameters for n samples."""

        def coin(name: str) -> Tensor:
            heads = torch.rand(n, generator=generator, device=generator.device) < 0.5
            return heads & (name in self.names)

        def shift(axis: int) -> Tensor:
            size = self.shape[axis] if "roll" in self.names and self.periodic[axis] else 1
            return torch.randint(size, (n,), generator=generator, device=generator.device)

        return Parameters(coin("transpose"), coin("flip_x"), coin("flip_y"), roll_x=shift(1), roll_y=shift(0))

    def apply(self, field: Tensor, parameters: Parameters) -> Tensor:
        """The transformed field; see the function `apply`."""
        return apply(field, parameters)


def obstacle(name: str, grid: Grid) -> str | None:
    """What a transform would need that the domain lacks, or None."""
    even = all(bool((spacing == spacing[0]).all()) for spacing in (grid.dx, grid.dy))
    if not grid.valid.all():
        return "a domain without land or solids"
    if name == "transpose" and not (grid.shape[0] == grid.shape[1] and even and grid.dx[0] == grid.dy[0]):
        return "as many rows as columns and equal spacing"
    if name == "transpose" and grid.boundary_x != grid.boundary_y:
        return "the same boundary along x and y"
    if name == "roll" and not any(grid.periodic):
        return "a periodic axis"
    if name in ("flip_y", "roll") and not even:
        return "the same spacing in every row"
    return None


def apply(field: Tensor, parameters: Parameters) -> Tensor:
    """Transforms every sample.

    Arguments:
        field: `(n, 2, H, W)`, or `(n, T, 2, H, W)` where all frames of a sample are moved alike; with another number
            of channels the cells move and the values stay, as masks do.
        parameters: For n samples.

    Returns:
        A new tensor of the same shape.
    """
    (channels, height, width), n, device = field.shape[-3:], len(field), field.device
    frames = (1,) * (field.ndim - 4)
    transpose, flip_x, flip_y = (
        getattr(parameters, name).to(device).view(n, 1, 1) for name in ("transpose", "flip_x", "flip_y")
    )
    rows = (torch.arange(height, device=device).view(1, -1, 1) - parameters.roll_y.to(device).view(n, 1, 1)) % height
    columns = (torch.arange(width, device=device) - parameters.roll_x.to(device).view(n, 1, 1)) % width
    rows = torch.where(flip_y, height - 1 - rows, rows)
    columns = torch.where(flip_x, width - 1 - columns, columns)
    cells = torch.where(transpose, columns * width + rows, rows * width + columns)
    places = cells.view(n, *frames, 1, -1).expand(*field.shape[:-2], -1)
    moved = field.flatten(-2).gather(-1, places).view(field.shape)
    if channels != 2:
        return moved
    signs = 1.0 - 2.0 * torch.stack([flip_x, flip_y], dim=1).to(field.dtype).view(n, *frames, 2, 1, 1)
    return torch.where(transpose.view(n, *frames, 1, 1, 1), moved.flip(-3), moved) * signs
