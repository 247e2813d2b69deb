"""What balances take of a file: depth, heights, latitudes, and tolerances from what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Integers
from vecfield_diffusion.data.units import LENGTH, SPEED, factor, says_nothing
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.balances import Balances, Surroundings
from vecfield_diffusion.guidance.physics import NoPhysics
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.programs.source import read_variable

#: Snapshots that tolerances are found from, at most.
SEEN = 32


def placed_balances(physics: NoPhysics, fields: Fields, seen: range | None) -> NoPhysics:
    """Returns physics with what a file says of its balances; tolerances are those of the snapshots `seen`, or of all.

    Raises:
        UserError: Variables that there are not, and see `Balances.placed`.
    """
    if not isinstance(physics, Balances):
        return physics
    offered = np.asarray(range(len(fields)) if seen is None else seen)
    numbers = offered[np.linspace(0, len(offered) - 1, min(SEEN, len(offered))).astype(int)]
    latitude = torch.from_numpy(fields.y.astype(np.float64))[:, None] if fields.x_name == "lon" else None
    around = Surroundings(
        fields.grid.to("cpu"),
        latitude,
        factor(fields.units, SPEED),
        lambda: fields.read(numbers, partial=True),
        lambda name: in_metres(fields, name, numbers),
        None if fields.land is None else torch.as_tensor(fields.land),
    )
    if fields.land is None and any(term.name == "coast" for term in physics.terms) and not fields.grid.valid.all():
        print(
            "note: physics.coast: all that lies outside the domain counts as land. Where it is sea that was never "
            "measured, give domain=mask.npy, 1 = sea"
        )
    return physics.placed(around)


def with_balances(cases: Cases, method: Method, fields: Fields) -> Cases:
    """Returns cases with what is known of each beside its observation, where that differs from one to the other."""
    physics = method.physics
    if not isinstance(physics, Balances) or not physics.varies:
        return cases
    numbers = np.asarray(cases.numbers)
    return replace(cases, physics=physics.recorded(lambda name: in_metres(fields, name, numbers), cases.grid))


def in_metres(fields: Fields, name: str, numbers: Sequence[int] | Integers) -> Tensor:
    """Returns a variable of the file in metres, `(N, 1, H, W)`, of sequences `(N, T, 1, H, W)`. Raises UserError."""
    units = fields.units_of(name)
    scale = 1.0 if not units else factor(units, LENGTH)
    if scale is None or (units and says_nothing(units)):
        raise UserError(f"physics: '{name}' in {fields.source} has units '{units}'. Expected a length, such as m")
    return scale * read_variable(fields, name, numbers).narrow(-3, 0, 1)
