"""Numbers rounded together with their interval, and rows as plain text."""

from __future__ import annotations

import math

import pytest

from vecfield_diffusion.evaluation.tables import rounded, rounded_pair, table


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.90110, 0.00100, "0.9011 ± 0.0010"),
        (0.90110, 0.000999, "0.9011 ± 0.0010"),
        (0.90110, 0.00949, "0.901 ± 0.009"),
        (0.9, 0.3, "0.9 ± 0.3"),
        (0.96, 0.0961, "0.96 ± 0.10"),
        (99.97, 0.1, "99.97 ± 0.10"),
        (12345.6, 2000.0, "12000 ± 2000"),
        (123456.0, 20000.0, "120000 ± 20000"),
        (1.2345e-6, 3e-8, "(1.23 ± 0.03)e-06"),
        (1.2345e7, 3e5, "(1.23 ± 0.03)e+07"),
        (-0.001, 0.03, "0.00 ± 0.03"),
        (-0.52, 0.03, "-0.52 ± 0.03"),
    ],
)
def test_value_and_interval_end_at_the_same_digit(value: float, half: float, text: str) -> None:
    assert rounded(value, value - half, value + half) == text


def test_without_an_interval_three_digits_stand() -> None:
    assert rounded(0.123456) == rounded(0.123456, 0.123456, 0.123456) == rounded(0.123456, 0.1, math.inf) == "0.123"
    assert rounded(0.123456, 0.123456 - 2e-17, 0.123456 + 2e-17) == "0.123"  # an interval of rounding alone
    assert (rounded(math.nan), rounded(math.inf, 1, 2), rounded(-math.inf)) == ("–", "∞", "-∞")


def test_the_pair_is_for_tables_with_two_places() -> None:
    assert rounded_pair(0.5, 0.4, 0.6) == ("0.50", "0.10") and rounded_pair(0.5) == ("0.5", "")
    assert rounded(0.5, 0.4, 0.6, sign="+-") == "0.50 +- 0.10"


def test_table() -> None:
    rows = [{"method": "linear", "rmse": 0.123456, "cases": 50}, {"method": "oi", "rmse": math.nan}]
    assert table(rows) == ("method    rmse  cases\n------  ------  -----\nlinear  0.1235     50\noi           -      -")
    assert table(rows, ["rmse"]).splitlines()[2] == "0.1235"
