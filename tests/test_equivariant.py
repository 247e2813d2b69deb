"""Networks that commute with symmetries, and fields that go on across walls: to rounding, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.averaging import Averaged, image, shifted
from vecfield_diffusion.models.equivariant import MIRRORS, continued, vectors_of
from vecfield_diffusion.models.symmetry import GENERATORS, Action, Symmetry, group
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics import operators
from vecfield_diffusion.physics.grid import Grid

GROUPS = [["flip_x"], ["transpose"], ["turn"], ["flip_x", "flip_y"], ["flip_x", "turn"]]
KINDS = [{}, {"patch": 2}, {"frames": 3, "time": "attention"}, {"frames": 3}]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(**given) -> UNet:
    """A small one, none of whose weights is 0."""
    torch.manual_seed(0)
    made = UNet(7, channels=[16, 16], blocks=1, embedding=16, **given).double()
    for n, parameter in enumerate(made.parameters()):
        parameter.data += 0.1 * random(*parameter.shape, seed=n)
    return made


def input_image(x: Tensor, action: Action, elements: tuple[Symmetry, ...], n: int) -> Tensor:
    """The image of input channels under element n."""
    return elements[n].move(x)[..., action.source[n], :, :] * action.sign[n].double()[:, None, None]


@pytest.mark.parametrize(("names", "order"), [*zip(GROUPS, (2, 2, 4, 4, 8), strict=True), ([], 1)])
def test_a_group_is_closed_and_acts_as_its_matrices(names: list[str], order: int) -> None:
    elements, field = group(names), random(2, 4, 4)
    assert len(elements) == order and elements[0] == Symmetry()
    for g in elements:
        assert g @ g.inverse == Symmetry() and Symmetry.of(g.matrix) == g
        for h in elements:
            assert g @ h in elements
            torch.testing.assert_close((g @ h).act(field), g.act(h.act(field)), atol=0, rtol=0)
    with pytest.raises(ValueError, match="turn_left"):
        group(["turn_left"])


def test_elements_keep_the_divergence_and_a_turn_turns_to_the_left() -> None:
    grid = Grid(torch.ones(8, 8, dtype=torch.bool), boundary_x="periodic", boundary_y="periodic")
    field = random(1, 2, 8, 8)
    divergence = operators.divergence(field, grid)
    for g in group(["flip_x", "turn"]):
        torch.testing.assert_close(operators.divergence(g.act(field), grid), g.move(divergence))
    assert GENERATORS["turn"].matrix == ((0, -1), (1, 0))  # (1, 0) to (0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("names", GROUPS)
def test_the_output_moves_with_the_input(names: list[str], periodic: bool, kind: dict) -> None:
    made, elements = network(periodic=(periodic, periodic), equivariant=names, **kind), group(names)
    action = Action.of_vectors(elements, 7, [0, 2])
    shape = (2, 3, 7, 8, 8) if "frames" in kind else (2, 7, 8, 8)
    x, level = random(*shape), random(2)
    with torch.no_grad():
        y = made(x, level)
        assert y.std() > 0.05
        for n, g in enumerate(elements):
            torch.testing.assert_close(made(input_image(x, action, elements, n), level), g.act(y), atol=1e-12, rtol=0)
        plain = network(periodic=(periodic, periodic), **kind)
        last = elements[-1]
        assert (plain(input_image(x, action, elements, -1), level) - last.act(plain(x, level))).abs().max() > 1e-2


def test_the_mean_over_the_group_changes_no_weight_twice_and_follows_the_raw_ones() -> None:
    made = network(equivariant=["flip_x", "turn"])
    weights = made.commuting.weights(made)
    again = {
        name: made.commuting.actions[name].project(value, made.commuting.elements) for name, value in weights.items()
    }
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value)
    with torch.no_grad():
        before = made(random(1, 7, 8, 8), random(1))
        assert before.equal(made(random(1, 7, 8, 8), random(1)))
        made.stem.weight.mul_(2.0)
        assert not before.equal(made(random(1, 7, 8, 8), random(1)))
    made(random(1, 7, 8, 8), random(1)).square().sum().backward()
    assert made.stem.weight.grad.abs().sum() > 0


def test_a_denoiser_moves_with_its_observation_and_its_land() -> None:
    made = network(equivariant=["flip_x", "turn"])
    denoiser = Denoiser(made, EDM(), Normalizer(torch.zeros(2, 1, 1), 1.0)).double().eval()
    land, seen = random(2, 1, 8, 8, seed=1) < -0.8, random(2, 1, 8, 8, seed=2) > 0.5
    error = random(2, 1, 8, 8, seed=3).abs()
    y, z, s = random(2, 2, 8, 8, seed=4), random(2, 2, 8, 8, seed=5), torch.tensor([0.5, 3.0], dtype=torch.float64)
    with torch.no_grad():
        x_hat = denoiser(z, s, Observation(y, seen & ~land, error, ~land))
        for g in made.commuting.elements:
            moved = Observation(g.act(y), g.move(seen & ~land), g.move(error), g.move(~land))
            torch.testing.assert_close(denoiser(g.act(z), s, moved), g.act(x_hat), atol=1e-12, rtol=0)


@pytest.mark.parametrize("given", [dict(transforms=["flip_x", "turn"]), dict(transforms=[], shifts=2)])
def test_the_mean_over_images_moves_with_the_sample(given: dict) -> None:
    """Of a network that does not; over the shifts by fewer cells than its stride, with which it commutes itself."""
    denoiser = Denoiser(network(periodic=(True, True)), EDM(), Normalizer(torch.zeros(2, 1, 1), 1.0)).double().eval()
    guidance = Averaged(**given)
    averaged = guidance.wrap(denoiser)
    seen, error = random(1, 1, 8, 8, seed=2) > 0.5, random(1, 1, 8, 8, seed=3).abs()
    observation = Observation(random(1, 2, 8, 8, seed=4), seen, error, random(1, 1, 8, 8, seed=1) > -0.8)
    z, s = random(1, 2, 8, 8, seed=5), torch.tensor([0.5], dtype=torch.float64)
    shift = (0, 0) if "shifts" not in given else (3, 5)
    with torch.no_grad():
        for g in guidance.elements:
            moved = image(observation, g, shift), shifted(g.act(z), shift)
            ours = [shifted(g.act(found(z, s, observation)), shift) for found in (averaged, denoiser)]
            torch.testing.assert_close(averaged(moved[1], s, moved[0]), ours[0], atol=1e-12, rtol=0)
            assert g == Symmetry() and not any(shift) or (denoiser(moved[1], s, moved[0]) - ours[1]).abs().max() > 1e-3
        # The squared error of the mean is the mean one less the variance of the images.
        guidance.differences = [0.0, 0.0]
        mean, target = averaged(z, s, observation), random(1, 2, 8, 8, seed=7)
        images = [
            g.inverse.act(shifted(denoiser(shifted(g.act(z), by), s, image(observation, g, by)), (-by[0], -by[1])))
            for g, by in guidance.images()
        ]
        errors = torch.stack([(found - target).square().sum() for found in images])
    assert len(images) == (8 if "shifts" not in given else 4)
    torch.testing.assert_close(torch.stack(images).mean(0), mean)
    assert (mean - target).square().sum().item() == pytest.approx(errors.mean().item() - guidance.differences[0])
    assert f"{len(images)} images, " in guidance.summary() and Averaged().summary() is None


def test_averaging_is_refused_where_the_grid_or_the_mean_is_not_symmetric() -> None:
    cells = torch.ones(4, 4, dtype=torch.bool)
    rows = torch.tensor([1.0, 1.0, 1.1, 1.2])
    for given, grid, words in (
        (dict(shifts=2), Grid(cells), "shifts"),
        (dict(transforms=["flip_y"]), Grid(cells, dx=rows), "flip_y"),
        (dict(transforms=["turn"]), Grid(cells, dx=2.0), "turns"),
        (dict(transforms=["transpose"]), Grid(cells, boundary_x="wall"), "transposes"),
    ):
        assert words in Averaged(**given).obstacle(grid)
    assert Averaged(["flip_x", "turn"]).obstacle(Grid(cells, dy=-1.0)) is None
    assert Averaged(["flip_x"]).obstacle(Grid(cells, dx=rows)) is None
    mean = Normalizer(torch.ones(2, 1, 1), 1.0)
    with pytest.raises(UserError, match="mean_field=false"):
        Averaged().wrap(Denoiser(network(), EDM(), mean))


def test_fresh_weights_keep_their_size() -> None:
    torch.manual_seed(0)
    plain, made = (UNet(7, channels=[32, 32], equivariant=names) for names in ([], ["flip_x", "turn"]))
    found = made.commuting.weights(made)
    for name in ("down.0.0.0.conv1.weight", "shrink.0.1.weight"):
        assert found[name].std().item() == pytest.approx(plain.state_dict()[name].std().item(), rel=0.1)


def test_no_symmetry_and_no_wall_is_the_network_of_before() -> None:
    torch.manual_seed(3)
    plain = UNet(7, channels=[8, 8], blocks=1)
    torch.manual_seed(3)
    same = UNet(7, channels=[8, 8], blocks=1, equivariant=[], walls="mirror", mirrored=(False, False))
    x, level = torch.randn(1, 7, 8, 8), torch.zeros(1)
    assert plain.state_dict().keys() == same.state_dict().keys() and plain(x, level).equal(same(x, level))


@pytest.mark.parametrize("walls", [(False, True), (True, False), (True, True)])
def test_a_field_that_goes_on_across_walls_gives_an_output_that_does(walls: tuple[bool, bool]) -> None:
    """The network on the field and its image, as one that commutes with the mirrors sees them, on a torus."""
    given = dict(equivariant=["flip_x", "flip_y"])
    closed = tuple(not wall for wall in walls)
    made = network(periodic=closed, walls="mirror", mirrored=walls, **given)
    torus = network(periodic=(True, True), **given)
    x, level = random(2, 7, 8, 8), random(2)
    into, out = Action.of_vectors(MIRRORS, 7, [0, 2]), Action.of_vectors(MIRRORS, 2, [0])
    with torch.no_grad():
        whole = torus(continued(x, walls, into), level)
        torch.testing.assert_close(continued(made(x, level), walls, out), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_network_beside_its_mirror_image_has_no_flow_through_the_wall(kind: dict) -> None:
    """On the doubled torus its output is odd and even, whatever the weights: the divergence of the wall is 0 there."""
    made = network(walls="mirror", mirrored=(False, True), periodic=(True, False), **kind)
    x = random(1, 3, 7, 8, 8) if "frames" in kind else random(1, 7, 8, 8)
    with torch.no_grad():
        y = made(x, random(1))[0]
        double = torch.cat([x, input_image(x, Action.of_vectors(MIRRORS, 7, [0, 2]), MIRRORS, 1)], dim=-1)
        raw = network(periodic=(True, True), **kind)(double, random(1))[0]
    torch.testing.assert_close(y[..., 0, :, :], (raw[..., 0, :, :8] - raw[..., 0, :, 8:].flip(-1)) / 2)
    torch.testing.assert_close(y[..., 1, :, :], (raw[..., 1, :, :8] + raw[..., 1, :, 8:].flip(-1)) / 2)


def test_the_divergence_at_a_wall_is_that_of_the_field_that_goes_on() -> None:
    sizes = dict(dx=2.0, dy=3.0)
    box = Grid(torch.ones(6, 8, dtype=torch.bool), boundary_x="wall", boundary_y="wall", **sizes)
    torus = Grid(torch.ones(12, 16, dtype=torch.bool), boundary_x="periodic", boundary_y="periodic", **sizes)
    field, action = random(1, 2, 6, 8), Action.of_vectors(MIRRORS, 2, [0])
    double = operators.divergence(continued(field, (True, True), action), torus)
    torch.testing.assert_close(operators.divergence(field, box), double[..., :6, :8])


def test_what_no_group_can_move_is_named() -> None:
    for given, words in (
        (dict(in_channels=8), "in_channels"),
        (dict(in_channels=7, out_channels=4), "learned variance"),
        (dict(in_channels=7, channels=[12, 12]), "channels"),
        (dict(in_channels=7, periodic=(True, False), channels=[16, 16]), "boundary"),
    ):
        with pytest.raises(ValueError, match=words):
            UNet(**{"channels": [16, 16], **given}, equivariant=["flip_x", "turn"])
    assert vectors_of(11) == [0, 2, 7, 9] and vectors_of(7, 2) == [0, 2, 7, 9]
