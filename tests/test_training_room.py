"""The training room: memory, threads, records, what is said at the end, and where the numbers go."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from programs import SMALL, TINY, Call, is_message
from test_training import make_batches, make_run

from vecfield_diffusion import memory
from vecfield_diffusion.data.draws import seeded
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.base import BY_SCALARS
from vecfield_diffusion.models.budget import Budget
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.programs import trained
from vecfield_diffusion.threads import Fixed, Tuner
from vecfield_diffusion.training import memory as training_memory
from vecfield_diffusion.training import trainer as trainer_module
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from vecfield_diffusion.training.counters import Counters
from vecfield_diffusion.training.loggers import JSONLines, TensorBoardLogger, WandbLogger
from vecfield_diffusion.training.memory import advice, check_memory, kept_bytes
from vecfield_diffusion.training.settings import Trainer

# Memory.


def test_the_memory_left_is_the_least_of_the_machine_and_its_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:  2000 kB\n")
    assert memory.available(meminfo, tmp_path) == 2_048_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert memory.available(meminfo, tmp_path) == 2_048_000
    (tmp_path / "memory.max").write_text("900000\n")
    assert memory.available(meminfo, tmp_path) == 400_000
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 30000\n")
    assert memory.available(meminfo, tmp_path) == 430_000
    assert memory.available(tmp_path / "none", tmp_path / "none") is None
    assert [memory.readable(n) for n in (12, 4e4, 2.5e9, 4e12)] == ["12 bytes", "40 kB", "2.5 GB", "4e+03 GB"]


def test_sizes_that_do_not_fit_are_refused_before_memory_is_taken() -> None:
    """The sizes of a network count to the byte; a parameter more than the limit is refused."""
    sizes = {"channels": [8, 8], "blocks": 1, "embedding": 16}
    with Budget(10**9) as budget:
        network = UNet(7, **sizes)
    made = sum(weight.nbytes for weight in network.state_dict().values())
    assert made <= budget.taken <= 1.1 * made + 1000
    with Budget(budget.taken):
        UNet(7, **sizes)
    with pytest.raises(ValueError, match="sizes declared ask for"), Budget(budget.taken - 1):
        UNet(7, **sizes)
    for make in (lambda: torch.nn.Linear(10**7, 10**7), lambda: torch.nn.Embedding(10**12, 8)):
        with pytest.raises(ValueError, match="but .* are free"), Budget():
            make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": [1] * 200}, "must name at most 16 resolutions, got 200"),
        ({"blocks": 10**6}, "must be <= 100, got 1000000"),
        ({"channels": [10**6]}, "the sizes declared ask for"),
    ],
)
def test_a_checkpoint_that_declares_a_huge_network_ends_with_a_message(
    place: Path, run: Call, changes: dict, words: str
) -> None:
    state = load_checkpoint(place / "outputs/train/run/checkpoints/last.pt")
    config = yaml.safe_load(state["config"])
    config["model"] |= changes
    save_checkpoint(place / "huge.pt", state | {"config": yaml.safe_dump(config)})
    declared = "declares a network of more" if "sizes declared" in words else words
    is_message(run("infer", "ckpt=huge.pt", "name=huge"), "huge.pt", declared)
    given = f"model.{next(iter(changes))}={json.dumps(next(iter(changes.values())), separators=(',', ':'))}"
    is_message(run("train", *TINY, given, "name=huge"), words)


def test_what_a_step_keeps_grows_with_the_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    batch = run.batches(0)
    one, four = (kept_bytes(run.denoiser, batch[:n]) for n in (1, 4))
    assert one > 8 * 6 * 8 * 4  # at least one layer of 8 channels
    assert four == pytest.approx(4 * one, rel=0.1)


def test_a_batch_that_does_not_fit_names_one_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, batch_size=8)
    batch = run.batches(0)
    sample = kept_bytes(run.denoiser, batch[:1])
    weights = 3 * sum(weight.nbytes for weight in run.denoiser.parameters())
    for samples, words in ((8.1, None), (5, "trainer.accumulate=2"), (2.5, "trainer.accumulate=4"), (0.5, "Not even")):
        left = int(weights + samples * 1.3 * sample)
        monkeypatch.setattr(training_memory, "available", lambda left=left: left)
        if words is None:
            check_memory(run.denoiser, batch, 1)
        else:
            with pytest.raises(UserError, match=words):
                check_memory(run.denoiser, batch, 1)
    assert not (tmp_path / "checkpoints" / "last.pt").exists()
    assert advice(7, 1, 5) == "Use trainer.accumulate=7: 1 at once fit, and the batch stays the same"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
)
def test_memory_refused_within_a_step_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = make_run(tmp_path)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(run.denoiser.network, "forward", refuse)
    monkeypatch.setattr(trainer_module, "check_memory", lambda *_: None)
    with pytest.raises(UserError, match=r"^the memory is full\. Use trainer\.accumulate=2"):
        run.train()


def test_the_trial_of_a_sample_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    first.train()
    monkeypatch.setattr(trainer_module, "check_memory", lambda *_: None)
    second.train()
    ours, theirs = (run.denoiser.network.state_dict() for run in (first, second))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Threads.


def test_threads_are_tuned_where_the_user_chose_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(trainer_module, "allowed", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert isinstance(run.tuner(), Fixed)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert isinstance(run.tuner(), Tuner) and set_to == [2]
    monkeypatch.setattr(trained.threads, "free", lambda: 3)
    trained.choose_device("cpu")
    assert set_to == [2, 3]
    monkeypatch.setattr(trainer_module, "allowed", lambda: 1)
    assert isinstance(run.tuner(), Fixed)


# The end of a run.


def test_a_run_of_less_than_half_its_steps_says_that_the_network_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(max_steps=6000, max_minutes=9)
    said = trainer.untrained(Counters(step=44, minutes=9.0))
    assert said.startswith("44 of 6000 steps were done in 9 minutes: the network is not trained")
    assert "about 1.23e+03 minutes" in said  # 6000 / 44 * 9
    assert trainer.untrained(Counters(step=3000, minutes=9.0)) == ""
    run = make_run(tmp_path, max_steps=10000, max_minutes=1e-4, validate_every=10000)
    run.train()
    assert run.untrained and f"note: {run.untrained}" in capsys.readouterr().out
    run = make_run(tmp_path / "whole")
    run.train()
    assert run.untrained == "" and "note" not in capsys.readouterr().out


def test_the_best_alone_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.train()
    best, last = (tmp_path / "checkpoints" / name for name in ("best.pt", "last.pt"))
    kept = best.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match=r"best.pt is there, but not last.pt.*Copy .*best.pt to .*last.pt"):
        make_run(tmp_path).resume()
    assert best.read_bytes() == kept
    last.write_bytes(kept)
    assert make_run(tmp_path).resume()


def test_a_run_that_is_killed_after_its_first_validation_goes_on(tmp_path: Path) -> None:
    """Wherever best.pt is there is last.pt, though the time for a checkpoint has not come."""
    run = make_run(tmp_path, max_steps=8, checkpoint_minutes=1000.0)
    found = []
    validate = run.validate

    def watched(lines: JSONLines) -> str:
        text = validate(lines)
        found.append(run.last.exists())
        return text

    run.validate = watched
    run.train()
    assert all(found)


@pytest.mark.parametrize(
    "counters",
    [{"step": -1, "samples": 0}, {"step": "4"}, {"step": 1.5}, {"minutes": None}, {"pace": 1}, ["step"], None],
)
def test_damaged_counters_end_with_a_message(tmp_path: Path, counters: object) -> None:
    run = make_run(tmp_path)
    run.train()
    state = load_checkpoint(run.last)
    save_checkpoint(run.last, state | {"counters": counters})
    with pytest.raises(UserError, match=r"last.pt does not fit this run .*Remove it, or choose another name="):
        make_run(tmp_path).resume()


@pytest.mark.parametrize("key", ["scores", "losses", "ema", "optimizer", "network"])
@pytest.mark.parametrize("value", [3, None, "text", [1], {"a": 1}])
def test_a_damaged_part_of_a_checkpoint_ends_with_a_message(tmp_path: Path, key: str, value: object) -> None:
    run = make_run(tmp_path)
    run.train()
    state = load_checkpoint(run.last)
    save_checkpoint(run.last, state | {key: value})
    if (key, value) == ("scores", {"a": 1}):
        assert make_run(tmp_path).resume()
        return
    with pytest.raises(UserError, match=r"last.pt does not fit this run"):
        make_run(tmp_path).resume()


@pytest.mark.parametrize("line", ["nonsense", "3", "{}", '{"step": "1"}', '{"step": 1', "\xff"])
def test_a_broken_record_is_a_message_and_a_last_one_cut_short_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b"\n" + b'{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no record.*Move the file away"):
        JSONLines(path, 5)
    assert path.read_bytes() == before
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + line.encode("latin-1"))
    JSONLines(path, 1).close()
    assert path.read_text() == '{"step": 1}\n'
    with pytest.raises(UserError, match="cannot be read and written"):
        JSONLines(tmp_path, 1)


# Where the numbers go.


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_says_where_it_writes_and_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = WandbLogger()
    logger.open(tmp_path, "run", {})
    said = "".join(capsys.readouterr())
    logger.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert said == f"wandb: offline, in {folder}; to send it there: wandb sync {folder}\n"


def test_tensorboard_says_where_it_writes_and_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger()
    logger.open(tmp_path, "run", {})
    logger.close()
    place = tmp_path / "tensorboard"
    assert capsys.readouterr().out == f"tensorboard: in {place}; to look at it: tensorboard --logdir {place}\n"
    assert place.is_dir()


# What is drawn, and what a network says of itself.


def test_a_generator_belongs_to_its_numbers() -> None:
    def first(*numbers: int) -> float:
        return torch.rand((), generator=seeded(*numbers)).item()

    assert first(1, 2) == first(1, 2)
    assert len({first(1, 2, 3), first(1, 3, 2), first(2, 1, 3), first(3, 2, 1), first(1, 2)}) == 5


def test_a_plain_network_has_the_parametrization_by_scalars(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_batches(make_run(tmp_path).batches.fields))
    assert run.denoiser.parametrization is BY_SCALARS
    with pytest.raises(NotImplementedError, match="does not predict the mean"):
        BY_SCALARS.mean(torch.zeros(1))
    run.denoiser.parametrization.learn(lambda: pytest.fail("no field is asked for"))


def test_small_runs_of_the_program_are_untouched(place: Path, run: Call) -> None:
    assert run("train", *TINY, *SMALL, "name=again", "trainer.max_steps=2")[::2] == (0, "")
