"""A series by a network of sequences: pieces, what they keep and know, and the programs on trajectories."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from programs import SMALL, Call, is_message
from test_windows import Steady

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Empty
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.guidance.linear import cells
from vecfield_diffusion.guidance.sensors import Component
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import series
from vecfield_diffusion.programs.fill import fill_piece, write_piece
from vecfield_diffusion.programs.series import Piece, Plan
from vecfield_diffusion.programs.sinks import Gathered
from vecfield_diffusion.samplers.deterministic import DPMpp2M
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint


def fields_of(time: list[int], values: np.ndarray | None = None) -> Fields:
    """A series at some hours."""
    values = np.zeros((len(time), 2, 1, 2), dtype=np.float32) if values is None else values
    axes = {"x": np.arange(values.shape[3]), "y": np.arange(values.shape[2])}
    hours = np.datetime64("2024-01-01", "h") + np.array(time)
    grid = Grid(torch.ones(values.shape[2:], dtype=torch.bool))
    return Fields(MemoryReader(values), len(time), grid, **axes, source="series", names=("u", "v"), time=hours)


def plan(time: list[int], **changes: object) -> Plan:
    fields = fields_of(time)
    options = dict(frames=4, stride=1, past=False, length=12, offered=range(len(time)))
    return Plan(fields, **{**options, **changes})


@pytest.mark.parametrize("length", [1, 12, 17, 1000])
@pytest.mark.parametrize("wanted", [range(60), [3], [0, 1, 30, 33, 59]])
def test_every_snapshot_is_kept_once_with_its_surroundings(length: int, wanted: range | list[int]) -> None:
    """Each lies three frames from the ends of its piece, unless the series itself ends there or a piece goes on."""
    pieces = list(plan(list(range(60)), length=length).pieces(wanted))
    kept = [number for piece in pieces for number in piece.snapshots[piece.kept].tolist()]
    assert kept == list(wanted)
    before: set[int] = set()
    for piece in pieces:
        line = piece.snapshots[0].tolist()
        assert line == list(range(line[0], line[0] + len(line)))
        known = line[: piece.known]
        assert all(number in before or number not in wanted for number in known)
        for number in piece.snapshots[piece.kept].tolist():
            assert number - line[0] >= 3 or line[0] == 0
            assert line[-1] - number >= 3 or line[-1] == 59
        before.update(piece.snapshots[piece.kept].tolist())
    assert length < 1000 or sum(piece.known for piece in pieces) == 0


def test_runs_missing_frames_and_strides_have_pieces_of_their_own() -> None:
    """Hours 2 and 3 are missing; 400 hours later another run begins."""
    time = [0, 1, 4, 5, 6, 400, 401, 402]
    lines = [piece.snapshots[0].tolist() for piece in plan(time).pieces(range(8))]
    assert lines == [[0, 1, -1, -1, 2, 3, 4], [5, 6, 7]]
    lines = [piece.snapshots[0].tolist() for piece in plan(time, stride=2).pieces(range(8))]
    assert lines == [[0, -1, 2, 4], [1, -1, 3], [5, 7], [6]]
    lines = [piece.snapshots[0].tolist() for piece in plan(time, offered=range(1, 4)).pieces([2])]
    assert lines == [[1, -1, -1, 2, 3]]


def test_snapshots_that_see_the_same_frames_are_one_trajectory() -> None:
    """The network looks three frames away: six steps apart they share a frame's surroundings, seven apart none."""
    for other, lines in ((16, [(7, 19)]), (17, [(7, 13), (14, 20)])):
        found = list(plan(list(range(60)), length=1000).pieces([10, other]))
        assert [(piece.snapshots[0, 0], piece.snapshots[0, -1]) for piece in found] == lines


def test_from_the_past_alone_every_snapshot_ends_a_sequence() -> None:
    """Nothing that comes later is in it; before the beginning all is missing."""
    pieces = list(plan(list(range(10)), past=True, length=8).pieces([0, 2, 9]))
    assert [piece.snapshots.tolist() for piece in pieces] == [[[-1, -1, -1, 0], [-1, 0, 1, 2]], [[6, 7, 8, 9]]]
    assert all(piece.kept.tolist() == [[False, False, False, True]] * len(piece.kept) for piece in pieces)


class Exact(Steady):
    """The exact denoiser of a Gaussian series, in float32, as a program calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion, self.normalizer = EDM(sigma_max=50.0), Normalizer(torch.zeros(2, 1, 2), 1.0)

    def __call__(self, z: torch.Tensor, s: torch.Tensor, observation: Observation) -> torch.Tensor:
        exact = observation.apply(lambda part: part.double() if part.is_floating_point() else part)
        # Values without error have one far below all that matters.
        sigma = exact.sigma_y.clamp(min=1e-4)
        seen = Observation(exact.y, exact.observed, sigma, exact.valid)
        return super().__call__(z.double(), s.double(), seen).to(z)


def filled(length: int, members: int) -> tuple[torch.Tensor, SimpleNamespace]:
    """The members of a series of 50 frames that a program fills in pieces of `length` frames."""
    drawn = torch.linalg.cholesky(Exact().covariance(50)) @ torch.randn(
        200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    fields = fields_of(list(range(50)), drawn.view(50, 2, 1, 2).float().numpy())

    def mask(n: int, valid: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(n, 1, *valid.shape, generator=generator) < 0.3

    def known(snapshots: np.ndarray) -> object:
        return make_cases(fields, snapshots, mask, seed=1, sigma_obs=0.2, add_error=True)

    statistics = SimpleNamespace(std=1.0, largest=5.0)
    trained = SimpleNamespace(denoiser=Exact(), grid=fields.grid, window=(1, 2), frames=8, statistics=statistics)
    config = {"members": members, "seed": 5, "batch": members}
    place = {number: number for number in range(50)}
    common = dict(config=config, trained=trained, grid=fields.grid, mixture=None, thinned=lambda cases: cases)
    filling = SimpleNamespace(**common, known=known, place=place)
    method, sink = Method(DPMpp2M(32), Conditional()), Gathered()
    pieces = list(Plan(fields, 8, 1, past=False, length=length, offered=range(50)).pieces(range(50)))
    assert (len(pieces) > 1) == (length < 50)
    for piece in pieces:
        done = fill_piece(filling, method, piece, sink)
        write_piece(sink, piece.positions(place), *done, factor=1.0, done=sink.done())
    return sink.whole().double(), known(np.arange(50)[None])


def test_a_series_in_pieces_has_the_posterior_of_the_whole() -> None:
    """Correlations fade within a sequence: mean and spread are the dense ones, up to what 96 members leave open."""
    members, cases = filled(22, 96)
    observation = cases.observation(Exact().normalizer, torch.device("cpu"))
    exact = observation.apply(lambda part: part.double() if part.is_floating_point() else part)
    mean, covariance = (part[0] for part in Exact().posterior(exact))
    spread = covariance.diagonal().sqrt()
    away = (members.mean(dim=0).flatten() - mean) / (spread / np.sqrt(96))
    assert away.square().mean().sqrt() < 1.15
    assert abs((members.std(dim=0).flatten() / spread).mean() - 1) < 0.02
    # What neighbours have in common is that of the trajectory where pieces meet, too.
    pairs = members.flatten(2)
    steps = (pairs[:, 1:] - pairs[:, :-1]).var(dim=0)
    difference = covariance.view(50, 4, 50, 4)
    expected = torch.stack([
        (difference[t, :, t] + difference[t + 1, :, t + 1] - 2 * difference[t, :, t + 1]).diagonal() for t in range(49)
    ])  # fmt: skip
    ratio = (steps / expected).mean(dim=1)
    assert ratio.min() > 0.7 and ratio.max() < 1.4
    assert abs(ratio.mean() - 1) < 0.04


@pytest.mark.parametrize("sensor", [None, Component("u")])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_piece_goes_on_from_what_was_sampled_before(
    monkeypatch: pytest.MonkeyPatch, sensor: Component | None, factor: float
) -> None:
    """Each member by itself, its spread as it was before it was corrected, whatever an instrument reads."""
    values = torch.randn(7, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    fields = fields_of(list(range(7)), values.numpy())
    sampled = torch.randn(3, 7, 2, 1, 2, generator=torch.Generator().manual_seed(1))
    statistics = SimpleNamespace(std=1.0, largest=5.0)
    trained = SimpleNamespace(grid=fields.grid, denoiser=Exact(), statistics=statistics)
    known = make_cases(fields, np.arange(7)[None], Empty(), seed=0)
    place = {number: number for number in range(7)}
    common = dict(config={"members": 3}, trained=trained, grid=fields.grid, mixture=None, thinned=lambda cases: cases)
    filling = SimpleNamespace(**common, place=place, known=lambda snapshots: known[:])
    sink, kept = Gathered(), np.array([[True, True, False, False, False, False, False]])
    piece = Piece(np.arange(7)[None], kept)
    write_piece(sink, [0, 1], sampled[:, :2], known.snapshots(torch.from_numpy(kept)), factor=factor, done=set())
    seen = []

    def fill(
        config: object, *, cases: Cases, members: int, first: int, method: Method, **others: object
    ) -> torch.Tensor:
        given = cases.sensor or method.sensor
        normalizer = Normalizer(torch.zeros(2, 1, 2), 2.0)
        observation = cases.observation(normalizer, torch.device("cpu"))
        rows = (
            [cells(observation)]
            if given is None
            else given.select(torch.tensor([0])).rows(observation, normalizer, None)
        )
        y = rows[-1].y
        assert torch.equal(rows[-1].forward(y if given is None else torch.cat([y, y], dim=1)), y)
        assert rows[-1].present[:, :2].all() and not rows[-1].present[:, 2:].any()
        seen.append(2.0 * y[0, :2])
        return sampled[first : first + 1, None]

    monkeypatch.setattr("vecfield_diffusion.programs.fill.fill_cases", fill)
    piece = Piece(np.arange(7)[None], ~kept, known=2)
    fill_piece(filling, Method(DPMpp2M(2), Conditional(), sensor=sensor), piece, sink, factor=factor)
    torch.testing.assert_close(torch.stack(seen), sampled[:, :2])


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 hours of a wave that travels, of which hour 17 is missing."""
    path = tmp_path_factory.mktemp("series") / "drifting.h5"
    y, x = np.mgrid[:16, :16] * 2 * np.pi / 16
    hours = np.delete(np.arange(41), 17)
    u = np.stack([np.sin(x - 0.4 * t) * np.cos(y) for t in hours])
    v = np.stack([-np.cos(x - 0.4 * t) * np.sin(y) for t in hours])
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "vecfield", "version": 1, "dx": 1000.0, "dy": 1000.0})
        file["velocity"] = np.stack((u, v), axis=1).astype(np.float32)
        file["time"] = hours
        file["time"].attrs["units"] = "hours since 2024-01-01"
        file["x"], file["y"] = 1000.0 * np.arange(16), 1000.0 * np.arange(16)
    return path


@pytest.fixture(scope="module")
def network(place: Path, drifting: Path) -> str:
    """The name of a run of sequences of three frames."""
    return f"outputs/train/{drifting.stem}"


@pytest.fixture
def trained(run: Call, place: Path, drifting: Path, network: str) -> str:
    """The same, trained once."""
    if not (place / network).exists():
        options = ["dataset=file", f"dataset.path={drifting}", "dataset.frames=3", "debug=fast", *SMALL]
        split = ["splits.train=0.5", "splits.validation=0.2", "splits.test=0.3", "splits.guard=0"]
        code, out, err = run("train", *options, *split, "name=drifting")
        assert code == 0, err
        assert "40 times, 1 h apart, 1 missing between them (tolerance 0.1 h)" in out
        assert "train: 18 sequences of 3 frames; validation: 6 sequences of 3 frames" in out, out
    return network


def test_the_same_series_whatever_the_batch_and_wherever_it_is_broken_off(
    run: Call, place: Path, trained: str, drifting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In short pieces: stopped after one, the command goes on to the same bits; the batch changes rounding alone."""
    monkeypatch.setattr("vecfield_diffusion.programs.filling.VALUES", 2 * 2 * 256 * 12)
    common = [f"ckpt={trained}", f"input={drifting}", "mask=pixels", "mask.fraction=0.3", "members=2", "horizon=2"]
    common += ["sampler.steps=2", "inpainting=conditional"]
    for name, options in (("whole", []), ("narrow", ["batch=1"])):
        code, _, err = run("infer", *common, f"name={name}", *options)
        assert code == 0, err
    count = 0

    def stop(*given: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return fill_piece(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr("vecfield_diffusion.programs.fill.fill_piece", stop)
        code, _, _ = run("infer", *common, "name=broken")
    assert code == 130 and count == 3
    code, out, err = run("infer", *common, "name=broken")
    assert code == 0 and "going on: " in out, err
    whole, narrow, broken = (xr.open_dataset(place / f"outputs/infer/{name}/fields.nc") for name in
                             ("whole", "narrow", "broken"))  # fmt: skip
    assert whole.sizes["time"] == 42 and bool(whole.u_members.notnull().all())
    assert whole.time.values[-1] - whole.time.values[-3] == np.timedelta64(2, "h")
    np.testing.assert_array_equal(whole.u_members, broken.u_members)
    np.testing.assert_allclose(whole.u_members, narrow.u_members, atol=0.02)  # in bf16, where the machine has it
    scores = json.loads((place / "outputs/infer/whole/metrics.json").read_text())
    assert scores["observed"]["rmse_component"] < 1e-6


def test_later_observations_do_not_reach_the_past(run: Call, place: Path, trained: str, drifting: Path) -> None:
    """With `time_context=past` a snapshot is the same whether the file goes on after it or not."""
    cut = drifting.with_name("cut.h5")
    with h5py.File(drifting) as whole, h5py.File(cut, "w") as file:
        file.attrs.update(whole.attrs)
        for name in ("velocity", "time"):
            file[name] = whole[name][:12]
            file[name].attrs.update(whole[name].attrs)
        file["x"], file["y"] = whole["x"][:], whole["y"][:]
    found = {}
    for name, path, context in (("long", drifting, "past"), ("short", cut, "past"), ("both", drifting, "both")):
        options = ["hide=0.5", "time=11", "members=2", "sampler.steps=2", f"time_context={context}"]
        code, _, err = run("infer", f"ckpt={trained}", f"input={path}", *options, f"name=past-{name}")
        assert code == 0, err
        found[name] = xr.open_dataset(place / f"outputs/infer/past-{name}/fields.nc").u_members.values
    np.testing.assert_array_equal(found["long"], found["short"])
    assert np.abs(found["long"] - found["both"]).max() > 1e-3


def test_the_first_snapshot_is_filled_from_the_past(run: Call, place: Path, trained: str, drifting: Path) -> None:
    """Before it all is missing: frames whose noise is that of no frame of the series."""
    options = ["hide=0.5", "time=0:2", "members=2", "sampler.steps=2", "time_context=past", "name=first"]
    code, _, err = run("infer", f"ckpt={trained}", f"input={drifting}", *options)
    assert code == 0, err
    with xr.open_dataset(place / "outputs/infer/first/fields.nc") as filled:
        assert filled.sizes["time"] == 2 and bool(filled.u_members.notnull().all())


@pytest.mark.parametrize("asked", [["mask=ahead", "mask.horizon=3"], ["mask=MASKS"], ["mask=block", "mask.time=fixed"]])
def test_masks_that_go_through_time_fill_a_series(
    run: Call, place: Path, trained: str, drifting: Path, asked: list[str]
) -> None:
    """What the output says is observed is what the mask shows along the whole run, missing hour included."""
    masks = np.random.default_rng(0).random((41, 16, 16)) < 0.4
    np.save(place / "masks.npy", masks)
    asked = [option.replace("MASKS", "masks.npy") for option in asked]
    options = ["members=2", "sampler.steps=2", "inpainting=conditional", "name=through"]
    code, _, err = run("infer", f"ckpt={trained}", f"input={drifting}", *asked, *options)
    assert code == 0, err
    with xr.open_dataset(place / "outputs/infer/through/fields.nc") as filled:
        observed = filled.observed.values.astype(bool)
    if asked[0] == "mask=ahead":
        np.testing.assert_array_equal(observed.all(axis=(-1, -2)).reshape(len(observed), -1)[:, 0], np.arange(40) < 37)
    elif asked[0] == "mask=block":
        assert (observed == observed[:1]).all() and not observed.all()
    else:
        np.testing.assert_array_equal(observed.reshape(40, 16, 16), np.delete(masks, 17, axis=0))


def test_a_network_of_snapshots_sees_masks_as_they_are_told_to_go(run: Call, place: Path) -> None:
    for option, same in (("mask.time=fixed", True), ("mask.time=auto", False)):
        few = ["time=all", "members=2", "sampler.steps=2", "inpainting=conditional", "name=told"]
        code, _, err = run("infer", "ckpt=outputs/train/run", "mask=block", option, *few)
        assert code == 0, err
        with xr.open_dataset(place / "outputs/infer/told/fields.nc") as filled:
            observed = filled.observed.values
        assert (observed == observed[:1]).all() == same and len(observed) > 2


def test_a_network_that_was_trained_to_foretell_fills(run: Call, place: Path, drifting: Path) -> None:
    """Its masks are those of sequences, also where they are compared with what is to be filled."""
    split = ["splits.train=0.5", "splits.validation=0.2", "splits.test=0.3", "splits.guard=0", "name=foretells"]
    given = ["dataset=file", f"dataset.path={drifting}", "dataset.frames=3", "debug=fast", *SMALL, *split]
    code, _, err = run("train", *given, "mask=ahead")
    assert code == 0, err
    few = ["time=5", "hide=0.5", "members=2", "sampler.steps=2", "name=foretold"]
    code, out, err = run("infer", "ckpt=outputs/train/foretells", f"input={drifting}", *few)
    assert code == 0 and "inpainting=" in out, err


def test_a_series_of_another_step_is_met_with_a_note(run: Call, trained: str, drifting: Path) -> None:
    """Every second hour is not what a network of hours knows; an hour is."""
    slow = drifting.with_name("slow.h5")
    with h5py.File(drifting) as whole, h5py.File(slow, "w") as file:
        file.attrs.update(whole.attrs)
        for name in ("velocity", "time"):
            file[name] = whole[name][:17:2]
            file[name].attrs.update(whole[name].attrs)
        file["x"], file["y"] = whole["x"][:], whole["y"][:]
    common = [f"ckpt={trained}", "hide=0.5", "time=0", "members=2", "sampler.steps=2", "name=slow"]
    _, out, err = run("infer", *common, f"input={slow}")
    assert "are 2 h apart" in out and "trained on 1 h" in out, (out, err)
    assert "apart, those that" not in run("infer", *common, f"input={drifting}")[1]


def test_parts_of_another_kind_are_refused(run: Call, place: Path, trained: str) -> None:
    """A likelihood of sequences, and a weaker network of snapshots beside one of sequences."""
    is_message(run("infer", f"ckpt={trained}", "likelihood=exact", "mask=none"), "likelihood is that of snapshots")
    weaker = ["guidance=autoguidance", "guidance.ckpt=outputs/train/run"]
    is_message(run("infer", f"ckpt={trained}", *weaker), "guidance.ckpt=outputs/train/run")


def test_networks_of_one_file_are_compared_whatever_frames_they_see(
    run: Call, place: Path, trained: str, drifting: Path
) -> None:
    """Also one that an older version trained, whose configuration does not know of frames."""
    options = ["dataset=file", f"dataset.path={drifting}", "debug=fast", *SMALL, "name=snapshots"]
    split = ["splits.train=0.5", "splits.validation=0.2", "splits.test=0.3", "splits.guard=0"]
    assert run("train", *options, *split)[0] == 0
    state = load_checkpoint(place / "outputs/train/snapshots/checkpoints/last.pt")
    config = yaml.safe_load(state["config"])
    config["dataset"] = {key: value for key, value in config["dataset"].items() if key not in ("frames", "stride")}
    save_checkpoint(place / "older.pt", {**state, "config": yaml.safe_dump(config)})
    for other in ("outputs/train/snapshots", "older.pt"):
        options = ["masks=[block]", "cases=4", "members=2", "sampler.steps=2", "name=both", "baselines=[climatology]"]
        code, _, err = run("evaluate", f"ckpt=[{trained},{other}]", f"data={drifting}", *options)
        assert code == 0, err


def test_a_time_without_measurements_is_filled_from_others(
    run: Call, place: Path, trained: str, drifting: Path
) -> None:
    """By itself, too, where a network of snapshots finds nothing to fill it from."""
    gone = drifting.with_name("gone.h5")
    gone.write_bytes(drifting.read_bytes())
    with h5py.File(gone, "r+") as file:
        file["velocity"][11] = np.nan
    options = ["time=11", "members=2", "sampler.steps=2", "name=gone"]
    code, out, err = run("infer", f"ckpt={trained}", f"input={gone}", *options)
    assert (
        code == 0 and "note: filled from other times alone: 1 snapshot without an observed cell, such as 11" in out
    ), err
    assert bool(xr.open_dataset(place / "outputs/infer/gone/fields.nc").u.notnull().all())


def test_a_network_of_sequences_is_scored_as_trajectories(run: Call, place: Path, trained: str) -> None:
    """The observed cells of the scored snapshots are those that all other methods see."""
    options = ["masks=[track]", "cases=6", "series=true", "members=2", "sampler.steps=2", "name=series"]
    code, out, err = run("evaluate", f"ckpt={trained}", *options, "baselines=[climatology,linear]")
    assert code == 0, err
    rows = [line.split(",") for line in (place / "outputs/evaluate/series/scores.csv").read_text().splitlines()]
    named = {(row[1], row[2]) for row in rows}
    assert {("diffusion", "crps"), ("linear", "rmse_component"), ("diffusion", "separation_3")} <= named


def test_what_takes_a_network_of_sequences_is_said(run: Call, trained: str, drifting: Path) -> None:
    """A negative horizon is none; too many frames have no sequence."""
    is_message(run("infer", f"ckpt={trained}", f"input={drifting}", "horizon=-2"), "horizon must be >= 0, got -2")
    options = ["dataset=file", f"dataset.path={drifting}", "debug=fast", *SMALL, "name=long"]
    foreign = [
        "model=foreign",
        "model.network={_target_: torch.nn.Conv2d, in_channels: 6, out_channels: 2, kernel_size: 1}",
    ]
    foreign += ["model.arguments={input: input}", "dataset.frames=3"]
    plain = [option for option in options if not option.startswith("model.")]
    is_message(run("train", *plain, *foreign), "model.frames: must be 1", "another library takes snapshots")
    is_message(run("train", *options, "dataset.frames=30"), "no sequence of 30 frames", "dataset.frames")


def test_pieces_of_snapshots_are_the_snapshots() -> None:
    """All of them are kept, in their order."""
    piece = Piece.of([7, 3])
    assert piece.positions({3: 0, 7: 1}) == [1, 0] and piece.known == 0
    assert series.VALUES == 2**26
