"""Units as files spell them. cf-xarray's registry (pint) knows those of CF; worse ones are put right first."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

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
    (r"\b10\s*(?:(?:\*\*|\^)\s*([-+]?\d+)|([-+]\d+))\b", r"1e\1\2"),
)
#: Numbers to the power of numbers, which the parser would work out however long that takes.
TOWER = re.compile(r"\d\)?\s*(\*\*|\^)\s*\(?[-+]?\d")


@cache
def factor(units: str, target: str) -> float | None:
    """The number that turns values in `units` into `target`; None where they are no such quantity, or unknown."""
    found, wanted = _parsed(units), registry.Unit(target)
    if found is None or found.dimensionality != wanted.dimensionality or str(found.units) == "dimensionless":
        return None
    if "pixel" in str(found.units):  # of style sheets, which count 96 to the inch; those of cameras have no length
        return None
    number = float(found.to(wanted).magnitude)
    return number if 0 < number < math.inf else None


@cache
def _parsed(units: str) -> Any | None:  # noqa: ANN401
    """The quantity that is 1 in these units, such as 0.01 m/s; None where they are no units."""
    for wrong, right in SPELLINGS:
        units = re.sub(wrong, right, units.strip())
    try:
        return None if TOWER.search(units) else registry.Quantity(units)
    except Exception:  # noqa: BLE001  (the parser raises whatever Python does on the text that a file holds)
        return None


def is_degrees(units: str) -> bool:
    """Whether units count degrees on the globe."""
    return re.match(r"deg|°", units.strip().lower()) is not None


def turned_degrees(units: str) -> str | None:
    """The units that count the other way where these count westward or southward, as `degrees_west` does."""
    found = re.fullmatch(r"[Dd]eg(?:rees?)?[ _]?(?:([Ww]est|W)|[Ss]outh|S)", units.strip())
    return None if found is None else "degrees_east" if found[1] else "degrees_north"


def says_nothing(units: str) -> bool:
    """Whether the text names no unit: none, a pure number, or a spelling that is no unit at all."""
    if units.strip().lower() in ("", "1", "-", "none", "unknown", "n/a", "nondim", "dimensionless"):
        return True
    found = _parsed(units)
    return found is None or bool(found.dimensionless and found.magnitude == 1)


def has_factor(units: str) -> bool:
    """Whether units that are not understood begin with a number other than 1, such as `0.1 kn/tick`."""
    number = re.match(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", units.strip(), re.IGNORECASE)
    return _parsed(units) is None and number is not None and float(number[0]) != 1


def same_units(first: str, second: str) -> bool:
    """Whether two spellings mean the same units of velocity."""
    one, other = factor(first, SPEED), factor(second, SPEED)
    plain = [re.sub(r"\s+", " ", units.strip().lower()) for units in (first, second)]
    return plain[0] == plain[1] or (one is not None and one == other)
