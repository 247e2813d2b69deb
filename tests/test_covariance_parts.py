"""The variance of optimal interpolation is worked out a part of the domain at a time."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from vecfield_diffusion.evaluation import covariance
from vecfield_diffusion.evaluation.covariance import Homogeneous, _parts


def homogeneous(size: int) -> tuple[Homogeneous, np.ndarray]:
    fields = np.random.default_rng(0).standard_normal((20, 2, size, size))
    wave = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size) * size] * 2))
    fields = np.fft.ifft2(np.fft.fft2(fields) * np.exp(-wave / 3)).real
    valid = np.ones((size, size), dtype=bool)
    return Homogeneous.of(fields, np.zeros(fields.shape[1:]), valid, (True, True), 1e-6), fields[0]


def test_the_parts_are_all_cells_once() -> None:
    cells = np.random.default_rng(0).random((5, 7)) < 0.6
    parts = list(_parts(cells, 4))
    assert (np.sum(parts, axis=0) == cells).all() and [part.sum() for part in parts[:-1]] == [4] * (len(parts) - 1)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_parts_change_no_bit_that_counts(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    law, field = homogeneous(8)
    observed = np.random.default_rng(1).random((8, 8)) < share
    given = np.where(observed, field, 0.0), observed, 1e-3
    _, whole = law.condition(*given, with_variance=True)
    monkeypatch.setattr(covariance, "_parts", lambda cells: _parts(cells, 3))
    _, parts = law.condition(*given, with_variance=True)
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-15)


def test_the_variance_of_a_field_takes_little_more_memory_than_its_system() -> None:
    """About 3300 x 3300 numbers are 87 MB; a matrix for all of the domain took 700 MB beside them."""
    law, field = homogeneous(64)
    observed = np.random.default_rng(1).random((64, 64)) < 0.6
    tracemalloc.start()
    law.condition(np.where(observed, field, 0.0), observed, 1e-3, with_variance=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 350e6, peak
