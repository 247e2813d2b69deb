"""Names of what a command leaves: different commands leave different folders."""

from __future__ import annotations

import shlex

import pytest

from vecfield_diffusion import commands


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("ckpt=outputs/train/mine", "mine"),
        ("ckpt=outputs/train/mine/checkpoints/best.pt mask=auto", "mine"),
        ("ckpt=outputs/train/compare/0 time=2022-02-21", "compare_0-time_2022-02-21"),
        ("ckpt=pretrained/agulhas.safetensors mask=my_mask.npy", "agulhas-my_mask"),
        ("ckpt=mine input=radar.nc 'sigma_obs=[u_err,v_err]'", "mine-radar-sigma_obs_u_err_v_err"),
        ("ckpt=mine 'input=\"a b/*.nc\"' hide=0.2", "mine-a_b-hide_0.2"),
        (
            "ckpt=mine inpainting=mmps physics=divergence sampler.schedule=karras",
            "mine-mmps-divergence-schedule_karras",
        ),
        ("ckpt=mine batch=2 device=cpu figure=a.pdf overwrite=true data=/far/away.nc", "mine"),
        ("ckpt=none input=radar.nc metadata.creator=Ann metadata.depth=0", "none-radar"),
        ("ckpt=mine mask=block name=given", "given"),
    ],
)
def test_a_name_is_made_of_the_command(typed: str, name: str) -> None:
    assert commands.infer.config(*shlex.split(typed))["name"] == name


def test_commands_that_compare_and_long_ones() -> None:
    options = ["ckpt=[outputs/train/a,outputs/train/b]", "masks=[pixels,block]", "cases=50"]
    assert commands.evaluate.config(*options)["name"] == "a_b-pixels_block-cases_50"
    long = [commands.infer.config("ckpt=mine", f"input={'radar' * 40}.nc", f"seed={seed}")["name"] for seed in (1, 2)]
    assert len(set(long)) == 2 and {len(name) for name in long} == {100}
    assert commands.train.config()["name"] == "run"
