"""kill -9 at any moment loses nothing but time; `benchmarks/kills.py` does so twenty times to the programs."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from test_training import make_run

from vecfield_diffusion.training.checkpoint import load_checkpoint

STEPS = dict(max_steps=10, checkpoint_minutes=1e-9)


def go_on(folder: Path) -> None:
    """Trains from wherever the folder is, silently, with a checkpoint after each step."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        run = make_run(folder, **STEPS)
        run.resume()
        run.train()


def state(folder: Path) -> tuple[dict, list]:
    """The last checkpoint but for the time, and the log."""
    kept = load_checkpoint(folder / "checkpoints" / "last.pt")
    kept["counters"].pop("minutes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return kept, [{name: value for name, value in line.items() if name != "minutes"} for line in lines]


def test_a_training_killed_again_and_again_is_one_that_never_was(tmp_path: Path) -> None:
    make_run(tmp_path / "whole", **STEPS).train()
    context, killed = multiprocessing.get_context("fork"), 0
    log = tmp_path / "killed" / "metrics.jsonl"
    for lines, delay in zip((1, 4, 7, 10), np.random.default_rng(0).uniform(0, 0.03, 4), strict=True):
        process = context.Process(target=go_on, args=(tmp_path / "killed",))
        process.start()
        while process.is_alive() and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.001)
        process.join(delay)
        killed += process.is_alive()
        process.kill()
        process.join()
    run = make_run(tmp_path / "killed", **STEPS)
    run.resume()
    run.train()
    assert killed >= 1
    (expected, written), (found, said) = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert said == written
    assert found.keys() == expected.keys() and found["counters"] == expected["counters"]
    for name in ("network", "ema"):
        for key, value in expected[name].items():
            assert torch.equal(found[name][key], value), key
    for number, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][number][key], value) for key, value in moments.items())
