"""The help: comments of YAML files, and what the real commands print."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vecfield_diffusion import commands
from vecfield_diffusion.config.help import read_comments
from vecfield_diffusion.config.program import CONF, Program

ROOT = Path(__file__).parents[1]
PROGRAMS = ["train", "infer", "evaluate", "inspect", "calibrate", "export", "drift"]

TEXT = """\
# @package _global_
# What the file
# is about.
defaults:
  - base
  - mask: auto   # what is observed
a: 1             # first
b: "x # y"       # second,
                 # and more
# third,
# above
c:
  d: {e: 1}      # fourth
  # fifth
  f: null
g: null

# not of the head
h: [1, 2]  # sixth # seventh
i: |-
  # text
j:               # eighth
  k: a#b
"""


def test_the_comments_of_a_file() -> None:
    found = read_comments(TEXT)
    assert found.head == "What the file is about."
    assert found.keys == {
        "mask": "what is observed",
        "a": "first",
        "b": "second, and more",
        "c": "third, above",
        "c.d": "fourth",
        "c.f": "fifth",
        "h": "not of the head sixth # seventh",
        "j": "eighth",
    }


def test_an_empty_file_says_nothing() -> None:
    assert read_comments("") == read_comments("{}\n")
    assert read_comments("# All\n{}\n").head == "All"


def shown(program: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        getattr(commands, program)()
    out, err = capsys.readouterr()
    assert (end.value.code or 0) == (1 if err else 0)
    return out + err


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: shown(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_names_every_key_and_only_the_groups_of_the_program(ask, program: str) -> None:
    main: Program = getattr(commands, program)
    out = ask(program, "--help")
    lines = out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    config = main.config(*([] if program != "inspect" else ["a.nc"]), complete=False)
    for key in main.keys:
        assert any(line.startswith(f"{key}=") for line in lines), key
    infer_only = {"sampler", "inpainting", "physics", "guidance", "sensor"}
    groups = {
        "train": {"dataset", "mask", "model", "diffusion", "sampler", "physics", "optimizer", "trainer", "logger"}
        | {"experiment", "debug"},
        "infer": infer_only | {"mask"},
        "evaluate": infer_only,
        "calibrate": infer_only,
        "export": set(),
        "drift": set(),
        "inspect": set(),
    }[program]
    every = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    named = {line.partition("=")[0] for line in lines if line[:1].isalpha() and "=" in line.split(" ")[0]}
    assert named & every == groups
    assert named - every == set(main.keys) and set(config) >= set(main.keys)


def test_every_key_of_a_program_is_commented() -> None:
    for program in PROGRAMS:
        main = getattr(commands, program)
        names = ["evaluate"] if program == "calibrate" else [program]
        comments = read_comments((CONF / f"{names[0]}.yaml").read_text()).keys
        assert set(main.keys) <= set(comments), set(main.keys) - set(comments)
        chosen = {key for key in comments if (CONF / key).is_dir()}
        assert program in ("export", "inspect", "drift") or "sampler" in chosen


def test_every_option_says_what_it_is(ask) -> None:
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()):
        program = "infer" if group in ("inpainting", "guidance", "sensor") else "train"
        out = ask(program, "--help", group)
        options = out[out.index(f"Options ({group}=option):") :].splitlines()[2:]
        named = {line.split()[0]: line.split()[1:] for line in options if line.startswith("  ") and line[2] != " "}
        assert set(named) == {file.stem for file in (CONF / group).glob("*.yaml")}
        assert all(named.values()), (group, [name for name, words in named.items() if not words])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["infer", "hide"], ["hide=0.0\n", "share of the observed cells", "takes a number\n"]),
        (["infer", "device"], ["device=auto\n", "takes one of auto, cpu, cuda\n"]),
        (
            ["infer", "sampler=heun", "sampler.S_churn"],
            ["sampler.S_churn=0.0\n", "0: deterministic", "takes a number\n"],
        ),
        (
            ["infer", "sampler"],
            ["sampler=dpmpp_2m  (vecfield_diffusion.", "\n  sampler.steps=32  ", "\n  euler_maruyama "],
        ),
        (["infer", "mask=track", "mask"], ["mask=track  (", "  mask.legs=1 "]),
        (["train", "window"], ["a list of 2 (a whole number, a whole number) or null"]),
        (["train", "splits"], ["blocks of time", "  splits.train=0.8"]),
        (["train", "trainer.ema", "seed"], ["trainer.ema=50000", "half-life", "seed=0"]),
        (["inspect", "dx"], ["dx=null\n", "metres"]),
        (["inspect", "my.nc", "land"], ["land=auto\n", "takes "]),
        (["calibrate", "masks"], ["masks=[pixels,block,track]\n"]),
        (["infer", "hid"], ["error: --help hid: there is no such key or group. Did you mean 'hide'?\n"]),
        (["infer", "sampler.stepz"], ["Did you mean 'sampler.steps'?"]),
        (["infer", "optimizer"], ["error: --help optimizer: there is no such key or group."]),
    ],
)
def test_a_key_or_a_group_is_explained(ask, arguments: list[str], parts: list[str]) -> None:
    program, *words = arguments
    for line in ([program, "--help", *words], [program, *words, "-h"]):
        out = ask(*line)
        assert all(part in out for part in parts), out
        assert out.startswith("error: ") == (words[-1] in ("hid", "sampler.stepz", "optimizer"))


@pytest.mark.parametrize(
    "arguments", [["train.py", "--help"], ["infer.py", "--help", "sampler"], ["scripts/inspect_data.py"]], ids=str
)
def test_the_help_comes_at_once_and_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = "import runpy, sys\ntry:\n runpy.run_path(sys.argv.pop(1), run_name='__main__')\nfinally:\n"
    code += " print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n"), done.stderr
    assert seconds < 2, f"took {seconds:.1f} s"  # half a second on a machine that is not busy
    assert not list(tmp_path.iterdir())
