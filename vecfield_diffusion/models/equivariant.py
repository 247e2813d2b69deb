"""What makes a UNet commute with symmetries of the square, and what continues a field across walls.

**Symmetries** (`equivariant`): see `models/symmetry.py`. Exact where the strides divide the sides of a field, with any
boundary and any land: masks are channels and are moved along.

**Walls** (`walls=mirror`): a wall through which nothing flows is where a field meets its mirror image, the component
across it odd and the other one even. The network works on the field and its image beside one another, which close on
themselves, and of what comes out that part is kept which is such a pair:

    (u, v)(-x, y) = (-u, v)(x, y)        F(x) <- (F(x) + m F(x)) / 2        m the mirror

for twice the cells along each axis with walls. Along other axes a field goes on periodically, or by zeros, from which
nothing comes back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vecfield_diffusion.models.layers import Attention, TimeAttention
from vecfield_diffusion.models.symmetry import Action, Commuting, Generator, Symmetry, Weight, group

#: The mirrors of walls along y and x.
MIRRORS = (Symmetry(flip_y=True), Symmetry(flip_x=True))


def vectors_of(channels: int, frames: int = 1) -> list[int]:
    """Returns where the vectors begin among the input channels of a network, of all frames one after the other.

    They are the noisy field, the observed values and, behind what is observed, its error and the domain, whatever else:
    a background, and what model=gaussian estimates.

    Raises:
        ValueError: Other channels, such as those of a context.
    """
    if channels < 7 or channels % 2 == 0:
        raise ValueError(f"in_channels must be 7 or more by pairs, those of vectors, got {channels}")
    own = [0, 2, *range(7, channels, 2)]
    return [first + frame * channels for frame in range(frames) for first in own]


def commuting(network: nn.Module, names: Sequence[Generator], vectors: Sequence[int], frames: int) -> Commuting:
    """Returns how a UNet comes to commute with the group that `names` generate.

    Arguments:
        network: The UNet, with layers `stem`, `shrink`, `grow` and `head`.
        names: Elements of the group.
        vectors: Where the vectors begin among the channels that `stem` sees.
        frames: How many vectors come out.

    Raises:
        ValueError: Widths that the group does not divide.
    """
    elements = group(names)
    order, patch = len(elements), network.patch
    into = Action.of_vectors(elements, network.stem.in_channels // patch**2, vectors)
    out = Action.of_vectors(elements, 2 * frames, range(0, 2 * frames, 2))
    ends = {"stem": dict(into=into, in_block=patch), "head.2": dict(out=out, out_block=patch)}
    actions: dict[str, Weight] = {}
    for name, module in network.named_modules():
        if name.startswith("embed"):
            continue
        if isinstance(module, Attention | TimeAttention):
            check_width("attention", module.norm.num_channels // module.heads, order)
        if isinstance(module, nn.GroupNorm):
            check_width("channels", module.num_channels // module.num_groups, order)
            given = dict(out=Action.regular(elements, module.num_channels))
        elif isinstance(module, nn.Linear):
            given = dict(
                out=Action.regular(elements, module.out_features),
                into=Action.trivial(elements, module.in_features),
            )
        elif isinstance(module, nn.Conv2d):
            given = of_convolution(name, module, elements) | ends.get(name, {})
        else:
            continue
        weight = Weight(**{"into": Action.trivial(elements, 1), **given})
        actions |= {f"{name}.{part}": weight for part, _ in module.named_parameters()}
    found = Commuting(elements, actions)
    found.enlarge(network)
    return found


def of_convolution(name: str, layer: nn.Conv2d, elements: Sequence[Symmetry]) -> dict[str, Action | int]:
    """Returns how a group acts on a convolution between inner features, some of which halve or double the field."""
    a, b = 2 if name.startswith("shrink") else 1, 2 if name.startswith("grow") else 1
    return dict(
        out=Action.regular(elements, layer.out_channels // b**2),
        into=Action.regular(elements, layer.in_channels // a**2),
        out_block=b,
        in_block=a,
    )


def check_width(name: str, features: int, order: int) -> None:
    """Raises ValueError where features that are taken together are no whole orbits."""
    if features % order:
        raise ValueError(
            f"{name} must come in groups of a multiple of {order} features, the order of equivariant=, got {features}: "
            "give widths that are multiples of 16"
        )


def continued(x: Tensor, walls: tuple[bool, bool], action: Action) -> Tensor:
    """Returns `(N, C, H, W)` and its mirror image beyond the far wall, for each axis that has walls.

    Arguments:
        x: The fields.
        walls: Whether y and x end at walls.
        action: That of `MIRRORS` on the channels.
    """
    for n, (axis, mirror) in enumerate(zip((-2, -1), MIRRORS, strict=True)):
        if walls[n]:
            x = torch.cat([x, mirror.move(x) * action.sign[n].to(x).view(-1, 1, 1)], dim=axis)
    return x


def folded(x: Tensor, walls: tuple[bool, bool], action: Action) -> Tensor:
    """Returns of `(N, C, H, W)` and its image the half that `continued` began with, the mean of both."""
    for n, (axis, mirror) in enumerate(zip((-2, -1), MIRRORS, strict=True)):
        if walls[n]:
            x = (x + mirror.move(x) * action.sign[n].to(x).view(-1, 1, 1)).narrow(axis, 0, x.shape[axis] // 2) / 2
    return x
