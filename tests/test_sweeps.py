"""Sweeps by the launchers and the sweeper that are plugins: what fails or is killed is reported, and gone on with."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_config
from test_config import process, unindent

#: The program of `test_config.py`, in a folder that is the working directory, and what runs it in this process.
tree, run = test_config.tree, test_config.run

#: A job that, where its seed is 99, kills its process when job 0 is done, unless it was killed before.
KILLED = """
    if seed == 99 and not (folder / "killed").exists():
        import os, time
        (folder / "killed").touch()
        first = folder.parent / "0" / "result.json"
        while not (first.exists() and "done" in first.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    if seed == 13:"""


def table(folder: Path) -> dict[int, dict[str, str]]:
    """The rows of the table of a sweep by the number of the job."""
    with (folder / "results.csv").open() as stream:
        return {int(row["job"]): row for row in csv.DictReader(stream)}


def test_a_job_that_is_killed_is_reported_and_gone_on_with(tree: Path, run: Callable[..., Any]) -> None:
    """By a launcher that starts processes, and then by the one that starts none."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="a launcher of the extra `sweep`")
    (tree / "job.py").write_text(test_config.JOB.replace("\n    if seed == 13:", KILLED))
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done, _ = process(tree, "train.py", "-m", "seed=1,99", "name=s", *launcher)
    rows = table(tree / "outputs" / "train" / "s")
    assert done.returncode == 1 and {number: row["status"] for number, row in rows.items()} == {0: "done", 1: "killed"}
    assert float(rows[0]["loss"]) == 1 + 1 / 32
    assert "\njob 1: killed\nthe same command goes on with what is not done\n" in done.stdout
    (line,) = done.stderr.strip().split("\n")
    assert line.startswith("error: the sweep was stopped (TerminatedWorkerError: ")

    code, out, err = run("-m", "seed=1,99", "name=s")
    assert (code, err) == (0, "") and out.count("done already") == 1
    assert [row["status"] for row in table(tree / "outputs" / "train" / "s").values()] == ["done", "done"]


def test_jobs_of_a_queue_leave_one_table(tree: Path) -> None:
    """What they print goes into files of their own; what went wrong is said again at the end."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="a launcher of the extra `sweep`")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=1"]
    done, _ = process(tree, "train.py", "-m", "seed=1,13", "name=s", *launcher)
    rows = table(tree / "outputs" / "train" / "s")
    assert (done.returncode, done.stderr) == (1, "")
    assert {number: row["status"] for number, row in rows.items()} == {0: "done", 1: "failed"}
    assert "\njob 1: UserError: thirteen is refused\n" in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the storage of Optuna
def test_a_search_goes_on_past_what_fails_and_asks_for_the_same_again(tree: Path, run: Callable[..., Any]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the sweeper of the extra `sweep`")
    job = test_config.JOB.replace("seed == 13", 'config["rate"] > 0.7')
    (tree / "job.py").write_text(job.replace('seed + 1 / config["sampler"]["steps"]', '(config["rate"] - 0.4) ** 2'))
    search = ["-m", "rate=interval(0.0,1.0)", "window=null", "masks=[block]", "name=s", "hydra/sweeper=optuna"]
    code, out, err = run(*search, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1")
    rows = table(tree / "outputs" / "train" / "s")
    rates = {number: float(row["rate"]) for number, row in rows.items()}
    failed = [number for number, rate in rates.items() if rate > 0.7]
    assert code == 1 and len(rates) == 3 and len(failed) == 1
    assert [number for number, row in rows.items() if row["status"] == "failed"] == failed
    assert f"\njob {failed[0]}: UserError: thirteen is refused\n" in out and "Traceback" not in err
    best = next(iter(rows))
    assert best == min(rates, key=lambda number: abs(rates[number] - 0.4))
    found = (tree / "outputs" / "train" / "s" / "optimization_results.yaml").read_text()
    assert f"rate: {rates[best]}" in found  # the score is what is minimised

    _, out, _ = run(*search, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1")
    more = {number: float(row["rate"]) for number, row in table(tree / "outputs" / "train" / "s").items()}
    assert out.count("done already") == 2
    assert len(more) == 4 and {number: more[number] for number in rates} == rates


def test_a_job_that_another_process_works_on_is_left_to_it(tree: Path, run: Callable[..., Any]) -> None:
    code = unindent("""
        import sys
        from pathlib import Path
        from vecfield_diffusion.config import sweep
        from vecfield_diffusion.inference.locks import owned
        folder = Path("outputs/train/s/0")
        with owned(folder / sweep.RESULT):
            sweep.write(folder, ["seed=1", "name=s"], "running")
            print("begun", flush=True)
            sys.stdin.read()
    """)
    environment = os.environ | {"PYTHONPATH": str(test_config.ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=tree, env=environment, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"begun\n"
        ended, out, _ = run("-m", "seed=1,2", "name=s")
        other.stdin.close()
    assert ended == 1 and "job 0 (seed=1 name=s): another process works on it" in out
    assert {number: row["status"] for number, row in table(tree / "outputs/train/s").items()} == {
        0: "running",
        1: "done",
    }
    code, out, _ = run("-m", "seed=1,2", "name=s")
    assert code == 0 and out.count("done already") == 1
