"""Masks that go through time along whole runs of a series, drawn once however often parts of a run are looked at."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfield_diffusion.data.draws import MaskFunction, draw_sequence, seeded
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.sequences import Integers, Runs

#: Runs whose masks are kept, a bit a cell: a series is worked through run by run.
KEPT = 4


def masks_of_runs(fields: Fields, sequences: Integers, mask: MaskFunction, valid: Tensor, *, seed: int) -> Tensor:
    """Returns what a mask that goes through time along each run observes of sequences, boolean `(N, T, 1, H, W)`.

    Arguments:
        fields: The data.
        sequences: The snapshots of each, `(N, T)`, -1 where a frame is missing.
        mask: What is observed.
        valid: The domain `(H, W)`.
        seed: With the run it makes the masks of all frames of the run.
    """
    observed, runs = torch.zeros(*sequences.shape, 1, *valid.shape, dtype=torch.bool), Runs.of(fields)
    domain, shape = valid.numpy().tobytes(), tuple(valid.shape)
    for run in np.unique(runs.run[sequences[sequences >= 0]]).tolist():
        whole = _packed(mask, seed, run, int(runs.lengths[run]), domain, shape)
        inside = (sequences >= 0) & (runs.run[sequences] == run)
        bits = np.unpackbits(whole[runs.frame[sequences[inside]]], axis=1, count=valid.numel())
        observed[torch.from_numpy(inside)] = torch.from_numpy(bits.astype(bool)).view(-1, 1, *shape)
    return observed


@lru_cache(maxsize=KEPT)
def _packed(
    mask: MaskFunction, seed: int, run: int, length: int, domain: bytes, shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """The masks of all frames of a run, a bit a cell, `(T, bytes)`; a mask counts as the same if it is the same object.

    Arguments:
        mask: What is observed.
        seed: Of the masks.
        run: The number of the run.
        length: Its frames, T.
        domain: The valid cells, as bytes.
        shape: Of the domain.
    """
    valid = torch.frombuffer(bytearray(domain), dtype=torch.bool).view(shape)
    whole = draw_sequence(mask, 1, length, valid=valid, generator=seeded(seed, run, 3))[0]
    return np.packbits(whole.flatten(1).cpu().numpy(), axis=1)
