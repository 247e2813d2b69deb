"""Numbers as people read them: a value and its interval rounded together, and rows as aligned plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

#: An interval below this share of its value is rounding: a single block leaves nothing to chance.
ROUNDING = 1e-9


def rounded(value: float, low: float = math.nan, high: float = math.nan, sign: str = "±") -> str:
    """Returns a value with half its interval, both to the digit that the interval leaves certain: `0.901 ± 0.004`.

    Half the interval keeps one significant digit, two where the first is 1, and the value ends at the same decimal. Of
    large and of tiny numbers the power of ten stands once: `(1.23 ± 0.04)e-06`. A value without an interval has three
    significant digits.

    Arguments:
        value: The value; not a number gives a dash.
        low: The lower end of its interval; not finite where there is none.
        high: The upper end.
        sign: What stands between the two.
    """
    number, half = rounded_pair(value, low, high)
    if not half:
        return number
    mantissa, _, power = number.partition("e")
    return f"({mantissa} {sign} {half.partition('e')[0]})e{power}" if power else f"{number} {sign} {half}"


def rounded_pair(value: float, low: float = math.nan, high: float = math.nan) -> tuple[str, str]:
    """Returns the two numbers of `rounded` as texts, with one power of ten; the second is empty where there is none."""
    if not math.isfinite(value):
        return ("–" if math.isnan(value) else "∞" if value > 0 else "-∞"), ""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > ROUNDING * abs(value)):
        return f"{value:.3g}", ""
    largest = max(abs(value), half)
    power = math.floor(math.log10(largest))
    power = power if not -4 < power < 6 else 0
    half, value = half / 10.0**power, value / 10.0**power
    decimals = _decimals(half)
    texts = [f"{round(number, decimals) + 0.0:.{max(decimals, 0)}f}" for number in (value, half)]
    return tuple(f"{text}e{power:+03d}" if power else text for text in texts)


def _decimals(half: float) -> int:
    """How many decimals leave one significant digit of `half`, or two where this one is 1."""
    digit, _, power = f"{half:.0e}".partition("e")
    return (digit == "1") - int(power)


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Returns rows as aligned plain text: numbers with four significant digits to the right, words to the left.

    Arguments:
        rows: Values by column; `-` where there is none.
        columns: Which columns, in this order; those of the first row if not given.
    """
    columns = list(rows[0]) if columns is None and rows else list(columns or ())
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(_pad(*part) for part in zip(line, widths, words, strict=True)).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pad(text: str, width: int, word: bool) -> str:
    return text.ljust(width) if word else text.rjust(width)
