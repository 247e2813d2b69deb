"""The loop, its state and its statistics: a run that stops and goes on is, bit for bit, one that never stopped."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import pickle
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracle import GaussianPrior
from torch import nn

from vecfield_diffusion.data.augment import Augmentation
from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Pixels
from vecfield_diffusion.data.statistics import leading_eigenvalue, measure, round_up
from vecfield_diffusion.diffusion import precision
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.precision import network_precision
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.run_folder import check_folder, keep_config
from vecfield_diffusion.programs.trained import choose_device, load_trained
from vecfield_diffusion.signals import Interrupted
from vecfield_diffusion.training import checkpoint as checkpoint_module
from vecfield_diffusion.training.batches import Batches
from vecfield_diffusion.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from vecfield_diffusion.training.counters import Counters
from vecfield_diffusion.training.ema import EMA
from vecfield_diffusion.training.loggers import JSONLines, NoLogger, TensorBoardLogger, WandbLogger
from vecfield_diffusion.training.settings import Trainer
from vecfield_diffusion.training.trainer import TrainingRun

HEIGHT, WIDTH = 6, 8
MODEL = {
    "_target_": "vecfield_diffusion.models.unet.UNet",
    "channels": [8],
    "blocks": 1,
    "attention": [],
    "embedding": 8,
    "dropout": 0.1,
}
SPLIT = {"train": [0, 10], "validation": [10, 14], "test": [20, 24]}
CONFIG = {
    "dataset": {},
    "mask": {},
    "model": MODEL,
    "diffusion": {"_target_": "vecfield_diffusion.diffusion.formulations.EDM", "sigma_max": 20.0},
    "trainer": {"precision": "float32", "sigma_obs": 0.1, "condition_dropout": 0.1, "max_steps": 10},
}


def in_memory(velocity: np.ndarray, valid: np.ndarray | None = None, **grid: object) -> Fields:
    height, width = velocity.shape[-2:]
    valid = torch.ones(height, width, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    reader = MemoryReader(velocity.astype(np.float32))
    return Fields(reader, len(velocity), Grid(valid, **grid), np.arange(width), np.arange(height), "memory", ("u", "v"))


def gappy(n: int = 14, seed: int = 0) -> Fields:
    """Fields with land, gaps that differ from snapshot to snapshot, and one snapshot without any value."""
    rng = np.random.default_rng(seed)
    velocity = rng.standard_normal((n, 2, HEIGHT, WIDTH))
    velocity[rng.random((n, 1, HEIGHT, WIDTH)).repeat(2, axis=1) < 0.2] = np.nan
    velocity[3] = np.nan
    valid = np.ones((HEIGHT, WIDTH), dtype=bool)
    valid[:2, :3] = False
    return in_memory(velocity, valid)


def make_batches(fields: Fields, **changes: object) -> Batches:
    arguments = dict(
        indices=range(10),
        normalizer=Normalizer(torch.zeros(2, *fields.shape), 1.0),
        diffusion=EDM(sigma_max=20.0),
        mask=Pixels([0.1, 0.5]),
        augmentation=None,
        size=4,
        seed=0,
    )
    return Batches(fields=fields, **(arguments | changes))


def make_run(folder: Path, batches: Batches | None = None, **changes: object) -> TrainingRun:
    options = dict(max_steps=4, batch_size=4, warmup=8, ema=20, precision="float32", validate_every=2)
    trainer = Trainer(**(options | dict(validation_batches=1, score_cases=0, log_every=1) | changes))
    batches = batches or make_batches(gappy(), size=trainer.batch_size)
    torch.manual_seed(0)
    arguments = {key: value for key, value in MODEL.items() if key != "_target_"}
    network = UNet(in_channels=7, **arguments)
    folder.mkdir(parents=True, exist_ok=True)
    grid = batches.fields.grid
    statistics = dict(std=1.0, lambda_max=1.0, sigma_max=20.0, divergence_rms=1.0, vorticity_rms=1.0)
    return TrainingRun(
        trainer=trainer,
        denoiser=Denoiser(network, EDM(sigma_max=20.0), batches.normalizer),
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        batches=batches,
        validation=replace(batches, indices=range(10, 14)),
        folder=folder,
        logger=NoLogger(),
        identity={
            "config": yaml.safe_dump(CONFIG),
            "grid": grid.state_dict(),
            "data": {
                "length": 24,
                "units": "m s-1",
                "split": {"train": [0, 10], "validation": [10, 14], "test": [20, 24]},
            },
            "statistics": statistics,
            "mean": batches.normalizer.mean,
        },
    )


class Signalled:
    """Batches during the k-th of which a signal comes."""

    def __init__(self, batches: Batches, k: int, number: signal.Signals) -> None:
        self.batches, self.k, self.number = batches, k, number

    def __call__(self, k: int) -> object:
        if k == self.k:
            os.kill(os.getpid(), self.number)
        return self.batches(k)


def same(a: object, b: object) -> bool:
    """Whether two nested states agree bit for bit; the clock apart."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "minutes")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "minutes"} for line in found]


# Resuming.


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "accumulated"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("straight")
    make_run(folder, accumulate=request.param).train()
    return folder, request.param


@pytest.mark.parametrize("end", ["max_steps", "SIGTERM", "SIGINT"])
def test_four_steps_are_two_and_two_more(straight: tuple[Path, int], tmp_path: Path, end: str) -> None:
    folder, accumulate = straight
    first = make_run(tmp_path, accumulate=accumulate, max_steps=2 if end == "max_steps" else 4)
    if end == "max_steps":
        first.train()
    else:
        first.batches = Signalled(first.batches, 1, signal.Signals[end])
        with pytest.raises(Interrupted, match={"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[end]):
            first.train()
    assert load_checkpoint(first.last)["counters"]["step"] == 2
    second = make_run(tmp_path, accumulate=accumulate)
    nn.init.normal_(second.denoiser.network.stem.weight)  # what it began with does not matter
    assert second.resume()
    second.train()
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(each / "checkpoints" / name) for each in (folder, tmp_path)]
        assert states[0]["counters"]["samples"] == 4 * states[0]["counters"]["step"]
        assert same(*states)
    assert lines(tmp_path) == lines(folder)
    assert len(lines(folder)) == 6


def test_a_line_of_the_log_that_spans_a_stop_is_the_same(tmp_path: Path) -> None:
    options = dict(max_steps=6, log_every=3, validate_every=6)
    make_run(tmp_path / "a", **options).train()
    first = make_run(tmp_path / "b", **options)
    first.batches = Signalled(first.batches, 3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        first.train()
    second = make_run(tmp_path / "b", **options)
    assert second.resume() and second.counters.step == 4 and len(second.losses) == 1
    second.train()
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def test_a_finished_run_does_nothing_and_gives_its_scores(straight: tuple[Path, int]) -> None:
    folder, accumulate = straight
    run = make_run(folder, accumulate=accumulate)
    before = run.last.read_bytes()
    assert run.resume()
    assert run.train()["val/loss"] == lines(folder)[-1]["val/loss"]
    assert run.last.read_bytes() == before and len(lines(folder)) == 6


def test_the_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = make_run(tmp_path)
    run.batches = Signalled(run.batches, 0, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_parts_of_a_batch_add_up_to_it(straight: tuple[Path, int], tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "1", max_steps=1), make_run(tmp_path / "2", max_steps=1, accumulate=2)
    for run in (one, two):
        for module in run.denoiser.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    losses = [run.step(run.batches(0)) for run in (one, two)]
    torch.testing.assert_close(*losses)
    gradients = [[p.grad for p in run.denoiser.network.parameters()] for run in (one, two)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_resuming_refuses_another_network_and_an_old_state(tmp_path: Path) -> None:
    make_run(tmp_path, max_steps=1).train()
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    for name, change in (
        ("network", {**state["network"], "stem.weight": torch.zeros(3)}),
        ("network", {}),
        ("optimizer", {}),
        ("counters", {"steps": 3}),
        ("ema", {"more": torch.zeros(1)}),
    ):
        save_checkpoint(tmp_path / "checkpoints" / "last.pt", {**state, name: change})
        with pytest.raises(UserError, match="last.pt does not fit this run") as caught:
            make_run(tmp_path).resume()
        assert "\n" not in str(caught.value)


# Batches.


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    batches = make_batches(gappy())
    late, early = batches(5), batches(2)
    torch.manual_seed(123)
    again = make_batches(gappy())
    for k, batch in ((2, early), (5, late)):
        other = again(k)
        assert same(vars(other.observation), vars(batch.observation))
        assert all(torch.equal(getattr(other, name), getattr(batch, name)) for name in ("x0", "measured", "t", "noise"))
    assert not torch.equal(replace(again, seed=1)(2).noise, early.noise)
    assert not torch.equal(early.noise, late.noise)


@pytest.mark.parametrize("size", [3, 4, 10, 25])
def test_every_snapshot_is_seen_once_a_pass(size: int) -> None:
    batches = make_batches(gappy(), indices=range(2, 12), size=size)
    order = torch.cat([batches.chosen(k) for k in range(20)])
    passes = [order[first : first + 10].tolist() for first in range(0, len(order) - 9, 10)]
    assert all(sorted(each) == list(range(2, 12)) for each in passes)
    assert len({tuple(each) for each in passes}) == len(passes)


def test_what_is_observed_is_measured_and_carries_its_error() -> None:
    fields = in_memory(np.full((200, 2, HEIGHT, WIDTH), 3.0))
    batches = make_batches(fields, indices=range(200), size=200, sigma_obs=0.4, dropout=0.25)
    batch = batches(0)
    given = batch.observation
    assert given.sigma_y.max() <= 0.4 and given.sigma_y.mean().item() == pytest.approx(0.2, abs=0.03)
    z = ((given.y - 3.0) / given.sigma_y).flatten(1)
    assert z.std().item() == pytest.approx(1, abs=0.02)
    silent = ~given.observed.flatten(1).any(1)
    assert silent.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 200))
    land = make_batches(gappy(), dropout=0.0)(0)
    assert (land.observation.observed <= land.measured).all()
    assert not land.measured[..., :2, :3].any() and not land.observation.valid[..., :2, :3].any()


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_condition_dropout_at_its_ends(dropout: float, share: float) -> None:
    fields = in_memory(np.random.default_rng(0).standard_normal((10, 2, HEIGHT, WIDTH)))
    observed = make_batches(fields, size=40, dropout=dropout)(0).observation.observed
    assert (~observed.flatten(1).any(1)).double().mean().item() == share


def test_augmentation_turns_fields_before_they_are_measured() -> None:
    fields = in_memory(np.random.default_rng(0).standard_normal((10, 2, 6, 6)), boundary_x="periodic")
    augmentation = Augmentation(["flip_x"]).resolve(fields.grid, mean_is_zero=True)
    batches = make_batches(fields, augmentation=augmentation, size=40)
    turned, plain = batches(0), fields.read(batches.chosen(0))
    flipped = plain.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None]
    is_plain = (turned.x0 == plain).flatten(1).all(1)
    assert ((turned.x0 == flipped).flatten(1).all(1) ^ is_plain).all()
    assert 10 < is_plain.sum() < 30


# The loss.


def test_what_is_not_measured_changes_nothing(tmp_path: Path) -> None:
    """The same bits whatever stands in a cell without a measurement, and one empty snapshot breaks no step."""
    fields = gappy()
    runs = []
    for junk in (np.nan, 7.0):
        other = gappy()
        array = other.reader.array
        land = ~fields.grid.valid.numpy()
        array[..., land] = junk
        one_component = np.isnan(array)
        one_component[:, 1] = False
        array[one_component] = np.nan if np.isnan(junk) else np.inf
        run = make_run(tmp_path / str(junk), make_batches(other), max_steps=4)
        run.train()
        runs.append(load_checkpoint(run.last))
    assert same(*runs)
    assert all(value.isfinite().all() for value in runs[0]["network"].values())
    batches = make_batches(fields, indices=[3], size=4)
    batch = batches(0)
    assert not batch.measured.any() and not batch.observation.observed.any()
    run = make_run(tmp_path / "empty", batches)
    assert run.step(batch).item() == 0.0
    assert all(value.isfinite().all() for value in run.denoiser.network.state_dict().values())


def test_the_loss_reads_no_cell_that_is_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    batch = run.batches(0)
    junk = torch.where(batch.measured, batch.x0, torch.nan)
    assert not batch.measured.all()
    losses = [
        denoising_loss(run.denoiser.eval(), x0, batch.measured, batch.observation, batch.t, batch.noise)
        for x0 in (batch.x0, junk)
    ]
    assert torch.equal(*losses) and losses[0].isfinite().all()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path, max_steps=2).train()
    run = make_run(tmp_path)
    before = run.last.read_bytes()
    assert run.resume()
    run.batches = replace(run.batches, diffusion=EDM(sigma_max=20.0))
    plain = run.batches
    run.batches = lambda k: replace(plain(k), t=torch.full((4,), torch.inf))
    with pytest.raises(UserError, match="the loss is no longer finite at step 3. The last good checkpoint is kept"):
        run.train()
    assert run.last.read_bytes() == before
    again = make_run(tmp_path)
    assert again.resume() and again.train()["val/loss"] > 0


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, log_every=4, validate_every=4, checkpoint_minutes=1e-9)
    network = run.denoiser.network
    network.stem.weight.register_hook(lambda gradient: gradient * (torch.inf if run.counters.step == 2 else 1.0))
    with pytest.raises(UserError, match="no longer finite at step 3. The last good checkpoint is kept"):
        run.train()
    state = load_checkpoint(run.last)
    assert state["counters"]["step"] == 2 and all(value.isfinite().all() for value in state["network"].values())


def test_a_loss_that_is_not_finite_at_the_start_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    plain = run.batches
    run.batches = lambda k: replace(plain(k), noise=torch.full((4, 2, HEIGHT, WIDTH), torch.nan))
    with pytest.raises(UserError, match="at step 1. No checkpoint was kept"):
        run.train()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_small_network_learns_a_gaussian(tmp_path: Path) -> None:
    """Untrained, D = c_skip z and the weighted loss is 1; the optimum is mean (s^2 + 1) lambda / (lambda + s^2)."""
    prior = GaussianPrior(HEIGHT, WIDTH)
    root = prior.vectors * prior.eigenvalues.sqrt()
    noise = torch.randn(3000, prior.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fields = in_memory((noise @ root.T).view(-1, *prior.shape).numpy(), boundary_x="periodic", boundary_y="periodic")
    diffusion = EDM(sigma_min=0.05, sigma_max=20.0)
    batches = make_batches(fields, indices=range(2000), diffusion=diffusion, size=32, dropout=1.0)
    run = make_run(
        tmp_path, batches, max_steps=250, batch_size=32, warmup=500, ema=1000, cooldown=0.3, log_every=250,
        validate_every=250, validation_batches=8,
    )  # fmt: skip
    torch.manual_seed(0)
    network = UNet(in_channels=7, periodic=(True, True), channels=[24], blocks=1, attention=[], embedding=32)
    run.denoiser = Denoiser(network, diffusion, batches.normalizer)
    run.optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    run.validation = replace(batches, indices=range(2000, 3000))
    run.__post_init__()
    before = run.validation_loss()["val/loss"]
    after = run.train()["val/loss"]
    s = torch.cat([run.validation(k).t for k in range(8)]).double()[:, None]
    optimum = ((s**2 + 1) * prior.eigenvalues / (prior.eigenvalues + s**2)).mean().item()
    assert before == pytest.approx(1, abs=0.05)
    assert optimum * 0.95 < after < optimum + 0.15 * (before - optimum)


# Schedules.


def test_the_average_forgets_half_in_a_half_life() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    ema = EMA(network, half_life=640)
    network.weight.data.fill_(0.0)
    samples = 10**6
    for step in range(1, 41):
        samples += 32
        ema.update(network, 32, samples)
        assert ema.state_dict()["weight"].item() == pytest.approx(0.5 ** (32 * step / 640), rel=1e-5)
    other = EMA(nn.Linear(1, 1, bias=False), half_life=640)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.weights["weight"], ema.weights["weight"])
    assert other.weights["weight"].data_ptr() != ema.weights["weight"].data_ptr()


def test_the_average_follows_closely_at_the_start_and_without_half_life() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    early, none = EMA(network, half_life=1e9), EMA(network, half_life=0)
    network.weight.data.fill_(0.0)
    early.update(network, 20, 400)  # half-life 0.05 * 400
    assert early.state_dict()["weight"].item() == pytest.approx(0.5)
    none.update(network, 1, 1)
    assert none.state_dict()["weight"].item() == 0.0
    with pytest.raises(ValueError, match="ema must be >= 0"):
        EMA(network, -1)


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    trainer = Trainer(max_steps=1000, batch_size=10, warmup=2000, cooldown=0.25)
    rates = {step: trainer.rate(Counters(step, 10 * step)) for step in (0, 99, 199, 200, 749, 750, 875, 999)}
    expected = {0: 0.005, 99: 0.5, 199: 1.0, 200: 1.0, 749: 1.0, 750: 1.0, 875: 0.5, 999: 0.004}
    assert rates == pytest.approx(expected)
    assert Trainer(warmup=0).rate(Counters()) == 1.0
    timed = Trainer(max_steps=10**9, max_minutes=8.0, warmup=0, cooldown=0.5)
    assert timed.rate(Counters(5, 160, minutes=6.0)) == pytest.approx(0.5)
    assert timed.progress(Counters(5, 160, minutes=9.0)) > 1 and timed.rate(Counters(5, 160, minutes=9.0)) == 0.0


def test_the_optimizer_gets_that_rate(straight: tuple[Path, int]) -> None:
    folder, _ = straight
    rates = [line["lr"] for line in lines(folder) if "lr" in line]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("batch_size", 0),
        ("accumulate", 3),
        ("log_every", 0),
        ("validation_batches", 0),
        ("condition_dropout", 1.5),
        ("cooldown", -0.1),
        ("grad_clip", 0.0),
        ("checkpoint_minutes", 0.0),
        ("warmup", -1),
        ("ema", -1),
        ("score_members", 1),
        ("max_minutes", 0.0),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .*got {value}$"):
        Trainer(**{name: value})


def test_max_minutes_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=10**6, max_minutes=0.2 / 60)
    run.train()
    assert 0 < run.counters.step < 10**6 and run.counters.minutes >= 0.2 / 60
    assert load_checkpoint(run.last)["counters"]["step"] == run.counters.step


def test_precision_is_chosen_for_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX512-BF16 alone is fast on AMD's processors, not on Intel's."""
    monkeypatch.setattr(precision, "PROCESSOR", processor := tmp_path / "cpuinfo")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert network_precision("float32", gpu) is None and network_precision("bf16", cpu) is torch.bfloat16
    for avx, amx, vendor, fast in (
        (True, False, "AuthenticAMD", True),
        (True, False, "GenuineIntel", False),
        (True, True, "GenuineIntel", True),
        (False, False, "AuthenticAMD", False),
    ):
        processor.write_text(f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert network_precision("auto", cpu) is (torch.bfloat16 if fast else None)
    for major, expected in ((7, None), (8, torch.bfloat16), (9, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert network_precision("auto", gpu) is expected


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device=cuda: torch sees no GPU here. Use device=auto or device=cpu"):
        choose_device("cuda")


# Checkpoints.


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.ones(3)})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="last.pt: the checkpoint could not be written.*No space left on device"):
        save_checkpoint(path, {"weights": torch.zeros(3)})

    def fails(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:820] . PytorchStreamWriter failed writing file")

    monkeypatch.undo()
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match="an older one is as it was"):
        save_checkpoint(path, {"weights": torch.zeros(3)})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(3))


class Malicious:
    """What runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def test_what_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "good.pt", {"weights": torch.randn(100)})
    good = (tmp_path / "good.pt").read_bytes()
    flipped = bytearray(good)
    flipped[flipped.find(load_checkpoint(tmp_path / "good.pt")["weights"].numpy().tobytes()) + 5] ^= 1
    contents = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "one byte short": good[:-1],
        "one bit": bytes(flipped),
        "text": b"hello world\n",
        "pickle": pickle.dumps({"format": "vecfield-checkpoint", "version": 1}),
        "malicious pickle": pickle.dumps(Malicious(tmp_path / "pwned")),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"format": "vecfield-checkpoint", "version": 1, "x": Malicious(tmp_path / "pwned")}, tmp_path / "torch")
    torch.save(nn.Linear(1, 1), tmp_path / "module")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*contents, "torch", "module"):
            with pytest.raises(UserError, match="not a checkpoint that can be read: it (is damaged|holds objects)"):
                load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_what_is_of_another_program_or_version_is_refused(tmp_path: Path) -> None:
    for state in ({"weights": torch.zeros(1)}, [1, 2], {"format": "other"}, torch.zeros(3)):
        torch.save(state, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="not a checkpoint of this program"):
            load_checkpoint(tmp_path / "foreign.pt")
    for version in ({"version": 99}, {}):
        torch.save({"format": checkpoint_module.FORMAT, **version}, tmp_path / "new.pt")
        with pytest.raises(UserError, match="checkpoint version (99|None), but this program reads version 1"):
            load_checkpoint(tmp_path / "new.pt")


def test_where_a_checkpoint_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there. Give a run folder or a checkpoint file"):
        load_checkpoint(find_checkpoint(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.pt", "best.pt"):
        (folder / name).touch()
        assert find_checkpoint(tmp_path) == folder / name
    assert find_checkpoint(folder / "last.pt") == folder / "last.pt"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run", max_steps=1)
    run.train()
    return run.last


def test_a_checkpoint_is_all_that_sampling_needs(saved: Path) -> None:
    trained = load_trained(str(saved.parents[1]), torch.device("cpu"))
    state = load_checkpoint(saved)
    assert same(dict(trained.denoiser.network.state_dict()), state["ema"])
    assert trained.step == 1 and trained.grid.shape == (HEIGHT, WIDTH)
    assert not trained.denoiser.training and not any(p.requires_grad for p in trained.denoiser.parameters())


FOREIGN = """
import torch

class Net(torch.nn.Linear):
    def __init__(self, in_channels: int, periodic: tuple[bool, bool] = (False, False)) -> None:
        super().__init__(in_channels, 2)
"""


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.call", "torch.hub.load", "vecfield_diffusion.config.build.build"]
)
def test_a_checkpoint_that_names_code_runs_none(saved: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"{command} was run"))
    for key in ("model", "diffusion"):
        config = {**CONFIG, key: {"_target_": target, "command": "echo", "args": "echo"}}
        save_checkpoint(saved, {**load_checkpoint(saved), "config": yaml.safe_dump(config)})
        with pytest.raises(UserError):
            load_trained(str(saved), torch.device("cpu"))


def test_a_foreign_class_needs_trust(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_net.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    config = {**CONFIG, "model": {"_target_": "foreign_net.Net"}}
    weights = nn.Linear(7, 2).state_dict()
    save_checkpoint(saved, {**load_checkpoint(saved), "config": yaml.safe_dump(config), "ema": weights})
    with pytest.raises(UserError, match=r"may name only .* add trust=\[foreign_net\]"):
        load_trained(str(saved), torch.device("cpu"))
    trained = load_trained(str(saved), torch.device("cpu"), ["foreign_net"])
    assert type(trained.denoiser.network).__name__ == "Net"


def test_a_checkpoint_of_another_network_is_refused(saved: Path) -> None:
    state = load_checkpoint(saved)
    for change in (
        {"config": yaml.safe_dump({**CONFIG, "model": {**MODEL, "channels": [16]}})},
        {"config": yaml.safe_dump({**CONFIG, "model": {**MODEL, "blocks": 2}})},
        {"config": "][", "ema": {}},
        {"config": "text"},
        {"config": 3},
        {"ema": {}},
        {"ema": {**state["ema"], "stem.weight": torch.zeros(2)}},
        {"grid": {}},
        {"statistics": {"std": 1.0}},
        {"mean": None},
        {"counters": {}},
    ):
        save_checkpoint(saved, {**state, **change})
        with pytest.raises(UserError, match="does not fit this program|expected|declares a network of more") as caught:
            load_trained(str(saved), torch.device("cpu"))
        assert "\n" not in str(caught.value)


def test_a_folder_keeps_the_configuration_that_its_run_began_with(tmp_path: Path) -> None:
    config = {"name": "a", "seed": 0, "diffusion": {"sigma_max": 40.0}, "trainer": {"max_steps": 5, "batch_size": 4}}
    keep_config(config, tmp_path)
    keep_config({**config, "seed": 1}, tmp_path)  # nothing was trained yet: a new beginning
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    with pytest.raises(UserError, match="holds a run with seed=1, not 0. Give the same to go on with it, or another"):
        keep_config(config, tmp_path)
    same_run = {**config, "seed": 1, "name": "b", "trainer": {"max_steps": 9, "batch_size": 4}}
    assert check_folder({**same_run, "diffusion": {"sigma_max": "auto"}}, tmp_path)
    with pytest.raises(UserError, match="diffusion.sigma_max=40.0, not 50.0"):
        check_folder({**same_run, "diffusion": {"sigma_max": 50.0}}, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


# Logs.


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    log = JSONLines(path, 2)
    log.log({"loss": 0.25}, 4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*records[:3], {"step": 4, "loss": 0.25}]
    log.close()
    JSONLines(path, 0).close()
    assert path.read_text() == "" and [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (4, 3), (255, 0, 0)).save(folder / "picture.png")
    return folder / "picture.png"


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger()
    logger.open(tmp_path, "name", {"seed": 0})
    logger.log({"loss": 0.5}, 3)
    logger.picture(picture(tmp_path), 3)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(3, 4, 3)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_an_account_stays_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "run"
    folder.mkdir(parents=True)
    logger = WandbLogger()
    logger.open(folder, "sweep/0", {"seed": 0})
    logger.log({"loss": 0.5}, 1)
    logger.picture(picture(tmp_path), 1)
    logger.close()
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0
    assert not (tmp_path / "wandb").exists()
    with pytest.raises(ValueError, match="mode must be auto, online or offline, got 'sometimes'"):
        WandbLogger(mode="sometimes")


# Statistics.


@pytest.mark.parametrize("mean_field", [True, False])
def test_statistics_are_those_of_numpy(mean_field: bool) -> None:
    fields = gappy(20)
    fields.reader.array[:, 0] += 5.0
    indices = range(2, 17)
    normalizer, statistics = measure(fields, indices, mean_field)
    x = fields.read(indices).double().numpy()
    valid = fields.grid.valid.numpy()
    mean = np.where(valid, np.nan_to_num(np.nanmean(np.where(valid, x, 0.0), axis=0)), 0.0) if mean_field else 0.0
    anomaly = x - mean
    assert statistics.std == pytest.approx(np.sqrt(np.nanmean(anomaly**2)), rel=1e-6)
    np.testing.assert_allclose(normalizer.mean.numpy(), np.broadcast_to(mean, (2, HEIGHT, WIDTH)), atol=1e-6)
    # The product of two snapshots is that over the cells that both measure, as if these were all.
    flat, seen = (anomaly / statistics.std).reshape(len(x), -1), np.isfinite(anomaly).reshape(len(x), -1)
    product = [[np.nansum(a * b) / max(1, (s & t).sum()) for b, t in zip(flat, seen)] for a, s in zip(flat, seen)]  # noqa: B905
    largest = np.linalg.eigvalsh(np.array(product) * seen.any(axis=0).sum() / len(x))[-1]
    assert statistics.lambda_max == pytest.approx(largest, rel=1e-5)
    wanted = 10 * math.sqrt(largest)
    assert wanted <= statistics.sigma_max < wanted + 10 ** (math.floor(math.log10(wanted)) - 1)
    assert f"{statistics.sigma_max:.1e}" == f"{statistics.sigma_max:.6e}"[:3] + f"{statistics.sigma_max:.6e}"[-4:]


def test_auto_subtracts_the_mean_unless_all_cells_are_alike() -> None:
    velocity = np.random.default_rng(0).standard_normal((10, 2, 6, 6)) + 2.0
    periodic = in_memory(velocity, boundary_x="periodic", boundary_y="periodic")
    assert (measure(periodic, range(10))[0].mean == 0).all()
    assert (measure(in_memory(velocity), range(10))[0].mean > 0).any()


def test_the_divergence_is_that_of_the_cells_in_the_domain() -> None:
    """u = a x with land: away from the coast the divergence is a, and land takes no part in its mean square."""
    x = np.arange(12.0)
    velocity = np.zeros((3, 2, 10, 12))
    velocity[:, 0] = 2e-5 * 1000.0 * x * np.array([1.0, 2.0, 3.0])[:, None, None]
    valid = np.ones((10, 12), dtype=bool)
    valid[:, 8:] = False
    _, statistics = measure(in_memory(velocity, valid, dx=1000.0, dy=1000.0), range(3), False)
    slopes = 2e-5 * np.array([1.0, 2.0, 3.0])
    # Through the coast nothing flows: the last wet column loses all that its other face brings.
    coast = -(6.5 * slopes)
    expected = np.sqrt((7 * (slopes**2).mean() + (coast**2).mean()) / 8)
    assert statistics.divergence_rms == pytest.approx(expected, rel=1e-5)
    assert statistics.vorticity_rms == pytest.approx(0, abs=1e-9)


def test_fields_that_do_not_vary_are_refused() -> None:
    for velocity in (np.zeros((5, 2, 4, 4)), np.full((5, 2, 4, 4), 3.0), np.full((5, 2, 4, 4), np.nan)):
        with pytest.raises(UserError, match="memory: the 5 training snapshots do not vary"):
            measure(in_memory(velocity), range(5), True)


def test_the_eigenvalue_is_estimated_from_at_most_1024_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecfield_diffusion.data.statistics.SNAPSHOTS", 4)
    fields = in_memory(np.random.default_rng(0).standard_normal((9, 2, 4, 4)))
    flat = fields.read(range(0, 9, 3)).double().flatten(1).numpy()
    got = leading_eigenvalue(fields, range(9), Normalizer(torch.zeros(2, 4, 4), 1.0))
    assert got == pytest.approx(np.linalg.eigvalsh(flat.T @ flat / 3)[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"), [(41.2, 42.0), (40.0, 40.0), (99.2, 100.0), (123.0, 130.0), (0.0412, 0.042), (5.05, 5.1)]
)
def test_rounding_goes_up(value: float, expected: float) -> None:
    assert round_up(value) == pytest.approx(expected, rel=1e-12)


def test_levels_of_validation_fall_into_their_bins(tmp_path: Path) -> None:
    """The bins are even in ln s and together hold all: their means, weighted by size, give the mean."""
    run = make_run(tmp_path, validation_batches=5)
    values = run.validation_loss()
    levels = torch.cat([run.validation(k).t for k in range(5)])
    edges = np.geomspace(0.002, 20.0, 5)
    counts, _ = np.histogram(levels.numpy(), edges)
    assert counts.sum() == 20
    bins = [values.get(f"val/loss_s{low:.2g}_{high:.2g}", 0.0) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    assert values["val/loss"] == pytest.approx(np.average(bins, weights=counts), rel=1e-5)
    assert values == run.validation_loss()
    assert replace(run.validation, diffusion=DDPM())(0).t.max() < 1000
