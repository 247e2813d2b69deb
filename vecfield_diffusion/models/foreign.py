"""A network of another library in the place of one of ours.

Our networks are called as `network(x, c_noise)`, where `x = [c_in x_t, condition]` holds the noisy field (2 channels)
and what is known of it. A foreign one is called with its own arguments, each made from these two,

    output = network(name_1=source_1(x, c_noise), name_2=source_2(x, c_noise), ...),

on a field padded to a size that it takes, and what it returns is cropped. The sources, C channels of the condition:

    input       (B, 2 + C, H, W)    field and condition, concatenated
    field       (B, 2, H, W)        the noisy field alone
    condition   (B, C, H, W)        what is known: values, observed, valid, error, ... (Observation.channels)
    level       (B,)                c_noise, a floating-point number
    vector      (B, C)              the mean of each channel of the condition over all cells
    token       (B, 1, C)           the same as a sequence of one, for cross-attention
    3           (B,)                a whole number: the class label of every sample, int64
    callable    (B, ...)            a function or module of the condition, such as a class label computed from it
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecfield_diffusion.errors import nearest

FIELD = 2  # channels of the noisy field; the condition follows

Source = Literal["input", "field", "condition", "level", "vector", "token"]

SOURCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input": lambda x, level: x,
    "field": lambda x, level: x[:, :FIELD],
    "condition": lambda x, level: x[:, FIELD:],
    "level": lambda x, level: level,
    "vector": lambda x, level: x[:, FIELD:].mean(dim=(-2, -1)),
    "token": lambda x, level: x[:, None, FIELD:].mean(dim=(-2, -1)),
}

PADDING = {"zero": "constant", "edge": "replicate"}


class Foreign(nn.Module):
    """`(B, in_channels, H, W)` and a number `(B,)` to `(B, out_channels, H, W)`, by a network of any signature.

    It is tried once when it is made: on a field of zeros, in evaluation mode, without gradients.

    Arguments:
        network: The foreign network, a torch.nn.Module.
        arguments: For each argument of its `forward`, by name, the source of its value: see the top of this module.
        in_channels: Channels of the input: the field and what conditions it.
        out_channels: Channels of the output.
        periodic: Whether y and x close on themselves.
        output: Where the tensor is in what the network returns: an attribute or a key by name, an element by number;
            None where it returns the tensor.
        multiple: The number of cells that the network's sizes must be multiples of.
        padding: What fills the cells after the end of an axis that is not periodic: zeros, which mark them as lying
            outside the domain, or the last row and column. A periodic axis is continued on both sides.
        halo: Cells by which periodic axes are continued in any case, on each side: a network that knows nothing of
            the period is then free of a seam if it looks no further.
        trial: Rows and columns of the field that it is tried on; for a network that takes one size alone, that size.
        frames: The frames of a sample: one, for such networks take snapshots.

    Raises:
        ValueError: A number out of range, an unknown source or argument, no argument that holds the field, or a trial
            that fails: the network refuses its input, or returns something other than the output.
    """

    def __init__(
        self,
        network: Any,
        arguments: dict[str, int | Source | Callable[[Tensor], Tensor]],
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        output: str | int | None = None,
        multiple: int = 1,
        padding: Literal["zero", "edge"] = "zero",
        halo: int = 0,
        trial: tuple[int, int] = (32, 32),
        frames: int = 1,
    ) -> None:
        super().__init__()
        if frames > 1:
            raise ValueError(f"frames must be 1: a network of another library takes snapshots, got {frames}")
        check_numbers(in_channels, multiple, padding, halo, trial)
        check_arguments(network, arguments)
        self.network, self.arguments, self.output = network, dict(arguments), output
        # Modules among the sources are trained and saved with the network.
        self.functions = nn.ModuleList(source for source in arguments.values() if isinstance(source, nn.Module))
        self.periodic, self.multiple, self.padding, self.halo = tuple(periodic), multiple, padding, halo
        self._try(torch.Size([2, in_channels, *trial]), out_channels)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        (h, w), margins = x.shape[-2:], self.margins(x.shape[-2:])
        output = select(self.network(**self.values(x, noise, margins)), self.output)
        (top, _), (left, _) = margins
        return output[..., top : top + h, left : left + w]

    def values(self, x: Tensor, noise: Tensor, margins: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Returns the arguments of the network by name, those of the field's size padded by the margins."""
        values = {name: draw(source, x, noise.to(x.dtype)) for name, source in self.arguments.items()}
        return {
            name: pad(value, margins, self.periodic, self.padding) if fits(value, x) else value
            for name, value in values.items()
        }

    def margins(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Returns cells to add before and after each axis of a field of `size`."""
        return margins(size, self.multiple, self.periodic, self.halo)

    def _try(self, shape: torch.Size, out_channels: int) -> None:
        """Calls the network once. Raises ValueError that names the point where it fails and what was expected there."""
        like = next((value for value in self.parameters() if value.is_floating_point()), torch.zeros(()))
        x = torch.zeros(shape, dtype=like.dtype, device=like.device)
        level = x.new_ones(shape[0])
        margins = self.margins(shape[-2:])
        wanted = (shape[0], out_channels, *(sum(cells) for cells in zip(shape[-2:], map(sum, margins), strict=True)))
        with torch.no_grad(), evaluating(self):
            with refused("arguments: a function fails on a condition of zeros"):
                values = self.values(x, level, margins)
            given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
            with refused(f"network refuses {given} (if it takes one size alone, set trial=[rows,columns])"):
                result = self.network(**values)
            with refused(f"output {self.output!r} is not in the {describe(result)} that the network returns"):
                output = select(result, self.output)
        if not isinstance(output, Tensor):
            raise ValueError(f"output must lead to a tensor {wanted}, got {describe(output)}: name its part")
        if output.shape != wanted:
            raise ValueError(f"network must return {wanted} for {given}, got {describe(output)}")


# What the network is called with.


def draw(source: int | str | Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
    """Returns the value of a source, on the field without padding."""
    if isinstance(source, int):
        return torch.full((len(x),), source, device=x.device)
    return SOURCES[source](x, noise) if isinstance(source, str) else source(x[:, FIELD:])


def select(result: Any, output: str | int | None) -> Any:
    """Returns the part of what a network returns that `output` names."""
    if output is None:
        return result
    return result[output] if isinstance(output, int) or isinstance(result, Mapping) else getattr(result, output)


def fits(value: Tensor, x: Tensor) -> bool:
    """Returns whether a tensor lies on the cells of `x`."""
    return value.ndim == 4 and value.shape[-2:] == x.shape[-2:]


def margins(size: tuple[int, int], multiple: int, periodic: tuple[bool, bool], halo: int = 0) -> list[tuple[int, int]]:
    """Returns cells to add before and after each axis of a field of `size`, so that it is a multiple of `multiple`.

    Periodic axes get them on both sides, `halo` in any case; others at the end.
    """
    found = []
    for cells, closed in zip(size, periodic, strict=True):
        wide = 2 * halo if closed else 0
        more = wide + -(cells + wide) % multiple
        found.append((more // 2, more - more // 2) if closed else (0, more))
    return found


def pad(x: Tensor, margins: list[tuple[int, int]], periodic: tuple[bool, bool], padding: str) -> Tensor:
    """Continues `(..., H, W)` by cells before and after each axis: wrapped where periodic, else by `padding`."""
    for axis, (before, after), closed in zip((-2, -1), margins, periodic, strict=True):
        size = x.shape[axis]
        if closed and before + after:
            # Not F.pad, which wraps no further than once around.
            x = x.index_select(axis, torch.arange(-before, size + after, device=x.device) % size)
        elif before + after:
            x = F.pad(x, (0, 0, before, after) if axis == -2 else (before, after, 0, 0), PADDING[padding])
    return x


# What is refused.


def check_numbers(in_channels: int, multiple: int, padding: str, halo: int, trial: tuple[int, int]) -> None:
    """Raises ValueError for numbers out of range and for an unknown padding."""
    for name, value, least in (
        ("in_channels", in_channels, FIELD),
        ("multiple", multiple, 1),
        ("halo", halo, 0),
        ("trial", min(trial), 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if padding not in PADDING:
        raise ValueError(f"padding must be one of {', '.join(PADDING)}, got {padding!r}")


def check_arguments(network: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no network, for unknown sources, and for arguments that are not the network's."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    for name, source in arguments.items():
        if source not in SOURCES if isinstance(source, str) else not (type(source) is int or callable(source)):
            hint = nearest(source, SOURCES) if isinstance(source, str) else ""
            raise ValueError(
                f"arguments must give {name} one of {', '.join(SOURCES)}, a class label or a function, got "
                f"{source!r}.{hint}".rstrip(".")
            )
    if not any(source in ("input", "field") for source in arguments.values() if isinstance(source, str)):
        raise ValueError(f"arguments must hand over the field, as input or field, got {dict(arguments)}")
    signature = inspect.signature(network.forward)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        kind = type(network).__name__
        raise ValueError(f"arguments must be those of {kind} ({', '.join(signature.parameters)}): {error}") from None


# What networks raise on an input that they cannot take: shapes and types, embeddings and keys, assertions.
REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@contextmanager
def refused(text: str) -> Iterator[None]:
    """Turns what a foreign network raises into a ValueError that begins with `text`."""
    try:
        yield
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{text}: {type(error).__name__}: {reason}") from error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part of the module is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def describe(value: Any) -> str:
    """Returns a value for messages: its type, and its shape or its parts."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{kind} ({', '.join(map(str, value))})"
    return f"{kind} of {len(value)}" if isinstance(value, list | tuple) else kind
