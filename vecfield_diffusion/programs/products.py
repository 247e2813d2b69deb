"""Which products `infer.py` writes beside mean, spread and members, as `products=`, `quantiles=` and `exceed=` say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vecfield_diffusion.data.units import SPEED, factor
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.scores import rate
from vecfield_diffusion.inference.products import (
    Derivative,
    Direction,
    Exceedance,
    KineticEnergy,
    Quantiles,
    quantity_of,
)
from vecfield_diffusion.inference.template import Product, Template
from vecfield_diffusion.physics.grid import Grid

_VALUE = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*")


def chosen_products(config: Mapping[str, Any], template: Template, grid: Grid, units: str) -> list[Product]:
    """Returns the products that a configuration asks for.

    Arguments:
        config: That of `infer.py`.
        template: What the output takes from the input.
        grid: The grid.
        units: Of the velocities that the network works with.

    Raises:
        UserError: Levels, thresholds or quantities that are none.
    """
    make: dict[str, Callable[[], Product]] = {
        "quantiles": lambda: Quantiles(_levels(config["quantiles"])),
        "exceedance": lambda: Exceedance(thresholds(config["exceed"], template)),
        "direction": Direction,
        "energy": KineticEnergy,
        "vorticity": lambda: Derivative("vorticity", grid, rate(units)),
        "strain": lambda: Derivative("strain", grid, rate(units)),
    }
    wanted = dict.fromkeys([*config["products"], *(["exceedance"] if config["exceed"] else [])])
    return [make[name]() for name in wanted]


def _levels(levels: Sequence[float]) -> list[float]:
    if not levels or not all(0 < level < 1 for level in levels):
        raise UserError(f"quantiles={levels}: expected probabilities between 0 and 1, such as [0.05,0.5,0.95]")
    return sorted(set(levels))


def thresholds(given: Mapping[str, Any] | None, template: Template) -> dict[str, list[float]]:
    """Returns the thresholds of `exceed=` by quantity, in the units of the output.

    Raises:
        UserError: There are none, a quantity that is none, or a value that is no speed.
    """
    example = "such as 'exceed={speed:[0.5,1],towards_45:1 knot}'"
    if not given:
        raise UserError(f"products=[exceedance] needs thresholds: add exceed=, {example}")
    found = {}
    for what, values in given.items():
        try:
            quantity_of(what, template.names)
        except ValueError:
            names = ", ".join(template.names)
            raise UserError(f"exceed: {what} is none of speed, {names} and towards_<degrees>, {example}") from None
        values = values if isinstance(values, list) else [values]
        found[what] = sorted({_threshold(what, value, template.component_units) for value in values})
        if not found[what]:
            raise UserError(f"exceed: {what} has no threshold. Give some, {example}")
    return found


def _threshold(what: str, value: float | str, units: str) -> float:
    """A threshold in `units`; text has units of its own."""
    if isinstance(value, int | float):
        return float(value)
    number = _VALUE.fullmatch(value)
    own = units if number is None or not number[2] else number[2]
    ratio = 1.0 if own == units else factor(own, SPEED)
    whole = 1.0 if own == units else factor(units, SPEED)
    if number is None or ratio is None or whole is None:
        raise UserError(
            f"exceed: {what} > {value}: expected a number in {units}, or one with units of speed, such as 50 cm/s"
        )
    return float(number[1]) * ratio / whole
