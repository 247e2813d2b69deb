"""Augmentation: each transform commutes with the divergence and turns the curl as a symmetry of the plane does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.data.augment import TRANSFORMS, Augmentation, Parameters, apply
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.physics.grid import Grid

DX, DY = 0.5, 0.25


def periodic(height: int, width: int, dx: float = 1.0, dy: float = 1.0, x: str = "periodic") -> Grid:
    return Grid(torch.ones(height, width, dtype=torch.bool), dx, dy, boundary_x=x, boundary_y="periodic")


def one(name: str, shape: tuple[int, int] = (3, 5), n: int = 4) -> Parameters:
    """One transform alone; for `roll`, each sample by its own number of cells."""
    no, zero = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    parameters = Parameters(no, no, no, zero, zero)
    if name == "roll":
        return replace(parameters, roll_x=torch.arange(n) % shape[1], roll_y=(2 * torch.arange(n)) % shape[0])
    return replace(parameters, **{name: ~no})


def divergence_and_curl(field: Tensor, dx: float, dy: float) -> tuple[Tensor, Tensor]:
    """Central differences on a periodic grid."""

    def derivative(component: Tensor, axis: int, step: float) -> Tensor:
        return (component.roll(-1, axis) - component.roll(1, axis)) / (2 * step)

    u, v = field[:, :1], field[:, 1:]
    return derivative(u, 3, dx) + derivative(v, 2, dy), derivative(v, 3, dx) - derivative(u, 2, dy)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_divergence_and_curl_commute(name: str) -> None:
    shape, dx, dy = ((6, 6), DX, DX) if name == "transpose" else ((5, 8), DX, DY)
    field = torch.randn(4, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = one(name, shape)
    divergence, curl = divergence_and_curl(field, dx, dy)
    moved_divergence, moved_curl = divergence_and_curl(apply(field, parameters), dx, dy)
    sign = 1.0 if name == "roll" else -1.0
    # The one-channel fields move as masks do: cells only.
    torch.testing.assert_close(moved_divergence, apply(divergence, parameters), rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_curl, sign * apply(curl, parameters), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("flip_x", lambda u, v: (-u.flip(-1), v.flip(-1))),
        ("flip_y", lambda u, v: (u.flip(-2), -v.flip(-2))),
        ("roll", lambda u, v: (u.roll((2, 1), (0, 1)), v.roll((2, 1), (0, 1)))),
        ("transpose", lambda u, v: (v.T, u.T)),
    ],
)
def test_each_transform_by_hand(name: str, by_hand: Callable) -> None:
    shape = (3, 3) if name == "transpose" else (3, 5)
    field = torch.randn(4, 2, *shape)
    assert torch.equal(apply(field, one(name, shape))[1], torch.stack(by_hand(*field[1])))


@pytest.mark.parametrize("shape", [(6, 6), (5, 8)])
def test_masks_move_with_the_cells_and_the_inverse_brings_everything_back(shape: tuple[int, int]) -> None:
    augmentation = Augmentation().resolve(periodic(*shape), mean_is_zero=True)
    parameters = augmentation.draw(64, torch.Generator().manual_seed(1))
    field = torch.randn(64, 2, *shape)
    mask = torch.rand(64, 1, *shape) < 0.5
    hidden = torch.where(mask, field, torch.nan)
    moved = apply(hidden, parameters)
    assert torch.equal(moved[:, :1].isfinite(), apply(mask, parameters)) and moved.dtype == field.dtype
    for name in ("roll", "flip_y", "flip_x", "transpose"):
        still = one(name, n=64)
        keep = {key: getattr(parameters, key) for key in vars(parameters) if key.startswith(name)}
        moved = apply(moved, replace(still, **{key: -k if name == "roll" else k for key, k in keep.items()}))
    torch.testing.assert_close(moved, hidden, equal_nan=True, rtol=0, atol=0)
    assert ("transpose" in augmentation.names) == (shape[0] == shape[1])


def test_samples_differ_and_a_seed_repeats_them() -> None:
    augmentation = Augmentation().resolve(periodic(6, 6), mean_is_zero=True)
    first, again = (augmentation.draw(400, torch.Generator().manual_seed(3)) for _ in range(2))
    for name, drawn in vars(first).items():
        assert torch.equal(drawn, getattr(again, name))
        assert drawn.double().mean().item() == pytest.approx(2.5 if "roll" in name else 0.5, abs=0.3)
    assert first.roll_x.unique().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("grid", "mean_is_zero", "expected"),
    [
        (periodic(6, 6), True, TRANSFORMS),
        (periodic(6, 8), True, ("flip_x", "flip_y", "roll")),
        (periodic(6, 6, 1.0, 2.0), True, ("flip_x", "flip_y", "roll")),
        (periodic(6, 6), False, ()),
        (periodic(6, 6, x="open"), True, ()),
        (replace(periodic(6, 6), valid=torch.eye(6) == 0), True, ()),
    ],
)
def test_auto_takes_what_the_domain_allows(grid: Grid, mean_is_zero: bool, expected: tuple[str, ...]) -> None:
    assert Augmentation("auto").resolve(grid, mean_is_zero).names == expected
    assert Augmentation("none").resolve(grid, mean_is_zero).names == ()


def test_roll_is_only_along_periodic_axes_and_none_changes_nothing() -> None:
    field = torch.randn(50, 2, 4, 6)
    generator = torch.Generator().manual_seed(0)
    none = Augmentation("none").resolve(periodic(4, 6), mean_is_zero=True)
    assert torch.equal(none.apply(field, none.draw(50, generator)), field)
    augmentation = Augmentation(["roll"]).resolve(periodic(4, 6, x="wall"), mean_is_zero=False)
    parameters = augmentation.draw(50, generator)
    assert parameters.roll_x.eq(0).all() and parameters.roll_y.gt(0).any()


@pytest.mark.parametrize(
    ("name", "grid", "match"),
    [
        ("transpose", periodic(4, 6), "as many rows as columns"),
        ("transpose", periodic(6, 6, x="wall"), "same boundary"),
        ("roll", Grid(torch.ones(4, 4, dtype=torch.bool)), "periodic axis"),
        ("flip_x", Grid(torch.eye(4) == 0), "without land"),
        ("flip_y", Grid(torch.ones(3, 4, dtype=torch.bool), dx=torch.tensor([1.0, 2.0, 3.0])), "in every row"),
    ],
)
def test_what_is_impossible_is_refused(name: str, grid: Grid, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Augmentation([name]).resolve(grid, mean_is_zero=True)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="got 'flipx'. Did you mean 'flip_x'"):
        Augmentation(["flipx"])
