"""How much a set of snapshots can tell: how many of them are independent, and whether its blocks are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.splits import TimeBlocks

#: Independent cases, below which scores tell too little.
ENOUGH = 10
#: Ratio of the RMS of two blocks, from which they are unlike.
UNLIKE = 1.5
_SNAPSHOTS = 256


def independent(fields: Fields, indices: Sequence[int]) -> float:
    """How many of the snapshots `indices`, in the order of time, are independent: their span in correlation times."""
    if len(indices) < 2:
        return float(len(indices))
    time = max(1, TimeBlocks().guard_of(fields))
    return min(float(len(indices)), 1 + (indices[-1] - indices[0]) / time)


def compare_blocks(fields: Fields, split: Mapping[str, range]) -> list[str]:
    """A sentence for each block of a split whose RMS about the mean of training is unlike that of training."""
    train = _sample(fields, split["train"])
    mean = train.nanmean(dim=0)
    usual = _rms(train - mean)
    found = []
    for name in ("validation", "test"):
        rms = _rms(_sample(fields, split[name]) - mean)
        if usual > 0 and not 1 / UNLIKE < rms / usual < UNLIKE:
            found.append(
                f"{name} snapshots are unlike those of training: their RMS about its mean is {rms:.3g} {fields.units}, "
                f"{rms / usual:.1f} times the {usual:.3g} of training"
            )
    return found


def _sample(fields: Fields, block: range) -> Tensor:
    return fields.read(block[:: -(-len(block) // _SNAPSHOTS)]).double()


def _rms(anomaly: Tensor) -> float:
    return float(anomaly[anomaly.isfinite()].square().mean().sqrt())
