"""Training by two processes: the same steps as by one, and one word for whatever happens to any of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import gappy, make_batches
from torch import Tensor

from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.few_steps import CRPS, Consistency
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.residual import Residual
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.signals import Interrupted
from vecfield_diffusion.training import launch
from vecfield_diffusion.training.batches import Batch
from vecfield_diffusion.training.checkpoint import load_checkpoint
from vecfield_diffusion.training.distributed import DataParallel, SingleProcess
from vecfield_diffusion.training.few_steps import FewStepRun
from vecfield_diffusion.training.launch import DIED, DONE, EXIT, FAILED, REFUSED, Outcome, joined, launched
from vecfield_diffusion.training.loggers import NoLogger
from vecfield_diffusion.training.settings import Trainer
from vecfield_diffusion.training.sharded import ShardedDataParallel
from vecfield_diffusion.training.trainer import TrainingRun


def doubled(batches: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """The same batches in float64."""

    def double(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    def batch(k: int) -> Batch:
        drawn = batches(k)
        parts = (double(value) for value in (drawn.x0, drawn.measured, drawn.t, drawn.noise))
        x0, measured, t, noise = parts
        return Batch(x0, measured, drawn.observation.apply(double), t, noise)

    return batch


def make_run(
    folder: Path, processes: SingleProcess, max_steps: int, accumulate: int, diffusion: Diffusion | None
) -> TrainingRun:
    """A run in float64; without a formulation of all that may be trained: a network, a mean, its variance, and the
    uncertainty of the levels."""
    torch.manual_seed(0)
    kind, run = (Residual, TrainingRun) if diffusion is None else (UNet, FewStepRun)
    diffusion = diffusion or EDM(sigma_max=20.0, uncertainty=True)
    batches = make_batches(gappy(), size=12, diffusion=diffusion)
    network = kind(in_channels=7, channels=[8], blocks=1, attention=[], embedding=8)
    denoiser = Denoiser(network, diffusion, batches.normalizer).double()
    processes.distribute(denoiser)
    options = dict(max_steps=max_steps, batch_size=12, accumulate=accumulate, warmup=12, ema=20, validate_every=2)
    return run(
        trainer=Trainer(**options, log_every=1, validation_batches=1, score_cases=0, grad_clip=0.1),
        denoiser=denoiser,
        optimizer=torch.optim.AdamW(denoiser.parameters(), lr=1e-3, fused=True),
        batches=doubled(batches),
        validation=doubled(replace(batches, indices=range(10, 14))),
        folder=folder,
        logger=NoLogger(),
        identity={},
        processes=processes,
    )


def trained(
    folder: Path,
    processes: SingleProcess,
    max_steps: int = 4,
    accumulate: int = 1,
    diffusion: Diffusion | None = None,
    stopped_at: int = 0,
) -> None:
    """Trains, or goes on; `stopped_at` is the step after which a signal comes."""
    run = make_run(folder, processes, max_steps, accumulate, diffusion)
    run.resume()
    step = run.step

    def signalled(batch: Batch) -> Tensor:
        loss = step(batch)
        if run.counters.step == stopped_at:
            run.stop(signal.SIGTERM)
        return loss

    run.step = signalled
    with nullcontext() if not stopped_at else pytest.raises(Interrupted):
        run.train()


def train_in_all_ways(folder: Path) -> int:
    """Whole weights and shared ones, in one stretch, in two, and going on from what one process began."""
    with joined("ddp") as processes:
        assert type(processes) is DataParallel
        trained(folder / "ddp", processes)
        trained(folder / "parts", processes, accumulate=2)
        trained(folder / "crps", processes, accumulate=2, diffusion=CRPS(members=3))
        trained(folder / "crps, fsdp", ShardedDataParallel(), diffusion=CRPS(members=3))
        trained(folder / "consistency", ShardedDataParallel(), diffusion=Consistency(EDM(sigma_max=20.0)))
        trained(folder / "fsdp", ShardedDataParallel(), stopped_at=2)
        trained(folder / "fsdp", ShardedDataParallel())
        trained(folder / "begun", ShardedDataParallel())
        for name in ("to one", "to three"):
            trained(folder / name, ShardedDataParallel(), stopped_at=2)
        return processes.count


def go_on(folder: Path) -> int:
    """Three processes go on from what two have left in parts."""
    with joined("fsdp") as processes:
        trained(folder / "to three", processes)
        return processes.count


def states(folder: Path) -> dict[str, Tensor]:
    """The weights, averages and moments of the last checkpoint by name."""
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["counters"]["step"] == 4
    named = {part: state[part] for part in ("network", "diffusion", "ema")}
    named |= {f"moments of {number}": kept for number, kept in state["optimizer"]["state"].items()}
    return {f"{part}: {name}": value for part, values in named.items() for name, value in values.items()}


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "minutes"} for line in lines]


def test_two_processes_take_the_steps_of_one_whatever_they_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights, averages and moments after four steps, to rounding, in one stretch and in two."""
    monkeypatch.setattr(launch, "CONTEXT", "forkserver")  # five processes import torch once
    multiprocessing.set_forkserver_preload(["vecfield_diffusion.training.sharded"])
    trained(tmp_path / "begun", SingleProcess(), max_steps=2)
    trained(tmp_path / "one", SingleProcess())
    assert launched(train_in_all_ways, tmp_path, devices=2) == 2
    for name in ("to one", "to three"):
        kept = tmp_path / name / "checkpoints"
        assert (kept / "shards" / "00000002" / "state.pt").exists()
        (kept / "last.pt").unlink()  # of the first validation
    trained(tmp_path / "to one", SingleProcess())
    assert launched(go_on, tmp_path, devices=3) == 3
    trained(tmp_path / "crps, one", SingleProcess(), diffusion=CRPS(members=3))
    trained(tmp_path / "consistency, one", SingleProcess(), diffusion=Consistency(EDM(sigma_max=20.0)))
    ways = [(way, "one") for way in ("ddp", "fsdp", "begun", "parts", "to one", "to three")]
    ways += [("crps", "crps, one"), ("crps, fsdp", "crps, one"), ("consistency", "consistency, one")]
    for way, alone in ways:
        assert not (tmp_path / way / "checkpoints" / "shards").exists()  # last.pt is newer
        found, expected, log = states(tmp_path / way), states(tmp_path / alone), records(tmp_path / alone)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-7, atol=1e-11, msg=lambda text, name=f"{way}: {name}": f"{name}: {text}"
            )
        for line, wanted in zip(records(tmp_path / way), log, strict=True):
            assert line == pytest.approx(wanted, rel=3e-7), way  # losses are added up in float32


def test_processes_that_share_a_training_have_one_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the user can mend goes before what the others say of a partner that has gone."""
    gone, full = Outcome(FAILED, "Connection closed by peer"), Outcome(REFUSED, "the disk is full")
    assert launch._result({0: Outcome(DONE, 7), 1: Outcome(DONE, 8)}) == 7
    with pytest.raises(UserError, match="the disk is full"):
        launch._result({0: gone, 1: full})
    with pytest.raises(UserError, match="process 1 of the training was ended by SIGKILL"):
        launch._result({0: gone, 1: Outcome(DIED, -9)})
    with pytest.raises(RuntimeError, match="process 1 failed:\nConnection"):
        launch._result({0: Outcome(DONE), 1: gone})
    with pytest.raises(SystemExit) as stopped:
        launch._result({0: Outcome(EXIT, 143), 1: gone})
    assert stopped.value.code == 143
    with pytest.raises(UserError, match=r"batch_size=6 is no multiple of 2 processes times .*=2. .*batch_size=8"):
        two = SingleProcess()
        two.count = 2
        two.check(batch_size=6, accumulate=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="trainer.devices=2, but torchrun has started 4 processes"):
        launched(print, devices=2)


def killed_or_waiting(folder: Path) -> None:
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_process_that_is_killed_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    monkeypatch.setattr(launch, "CONTEXT", "fork")  # nothing is computed
    with pytest.raises(UserError, match=r"process 1 .* SIGKILL, as where memory is full.* goes on from"):
        launched(killed_or_waiting, tmp_path, devices=2)
    other = tmp_path / "0"
    if other.exists():  # unless it had not begun yet
        with pytest.raises(ProcessLookupError):
            os.kill(int(other.read_text()), 0)
