"""Units as files spell them. cf-xarray's registry (pint) knows those of CF; worse ones are put right first."""

from __future__ import annotations

import re
from functools import cache

from cf_xarray.units import units as registry

SPEED, LENGTH, DEGREE = "m s-1", "m", "degree"
#: Spellings that a registry would take for something else, or not at all: `ms-1` is not per millisecond.
SPELLINGS = (
    (r"\^?\{\s*(-?\d+)\s*\}", r"\1"),
    (r"\bms\s*(\*\*|\^)?\s*-1\b", "m s-1"),
    (r"(?i)\bmet(er|re)s?\s*(per\s*sec(ond)?s?\b|sec(ond)?-1)", "m s-1"),
    (r"(?i)\bkm\b", "km"),
    (r"\b(degrees?|deg)[ _]?(E|east|true)\b", "degrees_east"),
    (r"\b(degrees?|deg)[ _]?(N|north)\b", "degrees_north"),
)


@cache
def factor(units: str, target: str) -> float | None:
    """The number that turns values in `units` into `target`; None where they are no such quantity, or unknown."""
    for wrong, right in SPELLINGS:
        units = re.sub(wrong, right, units.strip())
    try:
        unit, wanted = registry.Unit(units), registry.Unit(target)
        if unit.dimensionality != wanted.dimensionality or (unit.dimensionless and str(unit) == "dimensionless"):
            return None
        if "pixel" in str(unit):  # of style sheets, which count 96 to the inch; those of cameras have no length
            return None
        return float(registry.Quantity(1.0, unit).to(wanted).magnitude)
    except Exception:  # noqa: BLE001  (the parser raises whatever Python does on the text that a file holds)
        return None


def is_degrees(units: str) -> bool:
    """Whether units count degrees on the globe."""
    return re.match(r"deg|°", units.strip().lower()) is not None


def says_nothing(units: str) -> bool:
    """Whether the text names no unit: none, a pure number, or a spelling that is no unit at all."""
    if units.strip().lower() in ("", "1", "-", "none", "unknown", "n/a", "nondim", "dimensionless"):
        return True
    try:
        return bool(registry.Unit(units).dimensionless)
    except Exception:  # noqa: BLE001
        return True


def same_units(first: str, second: str) -> bool:
    """Whether two spellings mean the same units of velocity."""
    one, other = factor(first, SPEED), factor(second, SPEED)
    plain = [re.sub(r"\s+", " ", units.strip().lower()) for units in (first, second)]
    return plain[0] == plain[1] or (one is not None and one == other)
