"""The Gaussian field that a network with `model=gaussian` starts from, learnt from the training snapshots."""

from __future__ import annotations

import numpy as np
import torch

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.statistics import homogeneous
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.evaluation.covariance import Homogeneous
from vecfield_diffusion.models.gaussian import Eigenfields, Modes, Waves

#: Snapshots that a covariance is learnt from, at most.
SNAPSHOTS = 2000


def gaussian_field(fields: Fields, indices: range, normalizer: Normalizer, window: tuple[int, int] | None) -> Modes:
    """Returns the Gaussian field with the homogeneous covariance of the training snapshots, at most 2000 of them.

    It has few enough numbers to be as good on unseen fields. That of principal components fits the fields that it was
    learnt from so much better than others that a network trained beside it goes wrong on these.
    """
    read = normalizer.normalize(fields.read(indices[:: -(-len(indices) // SNAPSHOTS)])).numpy()
    print(f"covariance of {len(read)} training snapshots")
    zero, valid = np.zeros(read.shape[1:]), fields.grid.valid.numpy()
    covariance = Homogeneous.of(read, zero, valid, fields.grid.periodic, nugget=0.0)
    if window is None and homogeneous(fields) and np.isfinite(read).all():  # waves have no gaps
        return Waves(torch.from_numpy(covariance.spectrum))
    shape = window or fields.shape
    count = min(Eigenfields.MODES, 2 * shape[0] * shape[1] - 1)
    vectors, variances, nugget = covariance.leading(count, shape)
    return Eigenfields(torch.from_numpy(vectors).float(), torch.from_numpy(variances).float(), nugget)
