"""What is known of the law that generated fields obey, beside the fields themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Law:
    """What is known of generated fields.

    Arguments:
        spectrum: Gives P(k) of homogeneous Gaussian fields, `(2, 2, H, W)` complex: the covariance of their Fourier
            transform of unit norm, in the units of the data squared. None for others.
        viscosity: nu of a flow that decays by `-nu (-lap)^n u`, in m^(2 n) s-1; None for fields that obey no equation.
        order: The power n.
    """

    spectrum: Callable[[], Tensor] | None = None
    viscosity: float | None = None
    order: int = 1
