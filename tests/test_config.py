"""The command line from end to end, on a small tree of configurations, and what the wheel carries."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vecfield_diffusion import __version__
from vecfield_diffusion.config import program as config_module
from vecfield_diffusion.config import schema, sources, sweep
from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.config.program import CONF, Program, option
from vecfield_diffusion.config.spelling import Spelling
from vecfield_diffusion.errors import UserError

ROOT = Path(__file__).parents[1]

FILES = {
    "train.yaml": """
        defaults: [hydra_defaults, sampler: heun, mask: none, experiment: none, _self_]
        name: run
        seed: 0
        rate: 1e-3
        ckpt: null
        masks: [block]
        device: auto  # where it
                      # computes
        window: null
        hydra: {help: {header: Trains.}}
    """,
    "sampler/heun.yaml": "{_target_: parts.Heun, steps: 32, churn: 0.0}",
    "sampler/euler.yaml": "{_target_: parts.Euler, steps: 16}",
    "mask/none.yaml": "",
    "mask/block.yaml": "{_target_: parts.Block, size: 3}",
    "mask/file.yaml": "{_target_: parts.File, path: '???'}",
    "experiment/none.yaml": "# @package _global_",
    "experiment/quick.yaml": """
        # @package _global_
        defaults: [override /sampler: euler]
        name: quick
        sampler: {steps: 4}
    """,
    "experiment/typo.yaml": """
        # @package _global_
        sampler: {stepz: 4}
    """,
    "other/thing.yaml": "{}",
}

JOB = """
import errno, sys
from vecfield_diffusion.errors import UserError

calls = []

def train(config, folder):
    calls.append((config, folder))
    seed = config["seed"]
    if seed == 13:
        raise UserError("thirteen is refused")
    if seed == 14:
        raise RuntimeError("fourteen is a bug")
    if seed == 15:
        raise KeyboardInterrupt
    if seed == 16:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "last.pt"))
    if seed == 17:
        return {"loss": float("nan")}
    return {"rmse": 2.0, "loss": seed + 1 / config["sampler"]["steps"]}
"""

PARTS = """
from dataclasses import dataclass

@dataclass
class Euler:
    steps: int = 8

@dataclass
class Heun(Euler):
    churn: float = 0.0

@dataclass
class Block:
    size: int | tuple[int, int] = 1

@dataclass
class File:
    path: str
"""

SCRIPT = """
import sys
from pathlib import Path
from vecfield_diffusion.config import program as config, schema
schema.PACKAGES = ("parts",)
config.CONF = Path(__file__).parent / "conf"
main = config.Program(name="train", job="job:train", keys={keys}, metric="loss")
if __name__ == "__main__":
    try:
        main()
    finally:
        print("torch" if "torch" in sys.modules else "light", "hydra" in sys.modules)
"""

KEYS = {
    "name": "str",
    "seed": "int",
    "rate": "float",
    "ckpt": "str | None",
    "masks": "list[str]",
    "device": "Literal['auto', 'cpu', 'cuda']",
    "window": "tuple[int, int] | None",
}
SPELLING = Spelling(
    files={"mask": "file"},
    implied={"mask.size": "mask=block"},
    instead={"sensors": "masks"},
    values={"device": {"gpu": "cuda"}},
    answers={"epochs": "count in steps", "mask": "score them side by side"},
)
MAIN = Program(
    name="train",
    job="job:train",
    keys=KEYS,
    examples={"ckpt": "python infer.py ckpt=RUN"},
    lists={"masks": "mask"},
    resolves=("sampler",),
    spelling=SPELLING,
)


def unindent(text: str) -> str:
    return "\n".join(line.removeprefix("        ") for line in text.split("\n")).strip() + "\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program's configurations, its parts and its job; the working directory."""
    for name, text in FILES.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(unindent(text))
    (tmp_path / "conf" / "hydra_defaults.yaml").write_text((CONF / "hydra_defaults.yaml").read_text())
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "train.py").write_text(SCRIPT.replace("{keys}", repr(KEYS)))
    # A module of one file is no package with submodules: the checker finds `parts` where a package would be.
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts.py").rename(tmp_path / "parts" / "__init__.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config_module, "CONF", tmp_path / "conf")
    monkeypatch.setattr("vecfield_diffusion.config.schema.PACKAGES", ("parts",))
    for cache in (sources.module_file, sources.read_module, schema.signature):
        cache.cache_clear()
    for module in ("job", "parts"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


@pytest.fixture
def run(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the program with a command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as end:
            MAIN()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


# Mistakes.

SAMPLER_KEYS = "The keys of sampler are: churn, steps."
TOP_KEYS = "The keys are: ckpt, device, mask, masks, name, rate, sampler, seed, window."
MASKS = "Options: block, file, none."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sampler=huen", "sampler=huen: there is no such option. Did you mean 'heun'? Options: euler, heun."),
        ("sampler=null", "sampler=null: there is no such option. Options: euler, heun."),
        ("sampler.stepz=3", f"unknown key sampler.stepz. Did you mean 'sampler.steps'? {SAMPLER_KEYS}"),
        ("+sampler.stepz=3", f"unknown key sampler.stepz. Did you mean 'steps'? {SAMPLER_KEYS}"),
        ("++sampler.stepz=3", f"unknown key sampler.stepz. Did you mean 'steps'? {SAMPLER_KEYS}"),
        ("experiment=typo", f"unknown key sampler.stepz. Did you mean 'steps'? {SAMPLER_KEYS}"),
        ("steps=3", f"unknown key steps. Did you mean 'sampler.steps'? {TOP_KEYS}"),
        ("sede=3", f"unknown key sede. Did you mean 'seed'? {TOP_KEYS}"),
        ("samplr=heun", f"unknown key samplr. Did you mean 'sampler'? {TOP_KEYS}"),
        ("~sensors", "unknown key sensors."),
        ("~sede", f"unknown key sede. Did you mean 'seed'? {TOP_KEYS}"),
        ("+seed=3", "seed is in the configuration already: write seed=3"),
        ("samplr/x=heun", "samplr/x: there is no such group of options."),
        ("sampler.steps=abc", "sampler.steps=abc: expected a whole number, got 'abc'"),
        ("seed=", "seed=: expected a whole number, got nothing"),
        ("rate=[1]", "rate=[1]: expected a number, got [1]"),
        ("ckpt=???", "ckpt= is missing: python infer.py ckpt=RUN"),
        ("mask=file", "mask.path= is missing"),
        ("mask=blok", f"mask=blok: there is no such option. Did you mean 'block'? {MASKS}"),
        ("masks=[block,blok]", f"mask=blok: there is no such option. Did you mean 'block'? {MASKS}"),
        ("quick", "cannot read 'quick': what is set on the command line is key=value"),
        ("--steps=3", "unrecognized arguments: --steps=3; what is set on the command line is key=value"),
        ("rate=1,2", "rate=1,2 holds several values: add -m to run each, or write rate=[...] for a list"),
        ("ckpt=a=b", "cannot read 'ckpt=a=b': a value that holds one of"),
        ("name=../x", "name=../x: a folder is called so"),
        ('name="a=b"', "name=a=b: a folder is called so"),
        ("other=thing", "other: there is no such group here. The groups are: experiment, mask, sampler."),
        ("mask=none,block", "mask=none,block holds several options: score them side by side"),
        ("sampler=heun,euler", "sampler=heun,euler holds several values: add -m to run each\n"),
        ("trainer.epochs=3", "trainer.epochs=3: count in steps"),
        ("+epochs=3", "+epochs=3: count in steps"),
        ("window=[64,", "cannot read 'window=[64,'"),
        ("window=[64, seed=3]", "cannot read 'window=[64,'"),
        ("+options=3", "unknown key options"),
        ("sensors.size=3", "sensors.size: masks=[...] takes options as they are. Write one of your own into DIR/"),
        ("sampler.mask=3", "unknown key sampler.mask."),
        ("mask.size=5 sampler.stepz=3", "unknown key sampler.stepz. Did you mean 'sampler.steps'?"),
        ("mask=file mask.path=1e3", "mask.path=1000.0: expected text, got 1000.0. Text that reads as a number"),
        ("-m masks=[a],[b]", "mask=a: there is no such option."),
        ("-m seed=1,2 --cfg job", "-m and --cfg: what is shown is one configuration"),
        ("-m name=a,b", "name=a,b: a sweep has one name, its jobs are numbered"),
        ("-m seed=1,2,x", "seed=x: expected a whole number, got 'x'"),
        ("seed=1,x -m rate=1,2", "seed=x: expected a whole number, got 'x'"),
        ("-m sampler=heun,euler sampler.churn=0,1", "unknown key sampler.churn. It is a key of sampler=heun."),
        ("-m sampler=heun,eulr", "sampler=eulr: there is no such option. Did you mean 'euler'?"),
        ("-m seed=range(0)", "seed=range(0): there is nothing to sweep over"),
        ("-m rate=interval(0,1)", "rate=interval(0,1): an interval is for a sweeper that searches"),
        ("hydra/launcher=joblob", "hydra/launcher=joblob: there is no such option."),
        ("--config-dir nowhere", "--config-dir nowhere: there is no such folder"),
        ("hydra.run.dir=train.py/x", "the folder train.py/x cannot be made: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(run: Callable[..., Any], tree: Path, arguments: str, message: str) -> None:
    code, out, err = run(*arguments.split(" "))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert "+" + message.split("=")[0] not in err
    assert not (tree / "outputs").exists()


def test_no_job_starts_when_one_choice_of_a_sweep_is_wrong(run: Callable[..., Any]) -> None:
    assert run("-m", "seed=1,2", "rate=1,two")[0] == 1
    assert "job" not in sys.modules


# Runs.


def test_the_job_gets_plain_values_as_annotated(run: Callable[..., Any], tree: Path) -> None:
    code, _, err = run("rate=1", "mask=block", "mask.size=[2,3]", "name=7")
    assert (code, err) == (0, "")
    (got, folder) = sys.modules["job"].calls[-1]
    assert got == {
        "name": "7",
        "seed": 0,
        "rate": 1.0,
        "ckpt": None,
        "masks": ["block"],
        "device": "auto",
        "window": None,
        "sampler": {"_target_": "parts.Heun", "steps": 32, "churn": 0.0},
        "mask": {"_target_": "parts.Block", "size": (2, 3)},
        "options": {
            "sampler": {
                "euler": {"_target_": "parts.Euler", "steps": 16},
                "heun": {"_target_": "parts.Heun", "steps": 32, "churn": 0.0},
            },
            "mask": {
                "none": {},
                "block": {"_target_": "parts.Block", "size": 3},
                "file": {"_target_": "parts.File", "path": "???"},
            },
        },
    }
    assert type(got) is dict and type(got["rate"]) is float and type(got["mask"]["size"]) is tuple
    assert folder == Path("outputs/train/7") and [*(tree / folder).iterdir()] == []


def test_config_composes_without_running(tree: Path) -> None:
    got = MAIN.config("experiment=quick")
    assert (got["sampler"], got["rate"]) == ({"_target_": "parts.Euler", "steps": 4}, 1e-3)
    assert MAIN.config("ckpt=???", complete=False)["ckpt"] == "???"


@pytest.mark.parametrize("name", ["m.npy", "my masks/m.nc", "m"])
def test_a_file_stands_for_an_option(tree: Path, name: str) -> None:
    (tree / "m").touch()
    assert MAIN.config(f"mask={name}")["mask"] == {"_target_": "parts.File", "path": name}


def test_one_option_by_itself(tree: Path) -> None:
    assert option("mask", "block") == {"_target_": "parts.Block", "size": 3}
    with pytest.raises(UserError, match="mask=blok: there is no such option"):
        option("mask", "blok")


def test_an_overlay_adds_options(run: Callable[..., Any], tree: Path) -> None:
    (tree / "mine" / "mask").mkdir(parents=True)
    (tree / "mine" / "mask" / "huge.yaml").write_text("{_target_: parts.Block, size: 99}")
    assert run("--config-dir", "mine", "mask=huge", "masks=[huge,block]")[0] == 0
    got = sys.modules["job"].calls[-1][0]
    assert got["mask"]["size"] == got["options"]["mask"]["huge"]["size"] == 99


@pytest.mark.parametrize(
    ("seed", "code", "text"),
    [
        (13, 1, "error: thirteen is refused\n"),
        (15, 130, "interrupted\n"),
        (16, 1, "error: outputs/train/run/last.pt: No space left on device\n"),
    ],
)
def test_how_a_run_ends(run: Callable[..., Any], tree: Path, seed: int, code: int, text: str) -> None:
    assert run(f"seed={seed}")[::2] == (code, text)
    assert not (tree / "outputs" / "train" / "run").exists()


def test_a_bug_keeps_its_traceback(run: Callable[..., Any]) -> None:
    code, _, err = run("seed=14")
    assert code == 1 and "job.py" in err and "RuntimeError: fourteen is a bug" in err


def test_other_errors_of_files_are_bugs() -> None:
    def job() -> int:
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        guarded(job)


def test_the_configuration_is_shown_with_a_value_missing(run: Callable[..., Any]) -> None:
    code, out, err = run("--cfg", "job", "ckpt=???", "sampler=euler")
    assert (code, err) == (0, "") and "parts.Euler" in out


def test_the_version_is_ours(run: Callable[..., Any]) -> None:
    assert run("--version") == (0, f"vecfield-diffusion {__version__}\n", "")


def test_a_command_without_a_folder_leaves_none(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = Program(name="train", job="job:train", keys=KEYS, folder=False)
    for arguments, code in ([], 0), (["seed=13"], 1), (["-m", "seed=1,2"], 1):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
    assert [folder for _, folder in sys.modules["job"].calls] == [Path("outputs/train")] * 2
    assert not (tree / "outputs").exists()


# What is typed, and what is meant.


@pytest.mark.parametrize(
    ("arguments", "meant", "note"),
    [
        (["device=gpu"], ["device=cuda"], "note: device=gpu is read as device=cuda\n"),
        (["device=GPU"], ["device=cuda"], "note: device=GPU is read as device=cuda\n"),
        (["masks=block"], ["masks=[block]"], "note: masks=block is read as masks=[block]\n"),
        (["masks=block,none"], ["masks=[block,none]"], "note: masks=block,none is read as masks=[block,none]\n"),
        (["sensors=block"], ["masks=[block]"], "note: sensors=block is read as masks=block\n"),
        (["window=64,32"], ["window=[64,32]"], "note: window=64,32 is read as window=[64,32]\n"),
        (["window=[64,", "32]"], ["window=[64,32]"], ""),
        (["mask.size=5"], ["mask=block", "mask.size=5"], "note: mask.size= calls for mask=block\n"),
        (["mask=block", "mask.size=5"], ["mask=block", "mask.size=5"], ""),
        (["mask.size=5", "mask=block"], ["mask=block", "mask.size=5"], ""),
    ],
)
def test_what_can_mean_one_thing_is_understood(
    run: Callable[..., Any], arguments: list[str], meant: list[str], note: str
) -> None:
    code, out, err = run(*arguments)
    assert (
        (code, err) == (0, "") and out.startswith(note) and out.count("\n") == note.count("\n") + note.count("sensors")
    )
    assert sys.modules["job"].calls[-1][0] == MAIN.config(*meant) == MAIN.config(*arguments)


def test_values_side_by_side_are_a_list_where_one_is_taken(tree: Path) -> None:
    main = Program(name="train", job="job:train", keys=KEYS | {"ckpt": "str | list[str] | None"})
    assert main.config("ckpt=a,b")["ckpt"] == ["a", "b"] and main.config("ckpt=a")["ckpt"] == "a"


def test_lists_are_swept_without_brackets(run: Callable[..., Any]) -> None:
    assert run("-m", "masks=block,none")[0] == 0
    assert [call[0]["masks"] for call in sys.modules["job"].calls] == [["block"], ["none"]]


@pytest.mark.parametrize("name", ["inf", "nan", "1e3", "1.50", "1_000", "true", "null", "7", "-inf", "007"])
def test_a_name_may_read_as_a_number(run: Callable[..., Any], tree: Path, name: str) -> None:
    assert run(f"name={name}") == (0, "", "")
    got, folder = sys.modules["job"].calls[-1]
    assert got["name"] == name and folder == Path("outputs/train") / name
    assert MAIN.config(f"name={name}")["name"] == name


def test_null_stays_null_where_it_may_be(tree: Path) -> None:
    assert MAIN.config("ckpt=null")["ckpt"] is None and MAIN.config("ckpt=1e3")["ckpt"] == "1e3"
    assert MAIN.config("ckpt='null'")["ckpt"] == "null"


def test_the_subject_of_a_command_is_its_first_word(tree: Path) -> None:
    main = Program(name="train", job="job:train", keys=KEYS, spelling=Spelling(subject="mask"))
    for arguments, path in (["m.npy"], "m.npy"), (["a=b's.npy"], "a=b's.npy"):
        (tree / path).touch()
        assert main.config(*arguments[:1], "mask=file")["mask"] == {"_target_": "parts.File", "path": path}
    with pytest.raises(UserError, match=r"^unknown key mask\.pth\."):
        main.config("m.npy", "mask=file", "pth=3")
    with pytest.raises(UserError, match="the file comes first"):
        main.config("path=3", "m.npy")


# Sweeps.


def test_a_sweep_runs_all_and_resumes(run: Callable[..., Any], tree: Path) -> None:
    line = ("-m", "sampler=euler,heun", "seed=1,13,14,17", "name=s")
    code, out, err = run(*line)
    assert code == 1 and "thirteen is refused" in err and "RuntimeError: fourteen is a bug" in err
    folder = tree / "outputs" / "train" / "s"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [str(number) for number in range(8)]
    with (folder / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["job"], row["status"]) for row in rows[:3]] == [("4", "done"), ("0", "done"), ("1", "failed")]
    assert [float(row["loss"]) for row in rows[:2]] == [1 + 1 / 32, 1 + 1 / 16]
    assert [row["sampler"] for row in rows[:2]] == ["heun", "euler"] and rows[0]["rmse"] == "2.0"
    assert rows[2]["error"] == "UserError: thirteen is refused"
    assert [row["status"] for row in rows].count("failed") == 6
    table = out[out.index("job  sampler") :].split("\n")
    assert table[0].split() == ["job", "sampler", "seed", "loss", "rmse", "status"]
    assert table[1].split() == ["4", "heun", "1", "1.0312", "2", "done"]

    ran = len(sys.modules["job"].calls)
    code, out, _ = run(*line)
    assert code == 1 and out.count("done already") == 2
    assert len(sys.modules["job"].calls) == ran + 6


def test_a_sweep_without_failures_ends_with_0(run: Callable[..., Any], tree: Path) -> None:
    assert run("seed=1,2", "-m")[0] == 0
    assert json.loads((tree / "outputs/train/run/1/result.json").read_text()) == {
        "overrides": ["seed=2"],
        "status": "done",
        "metrics": {"rmse": 2.0, "loss": 2 + 1 / 32},
    }


def test_another_sweep_of_the_same_name_is_refused(run: Callable[..., Any], tree: Path) -> None:
    assert run("-m", "seed=1,2", "name=s")[0] == 0
    before = (tree / "outputs/train/s/0/result.json").read_text()
    code, _, err = run("-m", "seed=3,4", "name=s")
    assert code == 1
    assert err.startswith("error: outputs/train/s/0 holds a job with other overrides (seed=1 name=s)")
    assert (tree / "outputs/train/s/0/result.json").read_text() == before


def test_jobs_that_set_a_name_stay_in_one_folder(run: Callable[..., Any], tree: Path) -> None:
    assert run("-m", "experiment=none,quick")[0] == 0
    assert [path.name for path in (tree / "outputs" / "train").iterdir()] == ["run"]


def test_a_job_that_was_killed_is_run_again(tmp_path: Path) -> None:
    sweep.write(tmp_path / "0", ["a=1"], "running")
    assert sweep.finished(tmp_path / "0", ["a=1"]) is None
    assert [row["status"] for row in sweep.rows(tmp_path, "loss")] == ["killed"]
    assert sweep.summarise(tmp_path, "loss") is False
    (tmp_path / "0" / "result.json").write_text("{")
    with pytest.raises(UserError, match="is not the result of a job"):
        sweep.finished(tmp_path / "0", ["a=1"])


@pytest.mark.parametrize(
    ("seed", "call", "status", "first"), [(1, 1, None, ""), (1, 3, "running", ""), (13, 3, "running", "thirteen")]
)
def test_a_result_that_cannot_be_written_ends_the_sweep_with_a_message(
    run: Callable[..., Any],
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    call: int,
    status: str | None,
    first: str,
) -> None:
    """The disk is full when the job starts, ends or has failed; each write syncs twice, the file and its folder."""
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("-m", f"seed={seed},2")
    lines = err.strip().split("\n")
    assert code == 1 and lines[:-1] == ([f"error: {first} is refused"] if first else [])
    expected = "error: cannot write result.json into outputs/train/run/0: No space left on device. Free some space"
    assert lines[-1].startswith(expected)
    folder = tree / "outputs" / "train" / "run"
    assert not (folder / "1").exists()
    files = [file for file in (folder / "0").iterdir() if file.is_file() and file.suffix != ".log"]
    assert [file.name for file in files] == ([] if status is None else ["result.json"])
    assert (sweep.read(folder / "0") or {}).get("status") == status


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.csv").write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.save(tmp_path, [])
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write results.csv into .*file: .*same command"):
        sweep.save(tmp_path / "file", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "results.csv"]
    assert (tmp_path / "results.csv").read_text() == "old"


# As a user's processes.


def process(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["sampler.stepz=3"], ["sampler=huen"], ["seed=x"]])
def test_answers_come_at_once_and_without_torch(tree: Path, arguments: list[str]) -> None:
    done, seconds = process(tree, "train.py", *arguments)
    assert done.returncode == (0 if arguments[0].startswith("--") else 1)
    assert done.stdout.split("\n")[-2] == "light True"
    assert seconds < 2, f"took {seconds:.1f} s"


def test_a_reader_that_goes_away_is_no_error(tree: Path) -> None:
    command = f"{sys.executable} -u train.py --help | true"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tree}"}
    done = subprocess.run(command, shell=True, cwd=tree, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["train", "infer", "evaluate", "inspect", "calibrate", "export", "drift"])
def test_the_scripts_and_entry_points_name_the_same_light_main(name: str, tmp_path: Path) -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][f"vecfield-{name}"]
    assert entry == f"vecfield_diffusion.commands:{name}"
    doors = {"inspect": "scripts/inspect_data", "calibrate": "scripts/calibrate", "export": "scripts/export"}
    doors |= {"drift": "scripts/drift"}
    script = (ROOT / f"{doors.get(name, name)}.py").read_text()
    assert f"from vecfield_diffusion.commands import {name}" in script and ("@hydra.main" in script or name in doors)
    code = (
        f"import sys; from vecfield_diffusion.commands import {name} as it; print(callable(it), 'torch' in sys.modules)"
    )
    done, _ = process(tmp_path, "-c", code)
    assert done.stdout == "True False\n", done.stderr


def test_the_wheel_carries_the_configurations(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
    ]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = {"evaluation/report.html.j2", "pretrained/turbulence.safetensors", "pretrained/agulhas.safetensors"}
        assert {f"vecfield_diffusion/{file}" for file in carried} <= set(archive.namelist())
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {f"vecfield_diffusion/conf/{file.relative_to(CONF)}" for file in CONF.rglob("*.yaml")}
    assert shipped and shipped <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)
    code = "from vecfield_diffusion.config.program import CONF; print(CONF)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "vecfield_diffusion" / "conf")
