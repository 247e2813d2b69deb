"""Quality flags: which of the values that a file holds count as measured.

A variable names its flags in `ancillary_variables` (CF section 3.4), and `flag_meanings` says what their `flag_values`
mean (section 3.5): pass, not_evaluated, suspect, fail and missing_data in QARTOD, good_data or good_value, bad_data and
no_qc_performed of Copernicus, EMODnet and SeaDataNet. A value is bad if any of its flags says so, else good if any says
that, else unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from vecfield_diffusion.data.readers.layout import Layout
from vecfield_diffusion.data.readers.reader import plain
from vecfield_diffusion.data.words import option
from vecfield_diffusion.errors import UserError

Quality = Literal["all", "good_or_unknown", "good"]
QUALITIES = get_args(Quality)

#: What a value of a flag may say, in words of conventions; what no pattern knows says nothing.
GOOD = re.compile(r"pass|(probably_)?good(_data|_value)?|correct(_value)?|changed_value|value_changed", re.IGNORECASE)
BAD = re.compile(
    r".*(fail|suspect|bad|erroneous|questionable|missing|below_detection|in_excess|spike|outlier).*", re.IGNORECASE
)
UNKNOWN_CODE, GOOD_CODE, BAD_CODE = 0, 1, 2


@dataclass
class Checked:
    """What flags say of the components.

    Arguments:
        quality: Which values count.
        counts: How many values are unknown, good and bad.
        names: The flags that were found.
    """

    quality: Quality
    counts: NDArray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    names: dict[str, None] = field(default_factory=dict)

    def masks(self, dataset: xr.Dataset, layout: Layout) -> list[tuple[xr.Variable, bool]]:
        """Returns where the values of a component count, as a mask with the value of those that do; none for all.

        Arguments:
            dataset: The data set.
            layout: How the component lies in it.

        Raises:
            UserError: Values are to be left out by flags, and the component has none.
        """
        flags = {
            name: item
            for name in flag_names(dataset, layout.name)
            if (item := layout.view(dataset[name].variable)) is not None
        }
        self.names |= dict.fromkeys(flags)
        if self.quality == "all":
            return []
        if not flags:
            raise UserError(
                f"{option('quality', self.quality)}: {layout.name} names no flags in ancillary_variables that say what "
                "their values mean (flag_values, flag_meanings). Leave it out"
            )
        status = said_by(list(flags.values()))
        value = layout.view(dataset.variables[layout.name])
        known = np.isfinite(np.asarray(value.transpose(*status.dims).values, dtype=float))
        self.counts += np.bincount(status.values[known], minlength=3)
        kept = status.values == GOOD_CODE
        if self.quality == "good_or_unknown":
            kept |= status.values == UNKNOWN_CODE
        return [(xr.Variable(status.dims, kept.astype(np.int8)), True)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the flags."""
        names = ", ".join(self.names)
        if self.quality != "all":
            unknown, good, bad = self.counts.tolist()
            left = bad if self.quality == "good_or_unknown" else bad + unknown
            return (
                f"flags ({names}) call {good} values of both components good, {unknown} unknown, {bad} bad: "
                f"{left} are left out",
            )
        return (
            (f"the quality flags {names} are not applied: {option('quality', 'good')} keeps what is good",)
            if names
            else ()
        )


def flag_names(dataset: xr.Dataset, name: str) -> list[str]:
    """Returns the flags of a variable: those that it names some of whose values mean good or bad."""
    variable = dataset.variables[name]
    named = str(plain(variable.attrs.get("ancillary_variables", ""))).replace(",", " ").split()
    return [other for other in named if other in dataset.variables and any(meanings(dataset[other].attrs).values())]


def meanings(attrs: Mapping[str, Any]) -> dict[float, int]:
    """Returns what each value of a flag says: good, bad or nothing; empty of what is no such flag."""
    words = str(plain(attrs.get("flag_meanings", ""))).replace(",", " ").split()
    values = plain(attrs.get("flag_values", ()))
    if isinstance(values, str):
        values = [text.strip(" bB") for text in values.split(",")]
    try:
        numbers = [float(value) for value in np.atleast_1d(values)]
    except ValueError:
        return {}
    if not words or len(words) != len(numbers):
        return {}
    return dict(zip(numbers, map(_code, words), strict=True))


def _code(word: str) -> int:
    return GOOD_CODE if GOOD.fullmatch(word) else BAD_CODE if BAD.fullmatch(word) else UNKNOWN_CODE


def said_by(flags: Sequence[xr.Variable]) -> xr.Variable:
    """Returns the code of what several flags say together, on the dimensions of all of them."""
    together = None
    for flag in flags:
        raw = np.asarray(flag.values)
        codes = np.full(raw.shape, UNKNOWN_CODE, dtype=np.int8)
        for number, code in meanings(flag.attrs).items():
            codes[raw == number] = code
        own = xr.Variable(flag.dims, codes)
        together = own if together is None else xr.apply_ufunc(np.maximum, together, own)
    return together
