"""Checkpoints that are damaged, hostile or went wrong in training: one message, before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import FEW, Call, is_message

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.programs.trained import load_trained, unfinished
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state(place: Path) -> dict[str, Any]:
    return load_checkpoint(place / "outputs/train/run/checkpoints/last.pt")


def configured(state: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = yaml.safe_load(state["config"])
    change(config)
    return {**state, "config": yaml.safe_dump(config)}


def refused(tmp_path: Path, state: dict[str, Any], match: str) -> None:
    path = tmp_path / "odd.pt"
    save_checkpoint(path, {key: value for key, value in state.items() if key not in ("format", "version")})
    with pytest.raises(UserError, match=match):
        load_trained(str(path), CPU)


@pytest.mark.parametrize("key", ["config", "data", "grid", "statistics", "mean", "counters", "coordinates"])
@pytest.mark.parametrize("value", [7, "text", [1, 2], {"a": 1}])
def test_a_damaged_identity_is_one_message(tmp_path: Path, state: dict[str, Any], key: str, value: Any) -> None:
    refused(tmp_path, {**state, key: value}, "the checkpoint does not fit this program")


@pytest.mark.parametrize("value", [7, ["a"], [{"process": 3, "factor": 1.0}], [{"process": {}, "factor": "x"}]])
def test_a_damaged_calibration_is_one_message(tmp_path: Path, state: dict[str, Any], value: Any) -> None:
    refused(tmp_path, {**state, "calibration": value}, "the checkpoint does not fit this program")


@pytest.mark.parametrize("key", ["dataset", "mask", "model", "diffusion", "trainer"])
def test_a_configuration_without_a_part_is_one_message(tmp_path: Path, state: dict[str, Any], key: str) -> None:
    refused(tmp_path, configured(state, lambda config: config.pop(key)), "the checkpoint does not fit this program")
    refused(tmp_path, configured(state, lambda config: config.update({key: 3})), "must be a mapping, got 3")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    weights = {name: weight.clone() for name, weight in state["ema"].items()}
    name = next(iter(weights))
    weights[name].view(-1)[0] = torch.nan
    refused(tmp_path, {**state, "ema": weights}, f"1 of {len(weights)} weights are not finite, such as {name}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": [8] * 20000}, "must name at most 16 resolutions"),
        ({"channels": [2**20, 2**20]}, "declares a network of more"),
        ({"blocks": 20000}, "must be <= 100"),
    ],
    ids=["deep", "wide", "long"],
)
def test_a_network_larger_than_its_weights_takes_no_memory(
    tmp_path: Path, state: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    """2^20 channels would be 40 TB; twenty thousand layers are given up as soon as they exceed what is stored."""
    refused(tmp_path, configured(state, lambda config: config["model"].update(change)), words)


def test_the_mask_of_a_checkpoint_runs_no_code(place: Path, run: Call, state: dict[str, Any]) -> None:
    """It is built where `auto` compares masks, under the rule of every name in a checkpoint."""
    harm = {"_target_": "os.system", "command": "touch pwned"}
    odd = configured(state, lambda config: config.update(mask=harm))
    save_checkpoint(place / "mask.pt", {key: value for key, value in odd.items() if key not in ("format", "version")})
    is_message(run("infer", "ckpt=mask.pt", "name=harm", *FEW), "may name only")
    assert not (place / "pwned").exists()


def test_a_checkpoint_from_the_first_half_of_its_schedule_says_so(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    for step, note in ((4, "its training did 4 of the 10 steps of its schedule"), (5, ""), (10, "")):
        counted = {**state, "counters": {**state["counters"], "step": step}}
        save_checkpoint(path, {key: value for key, value in counted.items() if key not in ("format", "version")})
        trained = load_trained(str(path), CPU)
        said = unfinished(trained)
        assert trained.name == "run" and (note in said if note else said == "")
    refused(
        tmp_path, configured(state, lambda config: config["trainer"].update(max_steps="x")), "max_steps must be a num"
    )


def test_the_report_is_called_after_the_run_and_says_what_is_not_trained(place: Path, run: Call) -> None:
    state = load_checkpoint(place / "outputs/train/run/checkpoints/last.pt")
    early = {**state, "counters": {**state["counters"], "step": 4}}
    path = place / "outputs/train/early/checkpoints/last.pt"
    path.parent.mkdir(parents=True)
    (path.parents[1] / "config.yaml").write_text((place / "outputs/train/run/config.yaml").read_text())
    save_checkpoint(path, {key: value for key, value in early.items() if key not in ("format", "version")})
    few = ["masks=[block]", "cases=2", "baselines=climatology", *FEW]
    code, out, err = run("evaluate", "ckpt=outputs/train/early", "name=early", *few)
    assert (code, err) == (0, ""), err
    note = "its training did 4 of the 10 steps of its schedule: the network is not trained"
    text = (place / "outputs/evaluate/early/report.html").read_text()
    assert note in out and note in text and "<title>early on turbulence" in text
