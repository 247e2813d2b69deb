"""Stored numbers as values: packing and fill values by xarray, valid ranges, times of any calendar."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vecfield_diffusion.data.readers.reader import plain
from vecfield_diffusion.data.units import turned_degrees
from vecfield_diffusion.errors import UserError

PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")
NUMBERS = PACKING[:4]
#: Attributes that speak of how an array is stored, or of arrays that are not kept with it.
STORAGE = (
    *PACKING,
    "slope",
    "intercept",
    "Slope",
    "Intercept",
    "valid_min",
    "valid_max",
    "valid_range",
    "coordinates",
    "ancillary_variables",
    "cell_measures",
)
LABELS = ("units", "long_name", "standard_name", "axis", "calendar")


def decoded(dataset: xr.Dataset, names: Sequence[str], source: str) -> tuple[xr.Dataset, tuple[str, ...]]:
    """The data set with packed numbers and fill values decoded by xarray, still lazy, and what there is to say of it.

    Times stay as they are. Coordinates that count westward or southward count eastward and northward.

    Raises:
        UserError: Packing that is text, or that xarray does not understand.
    """
    encoding, closing, notes = dataset.encoding, dataset.close, ()
    dataset = dataset.copy()
    for name in sorted(dataset.variables, key=lambda name: name not in names):
        variable = dataset.variables[name]
        if variable.dtype.kind in "iu" and _packed_otherwise(variable, name, names, source) and name in names:
            notes += (f"'{name}' is packed by slope and intercept: taken as slope * number + intercept",)
        for key in NUMBERS if variable.dtype.kind in "fiu" else ():
            value = variable.attrs.get(key)
            if value is None or np.asarray(value).dtype.kind in "fiu":
                continue
            text = plain(value)
            try:
                if key in PACKING[:2]:
                    raise ValueError("packing in other numbers than the file says is not for us to guess")
                variable.attrs[key] = variable.dtype.type(float(text))
            except (ValueError, OverflowError) as error:
                if name in names or variable.ndim < 3:
                    raise UserError(
                        f"{source}: '{name}' has {key}='{text}', which is text. Expected a number: write it anew, e.g. "
                        f"`ncatted -a {key},{name},o,d,{text} FILE`."
                    ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = xr.decode_cf(dataset, decode_times=False, decode_timedelta=False)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}: the attributes of its variables cannot be understood: {error}") from error
    for name, variable in result.variables.items():
        units = turned_degrees(str(plain(variable.attrs.get("units", ""))))
        if units is not None and variable.dtype.kind in "fiu":
            result[name] = (variable.dims, -variable.values.astype(np.float64), {**variable.attrs, "units": units})
    result.encoding = dict(encoding)
    result.set_close(closing)
    return result, notes


def _packed_otherwise(variable: xr.Variable, name: str, names: Sequence[str], source: str) -> bool:
    """Whether integers are packed by slope and intercept, as old satellite files are: these get the names of CF.

    Raises:
        UserError: One of `names` has a `scale`, which no convention says how to apply.
    """
    own = {str(key).lower(): key for key in variable.attrs}
    if "scale_factor" in variable.attrs:
        return False
    if "slope" in own:
        variable.attrs["scale_factor"] = plain(variable.attrs[own["slope"]])
        variable.attrs["add_offset"] = plain(variable.attrs.get(own.get("intercept"), 0.0))
        return True
    scale = variable.attrs.get(own.get("scale"), 1.0)
    if np.asarray(scale).dtype.kind in "fiu" and np.any(np.asarray(scale) != 1) and name in names:
        raise UserError(
            f"{source}: '{name}' holds integers with the attribute {own['scale']}={plain(scale)}, which nothing says "
            "how to apply. If value = number * scale: rename it, `ncrename -a .scale,scale_factor FILE`."
        )
    return False


def limits_of(variable: xr.Variable) -> tuple[float, float]:
    """The least and the largest valid value, after decoding; infinite where the file gives none."""
    attrs, stored = variable.attrs, {**variable.encoding, **variable.attrs}
    pair = [np.ravel(attrs.get(name, none))[0] for name, none in (("valid_min", -np.inf), ("valid_max", np.inf))]
    pair = np.ravel(attrs["valid_range"]) if "valid_range" in attrs else pair
    if np.asarray(pair).dtype.kind not in "fiu" or len(pair) != 2:
        return -np.inf, np.inf
    neutral = {"scale_factor": 1.0, "add_offset": 0.0}
    scale, offset = (float(np.ravel(stored.get(name, none))[0]) for name, none in neutral.items())
    kind = np.dtype(stored.get("dtype") or variable.dtype)
    unsigned = str(plain(stored.get("_Unsigned", ""))).lower()
    limits = []
    for limit in pair:
        # The conventions give the limits in packed units if they are of the packed type, and of its sign.
        packed = np.asarray(limit).dtype.kind in "iu" and kind.kind in "iu"
        if packed and unsigned in ("true", "false"):
            sign = "u" if unsigned == "true" else "i"
            limit = np.asarray(limit).astype(kind).view(f"{sign}{kind.itemsize}")
        limits.append(float(limit) * scale + offset if packed else float(limit))
    slack = 1e-6 * max((abs(limit) for limit in limits if np.isfinite(limit)), default=0.0)
    return min(limits) - slack, max(limits) + slack


def described(variable: xr.Variable) -> dict[str, Any]:
    """The attributes that describe its values rather than how they are stored."""
    attrs = {**variable.attrs, **{key: variable.encoding[key] for key in ("grid_mapping",) if key in variable.encoding}}
    return {str(name): plain(value) for name, value in attrs.items() if name not in STORAGE and str(name)[:1] != "_"}


def labels(variable: xr.Variable) -> dict[str, str]:
    return {key: str(value) for key, value in described(variable).items() if key in LABELS}


def times_of(variable: xr.Variable) -> tuple[np.ndarray, dict[str, str]]:
    """Times as `datetime64` where they are dates of the calendar, and the attributes that belong to them.

    Dates that the calendar does not have, as 30 February of a year of 360 days, become days since 1970 of their own
    calendar, so that those of several files are in order.
    """
    attrs = labels(variable)
    attrs |= {key: str(plain(variable.encoding[key])) for key in ("units", "calendar") if key in variable.encoding}
    values = np.asarray(variable.values)
    if values.dtype.kind in "SU" or (values.dtype.kind == "O" and isinstance(np.ravel(values)[0], str | bytes)):
        return dates_of(pd.Series([plain(item) for item in np.ravel(values)]).str.replace("_", "T")), {}
    units = attrs.get("units", "")
    if values.dtype.kind in "fiu" and units.startswith("day as %Y%m%d"):
        days = pd.to_datetime(pd.Series(np.ravel(values)).astype("int64").astype(str), format="%Y%m%d")
        rest = pd.to_timedelta(np.ravel(values) % 1, unit="D")
        return (days + rest).to_numpy().astype("datetime64[ns]"), {}
    if values.dtype.kind in "fiu" and (dates := _of_months(values, units)) is not None:
        return dates, {}
    if values.dtype.kind in "fiu" and " since " in units:
        raw = xr.Variable(variable.dims, values, {key: attrs[key] for key in ("units", "calendar") if key in attrs})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = xr.decode_cf(xr.Dataset({"time": raw}), decode_timedelta=False)["time"].values
        except (ValueError, ImportError, OverflowError):
            return values, attrs
    if values.dtype.kind == "O":
        return _of_calendar(values, attrs)
    return values, attrs


def dates_of(texts: pd.Series) -> np.ndarray:
    """Dates of ISO 8601 as `datetime64[ns]`, UTC unless they say otherwise; NaT for what is none."""
    dates = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    return dates.dt.tz_localize(None).to_numpy().astype("datetime64[ns]")


def _of_months(numbers: np.ndarray, units: str) -> np.ndarray | None:
    """Dates that are months or years after one: whole months by the calendar, parts of one of 365.2425 / 12 days.

    None where the units are others, or a date lies outside the years that fit.
    """
    long = re.match(r"(?i)\s*(month|year)s?\s+since\s+(\S.*)", units)
    if long is None:
        return None
    numbers = numbers * (12 if long[1].lower() == "year" else 1)
    try:
        start = pd.Timestamp(long[2]).tz_localize(None)
        whole = np.floor(np.ravel(numbers))
        dates = [start + pd.DateOffset(months=int(month)) for month in whole]
        rest = pd.to_timedelta((np.ravel(numbers) - whole) * (365.2425 / 12), unit="D")
        return (pd.DatetimeIndex(dates) + rest).to_numpy().astype("datetime64[ns]")
    except (ValueError, OverflowError):
        return None


def _of_calendar(values: np.ndarray, attrs: dict[str, str]) -> tuple[np.ndarray, dict[str, str]]:
    flat = np.ravel(values)
    calendar = str(attrs.get("calendar", flat[0].calendar))
    try:
        if calendar in ("360_day", "366_day", "all_leap"):
            raise ValueError("a calendar with days that others do not have")
        dates = np.array([np.datetime64(date.isoformat()) for date in flat], dtype="datetime64[ns]")
        return dates.reshape(values.shape), {key: value for key, value in attrs.items() if key != "calendar"}
    except (ValueError, AttributeError, OverflowError):
        units = "days since 1970-01-01"
        numbers = xr.coding.times.encode_cf_datetime(values, units, calendar, dtype=np.dtype(np.float64))[0]
        return np.asarray(numbers, dtype=np.float64), attrs | {"units": units, "calendar": calendar}
