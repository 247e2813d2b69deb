"""The axes of fields: `(B, 2, H, W)` of snapshots, `(B, T, 2, H, W)` of sequences of T frames, one after the other.

A sample is one element of the batch, all its frames together. Channels are the third axis from the end in both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def column(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)`, a number for each sample of a batch with as many axes as `like`."""
    return values.view(-1, *(1 for _ in like.shape[1:]))


def total(values: Tensor) -> Tensor:
    """Returns the sum over each sample, `(B,)`."""
    return values.sum(dim=tuple(range(1, values.ndim)))


def u_and_v(fields: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u and v, `(..., 1, H, W)` each, of fields `(..., 2, H, W)`."""
    return fields.narrow(-3, 0, 1), fields.narrow(-3, 1, 1)


def by_frame(function: Callable[..., Tensor], fields: Tensor, *others: Tensor) -> Tensor:
    """Returns what a function of snapshots makes of the frames of fields `(..., C, H, W)`.

    Arguments:
        function: Of tensors `(N, C, H, W)` to `(N, C', H', W')`.
        fields: The fields.
        others: Its further arguments, which broadcast to the samples and frames of the fields.
    """
    frames = fields.shape[:-3]
    given = (other.expand(*frames, *other.shape[-3:]).flatten(0, -4) for other in others)
    return function(fields.flatten(0, -4), *given).unflatten(0, frames)
